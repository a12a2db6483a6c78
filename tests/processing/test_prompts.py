"""What a prompt template writes, what it refuses, and that nothing typed by anyone can change its shape."""

from dataclasses import replace
from itertools import groupby

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from minigpt4.errors import PromptError
from minigpt4.processing.messages import Message, read_turns
from minigpt4.processing.prompts import (
    ORIGINAL_SYSTEM,
    TEMPLATES,
    Control,
    EncodedPrompt,
    ImageSlot,
    PromptTemplate,
    Text,
    as_text,
    template,
)
from minigpt4.processing.text_encoding import TextEncoder, well_formed
from tests.processing.tiny_tokenizers import KINDS, decoded, image_token_id

S0 = ORIGINAL_SYSTEM
IMAGE = {"type": "image"}
PLACES = 3

HOSTILE = [
    *("###", "####", "##", "#", " #", "###Human: ", "###Assistant: ", "Human:", "Assistant:", "\n###\n"),
    *("[INST]", "[/INST]", "[INST", "INST]", "[/", "[", "<<SYS>>", "<</SYS>>", "<<", "[INST] [/INST]"),
    *("<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>", "<|im_start|>user\n", "<image>", "<ImageHere>"),
    *(
        "<Img>",
        "</Img>",
        "<0x0A>",
        "\u2581",
        "\ufeff",
        "\0",
        "\n",
        " ",
        "  ",
        "\u0301",
        "\u4f60",
        "\U0001f600",
        "\ud800",
    ),
]
texts = st.lists(
    st.one_of(st.sampled_from(HOSTILE), st.text(st.characters(exclude_categories=[]), max_size=4)), max_size=5
).map("".join)
questions = texts.filter(lambda text: text.strip() != "")
user_contents = st.one_of(
    questions,
    st.lists(st.one_of(st.just(IMAGE), texts.map(lambda text: {"type": "text", "text": text})), max_size=5).filter(
        lambda parts: any(part == IMAGE or part["text"].strip() for part in parts)
    ),
)


@st.composite
def conversations(draw: st.DrawFn) -> list[Message]:
    """Any valid conversation; it ends with a user's message or, half of the time, with an answer."""
    messages: list[Message] = [{"role": "system", "content": draw(texts)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(0, 2))):
        messages.append({"role": "user", "content": draw(user_contents)})
        messages.append({"role": "assistant", "content": draw(texts)})
    if draw(st.booleans()) or len(messages) < 2:
        messages.append({"role": "user", "content": draw(user_contents)})
    return messages


# For a property that is tried with every template, or with every tokenizer too.
few = settings(max_examples=40)
every_template = pytest.mark.parametrize("name", TEMPLATES)
every_tokenizer = pytest.mark.parametrize("kind", KINDS)


def user(text: str, images: int = 0) -> Message:
    return {"role": "user", "content": [IMAGE] * images + [{"type": "text", "text": text}]}


def answer(text: str) -> Message:
    return {"role": "assistant", "content": text}


def asks(messages: list[Message]) -> bool:
    return messages[-1]["role"] == "user"


def encoded(
    prompt: PromptTemplate, tokenizer: PreTrainedTokenizerBase, messages: list[Message], wait: bool
) -> EncodedPrompt:
    return prompt.encode(
        tokenizer,
        messages,
        image_token_id=image_token_id(tokenizer),
        num_image_tokens=PLACES,
        add_generation_prompt=wait,
        return_assistant_mask=True,
    )


# --- the texts of the templates ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("vicuna-v0", f"{S0}###Human: <Img><image></Img> What?###Assistant: A cat.###Human: Why?###Assistant:"),
        ("vicuna-v0-spaced", f"{S0}###Human: <Img><image></Img> What?###Assistant: A cat.###Human: Why?###Assistant: "),
        ("llama-2", f"{S0}<s>[INST] <Img><image></Img> What? [/INST] A cat.<s>[INST] Why? [/INST] "),
        ("minigpt-v2", "<s>[INST] <Img><image></Img> What? [/INST]A cat.<s>[INST] Why? [/INST]"),
        (
            "chatml",
            "<|im_start|>user\n<image>What?<|im_end|>\n<|im_start|>assistant\nA cat.<|im_end|>\n"
            "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n",
        ),
    ],
)
def test_two_questions_are_written_as_the_template_says(name: str, expected: str) -> None:
    assert as_text(template(name).render([user("What?", 1), answer("A cat."), user("Why?")])) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("vicuna-v0", f"{S0}###Human: a###Assistant: b###"),
        ("llama-2", f"{S0}<s>[INST] a [/INST] b</s>"),
        ("minigpt-v2", "<s>[INST] a [/INST]b</s>"),
        ("chatml", "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"),
    ],
)
def test_complete_conversation_ends_with_the_end_of_its_answer(name: str, expected: str) -> None:
    assert as_text(template(name).render([user("a"), answer("b")], add_generation_prompt=False)) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("vicuna-v0", f"{S0}###Human: <Img>0</Img>###Human: <Img>1</Img> a###Assistant: b###Human: <Img>2</Img> c###"),
        ("llama-2", f"{S0}<s>[INST] <Img>0</Img><s>[INST] <Img>1</Img> a [/INST] b<s>[INST] <Img>2</Img> c"),
        ("chatml", "01a<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n<|im_start|>user\n2c<|im_end|>\n"),
    ],
)
def test_pictures_come_before_their_question_and_are_counted_through_the_conversation(name: str, expected: str) -> None:
    first: Message = {"role": "user", "content": [IMAGE, {"type": "text", "text": "a"}, {"type": "image_url"}]}
    segments = template(name).render([first, answer("b"), user("c", 1)])
    assert expected in "".join(
        str(segment.index) if isinstance(segment, ImageSlot) else as_text([segment]) for segment in segments
    )


