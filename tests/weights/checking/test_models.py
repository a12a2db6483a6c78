"""The list of models tells the truth about what lies on the disk."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from minigpt4.errors import StorageError
from minigpt4.weights.checking.models import LIBRARIES_BYTES, NANO_PEAK_BYTES, context_of, list_models
from minigpt4.weights.parts import SMOLLM2, part_path


def model_folder(home: Path, name: str, weights: int = 0, **files: str) -> Path:
    """Make a folder in `home/models` with JSON files and, where wanted, a file of `weights` bytes."""
    folder = home / "models" / name
    folder.mkdir(parents=True)
    for file, content in files.items():
        (folder / f"{file}.json").write_text(content)
    if weights:
        (folder / "model.safetensors").write_bytes(bytes(weights))
    return folder


def test_part_is_here_once_its_file_is() -> None:
    def state() -> str:
        part = next(part for part in list_models()[0]["parts"] if part["role"] == "language model")
        return str(part["state"])

    assert state() == "fetched on first use"
    part_path(SMOLLM2).parent.mkdir(parents=True)
    part_path(SMOLLM2).write_bytes(b"")
    assert state() == "here"


def test_listing_an_empty_home_makes_nothing(home: Path) -> None:
    assert [row["name"] for row in list_models()] == ["nano"]
    assert list(home.iterdir()) == []


def test_full_folder_is_listed_with_its_size_and_memory(home: Path) -> None:
    folder = model_folder(home, "mine", weights=3_000_000, config=json.dumps({"model_type": "minigpt4"}))
    row = list_models()[1]
    assert row["name"] == row["folder"] == str(folder)
    assert row["parts"][0] == {
        "role": "full folder",
        "name": "mine",
        "licence": None,
        "megabytes": 3,
        "state": "here",
    }
    assert row["memory_gigabytes"] >= LIBRARIES_BYTES / 1e9
    assert json.loads(json.dumps(row)) == row


def test_alignment_folder_is_listed_as_one(home: Path) -> None:
    model_folder(home, "aligned", alignment="{}")
    row = list_models()[1]
    assert row["parts"][0]["role"] == "alignment folder"
    assert row["parts"][0]["state"] == "incomplete: no weights"
    (Path(row["folder"]) / "alignment.safetensors").write_bytes(b"0")
    assert list_models()[1]["parts"][0]["state"] == "here"


@pytest.mark.parametrize("config", [json.dumps({"model_type": "llama"}), "{", "[]", "\x00"])
def test_folder_that_is_no_model_of_ours_is_not_listed(home: Path, config: str) -> None:
    model_folder(home, "language-model", weights=10, config=config)
    model_folder(home, ".mine.1234abcd.tmp", config=json.dumps({"model_type": "minigpt4"}))
    model_folder(home, "nano-08e7953473429fd9", weights=10, config=json.dumps({"model_type": "minigpt4"}))
    (home / "models" / "file").write_text("")
    assert [row["name"] for row in list_models()] == ["nano"]


def test_folder_that_cannot_be_listed_is_named(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "models").mkdir()

    def refuse(self: Path) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(StorageError, match="models"):
        list_models()


def test_listing_loads_no_torch() -> None:
    code = (
        "import sys; from minigpt4.weights.checking import models; models.list_models(); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_nanos_figure_is_near_what_is_worked_out_before_loading() -> None:
    from minigpt4.weights.checking.memory import Placement, describe, need

    assert list_models()[0]["memory_gigabytes"] == NANO_PEAK_BYTES / 1e9
    assert need(describe("nano").size, Placement(context=512)).total == pytest.approx(NANO_PEAK_BYTES, rel=0.25)


def test_context_is_read_from_a_models_configuration(home: Path) -> None:
    said = {"model_type": "minigpt4", "text_config": {"max_position_embeddings": 77}}
    full = model_folder(home, "full", config=json.dumps(said))
    over_nano = model_folder(home, "over_nano", alignment=json.dumps({"frozen_parts": "nano"}))
    over_other = model_folder(home, "over_other", alignment=json.dumps({"frozen_parts": str(full)}))
    damaged = model_folder(home, "damaged", config="{")

    found = [context_of(str(name)) for name in ("nano", full, over_nano, over_other, damaged, "owner/name")]

    assert found == [8192, 77, 8192, None, None, None]
