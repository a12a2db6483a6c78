"""The command line: each command parses, calls one function and prints.

Answers and data go to standard output, everything else to standard error. Heavy libraries load inside the command that
needs them. A mistake of the user's is one sentence and a hint, exit status 2; `--debug` shows the traceback.
"""

from minigpt4.cli import (  # each registers its commands
    asking,
    checking,
    data,
    delta,
    demo,
    features,
    original,
    serving,
    training,
)
from minigpt4.cli.running import main

__all__ = ["asking", "checking", "data", "delta", "demo", "features", "main", "original", "serving", "training"]
