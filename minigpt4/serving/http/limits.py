"""What a body may be, enforced while it is read: its kind, its length, the time it takes, and all bodies together."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.requests import Request

from minigpt4.serving.http.openai_errors import ApiError
from minigpt4.serving.settings import Limits


class BodyReader:
    """Reads bodies, and knows how much of all of them is in memory.

    Args:
        limits: Lengths and times.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.held = 0
        self.closing = False
        self._deadlines: set[asyncio.Timeout] = set()

    def close(self) -> None:
        """Give up the bodies that are still arriving: nobody will answer them."""
        self.closing = True
        for deadline in self._deadlines:
            deadline.reschedule(asyncio.get_running_loop().time())

    @asynccontextmanager
    async def read(self, request: Request) -> AsyncIterator[bytearray]:
        """Read the JSON body of a request, and count it as held until the context is left.

        Raises:
            ApiError: 413, 415, 408, or 503 with too much at once and at the end.
            ConnectionError: The client left.
        """
        self._check_headers(request)
        body = bytearray()
        taken = 0
        try:
            async with self._deadline():
                while True:
                    message = await request.receive()
                    if message["type"] == "http.disconnect":
                        raise ConnectionError("the client left")
                    part = message.get("body", b"")
                    taken, self.held = taken + len(part), self.held + len(part)
                    body += part
                    if taken > self.limits.max_body_bytes:
                        raise self._too_long()
                    if self.held > self.limits.max_held_bytes:
                        raise ApiError(503, "the server is reading too much at once", headers={"Retry-After": "2"})
                    if not message.get("more_body"):
                        break
            yield body
        except TimeoutError as error:
            if self.closing:
                raise ApiError(503, "the server is closing", headers={"Connection": "close"}) from error
            said = f"the body did not arrive within {self.limits.body_seconds:g} s"
            raise ApiError(408, said, headers={"Connection": "close"}) from error
        finally:
            self.held -= taken

    @asynccontextmanager
    async def _deadline(self) -> AsyncIterator[None]:
        async with asyncio.timeout(0 if self.closing else self.limits.body_seconds) as deadline:
            self._deadlines.add(deadline)
            try:
                yield
            finally:
                self._deadlines.discard(deadline)

    def _check_headers(self, request: Request) -> None:
        headers = request.headers
        if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise ApiError(415, "the body has to be JSON", "send the header Content-Type: application/json")
        if headers.get("content-encoding", "identity").lower() != "identity":
            raise ApiError(415, "compressed bodies are not accepted")
        if int(headers.get("content-length", "0")) > self.limits.max_body_bytes:
            raise self._too_long()

    def _too_long(self) -> ApiError:
        # The rest of it is read and dropped by the protocol: a client that is still sending would not see an answer
        # on a connection that is closed.
        return ApiError(413, f"the body is longer than {self.limits.max_body_bytes / 2**20:g} MiB", "send less")
