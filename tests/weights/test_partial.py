"""What came of a file is completed from where it stopped, byte for byte, or left as it is."""

import random
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from minigpt4.errors import DownloadError, StorageError
from minigpt4.weights.partial import MAX_BREAKS, Partial

CONTENT = random.Random(1).randbytes(400_000)
HALF = 200_000


class Server(ThreadingHTTPServer):
    """Gives the end of one file."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.status = 206
        self.content_range = "bytes {start}-{last}/{size}"
        self.limit = len(CONTENT)  # bytes after which a connection breaks off
        self.asked: list[tuple[str, str]] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/a%20b/tiny.whl"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:  # the name http.server calls
        wanted = self.headers["Range"]
        self.server.asked.append((self.path, wanted))
        start = int(wanted.removeprefix("bytes=").removesuffix("-"))
        body = CONTENT[start:]
        self.send_response(self.server.status)
        values = {"start": start, "last": len(CONTENT) - 1, "size": len(CONTENT)}
        self.send_header("Content-Range", self.server.content_range.format(**values))
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: self.server.limit])

    def log_message(self, *arguments: object) -> None:
        """Be quiet."""


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def partial(tmp_path: Path, server: Server) -> Partial:
    """Half of the file, as a download of it left it."""
    growing = tmp_path / "tiny.whl"
    growing.write_bytes(CONTENT[:HALF])
    log = tmp_path / "log"
    log.write_text(f"Found link https://127.0.0.1/tiny.whl.metadata\nFound link {server.address}#sha256=0 (from x)\n")
    partial = Partial(tmp_path / "kept", len(CONTENT))
    partial.keep(growing, log)
    growing.unlink()
    return partial


def test_the_rest_alone_is_asked_for(server: Server, partial: Partial) -> None:
    reports: list[int] = []

    file = partial.complete(reports.append)

    assert file is not None
    assert file.read_bytes() == CONTENT
    assert server.asked == [("/a%20b/tiny.whl", f"bytes={HALF}-")]
    assert reports == sorted(reports)
    assert reports[-1] == len(CONTENT)


def test_what_grows_after_it_was_kept_is_kept(tmp_path: Path, server: Server) -> None:
    log = tmp_path / "log"
    log.write_text(server.address)
    partial = Partial(tmp_path / "kept", len(CONTENT))
    with (tmp_path / "tiny.whl").open("wb") as growing:
        for start in range(0, HALF, 50_000):
            growing.write(CONTENT[start : start + 50_000])
            growing.flush()
            partial.keep(tmp_path / "tiny.whl", log)

    assert partial.file.read_bytes() == CONTENT[:HALF]


def test_less_does_not_take_the_place_of_more(tmp_path: Path, partial: Partial) -> None:
    again = tmp_path / "tiny.whl"
    again.write_bytes(CONTENT[:1000])
    partial.keep(again, tmp_path / "log")
    assert partial.file.read_bytes() == CONTENT[:HALF]

    again.write_bytes(CONTENT[: HALF + 1])
    partial.keep(again, tmp_path / "log")
    assert partial.file.read_bytes() == CONTENT[: HALF + 1]


def test_nothing_is_kept_of_a_file_whose_address_is_not_known(tmp_path: Path) -> None:
    (tmp_path / "tiny.whl").write_bytes(CONTENT)
    (tmp_path / "log").write_text("file:///wheels/tiny.whl http://x/other-tiny.whl.metadata")
    partial = Partial(tmp_path / "kept", len(CONTENT))

    partial.keep(tmp_path / "tiny.whl", tmp_path / "log")
    partial.keep(tmp_path / "gone.whl", tmp_path / "log")

    assert not partial.folder.exists()
    assert partial.complete(print) is None
    partial.remove()


@pytest.mark.parametrize(
    ("status", "content_range"),
    [
        (200, "bytes {start}-{last}/{size}"),
        (404, "bytes {start}-{last}/{size}"),
        (416, "bytes */{size}"),
        (206, "bytes 0-{last}/{size}"),
        (206, "bytes {start}-{last}/1000000"),
        (206, ""),
    ],
)
def test_server_that_gives_something_else_changes_nothing(
    server: Server, partial: Partial, status: int, content_range: str
) -> None:
    server.status, server.content_range = status, content_range

    assert partial.complete(print) is None
    assert partial.file.read_bytes() == CONTENT[:HALF]
    assert len(server.asked) == 1


def test_connection_that_breaks_off_is_taken_up(server: Server, partial: Partial) -> None:
    server.limit = 60_000

    file = partial.complete(lambda done: None)

    assert file is not None
    assert file.read_bytes() == CONTENT
    assert [wanted for _, wanted in server.asked] == [f"bytes={HALF + n * 60_000}-" for n in range(4)]


def test_connection_that_breaks_off_each_time_is_said_and_what_came_is_kept(server: Server, partial: Partial) -> None:
    server.limit = 1000

    with pytest.raises(DownloadError, match=f"broke off {MAX_BREAKS} times, 210000 of 400000 bytes") as told:
        partial.complete(lambda done: None)

    assert "run it again" in told.value.hint
    assert partial.file.read_bytes() == CONTENT[: HALF + MAX_BREAKS * 1000]


def test_server_that_is_gone_changes_nothing(server: Server, partial: Partial) -> None:
    server.shutdown()
    server.server_close()

    assert partial.complete(print) is None
    assert partial.file.read_bytes() == CONTENT[:HALF]


def test_more_than_the_whole_file_is_nothing_to_go_on_from(server: Server, partial: Partial) -> None:
    partial.file.write_bytes(CONTENT + b"!")

    assert partial.complete(print) is None
    assert server.asked == []


def test_whole_file_needs_no_server(server: Server, partial: Partial) -> None:
    partial.file.write_bytes(CONTENT)

    assert partial.complete(print) == partial.file
    assert server.asked == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no disk that is always full")
def test_full_disk_is_a_storage_error(server: Server, tmp_path: Path) -> None:
    class Full(Partial):
        @property
        def file(self) -> Path:
            return Path("/dev/full")

        def _here(self) -> int:
            return HALF

    (tmp_path / "address").write_text(server.address)
    with pytest.raises(StorageError, match="No space left on device"):
        Full(tmp_path, len(CONTENT)).complete(print)


def test_nothing_is_left_when_it_is_removed(partial: Partial) -> None:
    partial.remove()
    partial.remove()

    assert not partial.folder.exists()
