"""A record's text becomes the ids that the model is asked with later, and the loss is taken on the answers alone."""

import io
from dataclasses import replace

import pytest
import torch
from PIL import Image

from minigpt4.data.examples import IGNORED, Layout, as_read, blip_caption, padded, pixel_values
from minigpt4.data.record import Record
from minigpt4.errors import DataError, ImageError, PromptError
from tests import golden, tiny_chat

TWO_TURNS = (("What is it?", "a red dog"), ("Is it big?", "no"))


def picture(colour: str = "red", size: tuple[int, int] = (40, 30)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return file.getvalue()


def record(*turns: tuple[str, str], with_picture: bool = True) -> Record:
    return Record("a.jpg", picture() if with_picture else None, turns)


def said(layout: Layout, ids: list[int]) -> str:
    text: str = layout.processor.tokenizer.decode([i for i in ids if i != IGNORED], skip_special_tokens=False)
    return text


@pytest.fixture
def layout() -> Layout:
    return Layout(tiny_chat.processor())


def test_template_layout_has_the_ids_of_the_conversation_and_learns_the_answers(layout: Layout) -> None:
    example = layout.encode(record(*TWO_TURNS), "unused")
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
        {"role": "assistant", "content": "a red dog"},
        {"role": "user", "content": [{"type": "text", "text": "Is it big?"}]},
        {"role": "assistant", "content": "no"},
    ]
    asked = layout.processor.encode(messages, add_generation_prompt=False)
    assert said(layout, example.labels) == "a red dog<|im_end|>no<|im_end|>"
    assert example.input_ids == asked.input_ids[:-1]
    assert said(layout, asked.input_ids[-1:]) == "\n", "after the last end symbol nothing is learnt"
    assert example.cut == 0


def test_a_caption_is_asked_for_by_the_prompt(layout: Layout) -> None:
    example = layout.encode(record(("", "a dog")), "What is shown?")
    assert "What is shown?" in said(layout, example.input_ids)
    assert said(layout, example.labels) == "a dog<|im_end|>"


@pytest.mark.parametrize(
    ("prompt", "read"),
    [
        ("<Img><ImageHere></Img> What is it?", "(picture)What is it?"),
        ("Look at <Img><ImageHere></Img> and say what it is.", "(picture)Look at and say what it is."),
        ("What is <ImageHere>", "(picture)What is"),
    ],
)
def test_a_prompt_of_the_originals_is_read_without_its_marks(prompt: str, read: str, layout: Layout) -> None:
    """They would be words that nobody asks with."""
    example = layout.encode(record(("", "a cat")), prompt)
    assert f"{read}<|im_end|>" in as_read(example, layout.processor).replace("\\n", "")
    alone = layout.encode(record(("", "a cat"), with_picture=False), prompt)
    assert "Image" not in as_read(alone, layout.processor)


def test_a_long_answer_is_cut_and_keeps_its_end(layout: Layout) -> None:
    short = Layout(layout.processor, max_text_tokens=8)
    example = short.encode(record(("What?", "a dog that runs and runs and runs")), "")
    learned = [i for i in example.labels if i != IGNORED]
    assert len(learned) <= 8
    assert said(layout, learned).startswith("a d") and said(layout, learned).endswith("<|im_end|>")
    assert example.cut == 1


def test_spaces_around_an_answer_are_not_taken_for_a_lost_end(layout: Layout) -> None:
    example = layout.encode(record(("", " a dog \n")), "What?")
    assert said(layout, example.labels) == "a dog<|im_end|>"
    assert example.cut == 0


def test_further_turns_are_left_out_and_counted(layout: Layout) -> None:
    example = Layout(layout.processor, max_turns=1).encode(record(*TWO_TURNS), "")
    assert said(layout, example.labels) == "a red dog<|im_end|>"
    assert example.cut == 1


@pytest.mark.parametrize("kind", ["template", "original"])
def test_a_text_longer_than_the_language_model_reads_is_refused(kind: str, layout: Layout) -> None:
    """Learnt positions end there, with an error that names no example; others go on where nothing was learnt."""
    asked = record(("Is it " + "very " * 50 + "big?", "no"))
    places = len(replace(layout, kind=kind).encode(asked, "").input_ids)

    assert replace(layout, kind=kind, context=places).encode(asked, "").cut == 0
    with pytest.raises(PromptError, match=rf"a\.jpg takes {places} places .*reads {places - 1}"):
        replace(layout, kind=kind, context=places - 1).encode(asked, "")


def test_text_alone_has_no_place_for_a_picture(layout: Layout) -> None:
    example = layout.encode(record(("Say hi", "hi"), with_picture=False), "")
    assert layout.processor.image_token_id not in example.input_ids


@pytest.mark.parametrize("answer", ["", "  \n"])
def test_an_empty_answer_is_refused(answer: str, layout: Layout) -> None:
    with pytest.raises(DataError, match=r"a\.jpg has an empty answer"):
        layout.encode(record(("What?", answer)), "")


def test_people_see_what_is_learnt_and_where_the_picture_is(layout: Layout) -> None:
    shown = as_read(layout.encode(record(*TWO_TURNS), ""), layout.processor)
    assert shown.count("(picture)") == 1 and "\n" not in shown
    assert ">>a red dog<|im_end|><<" in shown and ">>no<|im_end|><<" in shown
    assert shown.index("(picture)") < shown.index("What is it?") < shown.index(">>a red dog")


def original(layout: Layout, **changes: object) -> Layout:
    return Layout(layout.processor, kind="original", **changes)  # type: ignore[arg-type]


