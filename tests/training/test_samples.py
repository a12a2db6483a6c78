"""The page of sample answers is whole in itself, shows text as text, and is continued by a resumed run."""

import base64
import io
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from PIL import Image

from minigpt4.errors import DataError
from minigpt4.inference.chat import ChatSession
from minigpt4.training.samples import (
    SHOWN_ROUNDS,
    Round,
    add_round,
    answer_pictures,
    make_round,
    read_rounds,
    write_samples_page,
)
from tests import tiny_chat

PICTURES = [tiny_chat.picture(seed) for seed in range(3)]
QUESTION = "What is it?"


class Page(HTMLParser):
    """What a reader sees: for each column the picture, and the rows in order; and every tag and address."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.columns: list[list[tuple[str, str]]] = []
        self.pictures: list[str] = []
        self._inside = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._inside = tag
        self.addresses += [value or "" for name, value in attributes if name in ("src", "href", "srcset", "data")]
        if tag == "article":
            self.columns.append([])
        elif tag == "img":
            self.pictures.append(dict(attributes)["src"] or "")
        elif tag == "dt":
            self.columns[-1].append(("", ""))

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside in ("dt", "dd"):
            name, text = self.columns[-1].pop()
            self.columns[-1].append((name + data, text) if self._inside == "dt" else (name, text + data))


def made(step: int, answers: list[str] | None = None, stage: str = "chat") -> Round:
    said = answers or [f"answer {number} at {step}" for number in range(3)]
    return make_round(stage, step, PICTURES, ["a cat", "", "a dog"], said)


def test_a_column_shows_picture_reference_and_answers_newest_first(tmp_path: Path) -> None:
    for step in (500, 1000):
        add_round(tmp_path, "a run", made(step))

    page = Page(tmp_path / "samples.html")

    assert page.columns[0] == [
        ("reference", "a cat"),
        ("chat, step 1,000", "answer 0 at 1000"),
        ("chat, step 500", "answer 0 at 500"),
    ]
    assert page.columns[1][0] == ("chat, step 1,000", "answer 1 at 1000")  # nobody said what this is
    assert len(page.columns) == len(set(page.pictures)) == 3


def test_pictures_are_small_and_inside(tmp_path: Path) -> None:
    large = Image.new("RGB", (2000, 1000), "red")

    add_round(tmp_path, "a run", make_round("chat", 1, [large], ["red"], ["red"]))

    (address,) = Page(tmp_path / "samples.html").addresses
    head, _, content = address.partition(",")
    assert head == "data:image/jpeg;base64"
    with Image.open(io.BytesIO(base64.b64decode(content))) as picture:
        assert picture.size == (320, 160)


def test_page_needs_no_script_and_nothing_from_elsewhere(tmp_path: Path) -> None:
    page = Page(add_round(tmp_path, "a run", made(1)))

    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert all(address.startswith("data:image/jpeg;base64,") for address in page.addresses)
    text = (tmp_path / "samples.html").read_text()
    assert "http:" not in text and "https:" not in text
    assert "default-src 'none'" in text
    assert "width=device-width" in text
    assert "prefers-color-scheme: dark" in text


@pytest.mark.parametrize(
    "hostile", ["<script>alert(1)</script>", "</dd></dl><img src=x onerror=alert(1)>", '" onload="x', "&amp; {title}"]
)
def test_what_a_model_says_stays_text(hostile: str, tmp_path: Path) -> None:
    told = make_round(hostile, 1, PICTURES[:1], [hostile], [hostile])

    page = Page(add_round(tmp_path, hostile, told))

    assert page.columns == [[("reference", hostile), (f"{hostile}, step 1", hostile)]]
    assert "script" not in page.tags
    assert page.tags.count("img") == 1


def test_text_that_no_page_can_hold_is_marked(tmp_path: Path) -> None:
    page = Page(add_round(tmp_path, "a run", made(1, ["half \ud83d", "bell \x07\nnext", "\u3000\u00e9"])))

    assert [column[-1][1] for column in page.columns] == ["half ?", "bell ?\nnext", "\u3000\u00e9"]
    assert read_rounds(tmp_path)[0].samples[0].answer == "half \ud83d"


def test_resumed_run_continues_the_page_and_repeats_no_round(tmp_path: Path) -> None:
    add_round(tmp_path, "a run", made(500))
    add_round(tmp_path, "a run", made(1000, ["lost"] * 3))

    add_round(tmp_path, "a run", made(1000))  # made again after the last checkpoint
    add_round(tmp_path, "a run", made(500, stage="more"))

    assert read_rounds(tmp_path) == [made(500), made(1000), made(500, stage="more")]
    page = Page(tmp_path / "samples.html")
    assert [name for name, _ in page.columns[1]] == ["more, step 500", "chat, step 1,000", "chat, step 500"]
    assert "lost" not in (tmp_path / "samples.html").read_text()


def test_a_picture_is_kept_once(tmp_path: Path) -> None:
    for step in range(1, 9):
        add_round(tmp_path, "a run", made(step))

    assert (tmp_path / "samples.jsonl").read_text().count("data:image") == 3


def test_earlier_answers_are_folded(tmp_path: Path) -> None:
    for step in range(1, SHOWN_ROUNDS + 4):
        add_round(tmp_path, "a run", made(step))

    page = Page(tmp_path / "samples.html")

    assert page.tags.count("details") == 3
    assert "3 earlier" in (tmp_path / "samples.html").read_text()
    assert all(len(column) >= SHOWN_ROUNDS + 3 for column in page.columns)


def test_other_pictures_begin_other_columns(tmp_path: Path) -> None:
    add_round(tmp_path, "a run", made(1))
    other = make_round("chat", 2, [tiny_chat.picture(9), PICTURES[0]], ["a bird", "a cat"], ["bird", "cat"])

    page = Page(add_round(tmp_path, "a run", other))

    assert page.columns[0] == [("reference", "a bird"), ("chat, step 2", "bird")]
    assert page.columns[1] == [("reference", "a cat"), ("chat, step 2", "cat"), ("chat, step 1", "answer 0 at 1")]


def test_page_without_rounds_says_so(tmp_path: Path) -> None:
    assert "No answers yet" in write_samples_page(tmp_path, "a run", []).read_text()


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"stage": "a", "step": 1, "samples": [["7", "", ""]], "pictures": {}}']
)
def test_damaged_file_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "samples.jsonl").write_text(content + "\n")

    with pytest.raises(DataError, match=r"line 1 of .*samples\.jsonl"):
        add_round(tmp_path, "a run", made(1))


@pytest.mark.parametrize("template", ["chatml", "vicuna-v0"])
def test_answers_are_those_of_a_conversation(template: str) -> None:
    model, processor = tiny_chat.model(), tiny_chat.processor(template)
    expected = []
    for picture in PICTURES:
        chat = ChatSession(model, processor)
        chat.add_image(picture)
        expected.append(chat.ask(QUESTION, max_new_tokens=12))

    answers = answer_pictures(model, processor, PICTURES, QUESTION, 12)

    assert answers == expected
    assert len(set(answers)) == 3  # each has its own picture


def test_answer_ends_where_the_model_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = tiny_chat.model(), tiny_chat.processor()
    said = []
    generate = model.generate
    monkeypatch.setattr(model, "generate", lambda **inputs: said.append(generate(**inputs)) or said[-1])
    whole = answer_pictures(model, processor, PICTURES[:1], QUESTION, 12)[0]
    model.generation_config.eos_token_id = said[0][0, -4].item()

    (ended,) = answer_pictures(model, processor, PICTURES[:1], QUESTION, 12)

    assert len(ended) < len(whole)
    assert said[1].shape[1] < said[0].shape[1]
    assert whole.startswith(ended.rstrip("\ufffd"))


def test_answering_leaves_every_part_in_its_mode_and_able_to_learn() -> None:
    model, processor = tiny_chat.model(), tiny_chat.processor()
    model.train()
    model.model.qformer.encoder.eval()
    before = {name: module.training for name, module in model.named_modules()}
    random = torch.get_rng_state()

    answer_pictures(model, processor, PICTURES, QUESTION, 4)

    assert {name: module.training for name, module in model.named_modules()} == before
    assert torch.equal(torch.get_rng_state(), random)
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image", "image": PICTURES[0]}, {"type": "text", "text": "?"}]}],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert model.model.language_projection.weight.grad.abs().sum() > 0


def test_modes_are_restored_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = tiny_chat.model(), tiny_chat.processor()
    model.train()

    def fail(**inputs: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(model, "generate", fail)
    with pytest.raises(RuntimeError):
        answer_pictures(model, processor, PICTURES, QUESTION, 4)

    assert model.training


def test_no_pictures_need_no_answers() -> None:
    assert answer_pictures(tiny_chat.model(), tiny_chat.processor(), [], QUESTION, 4) == []
