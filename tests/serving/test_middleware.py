"""Nobody gets past the key, whatever is done to path, Host or headers, and no other site's page gets in."""

import asyncio
import base64
import itertools
import json
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.routing import Route

from minigpt4.serving.app import make_app
from minigpt4.serving.settings import Settings, known_hosts
from tests.serving.live import HELLO, MODEL, Live, live
from tests.serving.test_errors import check

KEY = "correct-horse-battery"

WRONG_CREDENTIALS: dict[str, list[tuple[bytes, bytes]]] = {
    "none": [],
    "wrong": [(b"authorization", b"Bearer wrong-horse-battery")],
    "prefix": [(b"authorization", f"Bearer {KEY[:-1]}".encode())],
    "longer": [(b"authorization", f"Bearer {KEY}x".encode())],
    "empty": [(b"authorization", b"")],
    "empty bearer": [(b"authorization", b"Bearer ")],
    "no scheme": [(b"authorization", KEY.encode())],
    "another scheme": [(b"authorization", f"Digest {KEY}".encode())],
    "not ascii": [(b"authorization", "Bearer kl\u00fc\u00fc".encode())],
    "not utf-8": [(b"authorization", b"Bearer \xff\xfe")],
    "upper case": [(b"authorization", f"Bearer {KEY.upper()}".encode())],
    "two headers": [(b"authorization", f"Bearer {KEY}".encode()), (b"authorization", b"Bearer x")],
    "same header twice": [(b"authorization", f"Bearer {KEY}".encode())] * 2,
    "another header": [(b"x-api-key", KEY.encode())],
    "basic, wrong": [(b"authorization", b"Basic " + base64.b64encode(b"me:wrong"))],
    "basic, key as name": [(b"authorization", b"Basic " + base64.b64encode(f"{KEY}:".encode()))],
    "basic, broken": [(b"authorization", b"Basic !!!")],
    "cookie": [(b"cookie", f"key={KEY}".encode())],
}
HOSTS = [
    b"localhost",
    b"a/?x=",
    b"localhost/health?",
    b"localhost:80/health",
    b"/health",
    b"",
    b"evil.example",
    b"[::1",
]
PATHS = ["//v1/models", "/v1/../v1/models", "/health/../v1/models", "/HEALTH", "/health/", "//health", "/health;x",
         "/health/v1/models", "/v1/models/", "/nothing", "/", "/health%2f", "/healt", "/.", "*"]  # fmt: skip


def app() -> FastAPI:
    return make_app(None, Settings(MODEL, KEY), "<p>page</p>")


def call(
    application: FastAPI, path: str, headers: list[tuple[bytes, bytes]], method: str = "GET", host: bytes = b"localhost"
) -> tuple[int, dict[str, str], bytes]:
    """One request, as a server hands it over."""
    scope = {
        "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "method": method,
        "scheme": "http", "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "",
        "headers": [(b"host", host), *headers], "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80),
    }  # fmt: skip
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"{}", "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    asyncio.run(application(scope, receive, send))
    headers_sent = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return sent[0]["status"], headers_sent, b"".join(message.get("body", b"") for message in sent[1:])


def test_every_route_refuses_every_wrong_credential() -> None:
    application = app()
    routes = [route for route in application.routes if isinstance(route, Route) or hasattr(route, "methods")]
    guarded = [(r.path, method) for r in routes if r.path != "/health" for method in r.methods]  # type: ignore[attr-defined]
    assert len(guarded) >= 9
    for (path, method), credentials in itertools.product(guarded, WRONG_CREDENTIALS.values()):
        status, headers, body = call(application, path.replace("{model:path}", MODEL), credentials, method)
        assert (status, json.loads(body)["error"]["code"]) == (401, "invalid_api_key"), (path, method, credentials)
        assert headers["www-authenticate"] == "Bearer"
    print(f"\n{len(guarded)} routes x {len(WRONG_CREDENTIALS)} wrong credentials: all 401")


def test_neither_hosts_nor_paths_get_past_the_key() -> None:
    application = app()
    for path, host in itertools.product([*PATHS, "/v1/models", "/metrics"], HOSTS):
        assert call(application, path, [], host=host)[0] == 401, (path, host)


def test_health_alone_needs_no_key_and_says_nothing() -> None:
    status, _, body = call(app(), "/health", [])
    assert (status, body) == (200, b'{"status":"ok"}')


def test_the_key_opens_as_bearer_and_as_a_browsers_password() -> None:
    application = app()
    for value in (f"Bearer {KEY}", f"bearer {KEY}", "Basic " + base64.b64encode(f"any:{KEY}".encode()).decode()):
        for path in ("/", "/v1/models", "/metrics", "/version", "/docs", "/openapi.json"):
            assert call(application, path, [(b"authorization", value.encode())])[0] == 200, path


def test_a_browser_is_asked_for_the_key_and_a_program_is_not() -> None:
    _, headers, _ = call(app(), "/", [(b"accept", b"text/html,*/*")])
    assert headers["www-authenticate"].startswith("Basic ")


