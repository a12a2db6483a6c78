"""What the terminal shows beside answers: each line whole, whoever else writes."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

from minigpt4.cli.console import complain, note
from minigpt4.errors import UsageError
from tests import tiny_chat


class Writes(io.RawIOBase):
    """A terminal that keeps every write apart, as it comes from a program that buffers nothing."""

    def __init__(self) -> None:
        self.all: list[bytes] = []

    def writable(self) -> bool:
        return True

    def write(self, data: "bytes | memoryview") -> int:  # type: ignore[override]
        self.all.append(bytes(data))
        return len(data)


def unbuffered(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Have standard error as `PYTHONUNBUFFERED` makes it; return what will come there, write by write."""
    raw = Writes()
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(io.BufferedWriter(raw, 1), write_through=True))
    return raw.all


def test_a_note_and_its_line_break_are_one_write(monkeypatch: pytest.MonkeyPatch) -> None:
    writes = unbuffered(monkeypatch)
    note("loading nano")
    assert writes == [b"loading nano\n"]


def test_a_complaint_is_a_write_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    writes = unbuffered(monkeypatch)
    complain(UsageError("there is no file cat.jpg", "check the name"))
    assert writes == [b"error: there is no file cat.jpg\n", b"hint: check the name\n"]


def test_nothing_meant_for_a_closed_standard_error_reaches_the_answers(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    note("loading nano")
    assert capfd.readouterr().out == ""


def test_a_command_needs_no_standard_error(tmp_path: Path) -> None:
    """As `2>&-` has it, and a program without a console: nothing is told, and the answer is whole."""
    tiny_chat.picture().save(tmp_path / "cat.png")
    (tmp_path / "cat.txt").write_text("a cat on a mat")
    command = [sys.executable, "-m", "minigpt4", "data", "check", str(tmp_path), "--json"]
    closed = subprocess.run(["sh", "-c", '"$@" 2>&-', "sh", *command], capture_output=True, text=True, check=False)
    assert closed.returncode == 0
    assert json.loads(closed.stdout)["good"] == 1
