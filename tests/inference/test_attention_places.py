"""Who waits for a map has a place, and nobody else: those who only send slowly keep nobody out."""

import json
import select
import socket
import threading
import time
from typing import Any

import pytest

from minigpt4.inference.attention import AttentionMap, AttentionMaps
from minigpt4.serving.http.attention_route import MAX_WAITING
from tests.serving.live import Live, live, picture_file, read_all, seeing

ASKED = json.dumps({"messages": [seeing("what?", picture_file())]}).encode()
HEAD = (
    b"POST /v1/attention HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
    b"Content-Length: %d\r\n\r\n" % len(ASKED)
)


def begin(server: Live, count: int) -> list[socket.socket]:
    """Send headers and the first character of a body, so many times, until all of them are being read."""
    connections = [server.connect() for _ in range(count)]
    for connection in connections:
        connection.sendall(HEAD + ASKED[:1])
    deadline = time.monotonic() + 25  # a body that is slow is given up after 30
    while (held := server.server.desk.bodies.held) < count:
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
