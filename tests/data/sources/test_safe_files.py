"""No name in a list leads out of the folder of the pictures, and nothing but a small enough file is read."""

import os
import pickle
from pathlib import Path

import pytest

from minigpt4.data.sources.safe_files import (
    NO_PICTURE,
    BadRecordError,
    SafeFolder,
    files_in,
    files_of_split,
    is_other_split,
    kind_of,
    leaves_folder,
)
from minigpt4.errors import DataError, ImageError, PromptError
from minigpt4.processing.pictures import DEFAULT_LIMITS
from tests.data.sources.source_files import write


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "secret.jpg", b"secret")
    write(tmp_path / "pics" / "a" / "1.jpg", b"one")
    return tmp_path / "pics"


def test_file_in_the_folder_is_read(folder: Path) -> None:
    (folder / "link.jpg").symlink_to(folder / "a" / "1.jpg")

    assert SafeFolder(folder).read_picture(["missing.jpg", "a/1.jpg"], "key") == b"one"
    assert SafeFolder(folder).read_picture(["link.jpg"], "key") == b"one"


@pytest.mark.parametrize(
    "name",
    [
        "../secret.jpg",
        "a/../../secret.jpg",
        "/etc/passwd",
        "\\\\host\\share\\x.jpg",
        "C:\\x.jpg",
        "..\\secret.jpg",
        "C:x",
    ],
)
def test_name_that_leads_out_is_refused(name: str, folder: Path) -> None:
    assert leaves_folder(name)

    with pytest.raises(BadRecordError, match=r"^key: the picture .* is outside the folder") as told:
        SafeFolder(folder).read_picture([name], "key")

    assert told.value.kind == "picture outside its folder"


def test_a_whole_path_into_the_folder_is_not_said_to_lie_outside(folder: Path) -> None:
    with pytest.raises(BadRecordError, match=r"^key: '.*1\.jpg' is a whole path, expected one relative to ") as told:
        SafeFolder(folder).read_picture([str(folder / "a" / "1.jpg")], "key")

    assert told.value.kind == "picture named by its whole path"


@pytest.mark.parametrize("of", ["file", "folder"])
def test_link_that_leads_out_is_refused_unless_the_outer_folder_is_allowed(of: str, folder: Path) -> None:
    if of == "file":
        (folder / "x.jpg").symlink_to(folder.parent / "secret.jpg")
    else:
        (folder / "up").symlink_to(folder.parent)
    name = "x.jpg" if of == "file" else "up/secret.jpg"

    with pytest.raises(BadRecordError, match="is a link out of the folder"):
        SafeFolder(folder).read_picture([name], "key")

    assert SafeFolder(folder, within=folder.parent).read_picture([name], "key") == b"secret"


def test_a_folder_reached_by_a_link_is_itself(folder: Path) -> None:
    (folder.parent / "alias").symlink_to(folder)

    assert SafeFolder(folder.parent / "alias").read_picture(["a/1.jpg"], "key") == b"one"


@pytest.mark.parametrize("name", ["gone.jpg", "a/1.jpg/x", "nul\0.jpg", "x" * 5000, "loop.jpg", ""])
def test_what_is_not_there_is_missing(name: str, folder: Path) -> None:
    (folder / "loop.jpg").symlink_to(folder / "loop.jpg")

    with pytest.raises(BadRecordError) as told:
        SafeFolder(folder).read_picture([name], "key")

    assert told.value.kind == "picture that is missing" and len(told.value.message) < 500


def test_a_name_with_backslashes_is_pointed_at(folder: Path) -> None:
    with pytest.raises(BadRecordError, match=r"the picture 'a\\\\1\.jpg' is not in .*, but a/1\.jpg is$"):
        SafeFolder(folder).read_picture(["a\\1.jpg"], "key")
    with pytest.raises(BadRecordError, match=r"is not in [^,]*$"):
        SafeFolder(folder).read_picture(["a\\gone.jpg"], "key")


