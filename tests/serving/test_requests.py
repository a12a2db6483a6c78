"""Many clients, and clients that leave: nobody is lost and nothing leaks."""

import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import psutil
import pytest

from minigpt4.inference.request import Request
from minigpt4.serving.settings import Limits, Settings
from tests.inference.slowness import slow_steps
from tests.serving.live import HELLO, MODEL, Live, live, picture_file, request_bytes, seeing

LONG = HELLO | {"max_tokens": 900}


@pytest.fixture
def one_place() -> Iterator[Live]:
    settings = Settings(MODEL, decoders=1, limits=replace(Limits(), ping_seconds=0.05))
    with live(settings, max_concurrent=1, max_queue=4) as running:
        slow_steps(running.engine, 0.005)  # else a long answer may end before the test has seen what it looks for
        yield running


def occupy(server: Live) -> socket.socket:
    """Have an answer in progress."""
    connection = server.connect()
    connection.sendall(request_bytes(LONG | {"stream": True}))
    read = b""
    while b'"content": "' not in read.partition(b'"content": ""')[2]:
        read += connection.recv(65536)
    return connection


def wait_until_full(server: Live) -> None:
    deadline = time.monotonic() + 30
    while server.engine.counts.waiting < 4:
        assert time.monotonic() < deadline, server.engine.counts
        time.sleep(0.01)


def test_a_full_queue_answers_429_at_once_with_retry_after(one_place: Live) -> None:
    held = [occupy(one_place)]
    for _ in range(4):
        held.append(one_place.connect())
        held[-1].sendall(request_bytes(LONG))
    wait_until_full(one_place)
    body = {"messages": [seeing("what?", *[picture_file(n) for n in range(8)])]}  # would have to be decoded
    took = []
    for _ in range(20):
        started = time.monotonic()
        reply = one_place.chat(body)
        took.append(time.monotonic() - started)
        assert (reply.status, reply.error["type"], reply.error["code"]) == (429, "rate_limit_error", "queue_full")
        assert int(reply.headers["retry-after"]) >= 1
    took.sort()
    print(f"429: median {took[10] * 1000:.1f} ms, largest {took[-1] * 1000:.1f} ms")
    assert took[10] < 1  # an answer takes many seconds; how many milliseconds a refusal takes is soak.py's
    for connection in held:
        connection.close()
    one_place.wait_idle()
    assert one_place.chat(HELLO).status == 200


def test_a_request_read_when_the_queue_is_full_is_refused_before_it_is_looked_at(one_place: Live) -> None:
    late = one_place.connect()
    whole = request_bytes(HELLO).replace(b'{"messages"', b"{]messages]")
    late.sendall(whole[:-10])  # let in: there is room yet, and what it sends is not known
    time.sleep(0.2)
    held = [occupy(one_place)]
    for _ in range(4):
        held.append(one_place.connect())
        held[-1].sendall(request_bytes(LONG))
    wait_until_full(one_place)
    late.sendall(whole[-10:])
    assert late.recv(65536).startswith(b"HTTP/1.1 429")
    late.close()
    for connection in held:
        connection.close()
    one_place.wait_idle()


def test_who_waits_is_told_of_it_and_of_the_place(one_place: Live) -> None:
    first = occupy(one_place)
    with one_place.connect() as second:
        second.sendall(request_bytes(LONG | {"stream": True}))
        read = b""
        while b": ping" not in read:
            read += second.recv(65536)
        assert b": ping 1 waiting before this one\n\n" in read
        first.close()
        while b'"content": "' not in read.partition(b'"content": ""')[2]:
            read += second.recv(65536)
    one_place.wait_idle()


def leave_in_the_middle(server: Live, monkeypatch: pytest.MonkeyPatch, count: int) -> list[int]:
    """Let so many clients leave, one after the other; returns the tokens said after the server knew of each."""
    requests: list[Request] = []

    submit = server.engine.submit

    def recorded(*asked: Any, **options: Any) -> Request:
        requests.append(submit(*asked, **options))
        return requests[-1]

    monkeypatch.setattr(server.engine, "submit", recorded)
    wasted = []
    for number in range(count):
        with server.connect() as connection:
            connection.sendall(request_bytes(LONG | {"stream": number % 2 == 0}))
            while len(requests) <= number or requests[number].answer.completion_tokens < 3:
                time.sleep(0.001)
        while not requests[number].cancelled:
            time.sleep(0.0002)
        at = requests[number].answer.completion_tokens
        server.wait_idle()
        wasted.append(requests[number].answer.completion_tokens - at)
    return wasted


