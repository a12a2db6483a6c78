"""Maps over HTTP: what they show, what is refused, and that slow senders keep nobody out."""

import json
import select
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from minigpt4.inference.backends.torch.attention import AttentionMap, AttentionMaps
from minigpt4.serving.attention import MAX_WAITING
from tests.serving.live import Live, Reply, live, picture_file, read_all, seeing

ASKED = json.dumps({"messages": [seeing("what?", picture_file())]}).encode()
HEAD = (
    b"POST /v1/attention HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
    b"Content-Length: %d\r\n\r\n" % len(ASKED)
)

SEEN = seeing("What?", picture_file())
RED = {"role": "assistant", "content": "Red."}
LONG = {"role": "assistant", "content": "flower " * 4000}


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    with live() as running:
        yield running


def look(server: Live, *messages: object, span: list[int] | None = None) -> Reply:
    return server.ask("POST", "/v1/attention", {"messages": list(messages)} | ({"span": span} if span else {}))


def test_a_map_of_a_picture_and_of_an_answer(server: Live) -> None:
    answer = {"role": "assistant", "content": "It is red."}
    replies = [look(server, SEEN), look(server, SEEN, answer), look(server, SEEN, answer, span=[6, 9])]
    assert [reply.status for reply in replies] == [200, 200, 200]
    assert [(reply.json["of"], reply.json["text"]) for reply in replies[1:]] == [
        ("answer", "It is red."),
        ("answer", "red"),
    ]
    maps = [reply.json["values"] for reply in replies]
    for values in maps:
        assert len(values) == len(values[0])
        assert (min(map(min, values)), max(map(max, values))) == (0, 1)
    assert maps[0] != maps[1] != maps[2]


@pytest.mark.parametrize(
    ("messages", "more", "sentence"),
    [
        ([{"role": "user", "content": "hello"}], {}, "no picture"),
        ([SEEN], {"span": [0, 2]}, "no answer"),
        ([SEEN, RED], {"span": [90, 91]}, "has 4"),
        ([SEEN, RED], {"span": [0]}, "span"),
        ([SEEN, RED], {"span": [3, 2]}, ""),
        ([seeing("What?", b"no picture")], {}, "picture"),
        ([SEEN], {"layer": 3}, "layer"),
        ([], {}, "messages"),
    ],
)
def test_what_no_map_is_made_of_is_refused_in_a_sentence(
    messages: list[Any], more: dict[str, Any], sentence: str, server: Live
) -> None:
    reply = server.ask("POST", "/v1/attention", {"messages": messages} | more)
    assert reply.status == 400
    assert sentence in reply.error["message"]


def test_a_map_of_a_long_answer_is_refused_before_it_is_measured_and_one_of_its_early_words_is_drawn(
    server: Live,
) -> None:
    for span in (None, [20_000, 20_010]):
        started = time.monotonic()
        reply = look(server, SEEN, LONG, span=span)
        assert reply.status == 400 and "more than 1024 tokens" in reply.error["message"]
        assert time.monotonic() - started < 20  # quadratic, it took minutes
    assert look(server, SEEN, LONG, span=[0, 6]).json["text"].startswith("flower")


def begin(server: Live, count: int) -> list[socket.socket]:
    """Send headers and the first character of a body, so many times, until all of them are being read."""
    connections = [server.connect() for _ in range(count)]
    for connection in connections:
        connection.sendall(HEAD + ASKED[:1])
    deadline = time.monotonic() + 25  # a body that is slow is given up after 30
    while (held := server.server.handler.bodies.held) < count:
        assert time.monotonic() < deadline, f"{held} of {count} bodies are being read"
        time.sleep(0.01)
    return connections


def test_bodies_that_are_still_arriving_keep_nobody_out() -> None:
    with live() as server:
        slow = begin(server, 2 * MAX_WAITING)
        replies = [server.ask("POST", "/v1/attention", ASKED) for _ in range(2)]

        assert [reply.status for reply in replies] == [200, 200], replies[0].body
        for connection in slow:
            connection.close()


def test_a_map_too_many_is_refused_when_its_body_is_there_and_before_it_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    go_on = threading.Event()
    look = AttentionMaps.look

    def held(self: AttentionMaps, *asked: Any) -> AttentionMap:
        go_on.wait(120)
        return look(self, *asked)

    monkeypatch.setattr(AttentionMaps, "look", held)
    with live() as server:
        waiting = begin(server, MAX_WAITING + 1)
        for connection in waiting:
            connection.sendall(ASKED[1:])
        (refused,), _, _ = select.select(waiting, [], [], 60)  # no map is done: this one is refused
        told = read_all(refused)
        unread = server.raw(HEAD + ASKED[:1])
        go_on.set()
        made = [read_all(connection)[:12] for connection in waiting if connection is not refused]
        for connection in waiting:
            connection.close()
        again = server.ask("POST", "/v1/attention", ASKED)

    for answer in (told, unread):
        assert answer.startswith(b"HTTP/1.1 429") and b"retry-after: 5\r\n" in answer.lower()
        assert b"4 maps are being made or wait already" in answer
    assert made == [b"HTTP/1.1 200"] * MAX_WAITING
    assert again.status == 200
