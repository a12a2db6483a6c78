"""How long, how large and how dear a stage of training is, from a measured rate.

    python benchmarks/scale.py --run runs/nano-stage1                       # the rate of a run's last 100 updates
    python benchmarks/scale.py --images-per-second 142 --devices 4 --price 2.0 --model 7b

The rate is images a second over all devices, loading included, as `metrics.jsonl` has it. A picture is taken to have
20 kB (a JPEG of 256 pixels on the short side; --kilobytes says what yours have), cached features are 32 x 768 numbers
of 16 bits. Prices are what you pay; none is assumed.
"""

import argparse
import json
from pathlib import Path

STAGES = {
    # What the original ran: pairs seen, of how many there are.
    "stage 1 (20,000 x 256)": (5_120_000, 7_000_000),
    "stage 2 (1,000 x 12)": (12_000, 3_439),
}
TRAINED = {"7b": 768 * 4096 + 4096, "13b": 768 * 5120 + 5120}
FEATURE_BYTES = 32 * 768 * 2


def measured_rate(run: Path) -> float:
    """Images a second over the last 100 updates of a run."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    updates = [line for line in lines if "images" in line][-100:]
    return sum(line["images"] for line in updates) / sum(line["seconds"] for line in updates)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path)
    parser.add_argument("--images-per-second", type=float)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--price", type=float, help="of a device for an hour, in any currency")
    parser.add_argument("--kilobytes", type=float, default=20.0, help="a picture")
    parser.add_argument("--model", choices=TRAINED, default="7b")
    arguments = parser.parse_args()
    if (arguments.run is None) == (arguments.images_per_second is None):
        parser.error("give --run or --images-per-second")
    rate = arguments.images_per_second or measured_rate(arguments.run)
    print(f"{rate:.1f} images a second on {arguments.devices} device(s)\n")
    print("| stage | pairs seen | hours | device hours | price | pictures | features | a checkpoint |")
    print("|---|---|---|---|---|---|---|---|")
    for name, (seen, pictures) in STAGES.items():
        hours = seen / rate / 3600
        price = f"{hours * arguments.devices * arguments.price:.2f}" if arguments.price else "not given"
        storage = pictures * arguments.kilobytes * 1000
        checkpoint = TRAINED[arguments.model] * 4 * 3  # the numbers and two moments of each
        print(
            f"| {name} | {seen:,} | {hours:.2f} | {hours * arguments.devices:.2f} | {price} | {storage / 1e9:.2f} GB "
            f"| {pictures * FEATURE_BYTES / 1e9:.2f} GB | {checkpoint / 1e6:.0f} MB |"
        )


if __name__ == "__main__":
    main()