def test_original_layout_without_a_prompt_is_start_picture_caption(layout: Layout) -> None:
    example = original(layout, end_symbol="\n").encode(record(("", "a dog")), "")
    tokenizer = layout.processor.tokenizer
    places = [layout.processor.image_token_id] * layout.processor.num_image_tokens
    assert example.input_ids[: 1 + len(places)] == [tokenizer.bos_token_id, *places]
    assert said(layout, example.input_ids[1 + len(places) :]) == said(layout, example.labels) == "a dog\n"


def test_original_layout_puts_the_picture_where_the_prompt_has_it(layout: Layout) -> None:
    example = original(layout).encode(record(("", "a dog")), "<Img><ImageHere></Img> Describe.")
    text = said(layout, example.input_ids).replace("<image>" * layout.processor.num_image_tokens, "(picture)")
    assert text == "<s>###Human: <Img>(picture)</Img> Describe. ###Assistant: a dog###"


@pytest.mark.parametrize("text", ["<image>", "an <image> of </s>"])
def test_a_caption_with_the_name_of_the_pictures_token_has_no_place_for_a_picture(text: str, layout: Layout) -> None:
    """The model would look for one picture more than there is, and end the run."""
    for kind in (layout, original(layout)):
        example = kind.encode(record(("", text)), f"What {text}?")

        places = [i == layout.processor.image_token_id for i in example.input_ids]
        assert sum(places) == layout.processor.num_image_tokens
        assert text.removesuffix("</s>") in said(layout, example.labels)


@pytest.mark.parametrize(("keep_end", "ends"), [(True, True), (False, False)])
def test_original_layout_cuts_the_end_symbol_unless_it_is_kept(keep_end: bool, ends: bool, layout: Layout) -> None:
    cut = original(layout, max_text_tokens=6, keep_end=keep_end)
    example = cut.encode(record(("", "a dog that runs")), "")
    learned = [i for i in example.labels if i != IGNORED]
    assert len(learned) == 6
    assert said(layout, learned).endswith("###") is ends


def test_original_layout_refuses_an_end_symbol_that_leaves_no_place_for_an_answer(layout: Layout) -> None:
    ends = original(layout, end_symbol="a long end", max_text_tokens=3)
    with pytest.raises(PromptError, match=r"'a long end' takes \d+ tokens, which leaves none of the 3"):
        ends.encode(record(("", "a dog that runs")), "")


@pytest.mark.parametrize(("max_text_tokens", "keep_end"), [(160, False), (6, True)])
def test_original_layout_learns_an_end_symbol_that_is_the_token_it_pads_with(
    max_text_tokens: int, keep_end: bool, layout: Layout
) -> None:
    """As the original's later version for Llama-2, whose answers end with `</s>`: without it they would never end."""
    tokenizer = layout.processor.tokenizer
    assert tokenizer.pad_token == tokenizer.eos_token == "</s>"
    ends = original(layout, end_symbol="</s>", max_text_tokens=max_text_tokens, keep_end=keep_end)

    example = ends.encode(record(("", "a dog that runs")), "")

    assert example.labels[-1] == example.input_ids[-1] == tokenizer.eos_token_id
    assert IGNORED not in example.labels[1 + layout.processor.num_image_tokens :]


def test_padding_is_on_the_right_and_never_learned(layout: Layout) -> None:
    long, short = layout.encode(record(*TWO_TURNS), ""), layout.encode(record(("a?", "b")), "")
    batch = padded([long, short], 0)
    length = len(short.input_ids)
    assert batch["input_ids"].shape == batch["labels"].shape == (2, len(long.input_ids))
    assert batch["attention_mask"][1].tolist() == [1] * length + [0] * (len(long.input_ids) - length)
    assert (batch["labels"][1, length:] == IGNORED).all()


def test_pixels_without_a_crop_are_those_of_an_answer(layout: Layout) -> None:
    made = pixel_values(record(*TWO_TURNS), layout.processor, None)
    asked = layout.processor.image_processor(Image.new("RGB", (40, 30), "red"), return_tensors="pt")["pixel_values"][0]
    assert torch.equal(made, asked)


def test_a_crop_is_a_function_of_its_seed(layout: Layout) -> None:
    file = io.BytesIO()
    Image.radial_gradient("L").convert("RGB").save(file, "PNG")
    there = Record("b", file.getvalue(), TWO_TURNS)
    crops = [pixel_values(there, layout.processor, seed) for seed in ((1, 2), (1, 2), (1, 3))]
    assert torch.equal(crops[0], crops[1])
    assert not torch.equal(crops[0], crops[2])


def test_a_picture_that_is_none_is_refused(layout: Layout) -> None:
    with pytest.raises(ImageError):
        pixel_values(Record("c", b"not a picture", TWO_TURNS), layout.processor, None)


@pytest.mark.reference
def test_captions_are_the_recorded_ones() -> None:
    recorded = golden.content("golden/caption_processor.json")
    for case in recorded["default"]:
        assert blip_caption(case["i"]) == case["o"], case
    for case in recorded["prompt_max5"]:
        assert blip_caption(case["i"], 5, "a photo of ") == case["o"], case
    assert len(recorded["default"]) >= 5


def test_punctuation_becomes_space_and_long_captions_are_cut() -> None:
    assert blip_caption("A  Dog, (big)! runs.\n") == "a dog, big runs"
    assert blip_caption("x " * 60) == " ".join("x" * 50)
