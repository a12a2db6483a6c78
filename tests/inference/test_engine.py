"""Many who ask at once get the answers they would get alone, nothing is lost, and a place is given back at once."""

import functools
import itertools
import math
import queue
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor

from minigpt4.errors import ContextOverflowError, MiniGPT4Error, ServerBusyError, UsageError, WeightsError
from minigpt4.inference.backends.protocol import Logits
from minigpt4.inference.engine import Engine
from minigpt4.inference.prefix_cache import Prefix
from minigpt4.inference.request import Event, Request
from minigpt4.model import MiniGPT4ForConditionalGeneration
from minigpt4.processing.pictures import content_hash
from tests import tiny_chat
from tests.inference.slowness import slow_steps

NEW = 12


@pytest.fixture
def model() -> MiniGPT4ForConditionalGeneration:
    return tiny_chat.model()


@pytest.fixture
def engine(model: MiniGPT4ForConditionalGeneration) -> Iterator[Engine]:
    made = Engine(model, tiny_chat.processor(), max_concurrent=4, max_queue=64)
    yield made
    made.close(20)


class Heard:
    """Collects what an engine delivers."""

    def __init__(self) -> None:
        self.events: queue.Queue[Event] = queue.Queue()

    def __call__(self, event: Event) -> None:
        self.events.put(event)

    def text(self) -> str:
        pieces = []
        while (event := self.events.get(timeout=60)) is not None:
            if isinstance(event, BaseException):
                raise event
            pieces.append(event)
        return "".join(pieces)


def said(text: str, *pictures: Image.Image) -> dict[str, Any]:
    parts = [{"type": "image", "image": picture, "key": content_hash(picture)} for picture in pictures]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def answered(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def picture(number: int) -> Image.Image:
    return Image.new("RGB", (16, 16), ((37 * number) % 256, (91 * number) % 256, 128))


def ask(engine: Engine, messages: list[dict[str, Any]], **options: Any) -> tuple[Request, Heard]:
    heard = Heard()
    request = engine.submit(messages, {"max_new_tokens": NEW, **options}, heard)
    return request, heard


def alone(questions: list[str], number: int, *, max_new_tokens: int = NEW, **options: Any) -> list[str]:
    """The answers of the library's `generate`, each from its whole conversation."""
    model, processor = tiny_chat.model(), tiny_chat.processor()
    conversation: list[dict[str, Any]] = []
    for question in questions:
        conversation.append(said(question, *([] if conversation else [picture(number)])))
        inputs = processor.apply_chat_template(
            conversation, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
        )
        length = inputs["input_ids"].shape[1]
        rules = [RepetitionPenaltyLogitsProcessor(options.get("repetition_penalty", 1.0), prompt_ignore_length=length)]
        if "seed" in options:
            torch.manual_seed(options["seed"])
        more: dict[str, Any] = {k: v for k, v in options.items() if k not in ("seed", "repetition_penalty")}
        more |= {"do_sample": True, "top_k": more.get("top_k", 0)} if "temperature" in options else {"do_sample": False}
        ends = processor.tokenizer.convert_tokens_to_ids(["</s>", "<|im_end|>"])
        ids = model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            eos_token_id=ends,
            logits_processor=LogitsProcessorList(rules),
            **more,
        )[0, length:]
        conversation.append(answered(processor.tokenizer.decode(ids, skip_special_tokens=True).strip()))
    return [message["content"][0]["text"] for message in conversation[1::2]]


def test_one_answer_is_that_of_generate(engine: Engine) -> None:
    request, heard = ask(engine, [said("what is this?", picture(1))])
    assert [heard.text()] == alone(["what is this?"], 1)
    assert request.answer.text == alone(["what is this?"], 1)[0]
    assert (request.state, request.answer.completion_tokens > 0) == ("done", True)


def test_many_conversations_at_once_are_those_of_each_alone(engine: Engine) -> None:
    count, questions = 10, ["what is this?", "and why?", "say more"]
    conversations: list[list[dict[str, Any]]] = [[said(questions[0], picture(n))] for n in range(count)]
    for turn in range(len(questions)):
        running = [ask(engine, conversation, max_new_tokens=NEW) for conversation in conversations]
        for number, (_, heard) in enumerate(running):
            conversations[number].append(answered(heard.text()))
            if turn + 1 < len(questions):
                conversations[number].append(said(questions[turn + 1]))
    for number, conversation in enumerate(conversations):
        answers = [m["content"][0]["text"] for m in conversation if m["role"] == "assistant"]
        assert answers == alone(questions, number), number