def test_folder_and_pipe_are_not_read(folder: Path) -> None:
    os.mkfifo(folder / "pipe.jpg")

    for name in ("a", "pipe.jpg"):
        with pytest.raises(BadRecordError, match="is not a file"):
            SafeFolder(folder).read_picture([name], "key")


def test_large_and_empty_files_are_told(folder: Path) -> None:
    write(folder / "empty.jpg", b"")
    with (folder / "large.jpg").open("wb") as file:
        file.truncate(DEFAULT_LIMITS.max_bytes + 1)

    for name, kind in (("empty.jpg", "no picture"), ("large.jpg", "picture that is too large")):
        with pytest.raises(BadRecordError) as told:
            SafeFolder(folder).read_picture([name], "key")
        assert told.value.kind == kind


def test_files_are_listed_in_order_without_hidden_ones_and_linked_folders(folder: Path) -> None:
    for name in ("b.jpg", ".hidden/x.jpg", "a/.x.jpg", "a/0.jpg"):
        write(folder / name, b"12")
    (folder / "up").symlink_to(folder.parent)

    assert list(files_in(folder)) == [("b.jpg", 2), ("a/0.jpg", 2), ("a/1.jpg", 3)]
    with pytest.raises(DataError, match="cannot be read"):
        list(files_in(folder / "gone"))


def test_a_link_in_a_circle_is_no_file(folder: Path) -> None:
    (folder / "round.jpg").symlink_to("round.jpg")

    assert [name for name, _ in files_in(folder)] == ["a/1.jpg"]
    with pytest.raises(BadRecordError, match="is not in"):
        SafeFolder(folder).read_picture(["round.jpg"], "key")


def test_the_one_folder_that_has_pictures_is_looked_into(folder: Path) -> None:
    guarded = SafeFolder(folder)

    assert guarded.read_picture(["0.jpg", "1.jpg"], "key") == b"one"
    write(folder / "1.jpg", b"nearer")
    assert guarded.read_picture(["1.jpg"], "key") == b"nearer"


@pytest.mark.parametrize(("other", "name"), [("b/2.jpg", "1.jpg"), ("b/2.jpg", "2.jpg"), ("2.jpg", "1.jpg")])
def test_none_of_several_folders_is_guessed(other: str, name: str, folder: Path) -> None:
    write(folder / other, b"two")

    with pytest.raises(BadRecordError, match=f"the picture '{name}' is not in"):
        SafeFolder(folder).read_picture([name], "key")


@pytest.mark.parametrize("name", ["https://a.example/1.jpg", "S3://bucket/1.jpg"])
def test_an_address_is_told_as_one(name: str, folder: Path) -> None:
    with pytest.raises(BadRecordError, match="is an address, and pictures are read from this machine's disks") as told:
        SafeFolder(folder).read_picture([name], "key")

    assert told.value.kind == "picture named by its address"


@pytest.mark.parametrize("split", ["test", "val", "Validation", " dev ", "val2014", "test_A"])
def test_rows_for_testing_are_known_by_their_split(split: str) -> None:
    assert is_other_split(split)


@pytest.mark.parametrize("split", ["train", "restval", "trainval", "train_val", "", None, 1])
def test_other_rows_are_to_learn_from(split: object) -> None:
    assert not is_other_split(split)


def test_files_for_testing_are_left_out_unless_all_are() -> None:
    names = ["train/0.tar", "val/0.tar", "test-0.tar"]
    assert files_of_split(names) == (["train/0.tar"], {"file of another split": 2})
    assert files_of_split(["val/0.tar"]) == (["val/0.tar"], {})


def test_errors_of_a_record_have_a_kind_that_processes_pass_on() -> None:
    error = pickle.loads(pickle.dumps(BadRecordError(NO_PICTURE, "a", "b")))

    assert (kind_of(error), error.message, error.hint) == (NO_PICTURE, "a", "b")
    kinds = [kind_of(error) for error in (ImageError("a"), PromptError("a"), DataError("a"))]
    assert kinds == ["picture that cannot be opened", "text that cannot be a prompt", "record that cannot be used"]
