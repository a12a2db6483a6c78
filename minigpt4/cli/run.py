"""Running the command line: an error becomes one sentence, a hint and an exit status."""

import logging
import os
import sys
from typing import Any

import typer
from pydantic import ValidationError

from minigpt4.cli import ask, chat, data, doctor, serve, weights  # noqa: F401  (each registers its commands)
from minigpt4.cli.console import complain, forgiving_streams, note
from minigpt4.cli.interrupts import insisting
from minigpt4.cli.options import app, spread_options
from minigpt4.cli.train import join_names
from minigpt4.errors import MiniGPT4Error, UsageError

_EXPECTED = {
    "less_than_equal": "at most {le:g}",
    "greater_than_equal": "at least {ge:g}",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_parsing": "a number",
}
"""What an option should hold, by the kind of its error."""


def run() -> None:
    """Run the command line, and turn what goes wrong into one sentence and an exit status."""
    arguments, debug = without_debug(sys.argv[1:])
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    forgiving_streams()
    sleep_while_waiting()
    try:
        with insisting():
            _run(arguments)
    except MiniGPT4Error as error:
        if debug:
            raise
        complain(error)
        sys.exit(error.exit_status)
    except KeyboardInterrupt as stop:
        if debug:
            raise
        note(str(stop) or "stopped")
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # whoever read has enough
        sys.exit(141)
    except Exception as error:
        if debug:
            raise
        said = " ".join(str(error).split())
        reason = type(error).__name__ + (f": {said}" if said else "")
        complain(MiniGPT4Error(f"unexpected {reason}", hint="--debug shows where"))
        sys.exit(1)


def sleep_while_waiting() -> None:
    """Let torch's threads sleep while they wait for each other, unless the environment says otherwise.

    They spin by default, and lose their turns to whatever else the machine does: beside one busy program the first
    word about a picture then takes 17 times as long (`benchmarks/busy_machine.py`). Read when torch loads.
    """
    if not {"GOMP_SPINCOUNT", "KMP_BLOCKTIME"}.intersection(os.environ):
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def _run(arguments: list[str]) -> None:
    """Run a command without the library's own handling of errors, which would write its own words and statuses."""
    command = typer.main.get_command(app)
    try:
        with command.make_context("minigpt4", join_names(spread_options(arguments))) as context:
            command.invoke(context)
    except typer.Exit:
        return
    except Exception as error:
        if not hasattr(error, "format_message"):
            raise
        where = getattr(error, "ctx", None)
        message = error.format_message()
        if where and message == where.get_help():  # a group without a command
            note(message)
            sys.exit(2)
        message = _wrong_value(error) or " ".join(message.split()).rstrip(".")
        raise UsageError(message[:1].lower() + message[1:], _usage_hint(arguments, where)) from error
    finally:
        if sys.stdout is not None:
            sys.stdout.flush()  # here, where a broken pipe is still handled


def _wrong_value(error: Any) -> str:  # noqa: ANN401  (the library's error)
    """Say what an option holds and what was expected, of which the library says the latter only; else nothing."""
    cause, option = error.__cause__, getattr(error, "param", None)
    if not isinstance(cause, ValidationError) or option is None:
        return ""
    first = cause.errors()[0]
    expected = _EXPECTED.get(first["type"], str(first["msg"]).removeprefix("Input should be "))
    given = str(first["input"])
    return f"{error.param_hint or option.opts[0]} is {given[:80]!r}, expected {expected.format(**first.get('ctx', {}))}"


def _usage_hint(arguments: list[str], where: Any) -> str:  # noqa: ANN401  (the library's context, or None)
    """Name the cure of a command line that was not understood."""
    if any(argument.startswith("-") and " " in argument for argument in arguments):
        return "put -- before a question that begins with -, and every option before the --"
    path = where.command_path if where else " ".join(["minigpt4", *arguments[:1]])
    return f"`{path} --help` says what there is"


def without_debug(arguments: list[str]) -> tuple[list[str], bool]:
    """Take `--debug` out of the arguments, wherever it stands before `--`."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    options = [argument for argument in arguments[:end] if argument != "--debug"]
    return options + arguments[end:], len(options) < end