def test_answer_lengths_different_length_leave_and_join(engine: Engine) -> None:
    running = [ask(engine, [said("go", picture(n))], max_new_tokens=2 + 3 * n) for n in range(9)]
    for number, (_, heard) in enumerate(running):
        assert [heard.text()] == alone(["go"], number, max_new_tokens=2 + 3 * number)


def test_a_second_question_reads_only_what_is_new(engine: Engine) -> None:
    first, heard = ask(engine, [said("what is this?", picture(1))])
    messages = [said("what is this?", picture(1)), answered(heard.text()), said("why?")]
    second, heard = ask(engine, messages)
    heard.text()
    assert second.answer.cached_tokens >= first.answer.prompt_tokens - 1 > 0


def test_conversations_that_take_turns_each_go_on_from_their_own(engine: Engine) -> None:
    conversations = [[said(f"{n} is the number of this one, what is it?", picture(n))] for n in range(4)]
    before: list[list[int]] = [[] for _ in conversations]
    for turn in range(3):
        for number, conversation in enumerate(conversations):
            request, heard = ask(engine, conversation)
            conversation.append(answered(heard.text()))
            assert request.answer.cached_tokens >= len(before[number]) - 1, (turn, number)
            before[number] = request.ids
            conversation.append(said("and now?"))


def test_a_beginning_that_others_share_is_read_once_and_stays(engine: Engine) -> None:
    instructions = {"role": "system", "content": [{"type": "text", "text": "Be brief and friendly, in one sentence."}]}
    _, heard = ask(engine, [instructions, said("what is this?", picture(1))])
    first = heard.text()
    other, heard = ask(engine, [instructions, said("who goes there?", picture(2))])
    heard.text()
    again, heard = ask(engine, [instructions, said("what is this?", picture(1))])
    assert heard.text() == first
    assert other.answer.cached_tokens > 20
    assert again.answer.cached_tokens == again.answer.prompt_tokens - 1


def test_the_same_question_again_and_again_is_kept_once(engine: Engine) -> None:
    for _ in range(5):
        _, heard = ask(engine, [said("what is this?", picture(1))])
        heard.text()
    assert len(engine.prefix_cache) == 1


def test_a_seed_draws_the_same_answer_whoever_else_is_answered(engine: Engine) -> None:
    options = {"temperature": 1.5, "seed": 5}
    _, heard = ask(engine, [said("draw", picture(1))], **options)
    first = heard.text()
    others = [ask(engine, [said("other", picture(n))], temperature=1.0) for n in range(3)]
    _, heard = ask(engine, [said("draw", picture(1))], **options)
    assert heard.text() == first
    _, heard = ask(engine, [said("draw", picture(1))], temperature=1.5, seed=6)
    assert heard.text() != first
    for _, other in others:
        other.text()


def test_beams_are_those_of_generate(engine: Engine) -> None:
    _, heard = ask(engine, [said("what is this?", picture(1))], num_beams=3)
    assert [heard.text()] == alone(["what is this?"], 1, num_beams=3)


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("of_the_model", [False, True])
def test_a_penalty_for_repetition_counts_the_answer_alone(
    of_the_model: bool, num_beams: int, engine: Engine, model: MiniGPT4ForConditionalGeneration
) -> None:
    question, penalty = "cir bsy the the the cir bsy man man", {"repetition_penalty": 3.0}
    if of_the_model:
        model.generation_config.repetition_penalty = 3.0

    _, heard = ask(engine, [said(question, picture(1))], num_beams=num_beams, **({} if of_the_model else penalty))

    expected = alone([question], 1, num_beams=num_beams, **penalty)
    free = alone([question], 1, num_beams=num_beams)
    assert [heard.text()] == expected != free
    _, heard = ask(engine, [said(question, picture(1))], num_beams=num_beams, repetition_penalty=1.0)
    assert [heard.text()] == free


