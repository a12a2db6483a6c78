"""The recordings in the repository are a part of the whole set, and small."""

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests import golden

FILES = [path for path in sorted(golden.PART.rglob("*")) if path.is_file() and path.parent != golden.PART]


def test_no_file_is_large() -> None:
    assert [path.name for path in FILES if path.stat().st_size > 200_000] == []


def is_part(of: Any, whole: Any) -> bool:  # noqa: ANN401  (JSON)
    """Whether a JSON value is another one, or that without some of the cases it holds."""
    if isinstance(of, dict) and isinstance(whole, dict):
        return all(name in whole and is_part(value, whole[name]) for name, value in of.items())
    if isinstance(of, list) and isinstance(whole, list) and len(of) < len(whole):
        return all(value in whole for value in of)
    return bool(of == whole)


@pytest.mark.reference
@pytest.mark.skipif(not golden.WHOLE.is_dir(), reason="the whole set is not beside the checkout")
def test_every_file_is_that_of_the_whole_set_or_a_part_of_it() -> None:
    for path in FILES:
        whole = golden.WHOLE / path.relative_to(golden.PART)
        if path.suffix == ".npz" or path.read_bytes() == whole.read_bytes():
            continue
        if path.suffix == ".json":
            assert is_part(*(json.loads(file.read_text(encoding="utf-8")) for file in (path, whole))), path.name
            continue
        recorded = load_file(whole)
        for name, tensor in load_file(path).items():
            assert torch.equal(tensor, recorded[name]), name
