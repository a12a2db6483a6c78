"""Settings of a server: limits on requests, and the checks of what its operator gives: key, address, host names."""

import ipaddress
import os
import re
import socket
from dataclasses import dataclass, field
from pathlib import Path

from minigpt4.errors import UsageError
from minigpt4.processing.pictures import DEFAULT_LIMITS, ImageLimits

KEY_VARIABLE = "MINIGPT4_API_KEY"
HOST = re.compile(r"([A-Za-z0-9._-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\])(?::[0-9]{1,5})?")
"""A Host header: a name or an address, and a port."""
_KEY = re.compile(r"[\x21-\x7e]{8,512}")


@dataclass(frozen=True)
class Limits:
    """Limits on what requests may bring (bytes, characters, pixels) and how long they may take (seconds)."""

    max_body_bytes: int = 32 * 2**20  # one picture of 20 MiB in base64, or many small ones
    max_held_bytes: int = 256 * 2**20  # all bodies that are being read or prepared, together
    max_json_depth: int = 16  # lists and objects inside each other; a request needs 6
    max_json_values: int = 20_000  # values and names in a body, besides what texts hold of JSON's punctuation
    max_messages: int = 256
    max_text: int = 131_072  # all messages together
    max_pictures: int = 16
    max_total_pixels: int = 100_000_000  # all pictures of a request together
    max_new_tokens: int = 4096
    max_beams: int = 10
    max_connections: int = 512  # a new one closes the one that has waited longest without a request
    max_header_bytes: int = 16 * 1024  # request line and headers
    header_seconds: float = 10.0  # from the first byte, or the connection
    body_seconds: float = 30.0
    write_seconds: float = 30.0  # until a client has to read what it was sent
    answer_seconds: float = 600.0  # from the request to the end of its answer, waiting included
    ping_seconds: float = 2.0  # between comments in a stream that has nothing to say
    drain_seconds: float = 8.0  # from the order to stop until answers in progress are cancelled
    image: ImageLimits = DEFAULT_LIMITS


@dataclass(frozen=True)
class Settings:
    """Settings of one server."""

    model_id: str  # what clients call the model; never a path
    api_key: str | None = field(default=None, repr=False)  # every request but the one for /health has to bring it
    hosts: frozenset[str] | None = frozenset({"localhost", "127.0.0.1", "[::1]"})  # of Host headers; None for any
    image_hosts: frozenset[str] = frozenset()  # that pictures may be fetched from, as `name` or `name:port`
    limits: Limits = Limits()
    decoders: int = 2  # child processes that decode pictures


def read_key(path: Path | None) -> str | None:
    """Return the API key from a file (white space around it does not count), else from the environment, or None.

    Raises:
        UsageError: The file cannot be read, or what it holds is no key.
    """
    if path is None:
        key = os.environ.get(KEY_VARIABLE)
        return None if key is None else _checked(key, f"the environment variable {KEY_VARIABLE}")
    try:
        if path.exists() and not path.is_file():  # opening a pipe would wait for a writer
            raise UsageError(f"the key file {str(path)!r} is no plain file", "write the key into a file")
        with path.open("rb") as file:
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
    """Whether an address to listen on can be reached from this machine alone."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def check_exposure(host: str, api_key: str | None, *, insecure: bool) -> None:
    """Refuse to listen for other machines without a key.

    Raises:
        UsageError: The address is not this machine's own, there is no key, and it was not asked for.
    """
    if not is_loopback(host) and api_key is None and not insecure:
        raise UsageError(
            f"on {host} everybody who reaches this machine could use the server, and there is no API key",
            f"add --api-key-file FILE (or {KEY_VARIABLE}), or --insecure if that is meant",
        )


def known_hosts(host: str, allowed: list[str], api_key: str | None) -> frozenset[str] | None:
    """Return what Host headers may say, so that no page of another site reaches this server under its own name.

    Args:
        host: Where the server listens.
        allowed: Further names, as of a proxy in front.
        api_key: With a key on an open address any name will do: such a page does not have it.

    Raises:
        UsageError: A name that cannot stand in a Host header.
    """
    for name in allowed:
        match = HOST.fullmatch(name)
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
    import psutil  # type: ignore[import-untyped]

    found = [address for addresses in psutil.net_if_addrs().values() for address in addresses]
    own = {a.address for a in found if a.family == socket.AF_INET}
    return own | {f"[{a.address.partition('%')[0]}]" for a in found if a.family == socket.AF_INET6}
