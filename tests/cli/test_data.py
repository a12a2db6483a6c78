"""`minigpt4 data check` and `minigpt4 data index` as a user meets them."""

import io
import json
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from minigpt4.cli.data import BAD_SHARE
from minigpt4.cli.progress import counting_bar
from minigpt4.data.sources import open_source
from minigpt4.training.recipe import Recipe
from tests import tiny_chat
from tests.commands import Run, runner
from tests.data.sources.source_files import picture, samples, shard, write


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Runs a command in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    return runner(monkeypatch, capfd)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pics"
    for number in range(3):
        write(folder / f"{number}.jpg", picture(number))
        write(folder / f"{number}.txt", f"picture number {number}")
    write(folder / "lost.txt", "a text without its picture")
    return folder


def test_check_says_what_is_there_and_what_is_broken(run: Run, pictures: Path) -> None:
    result = run("data", "check", "pics")

    assert (result.status, result.err) == (
        1,
        "error: 25.00% of the records looked at are bad, `minigpt4 train` stops at more than 1%\n"
        "hint: mend the data, or raise max_bad_fraction in the recipe\n",
    )
    assert result.out.splitlines() == [
        "pics: 4 records",
        "  looked at   every record, every picture was decoded",
        "  sound       3, 0 of them without a picture",
        "  pictures    8 to 10 (median 9) pixels wide, 8 high",
        "  text        16 characters",
        "  repeated    0 pictures stand in an earlier record, 0 with the same words",
        "  bad         1, 25.00% of those looked at",
        "              1 x no picture",
        "                  lost.txt has no picture of its name",
    ]


def test_pictures_that_are_missing_have_a_cure(run: Run, tmp_path: Path) -> None:
    write(tmp_path / "lists/captions.csv", "file_name,caption\n0.jpg,a cat\n")
    write(tmp_path / "pics/0.jpg", picture(0))

    assert "hint: name the folder of the pictures with --images" in run("data", "check", "lists/captions.csv").err
    assert run("data", "check", "lists/captions.csv", "--images", "pics").status == 0


def test_names_that_are_whole_paths_or_addresses_have_a_cure(run: Run, tmp_path: Path) -> None:
    write(tmp_path / "pics/1.png", picture(1))
    for name, cure in (
        (f"{tmp_path}/pics/1.png", "write names that begin in the folder of the pictures"),
        ("https://a.example/1.png", "fetch them first, as docs/training.md says (img2dataset)"),
    ):
        write(tmp_path / "pics/list.csv", f"file_name,caption\n{name},a\n")
        assert f"hint: {cure}\n" in run("data", "check", "pics/list.csv").err


def test_links_out_of_the_folder_have_a_cure(run: Run, tmp_path: Path) -> None:
    write(tmp_path / "real/0.jpg", picture(0))
    write(tmp_path / "pics/captions.csv", "file_name,caption\n0.jpg,a cat\n")
    (tmp_path / "pics/0.jpg").symlink_to(tmp_path / "real/0.jpg")

    assert "--images (`images` of a source in a recipe), or copy them (cp -rL)" in run("data", "check", "pics").err
    assert run("data", "check", "pics/captions.csv", "--images", "real").status == 0


def test_known_faults_of_a_large_source_count_by_all_its_records(run: Run, tmp_path: Path) -> None:
    write(tmp_path / "pics/0.jpg", picture(0))
    rows = [f"0.jpg,words {number}\n" for number in range(10_950)] + [f"gone{n}.jpg,words\n" for n in range(100)]
    write(tmp_path / "pics/captions.csv", "file_name,caption\n" + "".join(rows))

    result = run("data", "check", "pics")

    assert (result.status, result.err) == (0, "")
    assert "\n  bad         100, 0.90% of all, by this sample\n" in result.out


def test_check_as_json_and_with_a_contact_sheet(run: Run, pictures: Path) -> None:
    result = run("data", "check", "pics", "--json", "--contact-sheet", "sheet.png")

    seen = json.loads(result.out)
    assert (seen["records"], seen["good"], seen["bad"], seen["samples"]) == (4, 3, 1, [0, 1, 2])
    assert seen["identity"] == open_source(pictures).identity
    with Image.open("sheet.png") as page:
        assert page.width > 1000


def test_check_counts_a_models_tokens(run: Run, pictures: Path) -> None:
    tiny_chat.saved(Path("model"))

    result = run("data", "check", "pics", "-m", "model", "--max-text-tokens", "5")

    assert "\n  tokens      " in result.out
    assert "\n  cut off     3 answers of more than 5 tokens\n" in result.out


