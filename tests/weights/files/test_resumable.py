"""A folder built file by file is absent or whole, and what an interrupted run finished is kept."""

from pathlib import Path

import pytest

from minigpt4.errors import StorageError, WeightsError
from minigpt4.weights.files.atomic import FileEntry, file_sha256, verify_folder
from minigpt4.weights.files.resumable import partial_path, resume_folder


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
    (partial_path(tmp_path / "out") / "content" / "c.unfinished").write_bytes(b"half")

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