def test_the_key_is_in_no_error_and_no_representation() -> None:
    settings = Settings(MODEL, KEY)
    assert KEY not in repr(settings)
    assert KEY.encode() not in call(app(), "/v1/models", WRONG_CREDENTIALS["prefix"])[2].replace(KEY[:-1].encode(), b"")


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    with live() as running:
        yield running


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.nip.io", "localhost.evil.example", "0x7f.1", "127.1"])
def test_another_name_for_this_machine_is_refused(host: str, server: Live) -> None:
    reply = server.ask("GET", "/v1/models", headers={"Host": f"{host}:{server.port}"})
    assert (reply.status, reply.error["code"]) == (400, "invalid_host")


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:8000", "LOCALHOST:1", "[::1]:8000"])
def test_this_machines_own_names_are_answered_and_its_own_page_is(host: str, server: Live) -> None:
    for headers in ({"Host": host}, {"Host": host, "Origin": f"http://{host}"}):
        assert server.ask("GET", "/v1/models", headers=headers).status == 200


@pytest.mark.parametrize("head", [b"", b"Host: localhost\r\nHost: evil\r\n", b"Host: a b\r\n", b"Host: a/?x=\r\n"])
def test_no_host_two_hosts_and_bent_hosts_are_refused(head: bytes, server: Live) -> None:
    answered = server.raw(b"GET /v1/models HTTP/1.1\r\nConnection: close\r\n" + head + b"\r\n")
    assert answered.startswith(b"HTTP/1.1 400") and b'"error"' in answered


@pytest.mark.parametrize("method", ["POST", "OPTIONS"])
@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://localhost:1", "capacitor://localhost", ""])
def test_a_page_of_another_site_is_refused_and_gets_no_cors(origin: str, method: str, server: Live) -> None:
    reply = server.ask(method, "/v1/chat/completions", HELLO, {"Origin": origin})
    assert (reply.status, reply.error["code"]) == (403, "foreign_origin")
    assert not any(name.startswith("access-control") for name in reply.headers)


def test_every_response_forbids_guessing_and_framing(server: Live) -> None:
    for path in ("/health", "/nothing", "/docs"):
        headers = server.ask("GET", path).headers
        assert (headers["x-content-type-options"], headers["x-frame-options"]) == ("nosniff", "DENY")
        assert "server" not in headers


@pytest.mark.parametrize(
    ("host", "allowed", "key", "named", "status"),
    [
        ("127.0.0.1", [], None, "ai.example.org", 400),
        ("127.0.0.1", [], KEY, "ai.example.org", 400),
        ("127.0.0.1", ["ai.example.org"], KEY, "ai.example.org", 200),
        ("0.0.0.0", [], None, "ai.example.org", 400),  # --insecure
        ("0.0.0.0", [], KEY, "ai.example.org", 200),
        ("0.0.0.0", ["ai.example.org"], KEY, "ai.example.org", 200),
        ("0.0.0.0", ["ai.example.org"], KEY, "evil.example", 400),
        ("192.0.2.1", ["ai.example.org"], KEY, "192.0.2.1", 200),
        ("192.0.2.1", ["ai.example.org"], KEY, "localhost", 200),
    ],
)
def test_the_name_of_a_host_is_looked_at_as_the_documents_say(
    host: str, allowed: list[str], key: str | None, named: str, status: int
) -> None:
    application = make_app(None, Settings(MODEL, key, known_hosts(host, allowed, key)))
    credentials = [(b"authorization", f"Bearer {key}".encode())] if key else []
    assert call(application, "/v1/models", credentials, host=named.encode())[0] == status
    if key:
        assert call(application, "/v1/models", [], host=named.encode())[0] == 401


@pytest.mark.parametrize("version", [b"1.1", b"1.0"])
def test_a_body_whose_length_is_told_in_two_ways_is_refused_and_nothing_after_it_read(
    version: bytes, server: Live
) -> None:
    head = b"POST /v1/chat/completions HTTP/" + version + b"\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    length = b"Content-Length: 4\r\n" if version == b"1.1" else b""
    smuggled = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    answered = server.raw(head + length + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + smuggled)
    assert answered.startswith(b"HTTP/1.1 400") and answered.count(b"HTTP/1.1") == 1


def test_headers_that_are_too_long_or_too_many_are_refused(server: Live) -> None:
    for headers in ({"X": "y" * 70_000}, {"X": "y" * 17_000}, {f"X{n}": "y" for n in range(120)}):
        reply = server.ask("GET", "/health", headers=headers)
        assert reply.status in (400, 431)
        check(reply, list(headers))


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nothing", 404),
        ("GET", "/v1/chat/completions", 405),
        ("PUT", "/health", 405),
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


def test_head_is_get_without_a_body(server: Live) -> None:
    for path, status in (("/health", 200), ("/v1/models", 200), ("/nothing", 404), ("/v1/chat/completions", 405)):
        reply = server.ask("HEAD", path)
        assert (reply.status, reply.body) == (status, b""), path
