"""A run's progress: a bar on a terminal, else lines, with rates, time left, loss and memory."""

import io
import math
import re
import sys
import time
from collections import deque
from dataclasses import replace

import pytest

from minigpt4.cli.progress import WINDOW, figures, time_left, training_bar
from minigpt4.training.loop import Progress

STEP = Progress(
    stage="words",
    step=1,
    steps=1000,
    loss=2.5,
    accuracy=0.25,
    learning_rate=1e-4,
    grad_norm=1.0,
    tokens=300,
    images=16,
    seconds=2.0,
    skipped=False,
    memory_bytes=1_900_000_000,
)


CONTROL = re.compile(r"\x1b\[[?0-9;]*[A-Za-z]")


class Terminal(io.StringIO):
    """A standard error that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def reported(steps: list[Progress], line_seconds: float = 200) -> None:
    with training_bar(line_seconds) as report:
        for step in steps:
            report(step)


def stages() -> list[Progress]:
    return [replace(STEP, stage=stage, step=n, steps=250) for stage in ("words", "chat") for n in range(1, 251)]


def test_without_a_terminal_lines_come_at_intervals(capsys: pytest.CaptureFixture[str]) -> None:
    reported(stages())

    out, err = capsys.readouterr()
    assert out == ""
    assert [line.split(",")[0] for line in err.splitlines()] == [
        f"{stage} {n} of 250" for stage in ("words", "chat") for n in (1, 101, 201, 250)
    ]


def test_line_says_it_all(capsys: pytest.CaptureFixture[str]) -> None:
    reported([STEP])

    assert capsys.readouterr().err == (
        "words 1 of 1,000, loss 2.500, accuracy 25%, 0.50 steps/s, 8.00 images/s, 150 tokens/s, 1.9 GB, 0:33:18 left\n"
    )


def test_resumed_run_says_at_once_where_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    reported([replace(STEP, step=n) for n in range(641, 660)])

    assert capsys.readouterr().err.startswith("words 641 of 1,000, ")


def test_rates_are_those_of_the_last_steps() -> None:
    slow, fast = replace(STEP, seconds=100.0), replace(STEP, seconds=0.5, images=20, tokens=1000)
    recent = deque([slow, *[fast] * WINDOW], maxlen=WINDOW)

    assert {"2.00 steps/s", "40.0 images/s", "2,000 tokens/s"} <= set(figures(recent))
    assert time_left(deque([replace(fast, step=200)])) == "0:06:40 left"
    assert time_left(deque([replace(slow, step=1)])) == "27:45:00 left"
    assert time_left(deque([replace(fast, step=1000)])) == "done"


def test_time_left_counts_what_comes_between_the_steps(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A validation of 20 s after every second step of 2 s: ten more seconds a step."""
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with training_bar(10.0) as report:
        for stage in ("words", "chat"):
            for step in range(2, 13):
                now += 2.0
                report(replace(STEP, stage=stage, step=step, steps=112))
                now += 0.0 if step % 2 else 20.0
            now += 500.0

    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in lines] == ["2", "7", "12"] * 2
    assert [line.rpartition(", ")[2] for line in lines] == ["0:03:40 left", "0:24:30 left", "0:20:00 left"] * 2
    assert {part for line in lines for part in line.split(", ") if "steps/s" in part} == {"0.50 steps/s"}


def test_rates_of_another_stage_do_not_count(capsys: pytest.CaptureFixture[str]) -> None:
    reported([STEP, replace(STEP, stage="chat", seconds=0.1)])

    assert "10.0 steps/s" in capsys.readouterr().err.splitlines()[1]


def test_what_is_not_known_is_left_out() -> None:
    shown = figures(deque([replace(STEP, tokens=0, images=0, seconds=0.0, memory_bytes=0)]))

    assert shown == ["loss 2.500", "accuracy 25%"]


def test_skipped_update_is_told() -> None:
    assert figures(deque([replace(STEP, loss=math.nan, skipped=True)]))[0] == "loss nan (skipped)"


def test_on_a_terminal_every_stage_has_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")

    reported([replace(step, stage=f"[b]{step.stage}") for step in stages()])

    words, chat, below = [line for line in CONTROL.sub("", terminal.getvalue()).splitlines() if line][-3:]
    assert (words.split()[0], chat.split()[0]) == ("[b]words", "[b]chat")
    assert all("250/250" in line and line.rstrip().endswith("done") for line in (words, chat))
    assert below.rstrip() == "loss 2.500  accuracy 25%  0.50 steps/s  8.00 images/s  150 tokens/s  1.9 GB"


def test_terminal_is_untouched_before_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)

    reported([])

    assert terminal.getvalue() == ""


def test_an_error_leaves_the_terminal_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")

    with pytest.raises(KeyboardInterrupt), training_bar() as report:
        report(STEP)
        raise KeyboardInterrupt

    assert sys.stderr is terminal
    assert terminal.getvalue().endswith("\x1b[?25h")  # the cursor is back
