"""No address that is not of an allowed, public host is ever connected to, and every refusal sounds the same."""

import asyncio
import shutil
import ssl
import subprocess
from collections.abc import Sequence
from pathlib import Path

import httpx
import pytest

from minigpt4.errors import ImageError, UsageError
from minigpt4.serving import remote_pictures
from minigpt4.serving.remote_pictures import allowed_host, fetch_picture, is_public

ALLOWED = frozenset({"pictures.example.org", "cdn.example.net", "odd.example.org:8443"})
PUBLIC = "93.184.215.14"
LIMIT = 1000

PRIVATE_ADDRESSES = """0.0.0.0 10.0.0.1 100.64.0.1 127.0.0.1 127.255.255.254 169.254.169.254 172.16.0.1 172.31.255.255
    192.0.0.8 192.0.0.170 192.0.2.1 192.88.99.1 192.168.1.1 198.18.0.1 198.51.100.7 203.0.113.9 224.0.0.1
    239.255.255.250 240.0.0.1 255.255.255.255 :: ::1 ::127.0.0.1 ::ffff:127.0.0.1 ::ffff:10.0.0.1 64:ff9b::7f00:1
    64:ff9b:1::1 100::1 2001::1 2001:db8::1 2002:7f00:1:: 2002:a00:1::1 3fff::1 5f00::1 fc00::1 fd12::1 fe80::1
    fe80::1%eth0 fec0::1 ff02::1 no-address""".split()  # noqa: SIM905

LOOPBACKS = """127.0.0.1 127.1 0 0.0.0.0 2130706433 0x7f000001 0x7f.1 0177.0.0.1 017700000001 [::1] [::]
    [::ffff:127.0.0.1] [::1%25lo] [64:ff9b::7f00:1] localhost LOCALHOST localhost. localhost.localdomain
    169.254.169.254 metadata.google.internal metadata 192.168.257 10.0.0.1 127.0.0.1.nip.io localtest.me
    127\u30020\u30020\u30021 \uff11\uff12\uff17.0.0.1 \u2460\u2461\u2466.0.0.1 evil.example example.org org
    example.net""".split()  # noqa: SIM905

BENT = [
    *(f"http://{bent}/" for bent in (
        "pictures.example.org@127.0.0.1", "127.0.0.1@pictures.example.org", "user:pw@pictures.example.org",
        "127.0.0.1\\@pictures.example.org", "pictures.example.org\\@127.0.0.1", "127.0.0.1#@pictures.example.org",
        "127.0.0.1?@pictures.example.org", "pictures.example.org:80@127.0.0.1", "pictures.example.org%00.evil.example",
        "pictures.example.org%2f@127.0.0.1", "pictures.example.org\x00.evil", "pictures.example.org\t",
        "pictures.example.org\r\nHost: evil", "pictures.example.org ", "pictures.example.org.", ".pictures.example.org",
        "pictures..example.org", "pictures.example.org.evil.example", "evilpictures.example.org",
        "a.pictures.example.org", "pictures.example.org:22", "pictures.example.org:443", "pictures.example.org:0",
        "pictures.example.org:080", "pictures.example.org:99999", "pictures.example.org:", "pictures.example.org:80:80",
        "odd.example.org", "[pictures.example.org]", "pictures.example.org[", "PICTURES.EXAMPLE.ORG",
        "pictures.example.org\u3002evil", "p\u0131ctures.example.org", "pictures.example\u2024org",
        "a" * 70 + ".org", "a." * 2000 + "org", "-.example.org",
    )),
    *(f"http://pictures.example.org/{bent}" for bent in ("\u00e9", "a b", '"', "<x>", "#x", "x\r\nX: y", "a" * 3000)),
    " http://pictures.example.org/", "http://pictures.example.org/ ", "http:pictures.example.org",
    "http:/pictures.example.org", "http:///pictures.example.org", "//pictures.example.org/a.png",
    "https://pictures.example.org:80/", "HTTP://pictures.example.org/", "ftp://pictures.example.org/",
    "file:///etc/passwd", "file://pictures.example.org/etc/passwd", "gopher://127.0.0.1/", "dict://127.0.0.1:6379/",
    "jar:http://pictures.example.org!/", "javascript:alert(1)", "blob:http://pictures.example.org/x",
    "unix:/run/docker.sock", "/etc/passwd", "C:\\x.png", "", "http://", "http", "://", "s3://bucket/x",
]  # fmt: skip
HOSTILE = [f"{scheme}://{host}{rest}" for scheme in ("http", "https") for host in LOOPBACKS
           for rest in ("/", ":80/a.png", "")] + BENT  # fmt: skip