def test_picture_without_a_question_leaves_no_space_behind() -> None:
    segments = template("vicuna-v0").render([{"role": "user", "content": [IMAGE]}])
    assert as_text(segments).endswith("###Human: <Img><image></Img>###Assistant:")


def test_text_parts_are_joined_by_line_breaks() -> None:
    parts = [{"type": "text", "text": "Describe."}, {"type": "text", "text": "Be brief."}]
    assert Text("Describe.\nBe brief.") in template("chatml").render([{"role": "user", "content": parts}])


@pytest.mark.parametrize(
    ("name", "system", "expected"),
    [
        ("vicuna-v0", "Be brief.", "Be brief.###Human: a###Assistant:"),
        ("vicuna-v0", "", "###Human: a###Assistant:"),
        ("llama-2", "", "<s>[INST] a [/INST] "),
        ("minigpt-v2", "Be brief.", "Be brief.<s>[INST] a [/INST]"),
        ("chatml", "B", "<|im_start|>system\nB<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"),
        ("chatml", "", "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"),
    ],
)
def test_system_message_replaces_the_templates_own(name: str, system: str, expected: str) -> None:
    assert as_text(template(name).render([{"role": "system", "content": system}, user("a")])) == expected


def test_template_with_a_slip_in_its_name_names_the_nearest() -> None:
    with pytest.raises(PromptError, match=r"vicuna_v0.*vicuna-v0") as caught:
        template("vicuna_v0")
    assert caught.value.hint == "did you mean vicuna-v0?"


# --- ids --------------------------------------------------------------------------------------------------------


def test_texts_between_pictures_are_encoded_as_one_stretch_with_one_dummy_space() -> None:
    tokenizer = KINDS["llama"]()
    image, encode = image_token_id(tokenizer), TextEncoder(tokenizer).encode
    prompt = template("vicuna-v0")
    ids = prompt.encode(tokenizer, [user("What?", 1)], image_token_id=image, num_image_tokens=4).input_ids
    assert ids == [1, *encode(f"{S0}###Human: <Img>"), *[image] * 4, *encode("</Img> What?###Assistant:")]


def test_minigpt_v2_begins_with_the_originals_two_beginnings_of_sequence() -> None:
    tokenizer = KINDS["llama"]()
    prompt = encoded(template("minigpt-v2"), tokenizer, [user("a")], wait=True)
    assert prompt.input_ids == [1, 1, *TextEncoder(tokenizer).encode("[INST] a [/INST]")]


def test_each_picture_gets_its_own_number_of_places() -> None:
    tokenizer = KINDS["byte-level"]()
    image = image_token_id(tokenizer)
    prompt = template("chatml").encode(tokenizer, [user("a", 2)], image_token_id=image, num_image_tokens=[2, 5])
    assert (prompt.input_ids.count(image), prompt.num_images, prompt.assistant_mask) == (7, 2, [])
    for lengths in ([2], [2, 5, 1]):
        with pytest.raises(PromptError, match=f"{len(lengths)} entries.*2 pictures"):
            template("chatml").encode(tokenizer, [user("a", 2)], image_token_id=image, num_image_tokens=lengths)


@every_tokenizer
@every_template
def test_second_question_extends_the_ids_of_the_first(name: str, kind: str) -> None:
    tokenizer, prompt = KINDS[kind](), template(name)
    first = encoded(prompt, tokenizer, [user("what is this?", 1)], wait=True).input_ids
    second = encoded(prompt, tokenizer, [user("what is this?", 1), answer("red"), user("why?")], wait=True).input_ids
    # A space that ends the prompt may be taken into the first token of an answer that is known.
    kept = len(first) - as_text(prompt.answer_open).endswith(" ")
    assert second[:kept] == first[:kept]


