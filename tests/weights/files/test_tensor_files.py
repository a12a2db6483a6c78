"""Model files and folders of every layout are read lazily, by name, and told apart from what is no model."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from minigpt4.errors import WeightsError
from minigpt4.weights.files.tensor_files import TensorFiles, open_tensors

TENSORS: dict[str, Tensor] = {
    "matrix": torch.arange(6.0).view(2, 3),
    "half": torch.ones(4, dtype=torch.bfloat16),
    "number": torch.tensor(7),
    "empty": torch.empty(0, 5),
}
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n"


def save_bin(tensors: Mapping[str, Tensor], path: Path) -> None:
    torch.save(dict(tensors), path)


def save_bare(tensors: Mapping[str, Tensor], path: Path) -> None:
    torch.save(dict(tensors), path, _use_new_zipfile_serialization=False)


def save_safe(tensors: Mapping[str, Tensor], path: Path) -> None:
    save_file(dict(tensors), path)


Save = Callable[[Mapping[str, Tensor], Path], None]
FORMATS: dict[str, tuple[Save, str]] = {
    "archive": (save_bin, "bin"),
    "bare pickle": (save_bare, "bin"),
    "safetensors": (save_safe, "safetensors"),
}


def shards(folder: Path, save: Save = save_bin, suffix: str = "bin", *, index: bool = True) -> Path:
    """A folder of one model in three files."""
    names = list(TENSORS)
    stem = "pytorch_model" if suffix == "bin" else "model"
    files = {f"{stem}-{number:05}-of-00003.{suffix}": names[number - 1 :: 3] for number in (1, 2, 3)}
    for file, held in files.items():
        save({name: TENSORS[name] for name in held}, folder / file)
    if index:
        places = {name: file for file, held in files.items() for name in held}
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


def assert_holds(found: TensorFiles, expected: Mapping[str, Tensor] = TENSORS) -> None:
    assert set(found.names()) == set(expected)
    for name, tensor in expected.items():
        assert (found.shape(name), found.dtype(name)) == (tuple(tensor.shape), tensor.dtype)
        read = found.read(name)
        assert read.dtype == tensor.dtype
        assert torch.equal(read, tensor)


@pytest.mark.parametrize(("save", "suffix"), FORMATS.values(), ids=FORMATS)
def test_single_file_is_read(save: Save, suffix: str, tmp_path: Path) -> None:
    save(TENSORS, tmp_path / f"file.{suffix}")
    assert_holds(open_tensors(tmp_path / f"file.{suffix}"))


@pytest.mark.parametrize("index", [True, False], ids=["index", "no index"])
@pytest.mark.parametrize(("save", "suffix"), FORMATS.values(), ids=FORMATS)
def test_shards_are_read_with_and_without_an_index(save: Save, suffix: str, index: bool, tmp_path: Path) -> None:
    with open_tensors(shards(tmp_path, save, suffix, index=index)) as found:
        assert_holds(found)
        assert len(found.files) == 3


@pytest.mark.parametrize("key", ["model", "state_dict", "module"])
def test_checkpoint_is_unwrapped_and_the_rest_kept(key: str, tmp_path: Path) -> None:
    torch.save({key: TENSORS, "epoch": 4, "config": {"rate": 0.5}}, tmp_path / "file.pth")
    found = open_tensors(tmp_path / "file.pth")
    assert_holds(found)
    assert found.other == {"epoch": 4, "config": {"rate": 0.5}}


def test_every_stride_is_read_whole_and_in_pieces(tmp_path: Path) -> None:
    whole = torch.arange(24.0).view(4, 6)
    views = {"turned": whole.T, "part": whole[1:3, 2:5], "column": whole[:, 1], "row": whole[2:3], "whole": whole}
    torch.save(views, tmp_path / "file.pth")
    found = open_tensors(tmp_path / "file.pth")
    assert_holds(found, views)
    for name, view in views.items():
        pieces = [piece.clone() for piece in found.stored(name).pieces(12)]
        assert max(len(piece) for piece in pieces) <= 3
        assert torch.equal(torch.cat(pieces), view.flatten())


def test_changing_what_was_read_leaves_the_file_alone(tmp_path: Path) -> None:
    save_bin(TENSORS, tmp_path / "file.bin")
    before = (tmp_path / "file.bin").read_bytes()
    open_tensors(tmp_path / "file.bin").read("matrix").zero_()
    assert (tmp_path / "file.bin").read_bytes() == before
    assert_holds(open_tensors(tmp_path / "file.bin"))


def test_rows_of_a_table_are_read_alone(tmp_path: Path) -> None:
    save_bin(TENSORS, tmp_path / "file.bin")
    assert open_tensors(tmp_path / "file.bin").stored("matrix").rows(1, 1).tolist() == [3.0, 4.0, 5.0]


def test_only_lists_are_read_until_a_tensor_is_asked_for(tmp_path: Path) -> None:
    save_safe(TENSORS, tmp_path / "file.safetensors")
    found = open_tensors(tmp_path / "file.safetensors")
    with (tmp_path / "file.safetensors").open("r+b") as file:
        file.truncate(found.stored("matrix").start)
    with pytest.raises(WeightsError, match="became shorter"):
        found.read("matrix")
    with pytest.raises(WeightsError, match="became shorter"):
        list(found.stored("matrix").pieces(1000))


def pointer(folder: Path) -> None:
    (folder / "pytorch_model-00002-of-00003.bin").write_text(POINTER)


def missing(folder: Path) -> None:
    (folder / "pytorch_model-00002-of-00003.bin").unlink()


def cut(folder: Path) -> None:
    path = folder / "pytorch_model-00002-of-00003.bin"
    path.write_bytes(path.read_bytes()[:-100])


def other_version(folder: Path) -> None:
    save_bin({"else": torch.ones(1)}, folder / "pytorch_model-00002-of-00003.bin")


def web_page(folder: Path) -> None:
    (folder / "pytorch_model-00002-of-00003.bin").write_text("<!doctype html><html></html>")


def leading_out(folder: Path) -> None:
    (folder / "pytorch_model.bin.index.json").write_text('{"weight_map": {"matrix": "../secret.bin"}}')


def broken_index(folder: Path) -> None:
    (folder / "pytorch_model.bin.index.json").write_text('{"weight_map": ')


def index_pointer(folder: Path) -> None:
    (folder / "pytorch_model.bin.index.json").write_text(POINTER)


def empty_index(folder: Path) -> None:
    (folder / "pytorch_model.bin.index.json").write_text("{}")


@pytest.mark.parametrize(
    ("damage", "message", "hint"),
    [
        (pointer, "pytorch_model-00002-of-00003.bin.*git-lfs pointer", "git lfs pull"),
        (missing, "pytorch_model-00002-of-00003.bin is missing", "fetch that file again"),
        (cut, "pytorch_model-00002-of-00003.bin.*cut short", "download"),
        (other_version, "pytorch_model-00002-of-00003.bin does not hold the tensor", "different versions"),
        (web_page, "pytorch_model-00002-of-00003.bin.*web page", "download"),
        (leading_out, "names '../secret.bin', which is not a file of its folder", "fetch"),
        (broken_index, "index.json cannot be read as JSON", "fetch"),
        (index_pointer, "index.json.*git-lfs pointer", "git lfs pull"),
        (empty_index, "index.json has no weight_map", "fetch"),
    ],
)
def test_incomplete_folder_is_refused_by_the_file(
    damage: Callable[[Path], None], message: str, hint: str, tmp_path: Path
) -> None:
    damage(shards(tmp_path))
    with pytest.raises(WeightsError, match=message) as error:
        open_tensors(tmp_path)
    assert hint in error.value.hint


def test_gap_in_numbered_shards_is_found_without_an_index(tmp_path: Path) -> None:
    missing(shards(tmp_path, index=False))
    with pytest.raises(WeightsError, match=r"pytorch_model-00002-of-00003\.bin is missing"):
        open_tensors(tmp_path)


def test_tensor_in_two_files_is_refused_without_an_index(tmp_path: Path) -> None:
    for name in ("a.pth", "b.pth"):
        save_bin(TENSORS, tmp_path / name)
    with pytest.raises(WeightsError, match=r"a\.pth and b\.pth both hold the tensor matrix"):
        open_tensors(tmp_path)


def test_folder_in_both_formats_counts_once(tmp_path: Path) -> None:
    save_safe(TENSORS, tmp_path / "model.safetensors")
    save_bin({name: torch.zeros_like(tensor) for name, tensor in TENSORS.items()}, tmp_path / "pytorch_model.bin")
    assert_holds(open_tensors(tmp_path))


@pytest.mark.parametrize(
    ("file", "message", "hint"),
    [
        ("readme.txt", "holds no model weights", "name the folder with the weight files"),
        ("pytorch_model.bin.part", "is an unfinished download", "finish it"),
        ("consolidated.00.pth", "Meta's own LLaMA files", "from-meta"),
    ],
)
def test_folder_without_a_model_is_refused(file: str, message: str, hint: str, tmp_path: Path) -> None:
    (tmp_path / file).write_bytes(b"text")
    with pytest.raises(WeightsError, match=message) as error:
        open_tensors(tmp_path)
    assert hint in error.value.hint


def test_path_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="does not exist"):
        open_tensors(tmp_path / "none")
    with pytest.raises(WeightsError, match="neither a file nor a folder"):
        open_tensors(Path("/dev/null"))


def test_unknown_name_is_refused_by_name(tmp_path: Path) -> None:
    save_bin(TENSORS, tmp_path / "file.bin")
    with pytest.raises(WeightsError, match=r"file\.bin has no tensor matrices"):
        open_tensors(tmp_path / "file.bin").read("matrices")
