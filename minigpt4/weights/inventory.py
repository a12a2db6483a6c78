"""What models are here, what each needs, and what is missing; opens no tensor file."""

from pathlib import Path
from typing import Any

from minigpt4.weights.parts import EFFICIENTNET_LITE0, SMOLLM2, WheelFile, home, part_path

ALIGNMENT_DIR = Path(__file__).with_name("nano_alignment")
NANO_MEMORY_GIGABYTES = 1.5


def list_models() -> list[dict[str, Any]]:
    """Describe the models by name, one dictionary each, ready for JSON."""
    return [
        {
            "name": "nano",
            "description": "the small default: EfficientNet-Lite0, a Q-Former of 32 queries, SmolLM2-135M-Instruct",
            "parts": [
                _part("language model", SMOLLM2),
                _part("vision encoder", EFFICIENTNET_LITE0),
                {
                    "role": "alignment",
                    "name": "trained by this project",
                    "licence": "Apache-2.0",
                    "megabytes": round(sum(f.stat().st_size for f in ALIGNMENT_DIR.glob("*")) / 1e6),
                    "state": "here",
                },
            ],
            "memory_gigabytes": NANO_MEMORY_GIGABYTES,
            "folder": str(home()),
        }
    ]


def _part(role: str, part: WheelFile) -> dict[str, Any]:
    return {
        "role": role,
        "name": f"{Path(part.member).name} of the package {part.package} {part.version}",
        "licence": part.licence,
        "megabytes": round(part.size / 1e6),
        "state": "here" if part_path(part).is_file() else "fetched on first use",
    }
