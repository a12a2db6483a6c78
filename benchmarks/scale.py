"""How long, how large and how dear the way from a list of addresses to a trained model is, from rates.

    python benchmarks/scale.py --measure --encoder eva-vit-g               # rates of this machine, on one core
    python benchmarks/scale.py --run runs/nano-stage1                      # the rate of a run's last 100 updates
    python benchmarks/scale.py --images-per-second 142 --devices 4 --price 2.0 --download-machines 1

Each step has a rate of its own, of what is done in a second by all machines or devices together, and the table says
where it is from: measured here, given, or published by others. Where there is none, none is assumed.

- Filtering, index and features: `--measure` measures them here, with one thread (`measured_rates.py`); or they are
  given.
- Fetching is not measured. `--download-machines N`: N times 100 million addresses in 20 hours, what img2dataset's
  README says of one machine (16 cores, 2 Gbit/s); or the rate is given.
- Features on a device that is not at hand: `--device-teraflops` is what you assume that it does in a second in the
  products of matrices; with the operations of a picture, which `--measure` counts, it has a rate that nobody measured.
- Training: images a second, loading included, as `metrics.jsonl` has it.

A picture is taken to have 20 kB (a JPEG of 256 pixels on the short side; --kilobytes says what yours have), a record of
the index has 32 bytes, kept features are 32 x 768 numbers of 16 bits and a checksum. Prices are what you pay; none is
assumed either.
"""

import argparse
import json
import os
import platform
import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

STAGE_1_SEEN = 5_120_000
"""Pairs that 20,000 updates of 256 read."""
STAGE_2_SEEN, STAGE_2_PICTURES = 12_000, 3_439
TRAINED = {"7b": 768 * 4096 + 4096, "13b": 768 * 5120 + 5120}
INDEX_BYTES = 32
FEATURE_BYTES = 32 * 768 * 2 + 32 + 16
NOT_GIVEN = "not given"
IMG2DATASET = 100e6 / (20 * 3600)
"""Addresses a second of a machine with 16 cores and 2 Gbit/s, as img2dataset's README has it."""
MEASURED, GIVEN, PUBLISHED, ASSUMED = "measured here", "given", "img2dataset's README", "operations / assumed speed"
MEASURED_KEYS = ("filter_per_second", "index_per_second", "features_per_second", "features_gflop")


@dataclass(frozen=True)
class Rate:
    """What is done in a second, and where the number is from; None where there is none."""

    number: float | None = None
    source: str = NOT_GIVEN


@dataclass(frozen=True)
class Step:
    """A row of the table.

    Args:
        name: What is done.
        count: To how many.
        unit: Of what.
        rate: How many a second.
        storage: What it leaves.
        devices: On so many accelerators; 0 for a machine without.
        price: Of one of these, or of the machine, for an hour.
    """

    name: str
    count: int
    unit: str
    rate: Rate
    storage: str
    devices: int = 0
    price: float | None = None

    def row(self) -> str:
        """Return it as a line of Markdown."""
        rate = self.rate.number
        hours = None if rate is None else self.count / rate / 3600
        price = None if hours is None or self.price is None else hours * max(self.devices, 1) * self.price
        on_devices = _shown(None if hours is None else hours * self.devices) if self.devices else "none"
        cells = [self.name, f"{self.count:,} {self.unit}", NOT_GIVEN if rate is None else _rate(rate), self.rate.source,
                 _shown(hours), on_devices, _shown(price), self.storage]  # fmt: skip
        return f"| {' | '.join(cells)} |"


def main() -> None:
    arguments = _arguments()
    wanted = round(arguments.addresses * arguments.kept)
    pictures = round(wanted * arguments.success)
    checkpoint = f"{TRAINED[arguments.model] * 4 * 3 / 1e6:.0f} MB a checkpoint"  # the numbers, two moments of each
    machine = {"price": arguments.machine_price}
    device = {"devices": arguments.devices, "price": arguments.price}
    measured = measure(arguments) if arguments.measure else {}
    filtering, index = (_rate_of(f"{what}_per_second", arguments, measured) for what in ("filter", "index"))
    features, seen_on = _features(arguments, measured, machine, device)
    kept = "features of stage {}, if kept"
    steps = [
        Step("filtering", arguments.addresses, "addresses", filtering, "the list", **machine),
        Step(
            "fetching",
            wanted,
            "addresses",
            _fetching(arguments),
            _size(pictures * arguments.kilobytes * 1000),
            **machine,
        ),
        Step("index", pictures, "records", index, _size(pictures * INDEX_BYTES), **machine),
        Step(kept.format(1), pictures, "pictures", features, _size(pictures * FEATURE_BYTES), **seen_on),
        Step("stage 1 (20,000 x 256)", STAGE_1_SEEN, "pairs", _training(arguments), checkpoint, **device),
        Step(
            kept.format(2), STAGE_2_PICTURES, "pictures", features, _size(STAGE_2_PICTURES * FEATURE_BYTES), **seen_on
        ),
        Step("stage 2 (1,000 x 12)", STAGE_2_SEEN, "pairs", _training(arguments), checkpoint, **device),
    ]
    print(
        f"{arguments.addresses:,} addresses, {arguments.kept:.0%} pass the filters, {arguments.success:.0%} of these "
        f"lead to a picture: {pictures:,} pictures of {arguments.kilobytes:g} kB; {arguments.devices} device(s)\n"
    )
    print("| step | of | a second | which is | hours | device hours | price | storage |")
    print("|---|---|---|---|---|---|---|---|")
    for step in steps:
        print(step.row())


