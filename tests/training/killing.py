"""Kills toy runs again and again, at random moments, until each has ended; `python -m tests.training.killing --help`.

A program of its own: it forks from an interpreter in which everything is imported and nothing has been computed, so a
kill costs a fraction of a second. Every second run is killed once among the updates of each stage, at whatever
instruction; the other moments are drawn over a whole run. Exits with 1 and a sentence if a killed run ended in other
bits than a whole one, or if a stage was never hit.
"""

import argparse
import faulthandler
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
ELSEWHERE = "elsewhere"  # starting, between the stages, or ending
MOST_RUNS = 10
"""For a kill that was asked for, before a stage that none falls into is a mistake of this program."""


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
            faulthandler.register(signal.SIGUSR1, where_is(output, rank).open("w"))
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


def end(output: Path, children: list[int], due: Callable[[], bool] | None, victim: int) -> bool:
    """Wait for a run, or kill one of its processes once that is due; returns whether all ended well.

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
        if due is not None and waiting and due():
            due = None
            if children[victim] in waiting:
                kill_group(children[victim])
        if any(codes) and asked is None:
            asked = time.monotonic()
            for child in waiting:
                os.kill(child, signal.SIGTERM)
        if asked is not None and time.monotonic() > asked + 30 and waiting:
            sys.exit(left_waiting(output, {children.index(child): child for child in waiting}))
        time.sleep(0.002)
    return not any(codes)


def left_waiting(output: Path, children: dict[int, int]) -> str:
    """Kill processes that did not end, by rank; returns a sentence that says where each was."""
    told = "a process was left waiting for 30 s after another was killed"
    for rank, child in children.items():
        os.kill(child, signal.SIGUSR1)
        time.sleep(1)
        in_kernel = Path(f"/proc/{child}/wchan").read_text()
        told += f"\nrank {rank}, in the kernel at {in_kernel}:\n{where_is(output, rank).read_text()}"
        kill_group(child)
    return told


def where_is(output: Path, rank: int) -> Path:
    """The file to which a process writes where it is when it is asked by a signal."""
    return output.parent / f"{output.name}.{rank}.where"


def kill_group(child: int) -> None:
    """Kill a process and what it started."""
    try:
        os.killpg(child, signal.SIGKILL)
    except ProcessLookupError:  # it has no group of its own yet
        os.kill(child, signal.SIGKILL)


def after(seconds: float) -> Callable[[], bool]:
    """Return what tells whether so much time has passed."""
    moment = time.monotonic() + seconds
    return lambda: time.monotonic() > moment


def among_updates(output: Path, stage: str, step: int, seconds: float) -> Callable[[], bool]:
    """Return what tells whether a run that starts now made an update of a stage so many seconds ago."""
    before = lines_of(output)
    waited: Callable[[], bool] | None = None

    def due() -> bool:
        nonlocal waited
        if waited is None:
            update = last_update(before, lines_of(output))
            if update is None or update["stage"] != stage or update["step"] < step:
                return False
            waited = after(seconds)
        return waited()

    return due


def lines_of(output: Path) -> str:
    """The whole lines of a run's figures."""
    path = output / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return text[: text.rfind("\n") + 1]


def last_update(before: str, now: str) -> dict[str, Any] | None:
    """The last update that a start of a run made, by its figures before and now; None where it made none."""
    if before.startswith(now):  # they only became fewer
        return None
    update: dict[str, Any] = json.loads(now.splitlines()[-1])
    return update


def stage_killed(before: str, now: str) -> str:
    """Among which stage's updates a start of a run ended, by its figures before and now."""
    update = last_update(before, now)
    return ELSEWHERE if update is None or update["step"] == update["steps"] else update["stage"]


def result(output: Path) -> dict[str, Any]:
    """What must be equal: final tensors, the optimizer's last checkpoint, the figures."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
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
    if not end(whole, begin(whole, options, arguments.processes), None, 0):
        sys.exit("the run that nobody kills failed")
    length = time.monotonic() - started
    expected = result(whole)
    update = length / len(expected["figures"])
    fell: Counter[str] = Counter()
    runs = 0
    while fell.total() < arguments.kills or not all(fell[stage] for stage in STAGES):
        runs += 1
        if runs > MOST_RUNS * arguments.kills:
            sys.exit(f"{runs - 1} runs were not killed in both stages: {dict(fell)}")
        output = arguments.folder / f"killed-{runs}"
        for attempt in range(4):
            before = lines_of(output)
            due: Callable[[], bool] | None = None
            if attempt < len(STAGES) and runs % 2:
                due = among_updates(output, STAGES[attempt], drawn.randint(1, 2), drawn.uniform(0, update))
            elif attempt < 3:
                due = after(drawn.uniform(0, 1.1 * length))
            children = begin(output, options, arguments.processes)
            if end(output, children, due, drawn.randrange(arguments.processes)):
                break
            fell[stage_killed(before, lines_of(output))] += 1
        if result(output) != expected:
            sys.exit(f"run {runs}, killed and resumed, differs from one that was not")
    places = ", ".join(f"{place} {fell[place]}" for place in (*STAGES, ELSEWHERE))
    print(f"{fell.total()} kills over {runs} runs ({places}), each equal to the bit; a whole run takes {length:.1f} s")


if __name__ == "__main__":
    main()
