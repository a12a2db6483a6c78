"""Weight files written piece by piece are what the libraries write, bit for bit; an interrupted folder is completed."""

import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from minigpt4.errors import StorageError, WeightsError
from minigpt4.weights.files import model_writer
from minigpt4.weights.files.atomic import FileEntry, file_sha256, verify_folder
from minigpt4.weights.files.model_writer import (
    Entry,
    partial_path,
    resume_folder,
    write_safetensors,
    write_torch_archive,
)
from minigpt4.weights.files.tensor_files import open_tensors

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


def pieces(entry: Entry) -> Iterator[Tensor]:
    """Give a tensor in pieces of one buffer that is written over."""
    flat = TENSORS[entry.name].flatten()
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
    monkeypatch.setattr(model_writer, "_ZIP64_FROM", large_from)

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


def written(path: Path, content: bytes = b"content") -> FileEntry:
    path.write_bytes(content)
    return FileEntry(file_sha256(path), len(content))


def interrupted(target: Path, work: str = "work") -> None:
    """Write two files, then stop."""
    with pytest.raises(KeyboardInterrupt), resume_folder(target, work) as folder:
        folder.write("a", written)
        folder.write("b", written)
        raise KeyboardInterrupt


def made_again(target: Path, work: str = "work") -> list[str]:
    """Write three files; return those that were not there."""
    with resume_folder(target, work) as folder:
        return [name for name in ("a", "b", "c") if folder.write(name, written)]


def test_folder_appears_at_the_end_with_its_manifest(tmp_path: Path) -> None:
    with resume_folder(tmp_path / "out", "work") as folder:
        folder.write("a", written)
        assert not (tmp_path / "out").exists()

    assert list(verify_folder(tmp_path / "out").files) == ["a"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_interrupted_run_leaves_no_target_and_its_files_are_kept(tmp_path: Path) -> None:
    interrupted(tmp_path / "out")
    assert not (tmp_path / "out").exists()

    assert made_again(tmp_path / "out") == ["c"]
    assert sorted(verify_folder(tmp_path / "out").files) == ["a", "b", "c"]


def test_other_work_begins_anew(tmp_path: Path) -> None:
    interrupted(tmp_path / "out")

    assert made_again(tmp_path / "out", "other work") == ["a", "b", "c"]


@pytest.mark.parametrize("content", [b"", b"changed", b"longer content"])
def test_file_that_changed_is_made_anew(content: bytes, tmp_path: Path) -> None:
    interrupted(tmp_path / "out")
    (partial_path(tmp_path / "out") / "content" / "a").write_bytes(content)

    assert made_again(tmp_path / "out") == ["a", "c"]


def test_file_at_which_a_run_stopped_is_removed(tmp_path: Path) -> None:
    interrupted(tmp_path / "out")
    (partial_path(tmp_path / "out") / "content" / "c").write_bytes(b"half")

    made_again(tmp_path / "out")

    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a", "b", "c", "manifest.json"]


@pytest.mark.parametrize("journal", [b"", b"{", b"[]", b'{"work": "work", "files": {"a": 3}}', b"\xff"])
def test_broken_journal_makes_everything_anew(journal: bytes, tmp_path: Path) -> None:
    interrupted(tmp_path / "out")
    (partial_path(tmp_path / "out") / "journal.json").write_bytes(journal)

    assert made_again(tmp_path / "out") == ["a", "b", "c"]


def test_target_that_exists_is_refused_and_untouched(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine", encoding="utf-8")

    with pytest.raises(StorageError, match="exists already"):
        made_again(tmp_path / "out")

    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine"]


def test_stray_file_is_not_taken_into_the_folder(tmp_path: Path) -> None:
    with (
        pytest.raises(WeightsError, match="put there by another program"),
        resume_folder(tmp_path / "out", "w") as folder,
    ):
        folder.write("a", written)
        (partial_path(tmp_path / "out") / "content" / "stray").write_bytes(b"")

    assert not (tmp_path / "out").exists()


def test_error_of_writing_says_that_files_are_kept(tmp_path: Path) -> None:
    def full(path: Path) -> FileEntry:
        raise OSError(28, "No space left on device", str(path))

    with pytest.raises(StorageError, match="No space left") as caught, resume_folder(tmp_path / "out", "w") as folder:
        folder.write("a", written)
        folder.write("b", full)

    assert "the 1 files written so far are kept, run the same command again" in caught.value.hint
