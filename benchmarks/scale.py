"""How long, how large and how dear the way from a list of addresses to a trained model is, from rates.

    python benchmarks/scale.py --run runs/nano-stage1                       # the rate of a run's last 100 updates
    python benchmarks/scale.py --images-per-second 142 --devices 4 --price 2.0 --model 7b --download-per-second 1389

Each step has a rate of its own, of what is done in a second by all machines or devices together; where none is given,
none is assumed. That of training is images a second, loading included, as `metrics.jsonl` has it; that of features,
pictures a second, is printed by `minigpt4 data features`. A picture is taken to have 20 kB (a JPEG of 256 pixels on the
short side; --kilobytes says what yours have), a record of the index has 32 bytes, kept features are 32 x 768 numbers of
16 bits and a checksum. Prices are what you pay; none is assumed either.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

STAGE_1_SEEN = 5_120_000
"""Pairs that 20,000 updates of 256 read."""
STAGE_2_SEEN, STAGE_2_PICTURES = 12_000, 3_439
TRAINED = {"7b": 768 * 4096 + 4096, "13b": 768 * 5120 + 5120}
INDEX_BYTES = 32
FEATURE_BYTES = 32 * 768 * 2 + 32 + 16
NOT_GIVEN = "not given"


@dataclass(frozen=True)
class Step:
    """A row of the table.

    Args:
        name: What is done.
        count: To how many.
        unit: Of what.
        rate: How many a second, or None.
        storage: What it leaves.
        devices: On so many accelerators; 0 for a machine without.
        price: Of one of these, or of the machine, for an hour.
    """

    name: str
    count: int
    unit: str
    rate: float | None
    storage: str
    devices: int = 0
    price: float | None = None

    def row(self) -> str:
        """Return it as a line of Markdown."""
        hours = None if self.rate is None else self.count / self.rate / 3600
        price = None if hours is None or self.price is None else hours * max(self.devices, 1) * self.price
        on_devices = _shown(None if hours is None else hours * self.devices) if self.devices else "none"
        cells = [self.name, f"{self.count:,} {self.unit}", _shown(hours), on_devices, _shown(price), self.storage]
        return f"| {' | '.join(cells)} |"


def main() -> None:
    arguments = _arguments()
    wanted = round(arguments.addresses * arguments.kept)
    pictures = round(wanted * arguments.success)
    checkpoint = f"{TRAINED[arguments.model] * 4 * 3 / 1e6:.0f} MB a checkpoint"  # the numbers, two moments of each
    machine = {"price": arguments.machine_price}
    device = {"devices": arguments.devices, "price": arguments.price}
    training = measured_rate(arguments.run) if arguments.run else arguments.images_per_second
    features, bytes_each = arguments.features_per_second, arguments.kilobytes * 1000
    steps = [
        Step("filtering", arguments.addresses, "addresses", arguments.filter_per_second, "the list", **machine),
        Step("fetching", wanted, "addresses", arguments.download_per_second, _size(pictures * bytes_each), **machine),
        Step("index", pictures, "records", arguments.index_per_second, _size(pictures * INDEX_BYTES), **machine),
        Step("features of stage 1, if kept", pictures, "pictures", features, _size(pictures * FEATURE_BYTES), **device),
        Step("stage 1 (20,000 x 256)", STAGE_1_SEEN, "pairs", training, checkpoint, **device),
        Step(
            "features of stage 2, if kept", STAGE_2_PICTURES, "pictures", features,
            _size(STAGE_2_PICTURES * FEATURE_BYTES), **device,
        ),
        Step("stage 2 (1,000 x 12)", STAGE_2_SEEN, "pairs", training, checkpoint, **device),
    ]  # fmt: skip
    print(
        f"{arguments.addresses:,} addresses, {arguments.kept:.0%} pass the filters, {arguments.success:.0%} of these "
        f"lead to a picture: {pictures:,} pictures of {arguments.kilobytes:g} kB; {arguments.devices} device(s)\n"
    )
    print("| step | of | hours | device hours | price | storage |")
    print("|---|---|---|---|---|---|")
    for step in steps:
        print(step.row())


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
    parser.add_argument("--download-per-second", type=_positive, help="addresses")
    parser.add_argument("--filter-per-second", type=_positive, help="addresses")
    parser.add_argument("--index-per-second", type=_positive, help="records")
    parser.add_argument("--features-per-second", type=_positive, help="pictures")
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
    return NOT_GIVEN if value is None else f"{value:.2f}"


def _size(count: float) -> str:
    return f"{count / 1e9:.2f} GB"


if __name__ == "__main__":
    main()
