"""Connections cannot be held for nothing: slow headers, slow bodies, answers that nobody reads, and their number."""

import json
import logging
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace

import pytest

from minigpt4.serving.settings import Limits, Settings
from tests.serving.live import HELLO, MODEL, Live, live, read_all, request_bytes


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    with live() as running:
        yield running


def test_slow_senders_are_cut_off_and_do_not_slow_the_rest() -> None:
    limits = replace(Limits(), header_seconds=1.0, body_seconds=1.0)
    with live(Settings(MODEL, decoders=1, limits=limits)) as server:
        starts = [
            b"",
            b"GET /hea",
            b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: ",
            request_bytes(HELLO)[:-5],
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n5\r\n{",
            b"POST /health HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n",
        ]
        slow = [server.connect() for _ in range(60)]
        for number, connection in enumerate(slow):
            connection.sendall(starts[number % len(starts)])
        took = []
        for _ in range(20):
            started = time.monotonic()
            assert server.ask("GET", "/health").status == 200
            took.append(time.monotonic() - started)
        assert sorted(took)[10] < limits.header_seconds
        assert server.chat(HELLO).status == 200
        deadline = time.monotonic() + 15
        answers = []
        for connection in slow:
            connection.settimeout(max(0.1, deadline - time.monotonic()))
            answers.append(read_all(connection))
            connection.close()
        assert {answer[:12] for answer in answers} <= {b"", b"HTTP/1.1 408", b"HTTP/1.1 405"}
        assert sum(answer.startswith(b"HTTP/1.1 408") for answer in answers) >= 30


def test_a_second_request_on_a_connection_is_timed_too() -> None:
    limits = replace(Limits(), header_seconds=0.4)
    with live(Settings(MODEL, decoders=1, limits=limits)) as server, server.connect(10) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert connection.recv(4096).startswith(b"HTTP/1.1 200")
        connection.sendall(b"GET /hea")
        assert b"408" in read_all(connection)


def test_a_client_that_never_reads_is_cut_off_and_its_answer_given_up() -> None:
    limits = replace(Limits(), write_seconds=0.5, ping_seconds=0.001)
    with live(Settings(MODEL, decoders=1, limits=limits), max_concurrent=1) as server:
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        connection.connect(("127.0.0.1", server.port))
        page = b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n"
        connection.settimeout(0.2)
        with pytest.raises((TimeoutError, ConnectionError)):  # pipelined requests whose answers nobody reads
            while True:
                connection.sendall(page * 50)
        deadline = time.monotonic() + 20
        while len(server.server.server_state.connections) > 0:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        connection.close()
        assert server.chat(HELLO).status == 200


def test_more_connections_than_allowed_push_out_the_idle_ones() -> None:
    limits = replace(Limits(), max_connections=20)
    with live(Settings(MODEL, decoders=1, limits=limits)) as server, ExitStack() as stack:
        for _ in range(60):
            stack.enter_context(server.connect())
        assert server.ask("GET", "/health").status == 200
        assert len(server.server.server_state.connections) <= 20


@pytest.mark.parametrize(
    "data",
    [
        b"\r\n\r\n",
        b"GET\r\n\r\n",
        b"\x16\x03\x01\x02\x00" * 20,
        b"GET / HTTP/9.9\r\n\r\n",
        b"\x00" * 100,
        b"GET /health HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"POST /health HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip, chunked\r\n\r\n",
    ],
)
def test_what_is_no_http_is_refused_in_json(data: bytes, server: Live) -> None:
    with server.connect(5) as connection:
        connection.sendall(data)
        connection.shutdown(1)
        answered = read_all(connection)
    assert not answered or answered.startswith(b"HTTP/1.1 4")
    if answered:
        first, _ = json.JSONDecoder().raw_decode(answered.partition(b"\r\n\r\n")[2].decode())
        assert set(first) == {"error"}


@pytest.mark.parametrize("method", [b"HEAD", b"POST", b"GET"])
@pytest.mark.parametrize("pause", [0, 0.1])
def test_garbage_in_place_of_a_body_is_no_fault_of_the_server(
    method: bytes, pause: float, server: Live, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR), server.connect(5) as connection:
        head = method + b" /health HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
        connection.sendall(head + (b"" if pause else b"zz\r\n"))
        if pause:
            time.sleep(pause)
            connection.sendall(b"zz\r\n")
        answered = read_all(connection)
    assert not answered or answered[9:12] in (b"200", b"400", b"405")
    assert not caplog.records
