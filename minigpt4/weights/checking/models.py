"""The models that are here, what each needs and reads, and what is missing; opens no tensor file, needs no torch."""

import re
from pathlib import Path
from typing import Any

from minigpt4.errors import WeightsError
from minigpt4.text import read_json_object
from minigpt4.weights.files.disk import storing
from minigpt4.weights.parts import EFFICIENTNET_LITE0, SMOLLM2, WheelFile, home, part_path

LIBRARIES_BYTES = 400_000_000
"""Measured: a process with torch and transformers loaded and no weights, rounded up."""

NANO_PEAK_BYTES = 1_300_000_000
"""Measured: the peak of `minigpt4 ask` with nano on a CPU in float32."""

NANO_CONTEXT = 8192
"""Tokens that nano's language model reads."""

FLOAT32_PER_STORED_BYTE = 2
"""A CPU runs in float32 what is stored in 16 bits, the common case; stored float32 needs half of this."""

ALIGNMENT_DIR = Path(__file__).parents[1] / "nano_alignment"
_KEPT = re.compile(r"\.|nano-[0-9a-f]{16}$")  # scratch, and nano or an alignment over it as `load` joined it


def list_models() -> list[dict[str, Any]]:
    """Describe nano and the model folders in `home()/models`, one dictionary each, ready for JSON.

    Returns:
        For each: `name` (what `--model` takes), `description`, `parts` (each with `role`, `name`, `licence`,
        `megabytes` and `state`), `memory_gigabytes`, `folder`. A licence that is not known is None.

    Raises:
        StorageError: The folder of the models cannot be read.
    """
    folder = home() / "models"
    with storing(folder, doing="read"):
        candidates = sorted(path for path in folder.iterdir() if not _KEPT.match(path.name)) if folder.is_dir() else []
        described = [_folder(path) for path in candidates if path.is_dir()]
    return [_nano(), *(row for row in described if row is not None)]


def context_of(name: str) -> int | None:
    """Return how many tokens the language model of a model reads; None where only loading it tells.

    Args:
        name: What `--model` takes.
    """
    if name == "nano":
        return NANO_CONTEXT
    path = Path(name)
    try:
        if (path / "alignment.json").is_file():
            return NANO_CONTEXT if _read(path / "alignment.json").get("frozen_parts") == "nano" else None
        return int(_read(path / "config.json")["text_config"]["max_position_embeddings"])
    except (WeightsError, OSError, ValueError, KeyError, TypeError):
        return None  # loading the folder tells what is wrong with it


def _nano() -> dict[str, Any]:
    alignment = {
        "role": "alignment",
        "name": "trained by this project",
        "licence": "Apache-2.0",
        "megabytes": _megabytes(ALIGNMENT_DIR),
        "state": "here" if ALIGNMENT_DIR.is_dir() else "missing from this installation",
    }
    return {
        "name": "nano",
        "description": "the small default: EfficientNet-Lite0, a Q-Former of 32 queries, SmolLM2-135M-Instruct",
        "parts": [_part("language model", SMOLLM2), _part("vision encoder", EFFICIENTNET_LITE0), alignment],
        "memory_gigabytes": round(NANO_PEAK_BYTES / 1e9, 1),
        "folder": str(home()),
    }


def _part(role: str, part: WheelFile) -> dict[str, Any]:
    path = part_path(part)
    with storing(path, doing="read"):
        here = path.is_file()
    return {
        "role": role,
        "name": f"{Path(part.member).name} of the package {part.package} {part.version}",
        "licence": part.licence,
        "megabytes": round(part.size / 1e6, 3),
        "state": "here" if here else "fetched on first use",
    }


def _folder(path: Path) -> dict[str, Any] | None:
    """Describe a model folder; None for anything else."""
    megabytes = _megabytes(path)
    if (path / "alignment.json").is_file():
        role, weights, memory = "alignment folder", "alignment.safetensors", NANO_PEAK_BYTES
        description = "an alignment over nano's frozen parts"
    elif _is_full(path):
        role, weights = "full folder", "*.safetensors"
        memory = LIBRARIES_BYTES + FLOAT32_PER_STORED_BYTE * round(megabytes * 1e6)
        description = "a model with all its parts"
    else:
        return None
    state = "here" if any(path.glob(weights)) else "incomplete: no weights"
    part = {"role": role, "name": path.name, "licence": None, "megabytes": megabytes, "state": state}
    return {
        "name": str(path),
        "description": description,
        "parts": [part],
        "memory_gigabytes": round(memory / 1e9, 1),
        "folder": str(path),
    }


def _is_full(path: Path) -> bool:
    try:
        return bool(_read(path / "config.json").get("model_type") == "minigpt4")
    except WeightsError:
        return False


def _read(path: Path) -> dict[str, Any]:
    return read_json_object(path, WeightsError, "")


def _megabytes(folder: Path) -> float:
    return round(sum(file.stat().st_size for file in folder.glob("*") if file.is_file()) / 1e6, 3)
