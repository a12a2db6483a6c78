"""A server on a socket: how it listens, and how it ends, with every answer finished or its client told."""

import asyncio
import errno
import logging
import socket
import sys
from collections.abc import Callable
from types import FrameType

import uvicorn
from fastapi import FastAPI

from minigpt4.errors import UsageError
from minigpt4.serving.requests import RequestHandler
from minigpt4.serving.settings import Settings
from minigpt4.serving.timeouts import protocol_with

SWITCH_SECONDS = 0.0002
"""After which the interpreter is taken from the engine's thread when the server's asks for it, at every system call.

With the usual 5 ms, 56 requests that come at once to a full server wait half as long again for their refusals.
"""


def listen(host: str, port: int) -> socket.socket:
    """Take an address, before anything is loaded.

    Args:
        host: A name or an address of this machine.
        port: 0 for any that is free.

    Raises:
        UsageError: It cannot be had.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
    except OSError as error:
        raise UsageError(f"there is no address {host!r} on this machine", "127.0.0.1 is this machine alone") from error
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(512)
    except OSError as error:
        listening.close()
        if error.errno == errno.EADDRINUSE:
            raise UsageError(f"port {port} of {host} is in use", "choose another --port, or 0 for any") from error
        if error.errno == errno.EACCES:
            raise UsageError(f"port {port} is reserved for the system", "choose a --port above 1023") from error
        raise UsageError(f"port {port} of {host} cannot be used: {error.strerror}", "choose another address") from error
    return listening


class Server(uvicorn.Server):
    """Serves an application until a signal: the first lets answers finish, the second ends at once.

    Args:
        app: Made by `make_app`.
        settings: The same.
        on_closing: Told, at the first signal, how many answers are waited for.
    """

    def __init__(self, app: FastAPI, settings: Settings, on_closing: Callable[[int], None] = lambda _: None) -> None:
        limits = settings.limits
        config = uvicorn.Config(
            app,
            http=protocol_with(limits),
            ws="none",
            lifespan="on",
            loop="asyncio",
            log_config=None,
            log_level="error",  # below it are lines that any stranger can cause
            access_log=False,
            proxy_headers=False,
            server_header=False,
            h11_max_incomplete_event_size=limits.max_header_bytes,
            timeout_keep_alive=5,
            timeout_graceful_shutdown=round(limits.drain_seconds) + 1,
        )
        super().__init__(config)
        self.handler: RequestHandler = app.state.handler
        self.on_closing = on_closing
        self._closing: asyncio.Task[None] | None = None

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until a signal."""
        before = sys.getswitchinterval()
        sys.setswitchinterval(SWITCH_SECONDS)
        try:
            super().run(sockets)
        finally:
            sys.setswitchinterval(before)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to end, or end."""
        if self.should_exit:
            self.force_exit = True
            logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # else a traceback for each cut answer
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End: no new connections, the engine's answers finished or given up, then the rest."""
        self.on_closing(self.handler.unfinished)
        self._closing = asyncio.create_task(self.handler.close())  # beside the rest; its lifespan waits for it
        await super().shutdown(sockets)
        if self.force_exit:
            self.handler.cancel_all()
