"""No address that is not of an allowed, public host is ever connected to, and every refusal sounds the same."""

import asyncio
import ssl
from collections.abc import Sequence

import pytest

from minigpt4.errors import ImageError, UsageError
from minigpt4.serving.pictures import addresses
from minigpt4.serving.pictures.addresses import RemoteAddress, allowed_host, is_public
from minigpt4.serving.pictures.fetching import fetch_picture

ALLOWED = frozenset({"pictures.example.org", "cdn.example.net", "odd.example.org:8443"})
PUBLIC = "93.184.215.14"
LIMIT = 1000

PRIVATE_ADDRESSES = [
    "0.0.0.0",
    "10.0.0.1",
    "100.64.0.1",
    "127.0.0.1",
    "127.255.255.254",
    "169.254.169.254",
    "172.16.0.1",
    "172.31.255.255",
    "192.0.0.8",
    "192.0.0.170",
    "192.0.2.1",
    "192.88.99.1",
    "192.168.1.1",
    "198.18.0.1",
    "198.51.100.7",
    "203.0.113.9",
    "224.0.0.1",
    "239.255.255.250",
    "240.0.0.1",
    "255.255.255.255",
    "::",
    "::1",
    "::127.0.0.1",
    "::ffff:127.0.0.1",
    "::ffff:10.0.0.1",
    "64:ff9b::7f00:1",
    "64:ff9b:1::1",
    "100::1",
    "2001::1",
    "2001:db8::1",
    "2002:7f00:1::",
    "2002:a00:1::1",
    "3fff::1",
    "5f00::1",
    "fc00::1",
    "fd12::1",
    "fe80::1",
    "fe80::1%eth0",
    "fec0::1",
    "ff02::1",
    "not an address",
    "",
]

LOOPBACKS = [
    "127.0.0.1",
    "127.1",
    "127.0.1",
    "0",
    "0.0.0.0",
    "2130706433",
    "0x7f000001",
    "0x7f.1",
    "0177.0.0.1",
    "017700000001",
    "[::1]",
    "[::]",
    "[::ffff:127.0.0.1]",
    "[0:0:0:0:0:0:0:1]",
    "[::1%25lo]",
    "[fe80::1]",
    "[64:ff9b::7f00:1]",
    "localhost",
    "LOCALHOST",
    "localhost.",
    "localhost.localdomain",
    "ip6-localhost",
    "169.254.169.254",
    "metadata.google.internal",
    "metadata",
    "192.168.257",
    "192.168.1.1",
    "10.0.0.1",
    "172.16.0.1",
    "100.100.100.200",
    "127.0.0.1.nip.io",
    "localtest.me",
    "127\u30020\u30020\u30021",
    "\uff11\uff12\uff17.0.0.1",
    "\u2460\u2461\u2466.0.0.1",
    "evil.example",
    "example.org",
    "org",
    "example.net",
]

