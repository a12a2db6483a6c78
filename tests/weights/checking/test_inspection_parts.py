"""Files with weights that are no models of the original's are named for what they are."""

import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from minigpt4.errors import WeightsError
from minigpt4.weights.checking.inspection import inspect

HEADER = b"GGUF" + (3).to_bytes(4, "little") + (272).to_bytes(8, "little") + (34).to_bytes(8, "little")


def test_gguf_file_is_told_by_its_header(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(HEADER + b"\0" * 100)
    found = inspect(tmp_path / "model.gguf")
    assert (found.kind, found.version, found.sizes, found.fits) == ("GGUF file", "GGUF 3", {"tensors": 272}, [])
    assert found.bytes == 124


@pytest.mark.parametrize("length", range(4, 24, 5))
def test_gguf_file_that_is_cut_in_its_header_is_refused(length: int, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(HEADER[:length])
    with pytest.raises(WeightsError, match=r"model\.gguf is a GGUF file that is cut short"):
        inspect(tmp_path / "model.gguf")


def test_files_of_nano_by_name_and_size_say_so(tmp_path: Path) -> None:
    path = tmp_path / "SmolLM2-135M-Instruct.Q4_1.gguf"
    path.write_bytes(HEADER)
    assert inspect(path).fits == []
    with path.open("r+b") as file:
        file.truncate(98_362_432)
    assert inspect(path).fits == ["nano: by name and size it is its language model"]


@pytest.mark.parametrize("as_archive", [True, False])
def test_image_classifier_is_told_by_its_tensors(as_archive: bool, tmp_path: Path) -> None:
    tensors = {
        "_conv_stem.weight": torch.ones(4, 3, 3, 3),
        "_blocks.0._depthwise_conv.weight": torch.ones(4, 1, 3, 3),
        "_blocks.1._bn1.bias": torch.ones(4),
        "_fc.weight": torch.ones(1000, 8),
    }
    torch.save(tensors, tmp_path / "lite.pth", _use_new_zipfile_serialization=as_archive)
    found = inspect(tmp_path / "lite.pth")
    assert (found.kind, found.sizes) == ("image classifier", {"blocks": 2, "classes": 1000})
    assert found.parameters == 108 + 36 + 4 + 8000


def test_python_package_and_training_checkpoint_are_named(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as package:
        package.writestr("a/b.gguf", b"x")
    assert inspect(tmp_path / "a.whl").kind == "Python package"
    (tmp_path / "run").mkdir()
    for name in ("optimizer", "trained"):
        save_file({"a": torch.ones(2)}, tmp_path / "run" / f"{name}.safetensors")
    assert inspect(tmp_path / "run").kind == "training checkpoint"
