"""Small texts: counts, sizes, near names, the first line of an error, JSON objects."""

from pathlib import Path

import pytest

from minigpt4.errors import WeightsError
from minigpt4.text import counted, did_you_mean, first_line, read_json_object, size_text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (counted(1, "picture"), "1 picture"),
        (counted(2000, "picture"), "2,000 pictures"),
        (size_text(98_362_432), "98.4 MB"),
        (size_text(1_234), "1.2 kB"),
        (did_you_mean("chatmll", ["chatml", "llama-2"]), "did you mean chatml?"),
        (did_you_mean("xyz", ["chatml"], "name one of chatml"), "name one of chatml"),
        (first_line(ValueError("\nno such file:\nsecond line")), "no such file"),
        (first_line(KeyError()), "KeyError"),
    ],
)
def test_texts(text: str, expected: str) -> None:
    assert text == expected


@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff", b"[" * 100_000])
def test_a_file_that_is_no_json_object_is_the_error_asked_for(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)

    with pytest.raises(WeightsError, match=r"config\.json") as told:
        read_json_object(tmp_path / "config.json", WeightsError, "copy it again")

    assert told.value.hint == "copy it again"


def test_an_endless_file_is_no_json_object() -> None:
    with pytest.raises(WeightsError, match="/dev/zero"):
        read_json_object(Path("/dev/zero"), WeightsError, "")


def test_a_json_object_is_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"width": 3}')

    assert read_json_object(tmp_path / "config.json", WeightsError, "") == {"width": 3}
