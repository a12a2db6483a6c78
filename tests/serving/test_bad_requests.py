"""Whatever is sent, the answer is a sentence in a JSON error object, never a fault or a secret."""

import http.client
import json
import re
import time
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.serving.bad_requests import USER, bodies
from tests.serving.live import HELLO, MODEL, Live, Reply, live, read_all

LEAKS = re.compile(rb"Traceback|0x[0-9a-f]{6,}|/root|/home|/work|/usr|site-packages|\.py\b|object at|pydantic|errors\.")


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    with live() as running:
        yield running


class Caller:
    """One connection for many requests."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.used = 0.0
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)

    def post(self, body: bytes) -> Reply:
        if time.monotonic() - self.used > 2:  # the server closes a connection that is idle for 5 s
            self.connection.close()
        self.used = time.monotonic()
        self.connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
        response = self.connection.getresponse()
        return Reply(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())


@pytest.fixture(scope="module")
def caller(server: Live) -> Iterator[Caller]:
    made = Caller(server.port)
    yield made
    made.connection.close()


def check(reply: Reply, sent: object) -> None:
    """An OpenAI error object in plain words."""
    assert reply.headers["content-type"] == "application/json", sent
    assert set(reply.json) == {"error"}, sent
    error = reply.error
    assert set(error) == {"message", "type", "param", "code"}, sent
    assert 10 < len(error["message"]) <= 1000 and error["message"].endswith("."), (error, sent)
    assert not LEAKS.search(reply.body), (reply.body, sent)


def test_hundreds_of_bad_requests_are_each_refused_in_a_sentence(caller: Caller) -> None:
    count = 0
    for body in bodies():
        reply = caller.post(body)
        assert 400 <= reply.status < 500, (reply.status, reply.body[:300], body[:300])
        check(reply, body[:300])
        count += 1
    assert count >= 500
    print(f"\n{count} bad requests: 0 of 5xx")


IMAGE = {"type": "image_url", "image_url": {"url": 1}}


def test_roles_out_of_turn_are_named_by_their_place(caller: Caller) -> None:
    turn = {"role": "user", "content": "a"}

    error = caller.post(json.dumps({"messages": [turn, turn]}).encode()).error

    assert error["param"] == "messages[1]"
    assert error["message"].startswith("messages[1] has the role 'user', expected 'assistant'. Send ")


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({}, "messages", 'messages is missing. For instance "messages": [{"role": "user", "content": "Hello"}].'),
        ({"messages": "x"}, "messages", 'messages is "x", expected a list. For instance "messages": '),
        ({"messages": []}, "messages", "messages is an empty list, expected a list of at least 1. For instance "),
        ({"messages": [USER, 1]}, "messages[1]", 'messages[1] is 1, expected an object. For instance "messages": '),
        (
            {"messages": [{"role": "bot", "content": "x"}]},
            "messages[0].role",
            "messages[0].role is \"bot\", expected 'system', 'developer', 'user' or 'assistant'. For instance ",
        ),
        (
            {"messages": [{"role": "user", "content": None}]},
            "messages[0].content",
            "messages[0].content is null, expected a string or a list of parts. For instance ",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}, IMAGE]}]},
            "messages[0].content[1].image_url.url",
            'messages[0].content[1].image_url.url is 1, expected a string. For instance "url": "data:',
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "input_image"}]}]},
            "messages[0].content[0].type",
            "messages[0].content[0].type is \"input_image\", expected 'text' or 'image_url'. For instance ",
        ),
        (
            {"messages": [{"role": "user", "content": ["x"]}]},
            "messages[0].content[0]",
            'messages[0].content[0] is "x", expected an object. For instance {"type": "text", ',
        ),
        ({"messages": [{**USER, "tool_calls": []}]}, "messages[0].tool_calls", "known here. Leave it out."),
        ({"messages": [USER], "max_tokens": "5"}, "max_tokens", 'is "5", expected a whole number. Write it without '),
        ({"messages": [USER], "stream": "true"}, "stream", 'is "true", expected true or false. Write it without '),
        ({"messages": [USER], "temperature": -1}, "temperature", "is -1, expected at least 0. Leave it out for the "),
        (
            {"messages": [USER], "min_p": 1.5},
            "min_p",
            "min_p is 1.5, expected at most 1. Leave it out for the default.",
        ),
        ({"messages": [USER], "repetition_penalty": 0}, "repetition_penalty", "is 0, expected at least 0.01. Leave "),
        ({"messages": [USER], "stop": ["a", 1]}, "stop[1]", "stop[1] is 1, expected a string."),
        ({"messages": [USER], "stop": {}}, "stop", "stop is an object, expected a string or a list of up to 4. "),
        ({"messages": [USER], "seed": 2**63}, "seed", "expected at most 9223372036854775807. "),
        ({"messages": [USER], "model": [1, 2]}, "model", "model is a list of 2, expected a string. "),
        ({"messages": [{"role": "user", "content": "x", "name": {}}]}, "messages[0].name", "is an object, expected a "),
        ({"messages": [USER], "stop": "x" * 201}, "stop", "stop is a text of 201 characters, expected at most 200 "),
    ],
)
def test_a_wrong_field_is_named_with_what_it_holds_what_is_expected_and_the_cure(
    body: dict[str, Any], param: str, message: str, caller: Caller
) -> None:
    reply = caller.post(json.dumps(body).encode())
    check(reply, body)
    assert reply.error["param"] == param
    assert message in reply.error["message"]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inside: st.lists(inside, max_size=4) | st.dictionaries(st.text(max_size=10), inside, max_size=4),
    max_leaves=12,
)
FIELDS = st.sampled_from(
    [
        "messages",
        "model",
        "stream",
        "stream_options",
        "max_tokens",
        "temperature",
        "top_p",
        "stop",
        "seed",
        "num_beams",
        "top_k",
        "n",
        "tools",
        "user",
        "response_format",
        "logprobs",
        "extra",
    ]
)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {
            "role": st.sampled_from(["user", "assistant", "system", "tool"]) | JSON,
            "content": JSON | st.text(max_size=50),
        }
    ),
    max_size=3,
)
REQUESTS = st.dictionaries(FIELDS, JSON, max_size=4).flatmap(
    lambda fields: st.fixed_dictionaries({"messages": MESSAGES | JSON}).map(lambda messages: fields | messages)
)


def generated_is_answered(caller: Caller, request: dict[str, Any]) -> None:
    given_tokens = request.get("max_tokens")
    if given_tokens is None or (isinstance(given_tokens, int) and given_tokens > 3):
        request = request | {"max_tokens": 2}
    reply = caller.post(json.dumps(request).encode())
    assert reply.status < 500, (reply.body, request)
    if reply.status >= 400:
        check(reply, request)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(request=REQUESTS)
def test_generated_requests_are_answered_or_refused(caller: Caller, request: dict[str, Any]) -> None:
    generated_is_answered(caller, request)


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=st.binary(max_size=200))
def test_bytes_that_are_no_request_are_refused(caller: Caller, body: bytes) -> None:
    reply = caller.post(body)
    assert 400 <= reply.status < 500
    check(reply, body)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nothing", 404),
        ("GET", "/v1/chat/completions", 405),
        ("PUT", "/health", 405),
        ("POST", "/v1/models", 405),
        ("GET", "/v1/models/other", 404),
        ("GET", "/v1/models/" + "x" * 5000, 404),
        ("GET", "/%2e%2e/%2e%2e/etc/passwd", 404),
        ("GET", "/%00", 404),
        ("GET", "/%ff", 404),
        ("BREW", "/health", 405),
        ("GET", "/v1/models/", 404),
    ],
)
def test_addresses_and_methods_that_do_not_exist(method: str, path: str, status: int, server: Live) -> None:
    reply = server.ask(method, path)
    assert reply.status == status
    check(reply, path)
    if status == 405:
        assert reply.headers["allow"]


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Content-Type": "text/plain"}, 415),
        ({"Content-Type": ""}, 415),
        ({"Content-Encoding": "gzip"}, 415),
        ({"Content-Type": "application/json; charset=utf-8"}, 200),
        ({"X": "y" * 70_000}, 400),
        ({"X": "y" * 17_000}, 431),
    ],
)
def test_headers_of_a_request(headers: dict[str, str], status: int, server: Live) -> None:
    reply = server.chat(HELLO | {"max_tokens": 1}, headers)
    assert reply.status in (status, 400, 431) if status in (400, 431) else reply.status == status
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
    assert server.server.desk.bodies.held == 0


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


def test_a_fault_inside_is_told_without_its_text_and_the_server_goes_on(
    server: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("a secret in /srv/model at 0x7f0123456789")

    for place in ("minigpt4.inference.engine.Sampler.choose", "minigpt4.inference.engine.Engine._encode"):
        with monkeypatch.context() as patch:
            patch.setattr(place, broken)
            reply = server.chat(HELLO)
            streamed = server.chat(HELLO | {"stream": True})
        assert reply.status == 500
        check(reply, place)
        assert not LEAKS.search(streamed.body) and b"secret" not in streamed.body + reply.body
        assert b'"type": "server_error"' in streamed.body or b'"type":"server_error"' in streamed.body
    assert server.chat(HELLO).status == 200


def test_the_description_has_every_field_and_a_page_that_loads_nothing(server: Live) -> None:
    description = server.ask("GET", "/openapi.json").json
    fields = description["components"]["schemas"]["ChatRequest"]["properties"]
    assert {"messages", "num_beams", "stop", "stream_options"} <= set(fields)
    assert {"/v1/chat/completions", "/v1/models", "/health", "/ready", "/metrics"} <= set(description["paths"])
    page = server.ask("GET", "/docs").body.decode()
    assert "422" not in page and "HTTPValidationError" not in page  # what is wrong is 400 everywhere
    assert "/v1/chat/completions" in page and not re.search(r"src=|https?://|<script", page)


def test_what_is_counted(server: Live) -> None:
    before = server.ask("GET", "/metrics").body.decode()
    server.chat(HELLO)
    after = server.ask("GET", "/metrics").body.decode()

    def value(text: str, name: str) -> float:
        return float(re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)[1])  # type: ignore[index]

    for name in (
        'minigpt4_http_requests_total{method="POST",status="200"}',
        "minigpt4_time_to_first_token_seconds_count",
        'minigpt4_requests_total{outcome="completed"}',
    ):
        assert value(after, name) == value(before, name) + 1
    assert value(after, "minigpt4_requests_waiting") == 0
    assert server.ask("GET", "/version").json["model"] == MODEL
