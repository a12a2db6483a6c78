"""Kills toy runs again and again, at random moments, until each has ended; `python -m tests.training.killing --help`.

A program of its own: it forks from an interpreter in which everything is imported and nothing has been computed, so a
kill costs a fraction of a second. Exits with 1 and a sentence if a killed run ended in other bits than a whole one.
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
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from minigpt4.training.checkpoint import FOLDER
from tests.training import toy_process

UNEQUAL = ("seconds", "memory_bytes")  # figures of the clock and the machine


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


def end(children: list[int], deadline: float | None, victim: int) -> bool:
    """Wait for a run, or kill one of its processes at a deadline; returns whether all ended well.

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
        if deadline is not None and time.monotonic() > deadline and waiting:
            deadline = None
            if children[victim] in waiting:
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


def result(output: Path) -> dict[str, Any]:
    """What must be equal: final tensors, the optimizer's last checkpoint, the figures."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    figures = [{key: value for key, value in line.items() if key not in UNEQUAL} for line in lines]
    last = sorted((output / FOLDER).glob("stage1-*"))[-1]
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
    if not end(begin(whole, options, arguments.processes), None, 0):
        sys.exit("the run that nobody kills failed")
    length = time.monotonic() - started
    expected = result(whole)
    kills = runs = 0
    while kills < arguments.kills:
        runs += 1
        output = arguments.folder / f"killed-{runs}"
        for attempt in range(4):
            deadline = time.monotonic() + drawn.uniform(0, 1.1 * length) if attempt < 3 else None
            if end(begin(output, options, arguments.processes), deadline, drawn.randrange(arguments.processes)):
                break
            kills += 1
        if result(output) != expected:
            sys.exit(f"run {runs}, killed and resumed, differs from one that was not")
    print(f"{kills} kills over {runs} runs, each equal to the bit; a whole run takes {length:.1f} s")


if __name__ == "__main__":
    main()
