"""Tensor files that others wrote are read, or refused before any of their code runs or their lies are believed."""

import io
import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch

from minigpt4.errors import WeightsError
from minigpt4.weights.files.torch_files import read_torch_file
from tests import golden

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}


def written(folder: Path, content: object = TENSORS, **options: bool) -> Path:
    torch.save(content, folder / "file.pth", **options)  # type: ignore[arg-type]  # the format
    return folder / "file.pth"


def archive(folder: Path, change: str) -> Path:
    """A sound file whose archive was written again with one thing changed."""
    source = written(folder)
    target = folder / "changed.pth"
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for member in old.infolist():
            kind = zipfile.ZIP_DEFLATED if change == "compressed" else zipfile.ZIP_STORED
            new.writestr(member.filename, old.read(member), compress_type=kind)
        if change == "twice":
            with pytest.warns(UserWarning, match="Duplicate name"):
                new.writestr(old.infolist()[0].filename, b"another")
    return target


@pytest.mark.parametrize("new_format", [True, False], ids=["archive", "bare pickle"])
def test_both_formats_are_read(new_format: bool, tmp_path: Path) -> None:
    content = read_torch_file(written(tmp_path, _use_new_zipfile_serialization=new_format))

    assert content.keys() == TENSORS.keys()
    assert all(torch.equal(content[name], tensor) for name, tensor in TENSORS.items())


def test_nested_containers_are_read(tmp_path: Path) -> None:
    content = read_torch_file(written(tmp_path, {"model": {"a": torch.ones(2)}, "epoch": 3}))

    assert (content["model"]["a"].tolist(), content["epoch"]) == ([1.0, 1.0], 3)


class Bomb:
    """What a hostile file brings: unpickling it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("new_format", [True, False], ids=["archive", "bare pickle"])
def test_objects_are_refused_and_none_of_their_code_runs(new_format: bool, tmp_path: Path) -> None:
    path = written(tmp_path, {"a": Bomb(tmp_path / "ran")}, _use_new_zipfile_serialization=new_format)

    with pytest.raises(WeightsError, match=r"file\.pth was not opened: it holds objects other than tensors"):
        read_torch_file(path)

    assert not (tmp_path / "ran").exists()


def test_bare_pickle_of_an_object_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file.pth").write_bytes(pickle.dumps(Bomb(tmp_path / "ran"), protocol=2))

    with pytest.raises(WeightsError, match="was not opened"):
        read_torch_file(tmp_path / "file.pth")

    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("change", "why"), [("compressed", "compressed members"), ("twice", "two members of one name")]
)
def test_changed_archive_is_refused(change: str, why: str, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=why):
        read_torch_file(archive(tmp_path, change))


def test_archive_written_again_unchanged_is_read(tmp_path: Path) -> None:
    assert torch.equal(read_torch_file(archive(tmp_path, "nothing"))["a"], TENSORS["a"])


def test_declared_sizes_beyond_the_file_are_refused(tmp_path: Path) -> None:
    path = written(tmp_path)
    content = bytearray(path.read_bytes())
    entry = content.index(b"PK\x01\x02")  # the first member in the archive's directory
    content[entry + 20 : entry + 28] = (10**8).to_bytes(4, "little") * 2
    path.write_bytes(content)

    with pytest.raises(WeightsError, match="declares more bytes than the file has"):
        read_torch_file(path)


def test_tensor_larger_than_its_bytes_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, {"good": torch.ones(2), "huge": torch.ones(1).expand(10**9, 1000)})
    assert path.stat().st_size < 10_000

    with pytest.raises(WeightsError, match="tensor huge claims more bytes than it has"):
        read_torch_file(path)


def test_nested_tensor_larger_than_its_bytes_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, {"model": {"list": [torch.ones(1).expand(10**9, 1000)]}})

    with pytest.raises(WeightsError, match=r"tensor model\.list\.0 claims more bytes than it has"):
        read_torch_file(path)


def test_tensor_that_shares_another_ones_bytes_is_read(tmp_path: Path) -> None:
    whole = torch.arange(10.0)

    content = read_torch_file(written(tmp_path, {"whole": whole, "half": whole[:5], "turned": whole.view(2, 5).T}))

    assert torch.equal(content["half"], whole[:5])
    assert torch.equal(content["turned"], whole.view(2, 5).T)


@pytest.mark.parametrize("content", [[torch.ones(1)], torch.ones(1), "text", 3])
def test_other_containers_than_a_dictionary_are_refused(content: object, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="expected a dictionary of tensors"):
        read_torch_file(written(tmp_path, content))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"no tensors at all", b"\x80\x02}q\x00.", b"\0" * 1000])
def test_file_that_is_no_tensor_file_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "file.pth").write_bytes(content)

    with pytest.raises(WeightsError, match=r"file\.pth was not opened"):
        read_torch_file(tmp_path / "file.pth")


@pytest.mark.parametrize("new_format", [True, False], ids=["archive", "bare pickle"])
def test_file_cut_anywhere_is_refused(new_format: bool, tmp_path: Path) -> None:
    whole = written(tmp_path, _use_new_zipfile_serialization=new_format).read_bytes()
    for length in range(1, len(whole) - 1, len(whole) // 20):
        (tmp_path / "file.pth").write_bytes(whole[:length])

        with pytest.raises(WeightsError, match="was not opened"):
            read_torch_file(tmp_path / "file.pth")


def test_zip_of_something_else_is_refused(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive_file:
        archive_file.writestr("hello.txt", "hello")
    (tmp_path / "file.pth").write_bytes(buffer.getvalue())

    with pytest.raises(WeightsError, match="was not opened"):
        read_torch_file(tmp_path / "file.pth")


def test_missing_file_and_folder_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.pth"):
        with pytest.raises(WeightsError, match="is not a file"):
            read_torch_file(path)


@pytest.mark.reference
@pytest.mark.parametrize("path", sorted(golden.ROOT.glob("weights/untrusted_*")), ids=lambda path: path.name)
def test_fabricated_hostile_files_are_refused(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(WeightsError, match="was not opened"):
        read_torch_file(path)

    assert list(tmp_path.iterdir()) == []