SETTINGS: list[dict[str, Any]] = [
    {"temperature": 0.7},
    {"temperature": 1.5, "top_k": 7},
    {"temperature": 1.5, "top_p": 0.6},
    {"temperature": 2.0, "min_p": 0.05},
    {"temperature": 1.2, "top_k": 30, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.3},
    {"temperature": 1.0, "min_new_tokens": 5},
]


@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_seeded_draws_are_those_of_generate(options: dict[str, Any], engine: Engine) -> None:
    for seed in range(3):
        ours = {"min_length" if name == "min_new_tokens" else name: value for name, value in options.items()}
        _, heard = ask(engine, [said("what is this?", picture(1))], seed=seed, **ours)

        assert [heard.text()] == alone(["what is this?"], 1, seed=seed, **options)


@pytest.mark.parametrize("settings", [{"no_repeat_ngram_size": 1}, {"bad_words_ids": None}, {"top_p": 0.3}])
def test_settings_of_a_models_folder_hold(
    settings: dict[str, Any], engine: Engine, model: MiniGPT4ForConditionalGeneration
) -> None:
    free = alone(["what is this?"], 1, temperature=1.5, seed=1)
    if "bad_words_ids" in settings:
        settings = {"bad_words_ids": [[i] for i in engine.backend.tokenizer.encode(free[0])]}
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    engine = Engine(model, tiny_chat.processor())

    answer = engine.answer([said("what is this?", picture(1))], max_new_tokens=NEW, temperature=1.5, seed=1)

    assert [answer.text] == alone(["what is this?"], 1, temperature=1.5, seed=1, **settings) != free


def test_answers_in_this_thread_are_in_order_and_those_of_each_alone(engine: Engine) -> None:
    threads = threading.active_count()

    answers = [a.text for a in engine.answer_all(([said("go", picture(n))] for n in range(11)), max_new_tokens=NEW)]

    assert answers == [alone(["go"], n)[0] for n in range(11)]
    assert (threading.active_count(), engine.counts.completed) == (threads, 11)


def test_a_conversation_that_fails_ends_the_others_in_this_thread(engine: Engine) -> None:
    conversations = [[said("go", picture(n))] for n in range(3)] + [[said("x " * 2000)]]
    with pytest.raises(ContextOverflowError):
        list(engine.answer_all(conversations, max_new_tokens=NEW))
    assert engine.counts.answering == engine.counts.waiting == 0
    assert [engine.answer(conversations[0], max_new_tokens=NEW).text] == alone(["go"], 0)


def test_others_are_answered_and_leave_between_the_tokens_of_a_search() -> None:
    engine = Engine(tiny_chat.model(), tiny_chat.processor(), max_concurrent=2, max_queue=8)
    long = {"num_beams": 4, "max_new_tokens": 900, "min_length": 900}
    search, searched = ask(engine, [said("go", picture(1))], **long)
    another, not_answered = ask(engine, [said("go", picture(2))], **long)
    _, heard = ask(engine, [said("what is this?", picture(3))])
    assert [heard.text()] == alone(["what is this?"], 3)
    left, nothing = ask(engine, [said("go", picture(4))], **long)
    left.cancel()
    assert nothing.text() == ""
    assert (search.state, another.state) == ("answering", "waiting")

    engine.close(0)
    assert (searched.text(), not_answered.text()) == ("", "")
    assert (search.answer.finish_reason, another.answer.finish_reason) == ("cancelled", "cancelled")
    assert engine.counts.answering == 0


def test_a_search_is_the_same_with_others_between_its_tokens(engine: Engine) -> None:
    options = {"num_beams": 3, "temperature": 1.5, "seed": 3}
    expected = alone(["what is this?"], 1, **options)
    with engine._lock:
        _, searched = ask(engine, [said("what is this?", picture(1))], **options)
        others = [ask(engine, [said("go", picture(n))], temperature=1.0)[1] for n in range(3)]
    assert [searched.text()] == expected
    for other in others:
        other.text()


def test_a_stop_string_ends_an_answer_and_is_not_said(engine: Engine) -> None:
    _, heard = ask(engine, [said("what is this?", picture(1))])
    whole = heard.text()
    stop = whole[3:5]
    heard = Heard()
    request = engine.submit([said("what is this?", picture(1))], {"max_new_tokens": NEW}, heard, stop=[stop])
    assert heard.text() == whole.partition(stop)[0].rstrip()
    assert request.answer.finish_reason == "stop"


