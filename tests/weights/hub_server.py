"""A hub on this machine: the three answers that the hub's client asks of one, for one repository."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPOSITORY = "someone/tiny"


class Hub(ThreadingHTTPServer):
    """Gives the files of a folder as `someone/tiny`, at the revision `main` alone.

    Args:
        folder: The files.
    """

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.gated = False  # whether it shows the list of files, and gives none of them
        self.status = 200  # of every answer, where it is not 200
        self.page = b""  # its one answer, where there is one
        self.asked: list[str] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:  # the name http.server calls
        self.server.asked.append(self.path)
        path = self.path.partition("?")[0]
        if self.server.status != 200 or self.server.page:
            self.answer(self.server.status, self.server.page)
        elif path in (f"/api/models/{REPOSITORY}", f"/api/models/{REPOSITORY}/revision/main"):
            siblings = [{"rfilename": name} for name in self.files()]
            self.answer(200, json.dumps({"id": REPOSITORY, "sha": COMMIT, "siblings": siblings}).encode())
        elif path == f"/api/models/{REPOSITORY}/tree/{COMMIT}":
            rows = [
                {"type": "file", "path": name, "size": file.stat().st_size, "oid": "0" * 40}
                for name, file in self.files().items()
            ]
            self.answer(200, json.dumps(rows).encode())
        elif path.startswith(f"/api/models/{REPOSITORY}/"):
            self.answer(404, error="RevisionNotFound")
        elif self.server.gated:
            self.answer(403, error="GatedRepo")
        elif path.startswith(prefix := f"/{REPOSITORY}/resolve/{COMMIT}/"):
            content = self.files()[path.removeprefix(prefix)].read_bytes()
            self.answer(200, content, etag=f'"{hashlib.sha256(content).hexdigest()}"')  # the client names files by it
        else:
            self.answer(404, error="RepoNotFound")

    def do_HEAD(self) -> None:  # the name http.server calls
        self.do_GET()

    def files(self) -> dict[str, Path]:
        return {path.name: path for path in sorted(self.server.folder.iterdir())}

    def answer(self, status: int, body: bytes = b"", *, error: str = "", etag: str = "") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        if error:
            self.send_header("X-Error-Code", error)
        if etag:
            self.send_header("ETag", etag)
            self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        """Be quiet."""


@contextmanager
def running(folder: Path) -> Iterator[Hub]:
    """Serve a folder for as long as the block runs."""
    with Hub(folder) as hub:
        threading.Thread(target=hub.serve_forever, args=(0.05,), daemon=True).start()
        yield hub
        hub.shutdown()
