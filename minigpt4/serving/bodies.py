"""Bodies of requests, bounded while they are read and parsed: kind, length, time, depth, and all bodies together."""

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, NoReturn

from starlette.requests import Request

from minigpt4.serving.errors import ApiError
from minigpt4.serving.settings import Limits


class BodyReader:
    """Reader of bodies that bounds how much of all of them is in memory.

    Args:
        limits: Lengths and times.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.held = 0
        self.closing = False
        self._deadlines: set[asyncio.Timeout] = set()

    def close(self) -> None:
        """Give up the bodies that are still arriving."""
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
            async with asyncio.timeout(0 if self.closing else self.limits.body_seconds) as deadline:
                self._deadlines.add(deadline)
                more = True
                while more:
                    message = await request.receive()
                    if message["type"] == "http.disconnect":
                        raise ConnectionError("the client left")
                    body += message.get("body", b"")
                    self.held, taken = self.held + len(body) - taken, len(body)
                    if taken > self.limits.max_body_bytes:
                        raise self._too_long()
                    if self.held > self.limits.max_held_bytes:
                        raise ApiError(503, "the server is reading too much at once", headers={"Retry-After": "2"})
                    more = message.get("more_body", False)
                self._deadlines.discard(deadline)
            yield body
        except TimeoutError as error:
            late = f"the body did not arrive within {self.limits.body_seconds:g} s"
            raise ApiError(
                503 if self.closing else 408,
                "the server is closing" if self.closing else late,
                headers={"Connection": "close"},
            ) from error
        finally:
            self._deadlines.discard(deadline)
            self.held -= taken

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


def read_json(body: bytes | bytearray, limits: Limits) -> dict[str, Any]:
    """Parse a body, whose length is bounded already, that has to be one JSON object.

    Raises:
        ApiError: 400: it is none, it is too deep or has too many values, or it has a name twice in one object.
    """
    # Counted before anything is built: a megabyte of brackets would become a hundred of lists. Pictures have none of
    # these characters; the texts may consist of them.
    if sum(map(body.count, (b",", b":", b"[", b"{"))) > limits.max_json_values + limits.max_text:
        raise ApiError(400, f"the body holds more than {limits.max_json_values} values, or too much text")
    too_deep = ApiError(400, f"the body has more than {limits.max_json_depth} levels of lists and objects")
    try:
        read = json.loads(body.decode("utf-8"), object_pairs_hook=_object, parse_constant=_no_number)
        depth = _depth(read)
        if b"\\ud" in body or b"\\uD" in body:  # a character in two halves, or one half alone
            json.dumps(read, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ApiError(400, "the body holds half a character (a lone surrogate)") from error
    except UnicodeDecodeError as error:
        raise ApiError(400, "the body is not UTF-8") from error
    except json.JSONDecodeError as error:
        raise ApiError(400, f"the body is not JSON: {error.msg.lower()}, at character {error.pos}") from error
    except RecursionError as error:
        raise too_deep from error
    except ValueError as error:  # more than 4 300 digits
        raise ApiError(400, "the body holds a number that is too long") from error
    if not isinstance(read, dict):
        raise ApiError(400, "the body is not a JSON object", 'expected {"messages": [...]}')
    if depth > limits.max_json_depth:
        raise too_deep
    return read


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ApiError(400, f"the body names {twice[:40]!r} twice in one object")
    return made


def _no_number(name: str) -> NoReturn:
    raise ApiError(400, f"the body holds {name}, which is no JSON")


def _depth(value: object) -> int:
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if inside is None else 1 + max(map(_depth, inside), default=0)