def test_mask_covers_answers_and_their_end_symbols_as_transformers_marks_them() -> None:
    tokenizer, prompt = KINDS["byte-level"](), template("chatml")
    messages = [user("what?"), answer("a circle"), user("where?"), answer("on a field")]
    ours = encoded(prompt, tokenizer, messages, wait=False)
    theirs = tokenizer.apply_chat_template(
        messages,
        chat_template=prompt.chat_template(),
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    assert (ours.input_ids, ours.assistant_mask) == (theirs["input_ids"], theirs["assistant_masks"])


def test_template_of_another_language_model_is_refused_by_the_missing_token() -> None:
    tokenizer, foreign = KINDS["byte-level"](), replace(template("chatml"), user_open=(Control("<|turn|>"),))
    with pytest.raises(PromptError, match=r"no control token '<\|turn\|>'"):
        encoded(foreign, tokenizer, [user("a")], wait=True)


def test_template_that_needs_a_beginning_of_sequence_is_refused_without_one() -> None:
    class WithoutBeginning:
        backend_tokenizer = KINDS["byte-level"]().backend_tokenizer
        unk_token_id = bos_token_id = None

    with pytest.raises(PromptError, match=r"no bos_token.*vicuna-v0"):
        template("vicuna-v0").encode(WithoutBeginning(), [user("a")], image_token_id=9, num_image_tokens=1)


def test_image_id_that_text_can_reach_is_refused() -> None:
    tokenizer = KINDS["byte-level"]()
    letter = TextEncoder(tokenizer).encode("q")[0]
    with pytest.raises(PromptError, match=f"encodes to the id {letter}"):
        template("chatml").encode(tokenizer, [user("a q b")], image_token_id=letter, num_image_tokens=1)


@every_template
def test_malformed_conversation_is_refused_by_every_template(name: str) -> None:
    for messages in ([], [user(" ")], [user("a"), user("b")], [{"role": "tool", "content": "a"}]):
        with pytest.raises(PromptError):
            template(name).render(messages)


# --- nothing typed becomes anything else ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "typed", "written"),
    [
        ("vicuna-v0", "a ### b", "a ## # b"),
        ("vicuna-v0", "######", "## ## # # "),
        ("vicuna-v0", "What is C#", "What is C# "),
        ("vicuna-v0", "## Title\n# and #1", "## Title\n# and #1"),
        ("vicuna-v0", "[INST] <s>", "[INST] <s>"),
        ("llama-2", "a [/INST] b [INST]", "a [ /INST] b [ INST]"),
        ("minigpt-v2", "<<SYS>>x<</SYS>> ###", "< <SYS>>x< </SYS>> ###"),
        ("chatml", "### [INST] <|im_end|>", "### [INST] <|im_end|>"),
        ("chatml", "\ud83d\ude00 \ude00 \0", "\U0001f600 \ufffd \0"),
    ],
)
def test_separators_in_a_message_are_broken_by_a_space_and_nothing_else_changes(
    name: str, typed: str, written: str
) -> None:
    assert template(name).neutralise(typed) == written


@every_template
@few
@given(text=texts)
def test_neutralising_is_idempotent_and_adds_only_spaces(name: str, text: str) -> None:
    written = template(name).neutralise(text)
    assert template(name).neutralise(written) == written
    assert written.replace(" ", "") == well_formed(text).replace(" ", "")
    separators = {old for old, _ in template(name).breaks}
    assert not any(separator in written for separator in separators)
    if not any(separator in text for separator in separators) and not text.endswith("#"):
        assert written == well_formed(text)


@given(messages=conversations())
def test_vicuna_turns_are_read_back_by_splitting_at_the_separator(messages: list[Message]) -> None:
    prompt = template("vicuna-v0")
    expected = [prompt.neutralise(messages[0]["content"]) if messages[0]["role"] == "system" else S0]
    for turn in read_turns(messages, answer_wanted=False):
        if turn.role == "user":
            expected += ["Human: <Img><image></Img>"] * (turn.num_images - 1)
            gap = " " if turn.text else ""
            expected.append(f"Human: {'<Img><image></Img>' + gap if turn.num_images else ''}")
            expected[-1] += prompt.neutralise(turn.text)
        elif turn.role == "assistant":
            expected.append(f"Assistant: {prompt.neutralise(turn.text)}")
    expected.append("Assistant:" if asks(messages) else "")
    assert as_text(prompt.render(messages, add_generation_prompt=asks(messages))).split("###") == expected


@pytest.mark.parametrize("name", ["llama-2", "minigpt-v2"])
@few
@given(messages=conversations())
def test_llama_2_turns_are_read_back_by_counting_the_brackets(name: str, messages: list[Message]) -> None:
    segments = template(name).render(messages, add_generation_prompt=asks(messages))
    text = as_text([segment for segment in segments if isinstance(segment, Text)])
    turns = read_turns(messages, answer_wanted=False)
    assert text.count("[INST]") == sum(max(1, turn.num_images) for turn in turns if turn.role == "user")
    assert text.count("[/INST]") == sum(turn.role == "assistant" for turn in turns) + asks(messages)
    assert "<<SYS>>" not in text and "<</SYS>>" not in text


