"""The page of sample answers is whole in itself, shows text as text, and is continued by a resumed run."""

import base64
import io
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from minigpt4.errors import DataError
from minigpt4.training.samples import Round, add_round, make_round, read_rounds
from tests import tiny_chat

PICTURES = [tiny_chat.picture(seed) for seed in range(3)]


class Page(HTMLParser):
    """The rows of the page's table, and every tag and address."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.rows: list[list[str]] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attributes if name in ("src", "href", "srcset", "data")]
        if tag == "tr":
            self.rows.append([])
        elif tag in ("th", "td"):
            self.rows[-1].append("")

    def handle_data(self, data: str) -> None:
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data.rstrip("\n")


def made(step: int, answers: list[str] | None = None, stage: str = "chat") -> Round:
    return make_round(
        stage, step, PICTURES, ["a cat", "", "a dog"], answers or [f"answer {n} at {step}" for n in range(3)]
    )


def test_a_column_shows_picture_reference_and_answers_newest_first(tmp_path: Path) -> None:
    for step in (500, 1000):
        add_round(tmp_path, "a run", made(step))

    page = Page(tmp_path / "samples.html")

    assert page.rows[1:] == [
        ["reference", "a cat", "", "a dog"],
        ["chat, step 1,000", "answer 0 at 1000", "answer 1 at 1000", "answer 2 at 1000"],
        ["chat, step 500", "answer 0 at 500", "answer 1 at 500", "answer 2 at 500"],
    ]
    assert len(page.addresses) == len(set(page.addresses)) == 3


def test_pictures_are_small_and_inside(tmp_path: Path) -> None:
    large = Image.new("RGB", (2000, 1000), "red")

    page = Page(add_round(tmp_path, "a run", make_round("chat", 1, [large], ["red"], ["red"])))

    (address,) = page.addresses
    head, _, content = address.partition(",")
    assert head == "data:image/jpeg;base64"
    with Image.open(io.BytesIO(base64.b64decode(content))) as picture:
        assert picture.size == (320, 160)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert "default-src 'none'" in (tmp_path / "samples.html").read_text()


@pytest.mark.parametrize(
    "hostile",
    ["<script>alert(1)</script>", "</td></table><img src=x onerror=alert(1)>", '" onload="x', "&amp; {title}"],
)
def test_what_a_model_says_stays_text(hostile: str, tmp_path: Path) -> None:
    page = Page(add_round(tmp_path, hostile, make_round(hostile, 1, PICTURES[:1], [hostile], [hostile])))

    assert page.rows[1:] == [["reference", hostile], [f"{hostile}, step 1", hostile]]
    assert "script" not in page.tags
    assert page.tags.count("img") == 1


def test_text_that_no_page_can_hold_is_marked(tmp_path: Path) -> None:
    page = Page(add_round(tmp_path, "a run", made(1, ["half \ud83d", "bell \x07\nnext", "\u3000\u00e9"])))

    assert page.rows[-1][1:] == ["half ?", "bell ?\nnext", "\u3000\u00e9"]
    assert read_rounds(tmp_path)[0].samples[0].answer == "half \ud83d"


def test_resumed_run_continues_the_page_and_repeats_no_round_and_no_picture(tmp_path: Path) -> None:
    add_round(tmp_path, "a run", made(500))
    add_round(tmp_path, "a run", made(1000, ["lost"] * 3))

    add_round(tmp_path, "a run", made(1000))  # made again after the last checkpoint
    page = Page(add_round(tmp_path, "a run", made(500, stage="more")))

    assert read_rounds(tmp_path) == [made(500), made(1000), made(500, stage="more")]
    assert [row[0] for row in page.rows[2:]] == ["more, step 500", "chat, step 1,000", "chat, step 500"]
    assert (tmp_path / "samples.jsonl").read_text().count("data:image") == 3


def test_other_pictures_begin_other_columns(tmp_path: Path) -> None:
    add_round(tmp_path, "a run", made(1))
    other = make_round("chat", 2, [tiny_chat.picture(9), PICTURES[0]], ["a bird", "a cat"], ["bird", "cat"])

    page = Page(add_round(tmp_path, "a run", other))

    assert page.rows[2:] == [["chat, step 2", "bird", "cat"], ["chat, step 1", "", "answer 0 at 1"]]


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"stage": "a", "step": 1, "samples": [["7", "", ""]], "pictures": {}}']
)
def test_damaged_file_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "samples.jsonl").write_text(content + "\n")

    with pytest.raises(DataError, match=r"line 1 of .*samples\.jsonl"):
        add_round(tmp_path, "a run", made(1))