BENT = [
    "http://pictures.example.org@127.0.0.1/",
    "http://127.0.0.1@pictures.example.org/",
    "http://user:pw@pictures.example.org/",
    "http://127.0.0.1\\@pictures.example.org/",
    "http://pictures.example.org\\@127.0.0.1/",
    "http://127.0.0.1#@pictures.example.org/",
    "http://127.0.0.1?@pictures.example.org/",
    "http://pictures.example.org:80@127.0.0.1/",
    "http://pictures.example.org%00.evil.example/",
    "http://pictures.example.org%2f@127.0.0.1/",
    "http://pictures.example.org\x00.evil/",
    "http://pictures.example.org\t/",
    "http://pictures.example.org\n/x",
    "http://pictures.example.org\r\nHost: evil/",
    "http://pictures.example.org/x\r\nX: y",
    "http://pictures.example.org /",
    " http://pictures.example.org/",
    "http://pictures.example.org/ ",
    "http:pictures.example.org",
    "http:/pictures.example.org",
    "http:///pictures.example.org",
    "http:////pictures.example.org/",
    "//pictures.example.org/a.png",
    "http://pictures.example.org./",
    "http://.pictures.example.org/",
    "http://pictures..example.org/",
    "http://pictures.example.org.evil.example/",
    "http://evilpictures.example.org/",
    "http://a.pictures.example.org/",
    "http://pictures.example.org:22/",
    "http://pictures.example.org:443/",
    "https://pictures.example.org:80/",
    "http://pictures.example.org:8080/",
    "http://pictures.example.org:0/",
    "http://pictures.example.org:080/",
    "http://pictures.example.org:99999/",
    "http://pictures.example.org:-1/",
    "http://pictures.example.org:/",
    "http://pictures.example.org:80:80/",
    "http://odd.example.org/",
    "https://odd.example.org/",
    "http://[pictures.example.org]/",
    "http://[::ffff:pictures.example.org]/",
    "http://pictures.example.org[/",
    "http://PICTURES.EXAMPLE.ORG/",
    "http://pictures.example.org\u3002evil/",
    "http://p\u0131ctures.example.org/",
    "http://pictures.example\u2024org/",
    "http://xn--pictures.example.org/",
    "http://pictures.example.org/\u00e9",
    "http://pictures.example.org/a b",
    'http://pictures.example.org/"',
    "http://pictures.example.org/<x>",
    "http://pictures.example.org/#x",
    "HTTP://pictures.example.org/",
    "hTTp://pictures.example.org/",
    "ftp://pictures.example.org/",
    "file:///etc/passwd",
    "file://pictures.example.org/etc/passwd",
    "gopher://127.0.0.1/",
    "dict://127.0.0.1:6379/",
    "ldap://127.0.0.1/",
    "jar:http://pictures.example.org!/",
    "javascript:alert(1)",
    "blob:http://pictures.example.org/x",
    "view-source:http://pictures.example.org/",
    "ws://pictures.example.org/",
    "unix:/run/docker.sock",
    "/etc/passwd",
    "../etc/passwd",
    "C:\\x.png",
    "\\\\evil\\share\\x.png",
    "",
    "http://",
    "http",
    "://",
    "http://?",
    "http://#",
    "http://\u0000",
    "s3://bucket/x",
    "ssh://x",
    "about:blank",
    "http://" + "a" * 70 + ".org/",
    "http://" + "a." * 2000 + "org/",
    "http://pictures.example.org/" + "a" * 3000,
    "http://-.example.org/",
]

HOSTILE = [
    *(
        f"{scheme}://{host}{rest}"
        for scheme in ("http", "https")
        for host in LOOPBACKS
        for rest in ("/", ":80/a.png", "")
    ),
    *BENT,
]


class Network:
    """A resolver and a connector that record what they were asked, and answer what they were told."""

    def __init__(self, *answers: Sequence[str], response: bytes = b"") -> None:
        self.answers = list(answers)
        self.response = response
        self.resolved: list[tuple[str, int]] = []
        self.connected: list[tuple[str, RemoteAddress]] = []
        self.sent = bytearray()

    async def resolve(self, host: str, port: int) -> list[str]:
        self.resolved.append((host, port))
        return list(self.answers.pop(0))

    async def connect(self, ip: str, address: RemoteAddress) -> tuple[asyncio.StreamReader, "Network"]:
        self.connected.append((ip, address))
        reader = asyncio.StreamReader()
        reader.feed_data(self.response)
        reader.feed_eof()
        return reader, self

    # What `fetch_picture` uses of a writer.
    def write(self, data: bytes) -> None:
        self.sent += data

    async def drain(self) -> None:
        pass

    @property
    def transport(self) -> "Network":
        return self

    def abort(self) -> None:
        pass

    def fetch(self, url: str, allowed: frozenset[str] = ALLOWED, seconds: float = 5) -> bytes:
        return asyncio.run(
            fetch_picture(url, allowed, LIMIT, seconds=seconds, resolve=self.resolve, connect=self.connect)  # type: ignore[arg-type]
        )


def response(body: bytes = b"pixels", status: str = "200 OK", head: bytes = b"") -> bytes:
    return b"HTTP/1.1 " + status.encode() + b"\r\n" + head + b"Content-Length: %d\r\n\r\n" % len(body) + body


def refusal(network: Network, url: str, allowed: frozenset[str] = ALLOWED, seconds: float = 5) -> str:
    with pytest.raises(ImageError) as refused:
        network.fetch(url, allowed, seconds)
    return f"{refused.value.message} {refused.value.hint}"


def test_hostile_addresses_are_never_resolved_or_connected_to_and_are_refused_in_the_same_words() -> None:
    network = Network([PUBLIC], response=response())
    assert len(HOSTILE) >= 300
    assert len({refusal(network, url) for url in HOSTILE}) == 1
    assert (network.resolved, network.connected) == ([], [])
    print(f"\n{len(HOSTILE)} hostile addresses: 0 resolved, 0 connected")


