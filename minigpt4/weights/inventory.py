"""What models are here, what each needs and reads, and what is missing; opens no tensor file and needs no torch."""

import json
import re
from pathlib import Path
from typing import Any

from minigpt4.weights.checking.needs import FLOAT32_PER_STORED_BYTE, LIBRARIES_BYTES, NANO_CONTEXT, NANO_PEAK_BYTES
from minigpt4.weights.files.disk import storing
from minigpt4.weights.parts import EFFICIENTNET_LITE0, SMOLLM2, WheelFile, home, part_path

_KEPT = re.compile(r"\.|nano-[0-9a-f]{16}$")  # scratch, and nano or an alignment over it as `load` joined it
ALIGNMENT_DIR = Path(__file__).with_name("nano_alignment")


def list_models() -> list[dict[str, Any]]:
    """Describe the models that can be named and those in `home()/models`, one dictionary each, ready for JSON.

    Returns:
        For each: `name` (what `--model` takes), `description`, `parts` (each with `role`, `name`, `licence`,
        `megabytes` and `state`), `memory_gigabytes`, `folder`. A licence that is not known is None.

    Raises:
        StorageError: The folder of the models cannot be read.
    """
    return [_nano(), *_built()]


def context_of(name: str) -> int | None:
    """Return how many tokens a model's language model reads; None where only loading it tells.

    Args:
        name: What `--model` takes.
    """
    if name == "nano":
        return NANO_CONTEXT
    path = Path(name)
    try:
        if (path / "alignment.json").is_file():
            return NANO_CONTEXT if _read(path / "alignment.json")["frozen_parts"] == "nano" else None
        return int(_read(path / "config.json")["text_config"]["max_position_embeddings"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None  # what is wrong with a folder is told by loading it


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
        "memory_gigabytes": _gigabytes(NANO_PEAK_BYTES),
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


def _built() -> list[dict[str, Any]]:
    """Describe the model folders in `home()/models`; neither frozen parts, nor what loading joined of them."""
    folder = home() / "models"
    with storing(folder, doing="read"):
        candidates = sorted(path for path in folder.iterdir() if not _KEPT.match(path.name)) if folder.is_dir() else []
        described = [_folder(path) for path in candidates if path.is_dir()]
    return [row for row in described if row is not None]


def _folder(path: Path) -> dict[str, Any] | None:
    """Describe a model folder; None for anything else."""
    megabytes = _megabytes(path)
    if (path / "alignment.json").is_file():
        kind, weights = "alignment", "alignment.safetensors"
        memory = NANO_PEAK_BYTES
    elif _model_type(path) == "minigpt4":
        kind, weights = "full", "*.safetensors"
        memory = LIBRARIES_BYTES + FLOAT32_PER_STORED_BYTE * round(megabytes * 1e6)
    else:
        return None
    part = {
        "role": f"{kind} folder",
        "name": path.name,
        "licence": None,
        "megabytes": megabytes,
        "state": "here" if any(path.glob(weights)) else "incomplete: no weights",
    }
    return {
        "name": str(path),
        "description": "an alignment over nano's frozen parts" if kind == "alignment" else "a model with all its parts",
        "parts": [part],
        "memory_gigabytes": _gigabytes(memory),
        "folder": str(path),
    }


def _model_type(path: Path) -> str | None:
    """Return what kind of model a folder's configuration names; None where there is no readable one."""
    try:
        config = _read(path / "config.json")
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return config.get("model_type") if isinstance(config, dict) else None


def _read(path: Path) -> Any:  # noqa: ANN401  (what JSON can hold)
    return json.loads(path.read_text(encoding="utf-8"))


def _megabytes(folder: Path) -> float:
    return round(sum(file.stat().st_size for file in folder.glob("*") if file.is_file()) / 1e6, 3)


def _gigabytes(number: int) -> float:
    return round(number / 1e9, 1)
