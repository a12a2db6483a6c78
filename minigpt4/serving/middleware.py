"""Middleware around every route: limits on headers, key, Host and Origin, the same few headers, metrics and errors.

The key is wanted on every path but `/health`, whether there is something at that path or not. Paths are taken as the
router takes them, never out of an address that a Host header can bend.
"""

import base64
import binascii
import hmac
from collections.abc import Callable

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from minigpt4.serving.errors import ApiError, as_api_error, error_response
from minigpt4.serving.metrics import Metrics
from minigpt4.serving.settings import HOST, Settings

OPEN_PATHS = frozenset({"/health"})
COMPLETIONS = "/v1/chat/completions"
MAX_HEADERS = 100
RESPONSE_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}
_METHODS = frozenset({"GET", "POST", "HEAD", "OPTIONS", "PUT", "PATCH", "DELETE"})


class Middleware:
    """ASGI middleware; the outermost.

    Args:
        app: The application behind it.
        settings: Key, names and limits.
        metrics: Counts responses.
        admit: Raises `ApiError` when the queue is full. A full server has the least time, and refuses most requests:
            it is asked before a router looks at them.
    """

    def __init__(self, app: ASGIApp, settings: Settings, metrics: Metrics, admit: Callable[[], None]) -> None:
        self.app = app
        self.settings = settings
        self.metrics = metrics
        self.admit = admit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check a request before anything of it is read, and pass it on; every exception becomes a response."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        method = scope["method"] if scope["method"] in _METHODS else "other"
        if method == "HEAD":  # the protocol leaves the body out
            scope = {**scope, "method": "GET"}
        started = False

        async def counted(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                headers = MutableHeaders(scope=message)
                for name, value in RESPONSE_HEADERS.items():
                    headers.setdefault(name, value)
                self.metrics.requests.labels(method, str(message["status"])).inc()
            await send(message)

        try:
            self._check(scope)
            await self.app(scope, receive, counted)
        except ConnectionError:  # the client left
            if not started:
                self.metrics.requests.labels(method, "499").inc()
        except Exception as error:
            response = error_response(as_api_error(error))
            if started:
                raise  # the server cuts the connection: the client sees that the answer is not whole
            await response(scope, receive, counted)

    def _check(self, scope: Scope) -> None:
        _check_lengths(scope, self.settings.limits.max_header_bytes)
        if scope["path"] not in OPEN_PATHS:
            check_access(Headers(scope=scope), self.settings)
        if scope["path"] == COMPLETIONS and scope["method"] == "POST":
            self.admit()


def _check_lengths(scope: Scope, max_bytes: int) -> None:
    # The protocol bounds headers that arrive in pieces; those that arrive at once it has read already.
    length = len(scope["raw_path"]) + len(scope["query_string"])
    length += sum(len(name) + len(value) for name, value in scope["headers"])
    if length > max_bytes or len(scope["headers"]) > MAX_HEADERS:
        raise ApiError(431, "the headers are too long or too many")
    names = {name for name, _ in scope["headers"]}
    if b"transfer-encoding" in names and (b"content-length" in names or scope["http_version"] == "1.0"):
        # A proxy in front may have chosen the other of the two ends, and sent a stranger's request after it.
        raise ApiError(400, "the body's length is told in two ways", headers={"Connection": "close"})


def check_access(headers: Headers, settings: Settings) -> None:
    """Refuse a request without the key, for another host or from another site.

    Raises:
        ApiError: 401, 400 or 403.
    """
    if settings.api_key is not None and not _has_key(headers, settings.api_key):
        # A browser asks its user for it, once, and then sends it with every request to this server.
        asked = 'Basic realm="minigpt4", charset="UTF-8"' if "text/html" in headers.get("accept", "") else "Bearer"
        raise ApiError(
            401, "the API key is missing or wrong", "send the header Authorization: Bearer KEY",
            headers={"WWW-Authenticate": asked},
        )  # fmt: skip
    hosts = headers.getlist("host")
    match = HOST.fullmatch(hosts[0]) if len(hosts) == 1 else None
    if match is None:
        raise ApiError(400, "the Host header is missing or malformed", code="invalid_host")
    if settings.hosts is not None and match[1].lower() not in settings.hosts:
        raise ApiError(400, "this server does not go by that name", "see --allow-host", code="invalid_host")
    origins = headers.getlist("origin")
    own = {f"{scheme}://{hosts[0].lower()}" for scheme in ("http", "https")}  # https: a proxy in front
    if origins and (len(origins) > 1 or origins[0].lower() not in own):
        raise ApiError(403, "requests out of another site's pages are not answered", code="foreign_origin")


def _has_key(headers: Headers, key: str) -> bool:
    given = headers.getlist("authorization")
    if len(given) != 1:
        return False
    scheme, _, value = given[0].partition(" ")
    if scheme.lower() == "basic":
        try:
            value = base64.b64decode(value, validate=True).decode("utf-8").partition(":")[2]
        except (binascii.Error, UnicodeDecodeError):
            return False
    elif scheme.lower() != "bearer":
        return False
    return hmac.compare_digest(value.encode("utf-8", "surrogateescape"), key.encode())
