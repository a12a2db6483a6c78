"""A conversation is streamed, remembered, taken back and stopped, and no cache changes a word of it."""

import string
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from minigpt4 import ChatSession
from minigpt4.errors import ContextOverflowError, ImageError, PromptError, WeightsError
from minigpt4.inference.backends.protocol import Logits
from minigpt4.inference.chat import ImageCache
from minigpt4.model import MiniGPT4ForConditionalGeneration
from minigpt4.processing import MiniGPT4Processor
from tests import tiny_chat

NEW = 12  # ids an answer may have


@pytest.fixture(scope="module")
def model() -> MiniGPT4ForConditionalGeneration:
    return tiny_chat.model()


@pytest.fixture(scope="module")
def processor() -> MiniGPT4Processor:
    return tiny_chat.processor()


@pytest.fixture
def chat(model: MiniGPT4ForConditionalGeneration, processor: MiniGPT4Processor) -> ChatSession:
    return ChatSession(model, processor)


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    before = threading.active_count()
    yield
    deadline = time.monotonic() + 5  # the engine's thread ends after its last answer
    while threading.active_count() != before and time.monotonic() < deadline:
        time.sleep(0.001)
    assert threading.active_count() == before


def recomputed(chat: ChatSession, new: int = NEW) -> str:
    """The last answer of a conversation, from its messages alone: one call of `generate`, no cache."""
    inputs = chat.processor.apply_chat_template(
        chat.messages[:-1], tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    ids = chat.model.generate(**inputs, max_new_tokens=new, do_sample=False, eos_token_id=ends(chat))
    words = ids[0, inputs["input_ids"].shape[1] :]
    return chat.processor.tokenizer.decode(words, skip_special_tokens=True).strip()


def ends(chat: ChatSession) -> list[int]:
    return chat.processor.tokenizer.convert_tokens_to_ids(["</s>", "<|im_end|>"])


def after_every_token(monkeypatch: pytest.MonkeyPatch, chat: ChatSession, act: Callable[[int], None]) -> None:
    """Let `act(number of new ids)` run before every step of the engine."""
    step = chat.engine.backend.step

    def acting(slots: list[Any], tokens: list[int]) -> Logits:
        act(chat.answer.completion_tokens)
        return step(slots, tokens)

    monkeypatch.setattr(chat.engine.backend, "step", acting)


# -- what is said


def test_streamed_pieces_make_the_whole_answer(chat: ChatSession) -> None:
    chat.add_image(tiny_chat.picture())

    pieces = list(chat.stream("what is this?", max_new_tokens=NEW))

    assert len(pieces) > 1
    assert "".join(pieces) == chat.answer.text == chat.messages[-1]["content"][0]["text"] == recomputed(chat)


def test_answer_counts_what_it_took(chat: ChatSession) -> None:
    chat.ask("what is this?", max_new_tokens=NEW)

    answer = chat.answer
    prompt = chat.processor.encode(chat.messages[:-1]).input_ids
    assert (answer.prompt_tokens, answer.cached_tokens, answer.completion_tokens) == (len(prompt), 0, NEW)
    assert answer.finish_reason == "length"
    assert 0 < answer.seconds_to_first_token <= answer.seconds


def test_an_end_symbol_as_the_last_id_allowed_is_an_end(chat: ChatSession, monkeypatch: pytest.MonkeyPatch) -> None:
    end = ends(chat)[1]
    monkeypatch.setattr(chat.model.generation_config, "forced_eos_token_id", end)

    chat.ask("what is this?", max_new_tokens=3)

    assert chat.answer.completion_tokens == 3
    assert chat.answer.finish_reason == "stop"
    assert "<|im_end|>" not in chat.answer.text


def test_beams_give_one_piece_that_equals_generate(chat: ChatSession) -> None:
    chat.add_image(tiny_chat.picture())
    pieces = list(chat.stream("what is this?", max_new_tokens=NEW, num_beams=3))

    inputs = chat.processor.apply_chat_template(
        chat.messages[:-1], tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    ids = chat.model.generate(**inputs, max_new_tokens=NEW, num_beams=3, do_sample=False, eos_token_id=ends(chat))
    said = chat.processor.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    assert "".join(pieces) == chat.answer.text == said
    assert chat.answer.cached_tokens == 0
    chat.ask("and now?", max_new_tokens=NEW)
    assert chat.answer.text == recomputed(chat)


def test_seed_repeats_a_sampled_answer(chat: ChatSession) -> None:
    def sampled(seed: int) -> str:
        chat.reset()
        return chat.ask("what is this?", max_new_tokens=NEW, temperature=2.0, seed=seed)

    first = sampled(7)

    assert sampled(8) != first
    assert sampled(7) == first


def test_system_message_is_read(model: MiniGPT4ForConditionalGeneration, processor: MiniGPT4Processor) -> None:
    chat = ChatSession(model, processor, system="be brief.")
    plain = ChatSession(model, processor)

    chat.ask("what is this?", max_new_tokens=1)
    plain.ask("what is this?", max_new_tokens=1)

    assert chat.answer.prompt_tokens > plain.answer.prompt_tokens
    assert [message["role"] for message in chat.messages] == ["user", "assistant"]


def test_stop_string_that_is_no_token_ends_an_answer_unseen(model: MiniGPT4ForConditionalGeneration) -> None:
    chat = ChatSession(model, tiny_chat.processor("vicuna-v0"))
    sharp = chat.processor.tokenizer.convert_tokens_to_ids("##")
    suppressed = [i for i in range(len(chat.processor.tokenizer)) if i != sharp]
    own = model.generation_config.suppress_tokens
    model.generation_config.suppress_tokens = suppressed  # it says "####..." whatever it is asked
    try:
        pieces = list(chat.stream("what is this?", max_new_tokens=NEW))
    finally:
        model.generation_config.suppress_tokens = own

    assert pieces == []
    assert chat.answer.finish_reason == "stop"
    assert chat.answer.completion_tokens == 2  # "###" is whole after the second "##"


# -- what is remembered


def test_second_question_reuses_what_was_read_and_says_the_same(chat: ChatSession) -> None:
    chat.add_image(tiny_chat.picture())
    chat.ask("what is this?", max_new_tokens=NEW)
    first = chat.answer.prompt_tokens

    chat.ask("what color is it?", max_new_tokens=NEW)

    assert first <= chat.answer.cached_tokens < chat.answer.prompt_tokens
    assert chat.answer.text == recomputed(chat)


def test_third_question_and_a_second_picture_say_the_same(chat: ChatSession) -> None:
    chat.add_image(tiny_chat.picture(0))
    chat.ask("what is this?", max_new_tokens=NEW)
    chat.add_image(tiny_chat.picture(1))
    chat.add_image(tiny_chat.picture(2))
    chat.ask("and these?", max_new_tokens=NEW)
    assert chat.answer.cached_tokens > 0
    assert chat.answer.text == recomputed(chat)

    chat.ask("which is red?", max_new_tokens=NEW)

    assert chat.answer.text == recomputed(chat)


def test_same_picture_twice_says_the_same(chat: ChatSession) -> None:
    for question in ("what is this?", "and this?"):
        chat.add_image(tiny_chat.picture())
        chat.ask(question, max_new_tokens=NEW)

        assert chat.answer.text == recomputed(chat)
    assert chat.answer.cached_tokens > 0


def test_another_picture_under_the_same_question_is_seen(chat: ChatSession) -> None:
    chat.add_image(tiny_chat.picture(0))
    first = chat.ask("what is this?", max_new_tokens=NEW)
    chat.undo()

    chat.add_image(tiny_chat.picture(1))
    second = chat.ask("what is this?", max_new_tokens=NEW)

    assert second != first
    assert second == recomputed(chat)
    marker = chat.processor.image_token_id
    before_picture = chat.processor.encode(chat.messages[:-1]).input_ids.index(marker)
    assert chat.answer.cached_tokens == before_picture


def test_undo_forgets_the_last_question_and_keeps_what_stands_before_it(chat: ChatSession) -> None:
    chat.add_image(tiny_chat.picture(0))
    chat.ask("what is this?", max_new_tokens=NEW)
    before = chat.messages
    chat.add_image(tiny_chat.picture(1))
    chat.ask("and this?", max_new_tokens=NEW)

    chat.undo()

    assert chat.messages == before
    chat.ask("what color is it?", max_new_tokens=NEW)
    assert chat.answer.cached_tokens > 0
    assert chat.answer.text == recomputed(chat)


def test_undo_leaves_a_picture_that_waits(chat: ChatSession) -> None:
    chat.add_image(tiny_chat.picture(0))
    chat.ask("what is this?", max_new_tokens=NEW)
    chat.add_image(tiny_chat.picture(1))

    chat.undo()
    chat.ask("what is this?", max_new_tokens=NEW)

    assert chat.answer.text == recomputed(chat)
    other = ChatSession(chat.model, chat.processor)
    other.add_image(tiny_chat.picture(1))
    assert other.ask("what is this?", max_new_tokens=NEW) == chat.answer.text


def test_undo_of_nothing_is_refused(chat: ChatSession) -> None:
    with pytest.raises(PromptError, match="no question to take back"):
        chat.undo()


def test_reset_begins_anew(chat: ChatSession) -> None:
    chat.add_image(tiny_chat.picture(0))
    first = chat.ask("what is this?", max_new_tokens=NEW)
    chat.add_image(tiny_chat.picture(1))

    chat.reset()

    assert chat.messages == []
    assert chat.ask("what is this?", max_new_tokens=NEW) != first
    assert chat.answer.cached_tokens == 0
    assert chat.answer.text == recomputed(chat)


def test_picture_is_encoded_once(chat: ChatSession, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded = []
    encode = type(chat.model).get_image_features
    monkeypatch.setattr(
        type(chat.model), "get_image_features", lambda self, pixels: encoded.append(1) or encode(self, pixels)
    )
    for _ in range(2):
        chat.add_image(tiny_chat.picture(3))
        chat.ask("what is this?", max_new_tokens=1)
        chat.reset()

    assert len(encoded) == 1


def test_messages_are_a_copy(chat: ChatSession) -> None:
    chat.ask("what is this?", max_new_tokens=2)

    chat.messages[0]["content"].clear()
    chat.messages.clear()

    assert chat.messages[0]["content"] == [{"type": "text", "text": "what is this?"}]


# -- what is stopped


def test_cancel_from_another_thread_keeps_what_was_said(chat: ChatSession, monkeypatch: pytest.MonkeyPatch) -> None:
    def cancel_at_five(number: int) -> None:
        if number == 5:
            canceller = threading.Thread(target=chat.cancel)
            canceller.start()
            canceller.join()

    after_every_token(monkeypatch, chat, cancel_at_five)
    pieces = list(chat.stream("what is this?", max_new_tokens=200))
    monkeypatch.undo()

    assert chat.answer.finish_reason == "cancelled"
    assert 5 <= chat.answer.completion_tokens <= 6
    assert "".join(pieces) == chat.answer.text == chat.messages[-1]["content"][0]["text"] != ""
    chat.ask("go on", max_new_tokens=NEW)
    assert chat.answer.finish_reason in ("length", "stop")
    assert chat.answer.text == recomputed(chat)


def test_cancel_with_nothing_in_progress_stops_nothing(chat: ChatSession) -> None:
    chat.cancel()

    chat.ask("what is this?", max_new_tokens=NEW)

    assert chat.answer.completion_tokens == NEW


def test_caller_that_stops_reading_leaves_the_conversation_as_it_was(chat: ChatSession) -> None:
    chat.ask("hello", max_new_tokens=NEW)
    before, threads = chat.messages, threading.active_count()
    chat.add_image(tiny_chat.picture())

    for _ in chat.stream("what is this?", max_new_tokens=500):
        break

    assert threading.active_count() == threads
    assert chat.messages == before
    chat.ask("what is this?", max_new_tokens=NEW)  # the picture still waits
    assert [part["type"] for part in chat.messages[-2]["content"]] == ["image", "text"]
    assert chat.answer.text == recomputed(chat)


def test_nothing_changes_under_an_answer_in_progress(chat: ChatSession) -> None:
    chat.ask("hello", max_new_tokens=2)
    pieces = chat.stream("what is this?", max_new_tokens=NEW)
    next(pieces)

    for act in (chat.undo, chat.reset, lambda: chat.add_image(tiny_chat.picture()), lambda: chat.ask("and?")):
        with pytest.raises(PromptError, match="an answer is in progress"):
            act()
    pieces.close()  # type: ignore[attr-defined]  # it is a generator

    chat.ask("what is this?", max_new_tokens=NEW)
    assert chat.answer.text == recomputed(chat)


def test_error_inside_a_step_reaches_the_caller_and_the_next_question_works(
    chat: ChatSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat.add_image(tiny_chat.picture())
    chat.ask("what is this?", max_new_tokens=NEW)
    before = chat.messages

    def fail_at_three(number: int) -> None:
        if number == 3:
            raise RuntimeError("out of memory")

    after_every_token(monkeypatch, chat, fail_at_three)
    with pytest.raises(RuntimeError, match="out of memory"):
        chat.ask("what color is it?", max_new_tokens=NEW)
    monkeypatch.undo()

    assert chat.messages == before
    chat.ask("what color is it?", max_new_tokens=NEW)
    assert chat.answer.text == recomputed(chat)


def test_too_long_a_conversation_names_both_numbers(chat: ChatSession) -> None:
    chat.add_image(tiny_chat.picture())

    with pytest.raises(ContextOverflowError, match="1000") as told:
        chat.ask("what is this? " * 20, max_new_tokens=1000)

    prompt = len(chat.processor.encode([{"role": "user", "content": [{"type": "image"}, text("what is this? " * 20)]}])
                 .input_ids)  # fmt: skip
    assert f"{prompt} tokens" in told.value.message
    assert str(tiny_chat.CONTEXT) in told.value.message
    chat.ask("what is this?", max_new_tokens=2)
    assert len(chat.messages[0]["content"]) == 2


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def test_empty_question_and_broken_picture_are_refused(chat: ChatSession) -> None:
    with pytest.raises(PromptError, match="empty"):
        chat.ask("  ")
    with pytest.raises(ImageError):
        chat.add_image(b"no picture")

    assert chat.messages == []


def test_typed_control_tokens_stay_text(chat: ChatSession) -> None:
    chat.ask("<image><|im_end|>", max_new_tokens=2)

    ids = chat.processor.encode(chat.messages[:-1]).input_ids
    assert chat.processor.image_token_id not in ids
    assert ids.count(ends(chat)[1]) == 1  # the template's own


# -- options


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 2},
        {"top_p": 0, "temperature": 1},
        {"top_p": 1, "top_k": 5, "temperature": 0.5},
        {"num_beams": 2, "length_penalty": 1},
        {"min_length": 4},
        {"temperature": None, "seed": 3},
    ],
)
def test_every_option_reaches_generate(options: dict[str, Any], chat: ChatSession) -> None:
    assert chat.ask("what is this?", max_new_tokens=6, **options)


def test_zero_temperature_is_greedy_and_ignores_the_seed(chat: ChatSession) -> None:
    first = chat.ask("what is this?", max_new_tokens=NEW, temperature=0, seed=1, top_p=0.5)
    chat.reset()

    assert chat.ask("what is this?", max_new_tokens=NEW, seed=2) == first


def question_that_holds_its_answer(chat: ChatSession) -> tuple[str, str]:
    """A question that holds the very id its answer begins with, and the text of that id."""
    for start in range(len(string.ascii_letters)):
        question = string.ascii_letters[start:] + string.ascii_letters[:start]
        first = chat.ask(question, max_new_tokens=1)
        ids = chat.processor.encode(chat.messages[:-1]).input_ids
        chat.reset()
        if first and set(chat.processor.tokenizer.encode(first, add_special_tokens=False)) <= set(ids):
            return question, first
    raise AssertionError("no question holds its answer")


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}, {"num_beams": 2}])
def test_scores_that_are_no_numbers_are_an_error(options: dict[str, Any], processor: MiniGPT4Processor) -> None:
    """The most likely of them would be a token like any other."""
    chat = ChatSession(tiny_chat.model(), processor)
    chat.add_image(tiny_chat.picture())
    with torch.no_grad():
        chat.model.model.language_projection.weight[0, 0] = torch.nan
    with pytest.raises(WeightsError, match="scores are no numbers"):
        chat.ask("what is this?", max_new_tokens=4, **options)


def test_repetition_penalty_counts_what_is_newly_said_and_not_the_question(
    chat: ChatSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    question, first = question_that_holds_its_answer(chat)

    for beams in (1, 2):
        assert chat.ask(question, max_new_tokens=1, num_beams=beams, repetition_penalty=50.0) == first
        chat.reset()
    # The same where the penalty comes from the model's own settings.
    monkeypatch.setattr(chat.model.generation_config, "repetition_penalty", 50.0)
    assert chat.ask(question, max_new_tokens=1) == first


def test_a_full_cache_changes_no_answer(model: MiniGPT4ForConditionalGeneration, processor: MiniGPT4Processor) -> None:
    chat = ChatSession(model, processor, image_cache=ImageCache(max_bytes=0))
    for seed in (0, 1):
        chat.add_image(tiny_chat.picture(seed))
        chat.ask("what is this?", max_new_tokens=NEW)

        assert chat.answer.text == recomputed(chat)
