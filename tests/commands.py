"""A command run in the test's own process: its exit status, and what it printed where."""

import io
import sys
from collections.abc import Callable
from dataclasses import dataclass

import pytest
from transformers.utils import logging as transformers_logging

from minigpt4 import cli


@dataclass
class Result:
    """What a command did."""

    status: int
    out: str
    err: str


Run = Callable[..., Result]


def runner(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Return what runs `minigpt4` with arguments, and with bytes as `stdin`; None closes it."""
    # A process of its own is told by environment variables, which are too late for a library that has loaded.
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()

    def run(*arguments: str, stdin: bytes | None = b"") -> Result:
        stream = None if stdin is None else io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8")
        monkeypatch.setattr(sys, "argv", ["minigpt4", *arguments])
        monkeypatch.setattr(sys, "stdin", stream)
        capfd.readouterr()
        status = 0
        try:
            cli.main()
        except SystemExit as error:
            status = int(error.code or 0)
        return Result(status, *capfd.readouterr())

    return run


def refused(result: Result, *words: str) -> None:
    """Check that a mistake is told as it should be: one sentence and a hint on standard error, status 2."""
    lines = result.err.splitlines()
    assert result.status == 2, result
    assert result.out == ""
    assert len(lines) == 2, result.err
    assert lines[0].startswith("error: ")
    assert not lines[0].endswith(".")
    assert lines[1].startswith("hint: ")
    assert "Traceback" not in result.err
    for word in words:
        assert word in lines[0], (word, lines[0])
