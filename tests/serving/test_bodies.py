"""Bodies are bounded while they are read: kind, length, time, and what their JSON may hold."""

import time
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.serving.live import HELLO, Live, live, read_all, request_bytes
from tests.serving.test_errors import check

NO_BODIES = [
    b"", b" ", b"null", b"1", b'"x"', b"[]", b"{", b"{}", b"]", b"{'messages': []}",
    b'{"messages": [{"role": "user", "content": "x"}]', b'{"messages": [{"role": "user", "content": "x"}],}',
    b"\xef\xbb\xbf{}", b"\xff\xfe{\0}\0", b"\x00", b"\xff" * 100, b'{"messages": "\xff"}',
    b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
    b'{"messages": [{"role": "user", "content": "x"}], "stop": "\\udc00\\ud800"}', b'{"\\ud800": 1}',
    b'{"messages": [{"role": "user", "content": "a\nb"}]}',
    b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}',
    b'{"messages": [{"role": "user", "content": "x"}], "temperature": -Infinity}',
    b'{"messages": [{"role": "user", "content": "x"}], "temperature": 1e999}',
    b'{"messages": [{"role": "user", "content": "x"}], "seed": ' + b"9" * 5000 + b"}",
    b'{"messages": [], "messages": [{"role": "user", "content": "x"}]}',
    b'{"messages": [{"role": "user", "role": "system", "content": "x"}]}',
    b"[" * 100_000, b'{"a":' * 50_000, b"[" * 900 + b"]" * 900,
    b'{"user": ' + b"[" * 16 + b"]" * 16 + b', "messages": [{"role": "user", "content": "x"}]}',
    b"[" + b"0," * 200_000 + b"0]", b'{"messages": [' + b"[]," * 60_000 + b"[]]}", b"// x\n{}", b"messages=x",
]  # fmt: skip


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    with live() as running:
        yield running


@pytest.mark.parametrize("body", NO_BODIES, ids=lambda body: repr(body[:20]))
def test_what_is_no_acceptable_json_is_refused(body: bytes, server: Live) -> None:
    reply = server.ask("POST", "/v1/chat/completions", body)
    assert reply.status == 400
    check(reply, body[:100])


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=st.binary(max_size=200))
def test_bytes_that_are_no_request_are_refused(server: Live, body: bytes) -> None:
    reply = server.ask("POST", "/v1/chat/completions", body)
    assert reply.status == 400
    check(reply, body)


def test_sixteen_levels_are_read(server: Live) -> None:
    deep: object = []
    for _ in range(14):
        deep = [deep]
    assert server.chat(HELLO | {"user": deep}).status == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Content-Type": "text/plain"}, 415),  # as forms of another site's page are
        ({"Content-Type": "multipart/form-data; boundary=x"}, 415),
        ({"Content-Type": ""}, 415),
        ({"Content-Encoding": "gzip"}, 415),
        ({"Content-Type": "application/json; charset=utf-8"}, 200),
    ],
)
def test_the_kind_of_a_body(headers: dict[str, str], status: int, server: Live) -> None:
    reply = server.chat(HELLO | {"max_tokens": 1}, headers)
    assert reply.status == status
    if status != 200:
        check(reply, headers)


def test_a_body_that_is_too_long_is_refused_by_its_announced_length_and_by_what_arrives(server: Live) -> None:
    limit = 32 * 2**20
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with server.connect() as connection:
        connection.sendall(head + b"Content-Length: %d\r\n\r\n" % (limit + 1))
        assert connection.recv(1000).startswith(b"HTTP/1.1 413")
    with server.connect() as connection:
        connection.sendall(head + b"Transfer-Encoding: chunked\r\n\r\n")
        chunk = b"%x\r\n" % 2**20 + b" " * 2**20 + b"\r\n"
        for _ in range(33):
            connection.sendall(chunk)
        assert connection.recv(1000).startswith(b"HTTP/1.1 413")
    assert server.server.handler.bodies.held == 0


def test_bodies_that_are_still_arriving_do_not_hold_up_the_end() -> None:
    with live() as server:
        slow = [server.connect() for _ in range(4)]
        for connection in slow:
            connection.sendall(request_bytes(HELLO)[:-5])
        time.sleep(0.3)
        server.server.should_exit = True
        started = time.monotonic()
        assert {read_all(connection)[:12] for connection in slow} == {b"HTTP/1.1 503"}
        assert time.monotonic() - started < 5
        for connection in slow:
            connection.close()
