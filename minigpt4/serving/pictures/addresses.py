"""Addresses of remote pictures: which may be asked for at all, and which machines may be connected to.

An address is read once, by one strict pattern, so that no second reader can understand it otherwise; what a name
resolves to is compared with tables of our own, since the standard library's `is_global` lets tunnels to private
networks pass.
"""

import ipaddress
import re
from dataclasses import dataclass

from minigpt4.errors import UsageError

_LABEL = r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"
_HOST = rf"{_LABEL}(?:\.{_LABEL})+"
_PATH = r"[A-Za-z0-9._~!$&'()*+,;=:@%/-]*"
_QUERY = r"[A-Za-z0-9._~!$&'()*+,;=:@%/?-]*"
_URL = re.compile(rf"(https?)://({_HOST})(?::([1-9][0-9]{{0,4}}))?(/{_PATH})?(\?{_QUERY})?", re.ASCII)
_ALLOWED = re.compile(rf"({_HOST})(?::([1-9][0-9]{{0,4}}))?", re.ASCII)
_STANDARD_PORTS = {"http": 80, "https": 443}
MAX_URL = 2048

_PRIVATE_4 = [
    "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/24",
    "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24",
    "224.0.0.0/4", "240.0.0.0/4",
]  # fmt: skip
# Of IPv6 only 2000::/3 is the public internet; within it, tunnels to other networks and what is reserved.
_PUBLIC_6 = ipaddress.IPv6Network("2000::/3")
_PRIVATE_6 = ["2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20"]
_NETWORKS_4 = [ipaddress.IPv4Network(network) for network in _PRIVATE_4]
_NETWORKS_6 = [ipaddress.IPv6Network(network) for network in _PRIVATE_6]


@dataclass(frozen=True)
class RemoteAddress:
    """Where a picture may be fetched.

    Args:
        scheme: "http" or "https".
        host: A name, in lower case.
        port: Its port.
        target: Path and query.
    """

    scheme: str
    host: str
    port: int
    target: str

    @property
    def host_header(self) -> str:
        """What the Host header says."""
        return self.host if self.port == _STANDARD_PORTS[self.scheme] else f"{self.host}:{self.port}"


def read_address(url: str, allowed: frozenset[str]) -> RemoteAddress | None:
    """Read an address, or return None for one that is not of an allowed host.

    Args:
        url: As the client sent it.
        allowed: `name` (ports 80 and 443) or `name:port`, as `allowed_host` returns them.
    """
    match = _URL.fullmatch(url) if len(url) <= MAX_URL else None
    if match is None:
        return None
    scheme, host, given, path, query = match.groups()
    port = int(given) if given else _STANDARD_PORTS[scheme]
    listed = host in allowed if port == _STANDARD_PORTS[scheme] else f"{host}:{port}" in allowed
    return RemoteAddress(scheme, host, port, (path or "/") + (query or "")) if listed and port < 65536 else None


def allowed_host(text: str) -> str:
    """Check a host that an operator allows.

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
    """Tell whether an IP address is one of the public internet."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv4Address):
        return not any(ip in network for network in _NETWORKS_4)
    return ip in _PUBLIC_6 and ip.scope_id is None and not any(ip in network for network in _NETWORKS_6)