class Network(httpx.AsyncBaseTransport):
    """A resolver and a transport that record what they were asked, and answer what they were told."""

    def __init__(self, *answers: Sequence[str]) -> None:
        self.answers = list(answers)
        self.resolved: list[tuple[str, int]] = []
        self.sent: list[httpx.Request] = []

    async def resolve(self, host: str, port: int) -> list[str]:
        self.resolved.append((host, port))
        return list(self.answers.pop(0))

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self.sent.append(request)
        return httpx.Response(200, stream=httpx.ByteStream(b"pixels"))

    def fetch(self, url: str, allowed: frozenset[str] = ALLOWED) -> bytes:
        return asyncio.run(fetch_picture(url, allowed, LIMIT, resolve=self.resolve, transport=self))


def refusal(network: Network, url: str, allowed: frozenset[str] = ALLOWED) -> str:
    with pytest.raises(ImageError) as refused:
        network.fetch(url, allowed)
    return f"{refused.value.message} {refused.value.hint}"


def test_hostile_addresses_are_never_resolved_or_connected_to_and_are_refused_in_the_same_words() -> None:
    network = Network([PUBLIC])
    assert len({refusal(network, url) for url in HOSTILE}) == 1
    assert (network.resolved, network.sent) == ([], [])
    print(f"\n{len(HOSTILE)} hostile addresses: 0 resolved, 0 connected")


def test_without_allowed_hosts_nothing_is_fetched() -> None:
    network = Network([PUBLIC])
    refusal(network, "http://pictures.example.org/a.png", frozenset())
    assert network.resolved == []


@pytest.mark.parametrize("address", PRIVATE_ADDRESSES)
def test_a_name_that_means_a_private_address_is_not_connected_to(address: str) -> None:
    assert not is_public(address)
    for found in ([address], [PUBLIC, address], [address, PUBLIC]):
        network = Network(found)
        refusal(network, "http://pictures.example.org/a.png")
        assert network.sent == []


def test_public_addresses_are_public() -> None:
    for address in (PUBLIC, "8.8.8.8", "2606:4700::1111", "2a00:1450:4001::1"):
        assert is_public(address)


@pytest.mark.parametrize("ip", [PUBLIC, "2606:4700::1111"])
def test_a_name_is_resolved_once_and_that_address_connected_to(ip: str) -> None:
    network = Network([ip], ["127.0.0.1"])  # what rebinding a name does
    assert network.fetch("https://pictures.example.org/a.png?x=1") == b"pixels"
    assert network.resolved == [("pictures.example.org", 443)]
    (sent,) = network.sent
    assert (sent.url.host, sent.url.raw_path, sent.headers["host"]) == (ip, b"/a.png?x=1", "pictures.example.org")
    assert sent.extensions["sni_hostname"] == "pictures.example.org"  # the name that the certificate has to be of


@pytest.mark.parametrize("rest", ["", "/", "/a.png", "/a/b%20c.jpg?w=1&h=2", "?q=/x"])
@pytest.mark.parametrize(
    "host", ["http://pictures.example.org", "https://cdn.example.net", "http://odd.example.org:8443"]
)
def test_an_allowed_address_is_fetched(host: str, rest: str) -> None:
    network = Network([PUBLIC])
    assert network.fetch(host + rest) == b"pixels"
    assert network.sent[0].headers["host"] == host.partition("://")[2]
    assert network.sent[0].url.raw_path.decode() == ("" if rest.startswith("/") else "/") + rest


