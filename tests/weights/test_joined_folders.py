"""An alignment over nano is joined once, and the cache holds a bounded number of such folders: the last ones loaded."""

import os
from pathlib import Path

import pytest

from minigpt4.weights import folder as folder_module
from minigpt4.weights.folder import built_folder
from tests.weights import tiny_nano


@pytest.fixture
def original(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The language model of the alignments, with a cache that keeps two of them joined."""
    monkeypatch.setenv("MINIGPT4_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(folder_module, "JOINED_KEPT", 2)
    tiny_nano.stand_in_for_the_parts(monkeypatch)
    return tiny_nano.language_model(tmp_path / "original")


def joined(number: int, original: Path, tmp_path: Path) -> Path:
    """Join an alignment of its own; what was joined before looks older."""
    for path in (tmp_path / "home/models").glob("nano-*"):
        os.utime(path, (path.stat().st_mtime - 60,) * 2)
    folder = tmp_path / f"alignment{number}"
    if not folder.exists():
        tiny_nano.alignment(folder, original, mark=float(number))
    return built_folder(folder, None, original)


def test_those_that_were_not_loaded_for_longest_make_room(original: Path, tmp_path: Path) -> None:
    first, second = (joined(number, original, tmp_path) for number in (1, 2))
    assert joined(1, original, tmp_path) == first  # loaded again, so the second is the oldest now
    third = joined(3, original, tmp_path)

    there = {path.name for path in first.parent.iterdir() if path.name.startswith(("nano-", "."))}
    assert there == {first.name, third.name}
    assert joined(2, original, tmp_path) == second
    assert second.is_dir()


def test_folders_of_other_names_stay(original: Path, tmp_path: Path) -> None:
    models = joined(1, original, tmp_path).parent
    others = [models / "nano-mine", models / "original-0123456789abcdef", *models.glob("language-model-*")]
    for path in others:
        path.mkdir(exist_ok=True)
        os.utime(path, (0, 0))
    for number in (2, 3, 4):
        joined(number, original, tmp_path)

    assert len(others) == 3
    assert all(path.is_dir() for path in others)