def test_a_full_queue_refuses_at_once_and_loses_nothing() -> None:
    engine = Engine(tiny_chat.model(), tiny_chat.processor(), max_concurrent=1, max_queue=3)
    slow_steps(engine, 0.01)
    running, refused = [], 0
    for number in range(12):
        try:
            running.append(ask(engine, [said("go", picture(number))], max_new_tokens=100))
        except ServerBusyError:
            refused += 1
    assert refused >= 7
    assert all(isinstance(heard.text(), str) for _, heard in running)
    counts = engine.counts
    assert (counts.accepted, counts.completed, counts.refused) == (len(running), len(running), refused)
    engine.close(20)


def test_what_comes_before_the_first_is_taken_up_has_its_place_too() -> None:
    engine = Engine(tiny_chat.model(), tiny_chat.processor(), max_concurrent=1, max_queue=3)
    with engine._lock:  # its thread takes nothing up meanwhile
        running = [ask(engine, [said("go", picture(number))], max_new_tokens=4) for number in range(4)]
        assert engine.room == 0
        with pytest.raises(ServerBusyError, match="has 4 requests waiting"):
            ask(engine, [said("go")])
    assert all(isinstance(heard.text(), str) for _, heard in running)
    engine.close(20)
    assert engine.room == 4


def test_a_cancelled_answer_ends_within_a_token_and_frees_its_place(engine: Engine) -> None:
    slow_steps(engine, 0.01)
    request, heard = ask(engine, [said("go", picture(1))], max_new_tokens=900)
    while request.answer.completion_tokens < 5:
        time.sleep(0.001)
    request.cancel()
    at = request.answer.completion_tokens
    heard.text()
    assert request.answer.finish_reason == "cancelled"
    assert request.answer.completion_tokens <= at + 1
    assert (engine.counts.answering, engine.counts.cancelled) == (0, 1)


def test_a_request_cancelled_while_it_waits_is_never_answered() -> None:
    engine = Engine(tiny_chat.model(), tiny_chat.processor(), max_concurrent=1, max_queue=8)
    slow_steps(engine, 0.01)
    first, _ = ask(engine, [said("go", picture(1))], max_new_tokens=200)
    second, heard = ask(engine, [said("go", picture(2))])
    second.cancel()
    assert heard.text() == ""
    assert (second.answer.finish_reason, second.answer.completion_tokens) == ("cancelled", 0)
    first.cancel()
    engine.close(20)


def test_a_deadline_gives_an_answer_up(engine: Engine) -> None:
    slow_steps(engine, 0.01)
    heard = Heard()
    request = engine.submit([said("go", picture(1))], {"max_new_tokens": 900}, heard, timeout=0.3)
    heard.text()
    assert request.answer.finish_reason == "cancelled"
    assert 0.2 < request.answer.seconds < 5


@pytest.mark.parametrize(
    ("messages", "options", "error"),
    [
        ([{"role": "user", "content": ""}], {}, MiniGPT4Error),
        ([said("x")], {"max_new_tokens": 10**5}, ContextOverflowError),
        ([said("x")], {"top_q": 1}, UsageError),
    ],
)
def test_what_makes_no_sense_is_refused_before_it_waits(
    messages: list[dict[str, Any]], options: dict[str, Any], error: type[Exception], engine: Engine
) -> None:
    with pytest.raises(error):
        engine.submit(messages, options, Heard())
    assert engine.counts.accepted == 0


