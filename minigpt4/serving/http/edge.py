"""The outermost of the application: every response is counted and carries the same few headers, whatever went wrong."""

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from minigpt4.serving.http.metrics import Metrics
from minigpt4.serving.http.openai_errors import ApiError, as_api_error, error_response

HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}
MAX_HEADERS = 100
_METHODS = frozenset({"GET", "POST", "HEAD", "OPTIONS", "PUT", "PATCH", "DELETE"})


class Edge:
    """ASGI middleware.

    Args:
        app: What is behind it.
        metrics: Counts responses.
        max_bytes: Most bytes of address and headers.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, max_bytes: int) -> None:
        self.app = app
        self.max_bytes = max_bytes
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on; an error nobody expected becomes an answer here, and a line of the log."""
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
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
                self.metrics.requests.labels(method, str(message["status"])).inc()
            await send(message)

        try:
            self._check_headers(scope)
            await self.app(scope, receive, counted)
        except ConnectionError:  # the client left while its request was read
            return
        except Exception as error:
            told = as_api_error(error)
            if started:
                raise  # the server cuts the connection: the client sees that the answer is not whole
            await error_response(told)(scope, receive, counted)

    def _check_headers(self, scope: Scope) -> None:
        # The protocol bounds headers that arrive in pieces; those that arrive at once it has read already.
        length = len(scope["raw_path"]) + len(scope["query_string"])
        length += sum(len(name) + len(value) for name, value in scope["headers"])
        if length > self.max_bytes or len(scope["headers"]) > MAX_HEADERS:
            raise ApiError(431, "the headers are too long or too many")
        names = {name for name, _ in scope["headers"]}
        if b"transfer-encoding" in names and (b"content-length" in names or scope["http_version"] == "1.0"):
            # A proxy in front may have chosen the other of the two ends, and sent a stranger's request after it.
            raise ApiError(400, "the body's length is told in two ways", headers={"Connection": "close"})
