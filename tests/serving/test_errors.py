"""Whatever is sent, the answer is a sentence in a JSON error object, never a fault or a secret."""

import http.client
import json
import re
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.serving.live import HELLO, Live, Reply, data_url, large_picture, live, picture_file

LEAKS = re.compile(rb"Traceback|0x[0-9a-f]{6,}|/root|/home|/work|/usr|site-packages|\.py\b|object at|pydantic|errors\.")
USER = {"role": "user", "content": "hello"}
PICTURE = data_url(picture_file(1))
IMAGE = {"type": "image_url", "image_url": {"url": PICTURE}}

# What requests out of the description do not try: wrong values beside what each field takes, and other fields.
WRONG: dict[str, list[Any]] = {
    "messages": [None, "x", [], {"0": USER}],
    "model": [True, "", "gpt-4o", "tiny ", "../tiny", "/etc/passwd", "x" * 10_000],
    "stream": [1, "true", []],
    "stream_options": [True, {"include_usage": 1}, {"x": 1}, {}],
    "max_tokens": [0, -1, 1.5, True, "5", 10**9, 2**70],
    "max_completion_tokens": [0, "5", 10**9],
    "temperature": [-0.001, 101, 1e308, True, "1"],
    "top_p": [1.1, 10**30],
    "min_p": [-0.1, 1.1],
    "top_k": [-1, 1.5, 2**70],
    "num_beams": [0, 11, 65, True],
    "seed": [-(2**63) - 1, 2**63, 1.5],
    "repetition_penalty": [0, 101],
    "length_penalty": [-101, 101],
    "stop": [0, "", [""], ["a"] * 5, [None], [["a"]], {}, "x" * 201],
    "n": [0, 2, 1.0, True, "1"],
    "frequency_penalty": [0.1, "0"],
    "presence_penalty": [2, False],
    "logit_bias": [{"50256": -100}, []],
    "logprobs": [True, 0],
    "top_logprobs": [1],
    "tools": [[{"type": "function"}], {}],
    "tool_choice": ["required", {"type": "function"}],
    "functions": [[{"name": "f"}]],
    "response_format": [{"type": "json_object"}, "text"],
    "modalities": [["audio"]],
    "audio": [{"voice": "x"}],
    "best_of": [2],
    "echo": [True],
    "suffix": ["x"],
    "max_new_tokens": [5],
    "chat_template": ["{% for x in range(10**9) %}{% endfor %}"],
    "guided_regex": ["(a+)+$"],
    "__class__": [1],
    "": [1],
    "x" * 5000: [1],
    "\u0000": [1],
    "\U0001f600": [1],
    "\ud800": [1],
}
CONTENTS: list[Any] = [
    None, 0, {}, [], [None], ["x"], [[]], [{}], [{"type": None}], [{"type": []}], [{"type": "text"}],
    [{"type": "text", "text": None}], [{"type": "text", "text": "x", "more": 1}], [{"text": "x"}],
    [{"type": "Text", "text": "x"}], [{"type": "image", "image": "x"}], [{"type": "video_url"}],
    [{"type": "image_url"}], [{"type": "image_url", "image_url": PICTURE}], [{"type": "image_url", "image_url": {}}],
    [{"type": "image_url", "image_url": {"url": PICTURE, "detail": "huge"}}], "", " ", "\n\t", "x" * 32_769,
    "x" * 140_000, "word " * 3000, "\ud800", [{"type": "text", "text": ""}],
    [{"type": "text", "text": "x" * 20_000}] * 2, [IMAGE] * 17, [{"type": "text", "text": "x"}] * 10_000,
]  # fmt: skip
URLS = [
    "", " ", "x", "data:", "data:,", "data:image/png;base64,", "data:image/png;base64,!!!!",
    "data:image/png;base64,AAA", "data:text/html;base64,PGI+", "data:image/svg+xml;base64,PHN2Zy8+",
    "data:image/svg+xml,<svg/>", "data:;base64,AAAA", "data:image/png;base64," + "A" * 100_001,
    "data:image/" + "p" * 500 + ";base64,AAAA", PICTURE[:-8] + "\u00e9" * 4, PICTURE[: len(PICTURE) // 2],
    " " + PICTURE, "file:///etc/passwd", "/etc/passwd", "~/x.png", "http://localhost/x.png",
    "https://example.org/x.png", "ftp://x/y",
    *map(data_url, (b"GIF89a", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"RIFF\0\0\0\0WEBP", b"BM", b"%PDF-1.4",
                    b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"<html>", b"\x7fELF", b"PK\x03\x04",
                    b"%!PS-Adobe-3.0 EPSF-3.0", b"II*\0", b"8BPS", b"\0" * 1000, large_picture(20_001, 1),
                    large_picture(7000, 7000), large_picture(50_000, 50_000)[:40_000])),
]  # fmt: skip
ROLES: list[Any] = [None, 0, "", "User", "tool", "function", [], {}, "\u0000", "x" * 10_000]
ANSWER = {"role": "assistant", "content": "x"}
CONVERSATIONS: list[Any] = [
    [[]], [None], [{}], [{"role": "user"}], [{"content": "x"}], [{**USER, "tool_calls": []}], [{**USER, "name": 1}],
    [ANSWER], [{"role": "system", "content": "x"}], [USER, USER], [{"role": "system", "content": "x"}] * 2 + [USER],
    [USER, ANSWER], [USER, {"role": "system", "content": "x"}, USER], [USER, {**ANSWER, "content": None}, USER],
    [USER, {**ANSWER, "tool_calls": [{"id": "x"}]}, USER], [USER, {**ANSWER, "content": [IMAGE]}, USER],
    [{"role": "system", "content": [IMAGE]}, USER], [USER] * 257,
]  # fmt: skip


def bodies() -> Iterator[bytes]:
    """Bad requests; every one has to be answered by a status from 400 to 499."""
    for name, values in WRONG.items():
        yield from (json.dumps({"messages": [USER], name: value}).encode() for value in values)
    parts = [[{"type": "image_url", "image_url": {"url": url}}] for url in URLS]
    users = [[{"role": "user", "content": content}] for content in [*CONTENTS, *parts]]
    roles = [[{"role": role, "content": "x"}] for role in ROLES]
    yield from (json.dumps({"messages": messages}).encode() for messages in [*users, *roles, *CONVERSATIONS])


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    with live() as running:
        yield running


class Caller:
    """One connection for many requests."""

    def __init__(self, port: int) -> None:
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


def test_bad_requests_are_each_refused_in_a_sentence(caller: Caller) -> None:
    count = 0
    for body in bodies():
        reply = caller.post(body)
        assert 400 <= reply.status < 500, (reply.status, reply.body[:300], body[:300])
        check(reply, body[:300])
        count += 1
    print(f"\n{count} bad requests: 0 of 5xx")


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({}, "messages", 'messages is missing. For instance "messages": [{"role": "user", "content": "Hello"}].'),
        ({"messages": []}, "messages", "messages is an empty list, expected a list of at least 1. For instance "),
        ({"messages": [USER, USER]}, "messages[1]", "messages[1] has the role 'user', expected 'assistant'. Send "),
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
            {"messages": [{"role": "user", "content": [IMAGE, {"type": "image_url", "image_url": {"url": 1}}]}]},
            "messages[0].content[1].image_url.url",
            'messages[0].content[1].image_url.url is 1, expected a string. For instance "url": "data:',
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "input_image"}]}]},
            "messages[0].content[0].type",
            "messages[0].content[0].type is \"input_image\", expected 'text' or 'image_url'. For instance ",
        ),
        ({"messages": [{**USER, "tool_calls": []}]}, "messages[0].tool_calls", "known here. Leave it out."),
        ({"messages": [USER], "max_tokens": "5"}, "max_tokens", 'is "5", expected a whole number. Write it without '),
        ({"messages": [USER], "min_p": 1.5}, "min_p", "min_p is 1.5, expected at most 1. Leave it out for the default"),
        ({"messages": [USER], "stop": ["a", 1]}, "stop[1]", "stop[1] is 1, expected a string."),
        ({"messages": [USER], "stop": {}}, "stop", "stop is an object, expected a string or a list of up to 4. "),
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


@pytest.mark.parametrize("field", ["messages", "stream_options"])
def test_a_name_of_a_megabyte_does_not_come_back(field: str, caller: Caller) -> None:
    value = [{**USER, "k" * 10**6: 1}] if field == "messages" else {"k" * 10**6: 1}
    reply = caller.post(json.dumps({**HELLO, "stream": True, field: value}).encode())
    assert reply.status == 400 and len(reply.body) < 2000
    check(reply, field)


def test_a_fault_inside_is_told_without_its_text_and_the_server_goes_on(
    server: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("a secret in /srv/model at 0x7f0123456789")

    for place in ("minigpt4.inference.engine.Sampler.choose", "minigpt4.inference.engine.Engine._request"):
        with monkeypatch.context() as patch:
            patch.setattr(place, broken)
            reply = server.chat(HELLO)
            streamed = server.chat(HELLO | {"stream": True})
        assert reply.status == 500
        check(reply, place)
        assert not LEAKS.search(streamed.body) and b"secret" not in streamed.body + reply.body
        assert b'"type": "server_error"' in streamed.body or b'"type":"server_error"' in streamed.body
    assert server.chat(HELLO).status == 200
