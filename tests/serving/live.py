"""A server on a real socket, with the tiny model, in a thread of the test's own process."""

import base64
import http.client
import io
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from minigpt4.inference.engine import Engine
from minigpt4.serving.app import make_app
from minigpt4.serving.server import Server, listen
from minigpt4.serving.settings import Settings
from tests import tiny_chat

MODEL = "tiny"
HELLO = {"messages": [{"role": "user", "content": "hello"}]}


@dataclass
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:  # noqa: ANN401
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        return self.json["error"]


@dataclass
class Live:
    """A running server.

    Args:
        engine: Its engine.
        server: The server.
        port: Where it listens.
    """

    engine: Engine
    server: Server
    port: int
    threads: list[threading.Thread] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def connect(self, timeout: float = 60) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=timeout)

    def ask(
        self, method: str, path: str, body: bytes | dict[str, Any] | None = None, headers: dict[str, str] | None = None
    ) -> Reply:
        """One request on a connection of its own."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            given = {"Content-Type": "application/json"} if body is not None else {}
            data = json.dumps(body).encode() if isinstance(body, dict) else body
            connection.request(method, path, data, given | (headers or {}))
            response = connection.getresponse()
            return Reply(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())
        finally:
            connection.close()

    def chat(self, body: dict[str, Any], headers: dict[str, str] | None = None) -> Reply:
        return self.ask("POST", "/v1/chat/completions", {"max_tokens": 8, **body}, headers)

    def raw(self, data: bytes, timeout: float = 30) -> bytes:
        """Send bytes, and return all that comes until the server closes."""
        with self.connect(timeout) as connection:
            connection.sendall(data)
            return read_all(connection)

    def wait_idle(self, seconds: float = 30) -> None:
        """Until nothing waits and nothing is answered."""
        deadline = time.monotonic() + seconds
        while (counts := self.engine.counts).waiting or counts.answering:
            assert time.monotonic() < deadline, f"still busy: {counts}"
            time.sleep(0.01)


def request_bytes(body: dict[str, object], *headers: str) -> bytes:
    """A chat completion as it is sent."""
    data = json.dumps(body).encode()
    head = [
        "POST /v1/chat/completions HTTP/1.1",
        "Host: localhost",
        "Content-Type: application/json",
        f"Content-Length: {len(data)}",
        *headers,
    ]
    return "\r\n".join(head).encode() + b"\r\n\r\n" + data


def read_all(connection: socket.socket) -> bytes:
    read = b""
    try:
        while part := connection.recv(65536):
            read += part
    except ConnectionResetError:
        pass
    return read


@contextmanager
def live(
    settings: Settings | None = None, page: str | None = None, port: int = 0, **engine_options: Any
) -> Iterator[Live]:
    """Serve until the context is left."""
    settings = settings or Settings(MODEL, decoders=1)
    engine = Engine(
        tiny_chat.model(), tiny_chat.processor(), **{"max_concurrent": 4, "max_queue": 64, **engine_options}
    )
    listening = listen("127.0.0.1", port)
    server = Server(make_app(engine, settings, page), settings)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        deadline = time.monotonic() + 60
        while not server.started:
            assert time.monotonic() < deadline and thread.is_alive()
            time.sleep(0.01)
        yield Live(engine, server, listening.getsockname()[1])
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


def picture_file(seed: int = 0, kind: str = "PNG") -> bytes:
    """A small picture of noise, another for each seed."""
    file = io.BytesIO()
    tiny_chat.picture(seed).save(file, kind)
    return file.getvalue()


def data_url(file: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(file).decode()}"


def seeing(question: str, *files: bytes) -> dict[str, Any]:
    """A user's message with pictures."""
    pictures = [{"type": "image_url", "image_url": {"url": data_url(file)}} for file in files]
    return {"role": "user", "content": [*pictures, {"type": "text", "text": question}]}


def large_picture(width: int, height: int, mode: str = "1") -> bytes:
    file = io.BytesIO()
    Image.new(mode, (width, height)).save(file, "PNG")
    return file.getvalue()
