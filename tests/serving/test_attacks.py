"""What strangers and careless clients sent that once got through, or would have."""

import logging
import time
from collections.abc import Iterator
from typing import Any

import pytest

from minigpt4.processing.pictures import open_image
from minigpt4.serving.server import listen
from tests.serving.live import HELLO, Live, data_url, live, picture_file, read_all, seeing
from tests.serving.test_bad_requests import check
from tests.serving.test_crowds import request_bytes


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    with live() as running:
        yield running


@pytest.mark.parametrize("version", [b"1.1", b"1.0"])
def test_a_body_whose_length_is_told_in_two_ways_is_refused_and_nothing_after_it_read(
    version: bytes, server: Live
) -> None:
    head = b"POST /v1/chat/completions HTTP/" + version + b"\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    length = b"Content-Length: 4\r\n" if version == b"1.1" else b""
    smuggled = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    answered = server.raw(head + length + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + smuggled)
    assert answered.startswith(b"HTTP/1.1 400") and answered.count(b"HTTP/1.1") == 1


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


def test_head_is_get_without_a_body(server: Live) -> None:
    for path, status in (("/health", 200), ("/v1/models", 200), ("/nothing", 404), ("/v1/chat/completions", 405)):
        reply = server.ask("HEAD", path)
        assert (reply.status, reply.body) == (status, b""), path


@pytest.mark.parametrize("origin", ["capacitor://localhost", "chrome-extension://localhost", "localhost", ""])
def test_an_origin_of_another_kind_is_another_site(origin: str, server: Live) -> None:
    reply = server.chat(HELLO, {"Host": "localhost", "Origin": origin})
    assert (reply.status, reply.error["code"]) == (403, "foreign_origin")


@pytest.mark.parametrize("field", ["messages", "stream_options"])
def test_a_name_of_a_megabyte_does_not_come_back(field: str, server: Live) -> None:
    name = "k" * 10**6
    body: dict[str, Any] = HELLO | {"stream": True, "stream_options": {}}
    body[field] = [{"role": "user", "content": "x", name: 1}] if field == "messages" else {name: 1}
    reply = server.chat(body)
    assert reply.status == 400 and len(reply.body) < 2000
    check(reply, field)


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-40, 1e-6])
@pytest.mark.parametrize("num_beams", [1, 2])
def test_a_temperature_near_0_is_0(temperature: float, num_beams: int, server: Live) -> None:
    cold, colder = (server.chat(HELLO | {"temperature": given, "num_beams": num_beams}) for given in (0, temperature))
    assert colder.status == 200
    assert colder.json["choices"] == cold.json["choices"]


def test_penalties_of_0_may_have_a_point(server: Live) -> None:
    assert server.chat(HELLO | {"frequency_penalty": 0.0, "presence_penalty": 0.0}).status == 200


def test_long_text_is_searched_for_half_characters_at_once(server: Live) -> None:
    text = "\u4e2d" * 5_000_000
    started = time.monotonic()
    assert server.chat({"messages": [{"role": "user", "content": text}]}).status == 400
    assert time.monotonic() - started < 5  # 0.2 s; character by character it was minutes for a few such bodies


def test_a_map_of_a_long_answer_is_refused_before_it_is_measured(server: Live) -> None:
    messages = [seeing("what?", picture_file()), {"role": "assistant", "content": "flower " * 4000}]
    for span in (None, [20_000, 20_010]):
        started = time.monotonic()
        body = {"messages": messages} | ({"span": span} if span else {})
        reply = server.ask("POST", "/v1/attention", body)
        assert reply.status == 400 and "more than 1024 tokens" in reply.error["message"]
        assert time.monotonic() - started < 20  # quadratic, it took minutes


def test_a_map_of_early_words_of_a_long_answer_is_drawn(server: Live) -> None:
    messages = [seeing("what?", picture_file()), {"role": "assistant", "content": "flower " * 4000}]
    reply = server.ask("POST", "/v1/attention", {"messages": messages, "span": [0, 6]})
    assert reply.status == 200 and reply.json["text"].startswith("flower")


def test_a_span_that_ends_before_it_begins_has_no_words(server: Live) -> None:
    messages = [seeing("what?", picture_file()), {"role": "assistant", "content": "a flower"}]
    for span in ([5, 4], [4, 4], [8, 0]):
        reply = server.ask("POST", "/v1/attention", {"messages": messages, "span": span})
        assert reply.status == 400, span


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


def test_an_address_in_brackets_is_understood() -> None:
    with listen("[::1]", 0) as listening:
        assert listening.getsockname()[0] == "::1"


def test_the_description_asks_for_a_key_only_where_one_is_wanted(server: Live) -> None:
    assert "security" not in server.ask("GET", "/openapi.json").json


def test_white_space_in_a_data_url_is_dropped() -> None:
    file = picture_file()
    head, comma, payload = data_url(file).partition(",")
    spaced = open_image(head + comma + "\r\n\t ".join(payload))
    assert spaced.tobytes() == open_image(file).tobytes()
