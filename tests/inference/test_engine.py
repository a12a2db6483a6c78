"""Many who ask at once get the answers they would get alone, nothing is lost, and a place is given back at once."""

import functools
import itertools
import math
import queue
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from PIL import Image

from minigpt4.errors import ContextOverflowError, MiniGPT4Error, ServerBusyError, UsageError, WeightsError
from minigpt4.inference.chat import ChatSession
from minigpt4.inference.engine import Engine
from minigpt4.inference.reading import Read
from minigpt4.inference.request import Event, Request
from minigpt4.processing.pictures import content_hash
from tests import tiny_chat
from tests.inference.slowness import slow_steps

NEW = 12


@pytest.fixture
def engine() -> Iterator[Engine]:
    made = Engine(tiny_chat.model(), tiny_chat.processor(), max_concurrent=4, max_queue=64)
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


def alone(questions: list[str], number: int, **options: Any) -> list[str]:
    chat = ChatSession(tiny_chat.model(), tiny_chat.processor())
    chat.add_image(picture(number))
    return [chat.ask(question, max_new_tokens=NEW, **options) for question in questions]


def test_one_answer_is_the_sessions(engine: Engine) -> None:
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


def test_answers_of_different_length_leave_and_join(engine: Engine) -> None:
    running = [ask(engine, [said("go", picture(n))], max_new_tokens=2 + 3 * n) for n in range(9)]
    for number, (_, heard) in enumerate(running):
        chat = ChatSession(tiny_chat.model(), tiny_chat.processor())
        chat.add_image(picture(number))
        assert heard.text() == chat.ask("go", max_new_tokens=2 + 3 * number)


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
    assert len(engine._memory) == 1


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


def test_beams_are_the_sessions(engine: Engine) -> None:
    _, heard = ask(engine, [said("what is this?", picture(1))], num_beams=3)
    assert [heard.text()] == alone(["what is this?"], 1, num_beams=3)


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("of_the_model", [False, True])
def test_a_penalty_for_repetition_is_the_sessions(
    of_the_model: bool, num_beams: int, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    question, options = "cir bsy the the the cir bsy man man", {"num_beams": num_beams}
    free = alone([question], 1, **options)
    model = tiny_chat.model()
    if of_the_model:
        for one in (engine.model, model):
            monkeypatch.setattr(one.generation_config, "repetition_penalty", 3.0)
    else:
        options["repetition_penalty"] = 3.0  # type: ignore[assignment]
    chat = ChatSession(model, tiny_chat.processor())
    chat.add_image(picture(1))
    expected = chat.ask(question, max_new_tokens=NEW, **options)

    _, heard = ask(engine, [said(question, picture(1))], **options)

    assert heard.text() == expected
    assert [expected] != free


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
    with engine._change:
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
    with engine._change:  # its thread takes nothing up meanwhile
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
        raise RuntimeError("a secret")

    with monkeypatch.context() as patch:
        patch.setattr("minigpt4.inference.engine.embed", broken)
        _, heard = ask(engine, [said("go", picture(40))])
        with pytest.raises(MiniGPT4Error) as told:
            heard.text()
    assert "secret" not in str(told.value)
    _, heard = ask(engine, [said("what is this?", picture(1))])
    assert [heard.text()] == alone(["what is this?"], 1)


def test_a_step_that_fails_ends_those_in_progress_and_not_the_engine(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where memory runs out: what the batch holds is not known then."""
    slow_steps(engine, 0.01)
    step, steps = engine._batch.step, itertools.count()

    def failing(tokens: list[int]) -> torch.Tensor:
        if next(steps) == 20:
            raise torch.OutOfMemoryError("a secret")
        return step(tokens)

    monkeypatch.setattr(engine._batch, "step", failing)
    running = [ask(engine, [said("go", picture(n))], max_new_tokens=900)[1] for n in range(2)]

    for heard in running:
        with pytest.raises(MiniGPT4Error, match=r"^the answer failed$"):
            heard.text()
    _, heard = ask(engine, [said("what is this?", picture(1))])
    assert [heard.text()] == alone(["what is this?"], 1)
    counts = engine.counts
    assert (counts.failed, counts.completed, counts.answering) == (2, 1, 0)


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}, {"num_beams": 2}])
@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_scores_that_are_no_numbers_are_an_error_of_the_answer_they_belong_to(
    number: float, options: dict[str, Any], engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = engine.model.forward

    @functools.wraps(forward)
    def broken(*arguments: Any, **more: Any) -> object:
        output = forward(*arguments, **more)
        if more.get("mm_encoder_outputs") is not None:  # the one with a picture
            output.logits[0, -1, 5] = number
        return output

    monkeypatch.setattr(engine.model, "forward", broken)
    _, sound = ask(engine, [said("hello")])
    _, heard = ask(engine, [said("what is this?", picture(1))], **options)
    with pytest.raises(WeightsError, match="scores are no numbers"):
        heard.text()

    monkeypatch.undo()
    assert sound.text() == ChatSession(tiny_chat.model(), tiny_chat.processor()).ask("hello", max_new_tokens=NEW)
    _, heard = ask(engine, [said("what is this?", picture(1))])
    assert [heard.text()] == alone(["what is this?"], 1)


def test_an_answer_among_others_whose_scores_are_no_numbers_fails_alone(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow_steps(engine, 0.01)
    step = engine._batch.step

    def broken(tokens: list[int]) -> torch.Tensor:
        logits = step(tokens)
        if len(tokens) == 3:
            logits[1] = math.nan
        return logits

    monkeypatch.setattr(engine._batch, "step", broken)
    with engine._change:  # its thread takes nothing up meanwhile
        running = [ask(engine, [said("what is this?", picture(number))])[1] for number in range(3)]

    with pytest.raises(WeightsError):
        running[1].text()
    assert [running[n].text() for n in (0, 2)] == [alone(["what is this?"], n)[0] for n in (0, 2)]


def test_an_answer_whose_end_fails_is_told_so_and_the_others_go_on(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep, ends = engine._memory.keep, itertools.count()

    def failing(read: Read) -> None:
        if next(ends) == 0:
            raise torch.OutOfMemoryError("a secret")
        keep(read)

    monkeypatch.setattr(engine._memory, "keep", failing)
    with engine._change:  # its thread takes nothing up meanwhile
        _, short = ask(engine, [said("what is this?", picture(1))], max_new_tokens=3)
        _, long = ask(engine, [said("what is this?", picture(2))])

    with pytest.raises(MiniGPT4Error, match=r"^the answer failed$"):
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