def measure(arguments: argparse.Namespace) -> dict[str, float]:
    """Measure what this machine does on one core, and say it; returns rates by the names of their arguments."""
    import torch  # here: a table of given rates needs none of it
    from measured_rates import filtered_per_second, indexed_per_second, seeing

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        places = {name: Path(folder, name) for name in ("list", "shards", "features")}
        for place in places.values():
            place.mkdir()
        filtering = filtered_per_second(places["list"], arguments.sample)
        index = indexed_per_second(places["shards"], max(arguments.sample // 10, 1))
        seen = seeing(places["features"], arguments.encoder, arguments.pictures)
    numbers = (filtering, index, 1 / seen.seconds, seen.gflop)
    measured = {key: float(f"{number:.3g}") for key, number in zip(MEASURED_KEYS, numbers, strict=True)}
    print(f"measured {datetime.now(UTC):%Y-%m-%d}, one of {os.cpu_count()} cores of {_processor()}, float32, torch "
          f"{torch.__version__}:")  # fmt: skip
    print(f"  filtering {_rate(filtering)} addresses, indexing {_rate(index)} records a processor second")
    print(f"  features with {arguments.encoder}: {seen.seconds:.3g} s a picture, {seen.opening:.2g} s to open it among "
          f"them, and {seen.gflop:,.3g} Gflop")  # fmt: skip
    flags = " ".join(f"--{key.replace('_', '-')} {number:g}" for key, number in measured.items())
    print(f"  to have the table without measuring again:\n  {flags}\n")
    return measured


def _processor() -> str:
    """Name this machine's processor."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _rate_of(key: str, arguments: argparse.Namespace, measured: dict[str, float]) -> Rate:
    given = getattr(arguments, key)
    return Rate(given, GIVEN) if given else Rate(measured[key], MEASURED) if key in measured else Rate()


def _fetching(arguments: argparse.Namespace) -> Rate:
    machines = arguments.download_machines
    return Rate(machines * IMG2DATASET, PUBLISHED) if machines else _rate_of("download_per_second", arguments, {})


def _training(arguments: argparse.Namespace) -> Rate:
    if arguments.run:
        return Rate(measured_rate(arguments.run), "metrics.jsonl")
    return _rate_of("images_per_second", arguments, {})


def _features(
    arguments: argparse.Namespace, measured: dict[str, float], machine: dict[str, Any], device: dict[str, Any]
) -> tuple[Rate, dict[str, Any]]:
    """Return the rate of features, and what they are made on: devices, unless the rate was measured here."""
    gflop = arguments.features_gflop or measured.get("features_gflop")
    if arguments.device_teraflops and gflop:
        return Rate(arguments.devices * arguments.device_teraflops * 1000 / gflop, ASSUMED), device
    rate = _rate_of("features_per_second", arguments, measured)
    return rate, machine if rate.source == MEASURED else device


def measured_rate(run: Path) -> float:
    """Images a second over the last 100 updates of a run."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    updates = [line for line in lines if "images" in line][-100:]
    return sum(line["images"] for line in updates) / sum(line["seconds"] for line in updates)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--addresses", type=int, default=7_000_000, help="on the list")
    parser.add_argument("--success", type=_share, default=0.7, help="the share of those fetched that lead to a picture")
    parser.add_argument("--kept", type=_share, default=1.0, help="the share of addresses that pass the filters")
    parser.add_argument("--kilobytes", type=_positive, default=20.0, help="a picture")
    parser.add_argument(
        "--measure", action="store_true", help="filtering, index and features, on one core of this machine"
    )
    parser.add_argument(
        "--encoder", default="eva-vit-g", help="whose features are measured: that, or a model's name or folder"
    )
    parser.add_argument("--pictures", type=int, default=4, help="whose features are measured")
    parser.add_argument(
        "--sample",
        type=int,
        default=500_000,
        help="so many addresses are filtered, and a tenth as many records indexed",
    )
    fetching = parser.add_mutually_exclusive_group()
    fetching.add_argument("--download-per-second", type=_positive, help="addresses")
    fetching.add_argument("--download-machines", type=_positive, help="as fast as the one of img2dataset's README")
    parser.add_argument("--filter-per-second", type=_positive, help="addresses")
    parser.add_argument("--index-per-second", type=_positive, help="records")
    parser.add_argument("--features-per-second", type=_positive, help="pictures")
    parser.add_argument("--features-gflop", type=_positive, help="billions of operations a picture, where not measured")
    parser.add_argument("--device-teraflops", type=_positive, help="which a device is assumed to do in a second")
    training = parser.add_mutually_exclusive_group()
    training.add_argument("--images-per-second", type=_positive, help="of training")
    training.add_argument("--run", type=Path, help="a run's folder, for the rate of its training")
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--price", type=float, help="of a device for an hour, in any currency")
    parser.add_argument(
        "--machine-price", type=float, help="likewise, of the machine that fetches, filters and indexes"
    )
    parser.add_argument("--model", choices=TRAINED, default="7b")
    return parser.parse_args()


def _positive(text: str) -> float:
    if not float(text) > 0:
        raise argparse.ArgumentTypeError(f"{text} is not more than 0")
    return float(text)


def _share(text: str) -> float:
    if not 0 < float(text) <= 1:
        raise argparse.ArgumentTypeError(f"{text} is no share, expected is more than 0 and at most 1")
    return float(text)


def _shown(value: float | None) -> str:
    return NOT_GIVEN if value is None else f"{value:.2f}" if value >= 0.01 else f"{value:.1g}"


def _rate(number: float) -> str:
    return f"{float(f'{number:.3g}'):,g}" if number < 1000 else f"{float(f'{number:.3g}'):,.0f}"


def _size(count: float) -> str:
    return f"{count / 1e9:.2f} GB"


if __name__ == "__main__":
    main()
