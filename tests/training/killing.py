"""Kills toy runs again and again, at random moments, until each has ended; `python -m tests.training.killing --help`.

A program of its own: it forks from an interpreter in which everything is imported and nothing has been computed, so a
kill costs a fraction of a second. A kill comes at whatever instruction, a random time after a random update. Prints how
many fell among the updates of each stage; exits with 1 and a sentence if a killed run ended in other bits than a whole
one, or if a process was left waiting.
"""

import argparse
import json
import os
import random
import signal
import socket
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from minigpt4.training.run_folder import CHECKPOINT_FOLDER
from tests.training import toy_process

UNEQUAL = ("seconds", "memory_bytes")  # figures of the clock and the machine
STAGES = ("first", "second")  # of the toy recipe
MOST_RUNS = 10
"""For a kill that was asked for, before a stage without any is a mistake of this program."""


def begin(output: Path, options: list[str], processes: int) -> list[int]:
    """Start the processes of a run; returns their numbers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(processes):
        child = os.fork()
        if child == 0:
            os.setsid()
            if processes > 1:
                os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes))
                os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
            try:
                toy_process.run(toy_process.parsed([str(output), *options]))
            except BaseException:
                (output.parent / f"{output.name}.{rank}.error").write_text(traceback.format_exc())
                os._exit(1)
            os._exit(0)
        children.append(child)
    return children


def end(children: list[int], due: Callable[[], bool], victim: int) -> bool:
    """Wait for a run, and kill one of its processes once that is due; returns whether all ended well.

    As torchrun does, the others are asked to end once one has failed; they have 30 s for it.
    """
    waiting, codes = set(children), []
    asked = None
    while waiting:
        for child in list(waiting):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                waiting.remove(child)
                codes.append(status)
        if not codes and due():
            kill_group(children[victim])
        if any(codes) and asked is None:
            asked = time.monotonic()
            for child in waiting:
                os.kill(child, signal.SIGTERM)
        if asked is not None and time.monotonic() > asked + 30 and waiting:
            for child in waiting:
                kill_group(child)
            sys.exit("a process was left waiting for 30 s after another was killed")
        time.sleep(0.002)
    return not any(codes)


def kill_group(child: int) -> None:
    """Kill a process and what it started."""
    try:
        os.killpg(child, signal.SIGKILL)
    except ProcessLookupError:  # it has no group of its own yet
        os.kill(child, signal.SIGKILL)


def lines_of(output: Path) -> list[str]:
    """The whole lines of a run's figures."""
    path = output / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return text[: text.rfind("\n") + 1].splitlines()


def after(output: Path, updates: int, seconds: float) -> Callable[[], bool]:
    """Return what tells whether a run made so many updates, so many seconds ago."""
    moment = float("inf")

    def due() -> bool:
        nonlocal moment
        if moment == float("inf") and len(lines_of(output)) >= updates:
            moment = time.monotonic() + seconds
        return time.monotonic() > moment

    return due


def stage_killed(before: list[str], now: list[str]) -> str:
    """Among which stage's updates a start of a run ended, by its figures before and now."""
    last = json.loads(now[-1]) if len(now) > len(before) else None
    return "elsewhere" if last is None or last["step"] == last["steps"] else last["stage"]


def result(output: Path) -> dict[str, Any]:
    """What must be equal: final tensors, the optimizer's last checkpoint, the figures."""
    lines = [json.loads(line) for line in lines_of(output)]
    figures = [{key: value for key, value in line.items() if key not in UNEQUAL} for line in lines]
    last = sorted((output / CHECKPOINT_FOLDER).glob("stage1-*"))[-1]
    files = [output / "final.safetensors", last / "optimizer.safetensors"]
    tensors = {
        f"{file.name} {name}": tensor.numpy().tobytes() for file in files for name, tensor in load_file(file).items()
    }
    return {"figures": figures, "tensors": tensors}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--accumulation", default="1")
    parser.add_argument("--workers", default="0")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    options = ["--accumulation", arguments.accumulation, "--workers", arguments.workers]
    drawn = random.Random(arguments.seed)
    whole = arguments.folder / "whole"
    started = time.monotonic()
    if not end(begin(whole, options, arguments.processes), lambda: False, 0):
        sys.exit("the run that nobody kills failed")
    length = time.monotonic() - started
    expected = result(whole)
    updates = len(expected["figures"])
    fell: Counter[str] = Counter()
    runs = 0
    while fell.total() < arguments.kills or not all(fell[stage] for stage in STAGES):
        runs += 1
        if runs > MOST_RUNS * arguments.kills:
            sys.exit(f"{runs - 1} runs were not killed in both stages: {dict(fell)}")
        output = arguments.folder / f"killed-{runs}"
        for attempt in range(4):
            before = lines_of(output)
            due = after(output, drawn.randint(len(before), updates), drawn.uniform(0, 2 * length / updates))
            children = begin(output, options, arguments.processes)
            if end(children, due if attempt < 3 else lambda: False, drawn.randrange(arguments.processes)):
                break
            fell[stage_killed(before, lines_of(output))] += 1
        if result(output) != expected:
            sys.exit(f"run {runs}, killed and resumed, differs from one that was not")
    print(json.dumps({"all": fell.total(), **fell}))


if __name__ == "__main__":
    main()