def test_clients_that_leave_free_their_place_within_a_token(one_place: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    wasted = leave_in_the_middle(one_place, monkeypatch, 20)
    assert max(wasted) <= 1
    counts = one_place.engine.counts
    assert (counts.accepted, counts.cancelled, counts.answering, counts.waiting) == (20, 20, 0, 0)


def test_a_client_that_leaves_while_it_waits_is_never_answered(one_place: Live) -> None:
    first = occupy(one_place)
    second = one_place.connect()
    second.sendall(request_bytes(LONG))
    while one_place.engine.counts.waiting < 1:
        time.sleep(0.005)
    second.close()
    time.sleep(0.2)
    first.close()
    one_place.wait_idle()
    assert one_place.engine.counts.cancelled == 2


def test_of_those_that_come_at_once_as_many_are_admitted_as_there_is_room(one_place: Live) -> None:
    held = [one_place.connect() for _ in range(12)]
    for connection in held:
        connection.sendall(request_bytes(LONG))
    refused: list[socket.socket] = []
    deadline = time.monotonic() + 30
    while len(refused) < 7:
        assert time.monotonic() < deadline
        refused, _, _ = select.select(held, [], [], 1)
        time.sleep(0.01)
    assert {connection.recv(12) for connection in refused} == {b"HTTP/1.1 429"}
    counts = one_place.engine.counts
    assert (len(refused), counts.waiting, counts.answering) == (7, 4, 1)
    for connection in held:
        connection.close()
    one_place.wait_idle()


def test_a_crowd_on_one_place_loses_nobody() -> None:
    with live(max_concurrent=1, max_queue=3) as server:
        seen: list[int] = []

        def visit() -> None:
            for _ in range(6):
                seen.append(server.chat(HELLO | {"max_tokens": 3}).status)

        threads = [threading.Thread(target=visit) for _ in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        server.wait_idle()
        counts = server.engine.counts
        assert len(seen) == 96 and set(seen) <= {200, 429}
        assert counts.accepted == counts.completed == seen.count(200) > 0


def converse(server: Live, number: int, before_turn: Callable[[], object]) -> list[str]:
    """Hold a conversation about a picture of its own, each question after the answers before; returns those."""
    messages: list[dict[str, Any]] = [seeing(f"canary {number}", picture_file(number))]
    answers: list[str] = []
    for question in ("and then?", f"not {number + 1}?", ""):
        before_turn()
        reply = server.chat({"messages": messages, "max_tokens": 10})
        assert reply.status == 200, reply.body
        answers.append(reply.json["choices"][0]["message"]["content"])
        messages += [{"role": "assistant", "content": answers[-1]}, {"role": "user", "content": question}]
    return answers


@pytest.mark.slow
def test_interleaved_conversations_over_http_are_those_of_each_alone() -> None:
    count = 32
    with live(max_concurrent=1, read_bytes=0) as server:  # where no conversation finds anything of another
        alone = [converse(server, number, lambda: None) for number in range(count)]
    together: dict[int, list[str]] = {}
    turn = threading.Barrier(count)  # nobody's next question comes before everybody's last answer
    with live(max_concurrent=8) as server:

        def hold(number: int) -> None:
            try:
                together[number] = converse(server, number, turn.wait)
            finally:
                if number not in together:
                    turn.abort()  # the others do not wait for one that failed

        threads = [threading.Thread(target=hold, args=[number]) for number in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(250)
        answered = server.engine.counts.completed
    assert [together.get(number) for number in range(count)] == alone
    assert len({tuple(answers) for answers in alone}) > count / 2  # a mix-up would be seen
    print(f"\n{count} conversations interleaved, {answered} answers: all equal to those of each alone")


def test_new_pictures_and_connections_leave_nothing_behind() -> None:
    with live(image_bytes=2**16, read_bytes=2**20) as server:
        process = psutil.Process()

        def ask(numbers: range) -> tuple[int, int, int]:
            for number in numbers:
                reply = server.chat({"messages": [seeing("what?", picture_file(number))], "max_tokens": 1})
                assert reply.status == 200
            server.wait_idle()
            return process.memory_info().rss, process.num_threads(), process.num_fds()

        ask(range(30))
        before = ask(range(30, 60))
        after = ask(range(60, 140))
        assert after[0] - before[0] < 8 * 2**20
        assert after[1] <= before[1] and abs(after[2] - before[2]) <= 2
        assert server.server.handler.bodies.held == 0
