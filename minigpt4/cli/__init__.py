"""The command line: each command parses, calls one function and prints.

Answers and data go to standard output, everything else to standard error. Heavy libraries load inside the command that
needs them. A mistake of the user's is one sentence and a hint, exit status 2; `--debug` shows the traceback.
"""

import sys


def main() -> None:
    """Run the command line."""
    from minigpt4.cli.ending import ending_at_once

    with ending_at_once():
        _run()


def _run() -> None:
    try:
        from minigpt4.cli.running import run  # a third of a second, in which somebody may press Ctrl-C
    except KeyboardInterrupt:
        if sys.stderr is not None:
            print("stopped", file=sys.stderr)
        sys.exit(130)
    run()
