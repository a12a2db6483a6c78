"""Ctrl-C is heard although somebody keeps it to himself, and does not disturb who cleans up after it."""

import signal
import subprocess
import sys
import threading
import time

import pytest

from minigpt4.cli import interrupts
from minigpt4.cli.interrupts import AGAIN_SECONDS, heard, insisting

LONG = 60.0


class Keeps:
    """Somebody whose end is where Ctrl-C is pressed; Python prints what is raised there, and drops it."""

    def __del__(self) -> None:
        signal.raise_signal(signal.SIGINT)
        time.sleep(0.01)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_that_gets_lost_is_raised_again_where_the_program_waits() -> None:
    began = time.monotonic()
    waits = False
    with pytest.raises(KeyboardInterrupt), insisting():
        Keeps()
        waits = True
        threading.Event().wait(LONG)
    assert waits, "it was not lost"
    assert time.monotonic() - began < LONG


def test_who_cleans_up_is_left_alone() -> None:
    ended = False
    with pytest.raises(KeyboardInterrupt), insisting():
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            for _ in range(30):
                time.sleep(AGAIN_SECONDS / 10)
            ended = True
    assert ended


def test_a_second_one_of_a_person_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interrupts, "AGAIN_SECONDS", LONG)
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt), insisting():
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            threading.Timer(0.1, signal.pthread_kill, [threading.get_ident(), signal.SIGINT]).start()
            time.sleep(LONG)
    assert time.monotonic() - began < LONG


def test_one_that_was_heard_is_raised_no_more() -> None:
    with insisting():
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        heard()
        time.sleep(3 * AGAIN_SECONDS)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_end_of_the_block_is_the_end_of_it() -> None:
    with pytest.raises(KeyboardInterrupt), insisting():
        signal.raise_signal(signal.SIGINT)
    time.sleep(3 * AGAIN_SECONDS)
    assert interrupts._interrupts._timer is None


@pytest.mark.parametrize("handler", ["SIG_IGN", "SIG_DFL"])
def test_another_handler_stays(handler: str) -> None:
    code = f"""
import signal
signal.signal(signal.SIGINT, signal.{handler})
from minigpt4.cli.interrupts import insisting
with insisting():
    assert signal.getsignal(signal.SIGINT) is signal.{handler}
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_thread_has_no_signals() -> None:
    failures: list[BaseException] = []

    def enter() -> None:
        try:
            with insisting():
                pass
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert failures == []