def from_a_socket(
    answer: bytes,
    monkeypatch: pytest.MonkeyPatch,
    seconds: float = 5,
    scheme: str = "http",
    tls: ssl.SSLContext | None = None,
) -> bytes:
    """Fetch from a server on this machine, which counts as public for once, that sends some bytes to anybody."""
    monkeypatch.setattr(remote_pictures, "is_public", lambda address: True)

    opened: list[asyncio.Transport] = []

    class Answering(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            assert isinstance(transport, asyncio.Transport)
            opened.append(transport)
            transport.write(answer)
            if not answer.endswith(b"..."):
                transport.close()

    async def resolve(host: str, port: int) -> list[str]:
        return ["127.0.0.1"]

    async def run() -> bytes:
        server = await asyncio.get_running_loop().create_server(Answering, "127.0.0.1", 0, ssl=tls)
        host = f"pictures.example.org:{server.sockets[0].getsockname()[1]}"
        try:
            return await fetch_picture(
                f"{scheme}://{host}/", frozenset({host}), LIMIT, seconds=seconds, resolve=resolve
            )
        finally:
            server.close()
            for transport in opened:
                transport.abort()
            await asyncio.sleep(0.05)  # until they are closed

    return asyncio.run(run())


def response(body: bytes = b"pixels", status: str = "200 OK", head: bytes = b"") -> bytes:
    return b"HTTP/1.1 " + status.encode() + b"\r\n" + head + b"Content-Length: %d\r\n\r\n" % len(body) + body


def test_a_plain_answer_is_the_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")  # no proxy is asked
    assert from_a_socket(response(), monkeypatch) == b"pixels"


@pytest.mark.parametrize(
    "answer",
    [
        response(status="302 Found", head=b"Location: http://127.0.0.1/\r\n"),
        response(status="404 Not Found"),
        response(status="206 Partial"),
        response(head=b"Content-Encoding: gzip\r\n"),
        response(body=b"x" * (LIMIT + 1)),
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"400\r\n" + b"x" * 1024 + b"\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nshort",
        b"HTTP/1.1 200 OK\r\nX: " + b"y" * 400_000 + b"\r\n\r\n",
        b"SSH-2.0-OpenSSH\r\n",
        b"",
        b"\x00" * 100,
    ],
)
def test_what_is_no_plain_answer_is_refused_in_the_same_words(answer: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ImageError) as refused:
        from_a_socket(answer, monkeypatch)
    assert f"{refused.value.message} {refused.value.hint}" == refusal(Network(), "http://127.0.0.1/")


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_slow_host_is_given_up(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ImageError, match="not one that this server fetches from"):
        from_a_socket(b"HTTP/1.1 200 OK\r\nX: ...", monkeypatch, seconds=1, scheme=scheme)


@pytest.mark.skipif(not shutil.which("openssl"), reason="no openssl")
@pytest.mark.parametrize("name", ["pictures.example.org", "other.example.org", "127.0.0.1"])
def test_the_certificate_has_to_be_of_the_name_and_not_of_the_address(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = tmp_path / "made.pem"
    kind = "IP" if name[0].isdigit() else "DNS"
    words = f"openssl req -x509 -newkey rsa:2048 -nodes -keyout {made} -out {made}.crt -days 1 -subj /CN=x -addext"
    subprocess.run([*words.split(), f"subjectAltName={kind}:{name}"], check=True, capture_output=True)
    monkeypatch.setenv("SSL_CERT_FILE", f"{made}.crt")
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(f"{made}.crt", made)

    def fetched() -> bytes:
        return from_a_socket(response(), monkeypatch, scheme="https", tls=tls)

    if name == "pictures.example.org":
        assert fetched() == b"pixels"
        return
    with pytest.raises(ImageError, match="not one that this server fetches from"):
        fetched()


def test_hosts_to_allow_are_names() -> None:
    assert allowed_host("Pictures.Example.org") == "pictures.example.org"
    assert allowed_host("odd.example.org:8443") == "odd.example.org:8443"
    for text in ("localhost", "127.0.0.1", "10.1", "*.example.org", "http://x.org", "x.org/", "", "[::1]", "a b.org"):
        with pytest.raises(UsageError):
            allowed_host(text)
