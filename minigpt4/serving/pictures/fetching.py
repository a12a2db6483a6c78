"""The one way to a picture on another host: one resolution, one connection to what it said, no proxies, no redirects.

Whatever goes wrong is told in one sentence that is always the same, so that nothing can be learnt about a network from
asking a server to look at it.
"""

import asyncio
import socket
import ssl
from collections.abc import Awaitable, Callable

import h11

from minigpt4.errors import ImageError
from minigpt4.serving.pictures.addresses import RemoteAddress, is_public, read_address

Resolve = Callable[[str, int], Awaitable[list[str]]]
"""The IP addresses of a name and port."""
Connect = Callable[[str, RemoteAddress], Awaitable[tuple[asyncio.StreamReader, asyncio.StreamWriter]]]
"""A connection to an IP address, encrypted for the host's name where the scheme says so."""

_HEADER_BYTES = 16 * 1024

_REFUSED = ImageError(
    "the picture's address is not one that this server fetches from, or it gave no picture",
    "send the picture itself: data:image/jpeg;base64,...",
)


async def resolve(host: str, port: int) -> list[str]:
    """Ask the system for the addresses of a name."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(entry[4][0]) for entry in found]


async def connect(ip: str, address: RemoteAddress) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Connect to an IP address; its certificate has to be the host's."""
    if address.scheme == "http":
        return await asyncio.open_connection(ip, address.port)
    context = ssl.create_default_context()
    return await asyncio.open_connection(ip, address.port, ssl=context, server_hostname=address.host)


async def fetch_picture(
    url: str,
    allowed: frozenset[str],
    max_bytes: int,
    *,
    seconds: float = 5.0,
    resolve: Resolve = resolve,
    connect: Connect = connect,
) -> bytes:
    """Fetch the bytes at an address of an allowed host.

    Args:
        url: The address.
        allowed: Hosts, as `allowed_host` returns them.
        max_bytes: Most bytes read.
        seconds: For all of it.
        resolve: Asked once.
        connect: Asked once, for the first address that `resolve` gave.

    Raises:
        ImageError: Always in the same words.
    """
    address = read_address(url, allowed)
    if address is None:
        raise _refused()
    try:
        async with asyncio.timeout(seconds):
            found = await resolve(address.host, address.port)
            if not found or not all(map(is_public, found)):
                raise _refused()
            reader, writer = await connect(found[0], address)
            try:
                return await _get(reader, writer, address, max_bytes)
            finally:
                writer.transport.abort()
    except (
        OSError,
        EOFError,
        h11.ProtocolError,
        UnicodeError,
    ) as error:  # a timeout is an OSError, as TLS's errors are
        raise _refused() from error


async def _get(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, address: RemoteAddress, max_bytes: int
) -> bytes:
    connection = h11.Connection(h11.CLIENT, max_incomplete_event_size=_HEADER_BYTES)
    headers = [
        ("Host", address.host_header),
        ("User-Agent", "minigpt4"),
        ("Accept", "image/*"),
        ("Accept-Encoding", "identity"),
        ("Connection", "close"),
    ]
    writer.write(connection.send(h11.Request(method="GET", target=address.target, headers=headers)) or b"")
    writer.write(connection.send(h11.EndOfMessage()) or b"")
    await writer.drain()
    read = bytearray()
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            # No more than that: a longer header would pass when it arrives at once.
            connection.receive_data(await reader.read(_HEADER_BYTES))
        elif isinstance(event, h11.Response) and (event.status_code != 200 or _encoded(event)):
            raise _refused()
        elif isinstance(event, h11.Data):
            read += event.data
            if len(read) > max_bytes:
                raise _refused()
        elif isinstance(event, h11.EndOfMessage):
            return bytes(read)
        elif isinstance(event, h11.ConnectionClosed):
            raise EOFError


def _encoded(response: h11.Response) -> bool:
    return any(name == b"content-encoding" and value.lower() != b"identity" for name, value in response.headers)


def _refused() -> ImageError:
    return ImageError(_REFUSED.message, _REFUSED.hint)