def test_one_of_a_kind_is_no_plural(run: Run, capfd: pytest.CaptureFixture[str]) -> None:
    tiny_chat.saved(Path("model"))
    write(Path("pics/0.jpg"), picture(0))
    write(Path("pics/captions.csv"), "file_name,caption\n0.jpg,a long one\n0.jpg,b\n")
    result = run("data", "check", "pics", "-m", "model", "--max-text-tokens", "2")

    assert "\n  cut off     1 answer of more than 2 tokens\n" in result.out
    assert "\n  repeated    1 picture stands in an earlier record, 0 with the same words\n" in result.out
    with counting_bar("picture") as report:
        report("features", 1, 1)
    assert capfd.readouterr().err.startswith("features  1 of 1 picture\n")


def test_check_takes_format_images_and_text(run: Run, pictures: Path) -> None:
    write(Path("list.data.csv"), "file,words\n0.jpg,a cat\n1.jpg,a dog\n")

    result = run(
        "data", "check", "list.data.csv", "--format", "captions", "--images", "pics", "--text", "words", "--json"
    )

    assert json.loads(result.out)["good"] == 2


def test_index_is_written_and_used(run: Run, tmp_path: Path) -> None:
    (tmp_path / "tars").mkdir()
    shard(tmp_path / "tars" / "0.tar", {**samples(3), "x.jpg": b"x", "y.cls": b"0"})
    shard(tmp_path / "tars" / "1.tar", samples(2)).write_bytes(b"")

    result = run("data", "index", "tars")

    assert (result.status, result.out) == (0, "tars/minigpt4.index\n")
    assert result.err.splitlines() == [
        "5 records in 2 shards, 2 bad records among them",
        "damaged: 1.tar: the file is empty, expected a tar archive",
        "passed over: 1 x file of kind .cls",
    ]
    checked = run("data", "check", "tars").out
    assert "\n  passed over 1 x file of kind .cls\n" in checked
    assert "\n              1 x damaged file\n" in checked


def test_check_of_sound_records_succeeds_and_its_limit_is_that_of_a_recipe(run: Run, pictures: Path) -> None:
    (pictures / "lost.txt").unlink()
    (pictures / "2.jpg").unlink()
    (pictures / "2.txt").unlink()
    (pictures / "1.jpg").unlink()
    (pictures / "1.txt").unlink()

    result = run("data", "check", "pics")

    assert (result.status, result.err, result.out.splitlines()[0]) == (0, "", "pics: 1 record")
    assert Recipe.model_fields["max_bad_fraction"].default == BAD_SHARE


def test_all_bad_is_no_crash_and_no_sheet(run: Run, tmp_path: Path) -> None:
    shard(tmp_path / "0.tar", {f"{number}.jpg": b"x" for number in range(300)})

    result = run("data", "check", "0.tar", "--contact-sheet", "sheet.png")

    assert result.status == 1
    assert "300, 100.00% of those looked at" in result.out and "not written" in result.out
    assert not Path("sheet.png").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["check", "gone"], "gone does not exist"),
        (["check", "pics", "--format", "tarball"], "the format 'tarball' is not known"),
        (["check", "pics", "--contact-sheet", "sheet.jpg"], "sheet.jpg is no name for a contact sheet"),
        (["check", "pipe:touch ran"], "is an address or a command"),
        (["check", "hub:cats"], "is no id of a hub"),
        (["index", "pics"], "no tar shards in pics"),
        (["index", "gone"], "gone is not a file or folder"),
    ],
)
def test_mistake_is_one_sentence(arguments: list[str], words: str, run: Run, pictures: Path) -> None:
    result = run("data", *arguments)

    assert result.status == 2 and result.out == ""
    assert result.err.startswith("error: ") and words in result.err
    assert [line.partition(": ")[0] for line in result.err.splitlines()] == ["error", "hint"]


def test_what_takes_long_is_told_where_there_is_no_terminal_and_the_rest_is_not(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with counting_bar() as report:
        report("soon done", 10, 10)
        for done in (10, 20, 40):
            report("reading a list", done, 0)
            now += 20.0
        report("reading a list", 50, 50)
        for done in range(0, 101, 25):
            report("reading shards", done, 100)
            now += 20.0
    assert capsys.readouterr().err.splitlines() == [
        "reading a list  40  0.8 a second",
        "reading a list  50 of 50  0.7 a second",
        "reading shards  50 of 100  1.2 a second, 40 s left",
        "reading shards  100 of 100  1.2 a second",
    ]


def test_a_bar_on_a_terminal_is_gone_when_all_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with counting_bar("picture") as report:
        assert terminal.getvalue() == ""
        report("reading shards", 1, 3)
        report("reading shards", 3, 3)
        shown = terminal.getvalue()
        assert "reading shards" in shown and shown.endswith("\r\x1b[2K\x1b[?25h\r")  # wiped, the cursor back