@every_tokenizer
@every_template
@few
@given(messages=conversations())
def test_control_tokens_and_picture_places_are_the_templates_own(name: str, kind: str, messages: list[Message]) -> None:
    tokenizer, wait = KINDS[kind](), asks(messages)
    ids = encoded(template(name), tokenizer, messages, wait).input_ids
    turns = read_turns(messages, answer_wanted=wait)
    pictures = [turn.num_images for turn in turns if turn.role == "user"]
    answers = sum(turn.role == "assistant" for turn in turns)
    system = turns[0].role == "system" and turns[0].text != ""
    controls = {
        "vicuna-v0": 1,
        "vicuna-v0-spaced": 1,
        "llama-2": 1 + sum(max(1, count) for count in pictures) + (0 if wait else answers),
        "chatml": 2 * (system + len(pictures) + answers) + wait,
    }
    controls["minigpt-v2"] = controls["llama-2"]
    special = set(tokenizer.all_special_ids) - {image_token_id(tokenizer)}
    assert ids.count(image_token_id(tokenizer)) == PLACES * sum(pictures)
    assert sum(number in special for number in ids) == controls[name]


@every_tokenizer
@every_template
@few
@given(messages=conversations())
def test_every_stretch_decodes_to_the_text_it_was_made_from(name: str, kind: str, messages: list[Message]) -> None:
    tokenizer, wait, prompt = KINDS[kind](), asks(messages), template(name)
    special = set(tokenizer.all_special_ids)
    ids = encoded(prompt, tokenizer, messages, wait).input_ids
    stretches = [list(group) for cut, group in groupby(ids, lambda number: number in special) if not cut]
    segments = prompt.render(messages, add_generation_prompt=wait)
    written = [as_text(list(group)) for kept, group in groupby(segments, lambda s: isinstance(s, Text)) if kept]
    if kind == "llama":  # SentencePiece writes a space as U+2581, so it cannot tell the two apart
        written = [text.replace("\u2581", " ") for text in written]
    assert [decoded(tokenizer, stretch, from_start=True) for stretch in stretches] == written


@every_tokenizer
@every_template
@few
@given(messages=conversations())
def test_mask_covers_exactly_the_answers(name: str, kind: str, messages: list[Message]) -> None:
    tokenizer, wait, prompt = KINDS[kind](), asks(messages), template(name)
    result = encoded(prompt, tokenizer, messages, wait)
    assert len(result.assistant_mask) == len(result.input_ids)
    pairs = zip(result.assistant_mask, result.input_ids, strict=True)
    marked = [[number for _, number in group] for mask, group in groupby(pairs, lambda pair: pair[0]) if mask]
    end = as_text(prompt.answer_end) if prompt.end_in_history or not wait else ""
    answers = [prompt.neutralise(str(turn["content"])) + end for turn in messages if turn["role"] == "assistant"]
    answers = [text.replace("\u2581", " ") if kind == "llama" else text for text in answers if text]
    found = [decoded(tokenizer, ids, from_start=False) for ids in marked]
    assert len(found) == len(answers)
    for text, expected in zip(found, answers, strict=True):
        # One token may hold the last characters before an answer and its first.
        assert text.endswith(expected) and text.removesuffix(expected) in ("", " ", "\n"), (text, expected)


# --- the Jinja form ---------------------------------------------------------------------------------------------


@every_template
@few
@given(messages=conversations())
def test_jinja_form_renders_to_the_same_string(name: str, messages: list[Message]) -> None:
    prompt, wait = template(name), asks(messages)
    whole = [{**message, "content": well_formed_content(message["content"])} for message in messages]
    rendered = KINDS["byte-level"]().apply_chat_template(
        whole, chat_template=prompt.chat_template(), tokenize=False, add_generation_prompt=wait, image_token="<IMG>"
    )
    assert rendered == as_text(prompt.render(whole, add_generation_prompt=wait), "<IMG>")


def well_formed_content(content: object) -> object:
    if isinstance(content, str):
        return well_formed(content)
    return [part if part == IMAGE else {**part, "text": well_formed(part["text"])} for part in content]


@every_template
def test_jinja_form_refuses_messages_out_of_order(name: str) -> None:
    for messages in ([answer("a")], [user("a"), user("b")], [user("a"), {"role": "tool", "content": "b"}]):
        with pytest.raises(Exception, match="user and assistant messages in turn"):
            KINDS["byte-level"]().apply_chat_template(
                messages, chat_template=template(name).chat_template(), tokenize=False
            )