def test_what_goes_wrong_with_one_is_told_to_it_alone(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("a reason")

    with monkeypatch.context() as patch:
        patch.setattr(engine.backend, "encode", broken)
        _, heard = ask(engine, [said("go", picture(40))])
        with pytest.raises(RuntimeError, match="a reason"):
            heard.text()
    _, heard = ask(engine, [said("what is this?", picture(1))])
    assert [heard.text()] == alone(["what is this?"], 1)


def test_a_step_that_fails_ends_those_in_progress_and_not_the_engine(
    engine: Engine, model: MiniGPT4ForConditionalGeneration, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where memory runs out: what the batch holds is not known then."""
    slow_steps(engine, 0.01)
    forward, steps = model.forward, itertools.count()

    @functools.wraps(forward)
    def failing(*arguments: Any, **more: Any) -> object:
        if next(steps) == 20:
            raise torch.OutOfMemoryError("a reason")
        return forward(*arguments, **more)

    monkeypatch.setattr(model, "forward", failing)
    running = [ask(engine, [said("go", picture(n))], max_new_tokens=900)[1] for n in range(2)]

    for heard in running:
        with pytest.raises(torch.OutOfMemoryError, match="a reason"):
            heard.text()
    _, heard = ask(engine, [said("what is this?", picture(1))])
    assert [heard.text()] == alone(["what is this?"], 1)
    counts = engine.counts
    assert (counts.failed, counts.completed, counts.answering) == (2, 1, 0)


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}, {"num_beams": 2}])
@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_scores_that_are_no_numbers_are_an_error_of_the_answer_they_belong_to(
    number: float,
    options: dict[str, Any],
    engine: Engine,
    model: MiniGPT4ForConditionalGeneration,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    forward = model.forward

    @functools.wraps(forward)
    def broken(*arguments: Any, **more: Any) -> object:
        output = forward(*arguments, **more)
        if more.get("mm_encoder_outputs") is not None:  # the one with a picture
            output.logits[0, -1, 5] = number
        return output

    monkeypatch.setattr(model, "forward", broken)
    _, sound = ask(engine, [said("hello")])
    _, heard = ask(engine, [said("what is this?", picture(1))], **options)
    with pytest.raises(WeightsError, match="scores are no numbers"):
        heard.text()

    monkeypatch.undo()
    assert sound.text() == engine.answer([said("hello")], max_new_tokens=NEW).text
    _, heard = ask(engine, [said("what is this?", picture(1))])
    assert [heard.text()] == alone(["what is this?"], 1)


def test_an_answer_among_others_whose_scores_are_no_numbers_fails_alone(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow_steps(engine, 0.01)
    step = engine.backend.step

    def broken(slots: list[Any], tokens: list[int]) -> Logits:
        logits = step(slots, tokens)
        if len(tokens) == 3:
            logits[1] = math.nan
        return logits

    monkeypatch.setattr(engine.backend, "step", broken)
    with engine._lock:  # its thread takes nothing up meanwhile
        running = [ask(engine, [said("what is this?", picture(number))])[1] for number in range(3)]

    with pytest.raises(WeightsError):
        running[1].text()
    assert [running[n].text() for n in (0, 2)] == [alone(["what is this?"], n)[0] for n in (0, 2)]


def test_an_answer_whose_end_fails_is_told_so_and_the_others_go_on(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep, ends = engine.prefix_cache.keep, itertools.count()

    def failing(prefix: Prefix) -> None:
        if next(ends) == 0:
            raise torch.OutOfMemoryError("a reason")
        keep(prefix)

    monkeypatch.setattr(engine.prefix_cache, "keep", failing)
    with engine._lock:  # its thread takes nothing up meanwhile
        _, short = ask(engine, [said("what is this?", picture(1))], max_new_tokens=3)
        _, long = ask(engine, [said("what is this?", picture(2))])

    with pytest.raises(torch.OutOfMemoryError, match="a reason"):
        short.text()
    assert [long.text()] == alone(["what is this?"], 2)
    assert (engine.counts.failed, engine.counts.completed) == (1, 1)


def test_closing_finishes_what_is_accepted_and_takes_nothing_more() -> None:
    engine = Engine(tiny_chat.model(), tiny_chat.processor(), max_concurrent=2)
    running = [ask(engine, [said("go", picture(n))]) for n in range(5)]
    engine.close(30)
    assert [heard.text() for _, heard in running]
    assert engine.counts.completed == 5
    with pytest.raises(ServerBusyError, match="closing"):
        ask(engine, [said("go")])


def test_a_search_with_beams_is_given_up_too(engine: Engine) -> None:
    request, heard = ask(engine, [said("go", picture(1))], max_new_tokens=900, num_beams=4)
    while request.state == "waiting":
        time.sleep(0.001)
    started = time.monotonic()
    request.cancel()
    heard.text()
    assert time.monotonic() - started < 3
    assert (request.answer.finish_reason, engine.counts.cancelled) == ("cancelled", 1)
