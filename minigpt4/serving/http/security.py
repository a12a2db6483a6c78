"""Who may ask: the key, the Host and the Origin of a request, and where a server may listen without a key.

The key is wanted on every path but `/health`, whether there is something at that path or not. Paths are taken as the
router takes them, never out of an address that a Host header can bend.
"""

import base64
import binascii
import hmac
import ipaddress
import os
import re
import socket
import stat
from pathlib import Path

from starlette.datastructures import Headers
from starlette.responses import HTMLResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from minigpt4.errors import UsageError
from minigpt4.serving.http.key_page import KEY_PAGE, KEY_PAGE_POLICY
from minigpt4.serving.http.openai_errors import ApiError, error_response
from minigpt4.serving.settings import Settings

OPEN_PATHS = frozenset({"/health"})
KEY_VARIABLE = "MINIGPT4_API_KEY"
_KEY = re.compile(r"[\x21-\x7e]{8,512}")
_HOST = re.compile(r"([A-Za-z0-9._-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\])(?::[0-9]{1,5})?")


class Gate:
    """ASGI middleware: lets only those in who may ask.

    Args:
        app: The application behind it.
        settings: The key and the names of the server.
    """

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self.app = app
        self.settings = settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check a request before anything of it is read."""
        if scope["type"] == "lifespan" or (scope["type"] == "http" and scope["path"] in OPEN_PATHS):
            await self.app(scope, receive, send)
            return
        try:
            check_request(scope, self.settings)
        except ApiError as error:
            await _refusal(error)(scope, receive, send)
            return
        await self.app(scope, receive, send)


def _refusal(error: ApiError) -> Response:
    """Write what a browser shows its user when no key was typed, or anything else as every error."""
    if error.headers.get("WWW-Authenticate", "").startswith("Basic"):
        headers = {"Content-Security-Policy": KEY_PAGE_POLICY, "Cache-Control": "no-store"}
        return HTMLResponse(KEY_PAGE, error.http_status, headers=error.headers | headers)
    return error_response(error)


def check_request(scope: Scope, settings: Settings) -> None:
    """Refuse a request without the key, for another host or from another site.

    Raises:
        ApiError: 401, 400 or 403.
    """
    headers = Headers(scope=scope)
    if settings.api_key is not None and not _has_key(headers, settings.api_key):
        # A browser asks its user for it, once, and then sends it with every request to this server.
        asked = 'Basic realm="minigpt4", charset="UTF-8"' if "text/html" in headers.get("accept", "") else "Bearer"
        raise ApiError(
            401, "the API key is missing or wrong", "send the header Authorization: Bearer KEY",
            headers={"WWW-Authenticate": asked},
        )  # fmt: skip
    hosts = headers.getlist("host")
    match = _HOST.fullmatch(hosts[0]) if len(hosts) == 1 else None
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


def read_key(path: Path | None) -> str | None:
    """Read the key from a file, else from the environment.

    Args:
        path: A file that holds the key and nothing else; line breaks around it do not count.

    Returns:
        The key, or None where neither names one.

    Raises:
        UsageError: The file cannot be read, or what it holds is no key.
    """
    if path is None:
        key = os.environ.get(KEY_VARIABLE)
        return None if key is None else _checked(key, f"the environment variable {KEY_VARIABLE}")
    try:
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0))) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise UsageError(f"the key file {str(path)!r} is no plain file", "write the key into a file")
            data = file.read(4096)
    except OSError as error:
        reason = error.strerror or "it cannot be opened"
        raise UsageError(f"the key file {str(path)!r} cannot be read: {reason.lower()}", "check its path") from error
    return _checked(data.decode("utf-8", "replace"), f"the key file {str(path)!r}")


def _checked(text: str, where: str) -> str:
    key = text.strip("\r\n \t")
    if not _KEY.fullmatch(key):
        raise UsageError(
            f"{where} does not hold a key, expected 8 to 512 printable ASCII characters without spaces",
            "for instance: openssl rand -hex 32 > KEYFILE",
        )
    return key


def is_loopback(host: str) -> bool:
    """Tell whether an address to listen on can be reached from this machine alone."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def check_exposure(host: str, api_key: str | None, *, insecure: bool) -> None:
    """Refuse to be open to others without a key.

    Raises:
        UsageError: The address is not this machine's own, there is no key, and it was not asked for.
    """
    if not is_loopback(host) and api_key is None and not insecure:
        raise UsageError(
            f"on {host} everybody who reaches this machine could use the server, and there is no API key",
            f"add --api-key-file FILE (or {KEY_VARIABLE}), or --insecure if that is meant",
        )


def known_hosts(host: str, allowed: list[str], api_key: str | None) -> frozenset[str] | None:
    """Return what Host headers may say, so that no page of another site can reach this server under its own name.

    Args:
        host: Where the server listens.
        allowed: Further names, as of a proxy in front.
        api_key: With a key on an open address any name will do: such a page does not have it.

    Raises:
        UsageError: A name that cannot stand in a Host header.
    """
    for name in allowed:
        match = _HOST.fullmatch(name)
        if match is None or match[1] != name:
            raise UsageError(
                f"--allow-host {name!r} is no host name, expected one without port or scheme",
                hint="for https://chat.example.org:8443/ say --allow-host chat.example.org",
            )
    if not is_loopback(host) and api_key is not None and not allowed:
        return None
    host = host.strip("[]")
    names = {"localhost", "127.0.0.1", "[::1]", *(name.lower() for name in allowed)}
    if host not in ("", "0.0.0.0", "::"):
        return frozenset(names | {f"[{host}]" if ":" in host else host.lower()})
    return frozenset(names | {socket.gethostname().lower()} | _own_addresses())


def _own_addresses() -> set[str]:
    import psutil  # type: ignore[import-untyped]  # comes with accelerate

    found = [address for addresses in psutil.net_if_addrs().values() for address in addresses]
    own = {a.address for a in found if a.family == socket.AF_INET}
    return own | {f"[{a.address.partition('%')[0]}]" for a in found if a.family == socket.AF_INET6}