def test_without_allowed_hosts_nothing_is_fetched() -> None:
    network = Network([PUBLIC], response=response())
    refusal(network, "http://pictures.example.org/a.png", frozenset())
    assert network.resolved == []


@pytest.mark.parametrize("address", PRIVATE_ADDRESSES)
def test_a_name_that_means_a_private_address_is_not_connected_to(address: str) -> None:
    assert not is_public(address)
    for found in ([address], [PUBLIC, address], [address, PUBLIC]):
        network = Network(found)
        refusal(network, "http://pictures.example.org/a.png")
        assert network.connected == []


def test_public_addresses_are_public() -> None:
    for address in (PUBLIC, "8.8.8.8", "2606:4700::1111", "2a00:1450:4001::1"):
        assert is_public(address)


def test_a_name_is_resolved_once_and_that_address_connected_to() -> None:
    network = Network([PUBLIC], ["127.0.0.1"], response=response())  # what rebinding a name does
    assert network.fetch("https://pictures.example.org/a.png?x=1") == b"pixels"
    assert network.resolved == [("pictures.example.org", 443)]
    assert [ip for ip, _ in network.connected] == [PUBLIC]
    assert network.sent.startswith(b"GET /a.png?x=1 HTTP/1.1\r\nHost: pictures.example.org\r\n")


@pytest.mark.parametrize(
    "url",
    [
        f"{scheme}://{host}{rest}"
        for scheme in ("http", "https")
        for host in ("pictures.example.org", "cdn.example.net")
        for rest in ("", "/", "/a.png", "/a/b%20c.jpg?w=1&h=2", "?q=/x")
    ]
    + ["http://odd.example.org:8443/x", "https://odd.example.org:8443/x"],
)
def test_an_allowed_address_is_fetched(url: str) -> None:
    assert Network([PUBLIC], response=response()).fetch(url) == b"pixels"


@pytest.mark.parametrize(
    "answer",
    [
        response(status="302 Found", head=b"Location: http://127.0.0.1/\r\n"),
        response(status="301 Moved", head=b"Location: http://pictures.example.org/b\r\n"),
        response(status="404 Not Found"),
        response(status="206 Partial"),
        response(head=b"Content-Encoding: gzip\r\n"),
        response(body=b"x" * (LIMIT + 1)),
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"400\r\n" + b"x" * 1024 + b"\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nshort",
        b"HTTP/1.1 200 OK\r\nX: " + b"y" * 40_000 + b"\r\n\r\n",
        b"SSH-2.0-OpenSSH\r\n",
        b"",
        b"\x00" * 100,
    ],
)
def test_what_is_no_plain_answer_is_refused_in_the_same_words(answer: bytes) -> None:
    network = Network([PUBLIC], response=answer)
    assert refusal(network, "http://pictures.example.org/") == refusal(Network(), "http://127.0.0.1/")


def test_a_slow_host_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow(Network):
        async def resolve(self, host: str, port: int) -> list[str]:
            await asyncio.sleep(60)
            return [PUBLIC]

    refusal(Slow(), "http://pictures.example.org/", seconds=0.05)


def test_a_certificate_of_another_name_is_refused() -> None:
    class Wrong(Network):
        async def connect(self, ip: str, address: RemoteAddress) -> tuple[asyncio.StreamReader, Network]:
            raise ssl.SSLCertVerificationError("a secret")

    assert "secret" not in refusal(Wrong([PUBLIC]), "https://pictures.example.org/")


def test_hosts_to_allow_are_names() -> None:
    assert allowed_host("Pictures.Example.org") == "pictures.example.org"
    assert allowed_host("odd.example.org:8443") == "odd.example.org:8443"
    for text in ("localhost", "127.0.0.1", "10.1", "*.example.org", "http://x.org", "x.org/", "", "[::1]", "a b.org"):
        with pytest.raises(UsageError):
            allowed_host(text)


def test_the_pattern_takes_no_time_on_long_addresses() -> None:
    for url in ("http://" + "a" * 5000, "http://" + "a-" * 1000 + "!", "http://" + "a." * 1000 + "!"):
        assert addresses.read_address(url, ALLOWED) is None
