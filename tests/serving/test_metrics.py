"""What `/metrics` counts happened, and each once: refusals, answers that did not end, beams, decoders that died."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from minigpt4.serving import requests
from minigpt4.serving.pictures import open_messages
from tests.inference.slowness import slow_steps
from tests.serving.live import HELLO, Live, live, picture_file, request_bytes, seeing
from tests.serving.test_requests import LONG, occupy


@pytest.fixture
def slow() -> Iterator[Live]:
    """One place, one more request waits, and a long answer is still in progress whenever a test looks."""
    with live(max_concurrent=1, max_queue=1) as server:
        slow_steps(server.engine, 0.02)
        yield server


def metrics(server: Live) -> dict[str, float]:
    """All figures by their names, with labels."""
    lines = server.ask("GET", "/metrics").body.decode().splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}


def wait_for(server: Live, holds: Callable[[dict[str, float]], bool]) -> dict[str, float]:
    """Read the figures until something holds; what the engine ends is counted a moment after it."""
    deadline = time.monotonic() + 60
    while not holds(figures := metrics(server)):
        assert time.monotonic() < deadline, figures
        time.sleep(0.02)
    return figures


def test_refusals_before_and_after_a_body_is_read_are_each_counted_once(slow: Live) -> None:
    whole = request_bytes(HELLO)
    with ExitStack() as stack:
        late = stack.enter_context(slow.connect())
        late.sendall(whole[:-10])
        time.sleep(0.2)
        stack.enter_context(occupy(slow))
        stack.enter_context(slow.connect()).sendall(request_bytes(LONG))
        while slow.engine.counts.waiting < 1:
            time.sleep(0.01)
        assert [slow.chat(HELLO).status for _ in range(3)] == [429] * 3
        late.sendall(whole[-10:])
        assert late.recv(12) == b"HTTP/1.1 429"
        figures = metrics(slow)
    assert figures['minigpt4_requests_total{outcome="refused"}'] == 4
    assert figures['minigpt4_http_requests_total{method="POST",status="429"}'] == 4


def test_a_refusal_by_the_engine_is_counted_once(slow: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    others = []

    async def fill_the_queue(*asked: Any) -> list[dict[str, Any]]:
        for _ in range(2):
            others.append(slow.engine.submit(LONG["messages"], {"max_new_tokens": 900}, lambda event: None))
        return await open_messages(*asked)

    monkeypatch.setattr(requests, "open_messages", fill_the_queue)
    assert slow.chat(HELLO).status == 429
    assert metrics(slow)['minigpt4_requests_total{outcome="refused"}'] == 1
    for request in others:
        request.cancel()


def test_an_answer_whose_client_left_is_no_fast_answer(slow: Live) -> None:
    with occupy(slow):
        pass
    figures = wait_for(slow, lambda seen: seen["minigpt4_time_to_first_token_seconds_count"] == 1)
    assert figures['minigpt4_requests_total{outcome="cancelled"}'] == 1
    assert figures["minigpt4_answer_seconds_count"] == 0
    assert figures["minigpt4_time_to_first_token_seconds_sum"] > 0
    assert figures["minigpt4_completion_tokens_total"] >= 1

    assert slow.chat(HELLO).status == 200
    figures = metrics(slow)
    assert figures["minigpt4_answer_seconds_count"] == figures['minigpt4_requests_total{outcome="completed"}'] == 1
    assert figures["minigpt4_answer_seconds_sum"] > 0


def test_a_prompt_that_nobody_read_is_not_counted_as_read(slow: Live) -> None:
    with occupy(slow):
        with slow.connect() as second:
            second.sendall(request_bytes(LONG))
            while slow.engine.counts.waiting < 1:
                time.sleep(0.01)
        while slow.engine.counts.waiting:
            time.sleep(0.01)
    slow.wait_idle()
    figures = wait_for(slow, lambda seen: seen["minigpt4_time_to_first_token_seconds_count"] == 1)
    read_once = figures["minigpt4_prompt_tokens_total"]
    assert figures['minigpt4_requests_total{outcome="cancelled"}'] == 2

    usage = slow.chat(HELLO).json["usage"]
    assert read_once == usage["prompt_tokens"]
    assert metrics(slow)["minigpt4_prompt_tokens_total"] == 2 * read_once


def test_an_answer_that_failed_has_no_length(slow: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*asked: object) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(slow.engine.backend, "beam_search", fails)
    assert slow.chat(HELLO | {"num_beams": 2}).status == 500
    figures = metrics(slow)
    assert figures['minigpt4_requests_total{outcome="failed"}'] == 1
    assert figures["minigpt4_answer_seconds_count"] == figures["minigpt4_prompt_tokens_total"] == 0


def test_beams_whose_text_comes_whole_have_no_tokens_a_second(slow: Live) -> None:
    assert slow.chat(HELLO | {"num_beams": 2}).status == 200
    figures = metrics(slow)
    assert figures["minigpt4_answer_seconds_count"] == figures["minigpt4_time_to_first_token_seconds_count"] == 1
    assert figures["minigpt4_tokens_per_second_count"] == 0
    assert slow.chat(HELLO).status == 200
    assert metrics(slow)["minigpt4_tokens_per_second_count"] == 1


def test_a_decoder_that_died_over_a_map_is_counted_too(slow: Live) -> None:
    body = {"messages": [seeing("what?", picture_file())]}
    assert slow.chat(body).status == 200
    os.kill(slow.server.handler.pool.processes[0], signal.SIGKILL)
    assert slow.ask("POST", "/v1/attention", body).status == 400
    assert metrics(slow)["minigpt4_decoder_deaths_total"] == 1
