"""Pictures on other hosts: an allow-list of exact names, one resolution, one connection to what it gave, no redirects.

Every failure is the same sentence, so that nothing can be learnt about a network from asking a server to look at it.
"""

import asyncio
import ipaddress
import re
import socket
import ssl
from collections.abc import Awaitable, Callable

import httpx

from minigpt4.errors import ImageError, UsageError

MAX_URL = 2048
_LABEL = r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"
_NAME = rf"({_LABEL}(?:\.{_LABEL})+)(?::([1-9][0-9]{{0,4}}))?"
# One strict pattern, so that no second reader can take another host out of the same address.
_URL = re.compile(rf"(https?)://{_NAME}(/[\w.~!$&'()*+,;=:@%/-]*)?(\?[\w.~!$&'()*+,;=:@%/?-]*)?", re.ASCII)
_ALLOWED = re.compile(_NAME, re.ASCII)
_PORTS = {"http": 80, "https": 443}

_PUBLIC_6 = ipaddress.IPv6Network("2000::/3")
# `is_global` lets them pass, on some Pythons: tunnels to other networks, and what is reserved since.
_NOT_PUBLIC: list[ipaddress.IPv4Network | ipaddress.IPv6Network] = [
    *map(ipaddress.IPv4Network, ("192.0.0.0/24", "192.88.99.0/24")),
    *map(ipaddress.IPv6Network, ("2001::/23", "2002::/16", "3fff::/20")),
]

Resolve = Callable[[str, int], Awaitable[list[str]]]
"""The IP addresses of a name and port."""


def allowed_host(text: str) -> str:
    """Return a host that an operator allows, `name` or `name:port`, in lower case.

    Raises:
        UsageError: It is no name of a host, as an address or a pattern is not.
    """
    match = _ALLOWED.fullmatch(text.lower())
    if match is None or match[1].rpartition(".")[2].isdigit():
        raise UsageError(
            f"--allow-image-host {text!r} is no host name, expected one such as upload.example.org",
            "give the name alone, or name:port; not a URL, an address or a pattern",
        )
    return text.lower()


def is_public(address: str) -> bool:
    """Whether an IP address is one of the public internet."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    if ip.is_multicast or (isinstance(ip, ipaddress.IPv6Address) and ip not in _PUBLIC_6):
        return False
    return ip.is_global and not any(ip in network for network in _NOT_PUBLIC)


async def resolve(host: str, port: int) -> list[str]:
    """Ask the system for the addresses of a name."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(entry[4][0]) for entry in found]


async def fetch_picture(
    url: str,
    allowed: frozenset[str],
    max_bytes: int,
    *,
    seconds: float = 5.0,
    resolve: Resolve = resolve,
    transport: httpx.AsyncBaseTransport | None = None,
) -> bytes:
    """Fetch the bytes at an address of an allowed host.

    Args:
        url: The address, as a client sent it.
        allowed: `name` (ports 80 and 443) or `name:port`, as `allowed_host` returns them.
        max_bytes: Most bytes read.
        seconds: For all of it.
        resolve: Asked once.
        transport: Carries the one request; default httpx's own.

    Raises:
        ImageError: Always in the same words.
    """
    match = _URL.fullmatch(url) if len(url) <= MAX_URL else None
    if match is None:
        raise _refused()
    scheme, host, given, path, query = match.groups()
    port = int(given) if given else _PORTS[scheme]
    named = host if port == _PORTS[scheme] else f"{host}:{port}"
    if named not in allowed or port > 65535:
        raise _refused()
    try:
        async with asyncio.timeout(seconds):
            found = await resolve(host, port)
            if not found or not all(map(is_public, found)):
                raise _refused()
            ip = f"[{found[0]}]" if ":" in found[0] else found[0]
            target = f"{scheme}://{ip}:{port}{path or '/'}{query or ''}"
            return await _get(target, named, host, max_bytes, transport)
    except (OSError, UnicodeError, httpx.HTTPError, httpx.InvalidURL) as error:  # a timeout is an OSError
        raise _refused() from error


async def _get(target: str, named: str, host: str, max_bytes: int, transport: httpx.AsyncBaseTransport | None) -> bytes:
    """Ask the address that was checked; the certificate has to be the named host's."""
    headers = {"Host": named, "User-Agent": "minigpt4", "Accept": "image/*", "Accept-Encoding": "identity"}
    known = ssl.create_default_context()  # the system's certificates, not httpx's own
    async with (
        httpx.AsyncClient(transport=transport, verify=known, trust_env=False, timeout=None) as client,
        client.stream("GET", target, headers=headers, extensions={"sni_hostname": host}) as response,
    ):
        if response.status_code != 200 or response.headers.get("content-encoding", "identity").lower() != "identity":
            raise _refused()
        read = bytearray()
        async for part in response.aiter_raw():
            read += part
            if len(read) > max_bytes:
                raise _refused()
        return bytes(read)


def _refused() -> ImageError:
    return ImageError(
        "the picture's address is not one that this server fetches from, or it gave no picture",
        "send the picture itself: data:image/jpeg;base64,...",
    )
