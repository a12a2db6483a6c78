"""Files written piece by piece are what the libraries write, bit for bit."""

import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from minigpt4.weights.files import shard_files
from minigpt4.weights.files.atomic import file_sha256
from minigpt4.weights.files.shard_files import Entry, write_safetensors, write_torch_archive
from minigpt4.weights.files.tensors import open_tensors

TENSORS = {
    "half": torch.arange(15).view(3, 5).half(),
    "float": torch.arange(7.0),
    "number": torch.tensor(3),
    "empty": torch.empty(0, 4),
    "brain": torch.arange(5000).view(50, 100).bfloat16(),
    "flags": torch.tensor([True, False, True]),
    "Wörter": torch.ones(2, dtype=torch.uint8),
}
ENTRIES = [Entry(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in TENSORS.items()]


def pieces(name: str) -> Iterator[Tensor]:
    """Give a tensor in pieces of one buffer that is written over."""
    flat = TENSORS[name].flatten()
    buffer = torch.empty(min(1000, len(flat)), dtype=flat.dtype)
    for part in flat.split(1000) if len(flat) else []:
        buffer[: len(part)] = part
        yield buffer[: len(part)]


def assert_same(actual: dict[str, Tensor]) -> None:
    assert actual.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert (actual[name].dtype, actual[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(actual[name], tensor), name


def test_safetensors_file_is_read_by_its_library(tmp_path: Path) -> None:
    entry = write_safetensors(tmp_path / "a.safetensors", ENTRIES, pieces)

    assert_same(load_file(tmp_path / "a.safetensors"))
    assert entry.sha256 == file_sha256(tmp_path / "a.safetensors")
    assert entry.size == (tmp_path / "a.safetensors").stat().st_size


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("large_from", [2**31, 0])  # with 0, every member has the fields of a file over 4 GB
def test_archive_is_read_by_torch(
    mapped: bool, large_from: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_files, "_ZIP64_FROM", large_from)

    entry = write_torch_archive(tmp_path / "a.bin", ENTRIES, pieces)

    assert_same(torch.load(tmp_path / "a.bin", weights_only=True, mmap=mapped))
    assert entry.sha256 == file_sha256(tmp_path / "a.bin")
    tensors = open_tensors(tmp_path / "a.bin")
    assert all(tensors.stored(name).start % 64 == 0 for name in TENSORS if TENSORS[name].numel())
    with zipfile.ZipFile(tmp_path / "a.bin") as archive:
        assert archive.testzip() is None  # every member has its true checksum


@pytest.mark.parametrize("write", [write_safetensors, write_torch_archive])
@pytest.mark.parametrize("wrong", [Entry("half", torch.float16, (4, 5)), Entry("half", torch.float32, (3, 5))])
def test_pieces_that_are_not_what_was_announced_are_an_error(write: object, wrong: Entry, tmp_path: Path) -> None:
    with pytest.raises((ValueError, TypeError), match="half"):
        write(tmp_path / "a", [wrong], pieces)  # type: ignore[operator]
