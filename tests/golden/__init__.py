"""What the original's code recorded: all of it beside the checkout where that is, else the part of it in this folder.

`README.md` says where it comes from. Tests that compare with it carry the marker `reference`; what only the whole set
has is skipped without it.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

PART = Path(__file__).resolve().parent
WHOLE = PART.parents[2] / "shared/reference/tiny-original"
ROOT = WHOLE if WHOLE.is_dir() else PART


def recorded(path: str) -> Path:
    """A file or folder of the recordings, or a skipped test."""
    if not (ROOT / path).exists():
        pytest.skip(f"{path} is a recording that only the whole set beside the checkout has")
    return ROOT / path


def content(path: str) -> dict[str, Any]:
    """The content of a JSON file."""
    read: dict[str, Any] = json.loads((ROOT / path).read_text(encoding="utf-8"))
    return read


def tensors(path: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file, or a skipped test."""
    return load_file(recorded(path))
