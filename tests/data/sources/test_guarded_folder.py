"""No name in a list leads out of the folder of the pictures, and nothing but a small enough file is read."""

import os
from pathlib import Path

import pytest

from minigpt4.data.sources import BadRecordError
from minigpt4.data.sources.guarded_folder import GuardedFolder, files_in, leaves_folder
from minigpt4.errors import DataError
from minigpt4.processing.pictures import DEFAULT_LIMITS
from tests.data.sources.source_files import write


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "secret.jpg", b"secret")
    write(tmp_path / "pics" / "a" / "1.jpg", b"one")
    return tmp_path / "pics"


def test_file_in_the_folder_is_read(folder: Path) -> None:
    (folder / "link.jpg").symlink_to(folder / "a" / "1.jpg")

    assert GuardedFolder(folder).read_picture(["missing.jpg", "a/1.jpg"], "key") == b"one"
    assert GuardedFolder(folder).read_picture(["link.jpg"], "key") == b"one"


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
        GuardedFolder(folder).read_picture([name], "key")

    assert told.value.kind == "picture outside its folder"


def test_a_whole_path_into_the_folder_is_not_said_to_lie_outside(folder: Path) -> None:
    with pytest.raises(BadRecordError, match=r"^key: '.*1\.jpg' is a whole path, expected one relative to ") as told:
        GuardedFolder(folder).read_picture([str(folder / "a" / "1.jpg")], "key")

    assert told.value.kind == "picture named by its whole path"


@pytest.mark.parametrize("of", ["file", "folder"])
def test_link_that_leads_out_is_refused_unless_the_outer_folder_is_allowed(of: str, folder: Path) -> None:
    if of == "file":
        (folder / "x.jpg").symlink_to(folder.parent / "secret.jpg")
    else:
        (folder / "up").symlink_to(folder.parent)
    name = "x.jpg" if of == "file" else "up/secret.jpg"

    with pytest.raises(BadRecordError, match="is a link out of the folder"):
        GuardedFolder(folder).read_picture([name], "key")

    assert GuardedFolder(folder, within=folder.parent).read_picture([name], "key") == b"secret"


def test_a_folder_reached_by_a_link_is_itself(folder: Path) -> None:
    (folder.parent / "alias").symlink_to(folder)

    assert GuardedFolder(folder.parent / "alias").read_picture(["a/1.jpg"], "key") == b"one"


@pytest.mark.parametrize("name", ["gone.jpg", "a/1.jpg/x", "nul\0.jpg", "x" * 5000, "loop.jpg", ""])
def test_what_is_not_there_is_missing(name: str, folder: Path) -> None:
    (folder / "loop.jpg").symlink_to(folder / "loop.jpg")

    with pytest.raises(BadRecordError) as told:
        GuardedFolder(folder).read_picture([name], "key")

    assert told.value.kind == "picture that is missing" and len(told.value.message) < 500


def test_a_name_with_backslashes_is_pointed_at(folder: Path) -> None:
    with pytest.raises(BadRecordError, match=r"the picture 'a\\\\1\.jpg' is not in .*, but a/1\.jpg is$"):
        GuardedFolder(folder).read_picture(["a\\1.jpg"], "key")
    with pytest.raises(BadRecordError, match=r"is not in [^,]*$"):
        GuardedFolder(folder).read_picture(["a\\gone.jpg"], "key")


def test_folder_and_pipe_are_not_read(folder: Path) -> None:
    os.mkfifo(folder / "pipe.jpg")

    for name in ("a", "pipe.jpg"):
        with pytest.raises(BadRecordError, match="is not a file"):
            GuardedFolder(folder).read_picture([name], "key")


def test_large_and_empty_files_are_told(folder: Path) -> None:
    write(folder / "empty.jpg", b"")
    with (folder / "large.jpg").open("wb") as file:
        file.truncate(DEFAULT_LIMITS.max_bytes + 1)

    for name, kind in (("empty.jpg", "no picture"), ("large.jpg", "picture that is too large")):
        with pytest.raises(BadRecordError) as told:
            GuardedFolder(folder).read_picture([name], "key")
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
        GuardedFolder(folder).read_picture(["round.jpg"], "key")


def test_the_one_folder_that_has_pictures_is_looked_into(folder: Path) -> None:
    guarded = GuardedFolder(folder)

    assert guarded.read_picture(["0.jpg", "1.jpg"], "key") == b"one"
    write(folder / "1.jpg", b"nearer")
    assert guarded.read_picture(["1.jpg"], "key") == b"nearer"


@pytest.mark.parametrize(("other", "name"), [("b/2.jpg", "1.jpg"), ("b/2.jpg", "2.jpg"), ("2.jpg", "1.jpg")])
def test_none_of_several_folders_is_guessed(other: str, name: str, folder: Path) -> None:
    write(folder / other, b"two")

    with pytest.raises(BadRecordError, match=f"the picture '{name}' is not in"):
        GuardedFolder(folder).read_picture([name], "key")


@pytest.mark.parametrize("name", ["https://a.example/1.jpg", "S3://bucket/1.jpg"])
def test_an_address_is_told_as_one(name: str, folder: Path) -> None:
    with pytest.raises(BadRecordError, match="is an address, and pictures are read from this machine's disks") as told:
        GuardedFolder(folder).read_picture([name], "key")

    assert told.value.kind == "picture named by its address"
