"""One of many processes ends when its work is done, with its status and all that it printed."""

import os
import subprocess
import sys

import pytest

CODE = """
import atexit, sys
from minigpt4.cli import ending_at_once

atexit.register(lambda: print("the interpreter's own end"))
with ending_at_once():
    print("a line")
    print("no line", end="", file=sys.stderr)
    {last}
"""


def ended(processes: str | None, last: str) -> tuple[int, list[str], str]:
    environment = {name: value for name, value in os.environ.items() if name not in ("WORLD_SIZE", "PYTHONUNBUFFERED")}
    if processes is not None:
        environment["WORLD_SIZE"] = processes
    done = subprocess.run(
        [sys.executable, "-c", CODE.format(last=last)], env=environment, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout.splitlines(), done.stderr


@pytest.mark.parametrize(("last", "status"), [("pass", 0), ("sys.exit()", 0), ("sys.exit(143)", 143)])
def test_one_of_many_ends_at_once_with_its_status_and_its_words(last: str, status: int) -> None:
    assert ended("2", last) == (status, ["a line"], "no line")


@pytest.mark.parametrize("processes", [None, "1", ""])
def test_a_process_alone_ends_as_always(processes: str | None) -> None:
    assert ended(processes, "sys.exit(3)") == (3, ["a line", "the interpreter's own end"], "no line")


def test_an_exception_is_shown() -> None:
    status, out, err = ended("2", "raise ValueError('shown')")
    assert (status, out) == (1, ["a line", "the interpreter's own end"])
    assert err.endswith("ValueError: shown\n")


def test_the_command_line_ends_so() -> None:
    environment = {**os.environ, "WORLD_SIZE": "2"}
    code = "import atexit, sys; from minigpt4.cli import main; atexit.register(lambda: print('later')); "
    for arguments, status in (["--version"], 0), (["no-such-command"], 2):
        program = f"{code}sys.argv = ['minigpt4', *{arguments}]; main()"
        done = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False
        )
        assert (done.returncode, "later" in done.stdout) == (status, False), done.stderr
        assert bool(done.stdout) == (status == 0)
