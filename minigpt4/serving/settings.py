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
    """Limits on what a request may bring and how long it may take.

    Args:
        max_body_bytes: Length of a body. 32 MiB: one picture of 20 MiB in base64, or many small ones.
        max_held_bytes: All bodies that are being read or prepared, together.
        max_json_depth: Lists and objects inside each other; a request needs 6.
        max_json_values: Values and names in a body, besides what texts may hold of JSON's punctuation.
        max_messages: Turns of a conversation.
        max_text: Characters of all messages together.
        max_pictures: Pictures of a request.
        max_total_pixels: Pixels of all pictures of a request together.
        max_new_tokens: Longest answer that may be asked for.
        max_beams: Beams of a search.
        max_connections: Open connections; the one that has waited longest without a request is closed for a new one.
        max_header_bytes: Request line and headers.
        header_seconds: From the first byte, or the connection, to the end of the headers.
        body_seconds: To the end of the body.
        write_seconds: Until a client has to read what it was sent.
        answer_seconds: From the request to the end of its answer, waiting included.
        ping_seconds: Between comments in a stream that has nothing to say.
        drain_seconds: From the order to stop until answers in progress are cancelled.
        image: One picture.
    """

    max_body_bytes: int = 32 * 2**20
    max_held_bytes: int = 256 * 2**20
    max_json_depth: int = 16
    max_json_values: int = 20_000
    max_messages: int = 256
    max_text: int = 131_072
    max_pictures: int = 16
    max_total_pixels: int = 100_000_000
    max_new_tokens: int = 4096
    max_beams: int = 10
    max_connections: int = 512
    max_header_bytes: int = 16 * 1024
    header_seconds: float = 10.0
    body_seconds: float = 30.0
    write_seconds: float = 30.0
    answer_seconds: float = 600.0
    ping_seconds: float = 2.0
    drain_seconds: float = 8.0
    image: ImageLimits = DEFAULT_LIMITS


@dataclass(frozen=True)
class Settings:
    """Settings of one server.

    Args:
        model_id: What clients call the model; never a path.
        api_key: What every request but the one for `/health` must bring; None for no key.
        hosts: Names and addresses that a Host header may say, without ports, in lower case; None for any.
        image_hosts: Hosts, as `name` or `name:port`, that pictures may be fetched from.
        limits: Limits on requests.
        decoders: Child processes that decode pictures.
    """

    model_id: str
    api_key: str | None = field(default=None, repr=False)
    hosts: frozenset[str] | None = frozenset({"localhost", "127.0.0.1", "[::1]"})
    image_hosts: frozenset[str] = frozenset()
    limits: Limits = Limits()
    decoders: int = 2


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
