"""What answering takes beside other work, with threads that spin while they wait and with threads that sleep.

    python benchmarks/busy_machine.py --rounds 3

torch shares its work among threads, many times in each answer, and those that are done first wait for the last. By
default they spin, and lose their turns to whatever else the machine does. `minigpt4` sets `OMP_WAIT_POLICY=PASSIVE`
before torch loads, so that they sleep, unless the environment says how often they spin: 300,000 times is GCC's default.

`minigpt4 serve` with nano answers a question about each of some pictures (drawn scenes), one after another, in eight
tokens: by itself, and beside programs that only count, on half of the cores. Each way gets servers of its own, and the
ways take turns; all must give the same answers.
"""

import argparse
import base64
import io
import json
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from nano.scenes.drawing import draw_scene

WAYS = {"spin": {"GOMP_SPINCOUNT": "300000"}, "sleep": {}}
TOLD = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_NUM_THREADS")
QUESTION = "What is in this picture?"


@contextmanager
def others(count: int) -> Iterator[None]:
    """Keep so many cores busy meanwhile."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"], start_new_session=True) for _ in range(count)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


@contextmanager
def serving(way: str) -> Iterator[str]:
    """Serve nano; gives the address."""
    environment = {name: value for name, value in os.environ.items() if name not in TOLD} | WAYS[way]
    command = [sys.executable, "-m", "minigpt4", "serve", "--port", "0"]
    server = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        said = ""
        while (found := re.search(r"http://\S+:\d+", said)) is None:
            assert server.stderr is not None
            said = server.stderr.readline()
            assert said, "the server ended"
        address = found[0]
        while not is_ready(address):
            time.sleep(0.05)
        yield address
    finally:
        server.terminate()
        server.wait()


def is_ready(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/ready", timeout=60) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False


def ask(address: str, number: int) -> tuple[float, float, str]:
    """Ask about a picture; gives seconds to the first word and to the end, and the answer."""
    file = io.BytesIO()
    draw_scene(np.random.default_rng(number))[0].save(file, "PNG")
    picture = {"url": f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"}
    content = [{"type": "image_url", "image_url": picture}, {"type": "text", "text": QUESTION}]
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": 8, "stream": True}
    url, headers = f"{address}/v1/chat/completions", {"Content-Type": "application/json"}
    began, first, said = time.perf_counter(), 0.0, ""
    with urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode(), headers), timeout=600) as reply:
        for line in reply:
            if line.startswith(b"data: {"):
                said += json.loads(line[6:])["choices"][0]["delta"].get("content") or ""
                first = first or (time.perf_counter() - began if said else 0.0)
    return first, time.perf_counter() - began, said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pictures", type=int, default=5, help="answers in a round")
    arguments = parser.parse_args()
    cores = os.cpu_count() or 2
    load_before = os.getloadavg()[0]
    ways = [(way, busy) for busy in (0, cores // 2) for way in WAYS]
    first: dict[tuple[str, int], list[float]] = {way: [] for way in ways}
    whole: dict[tuple[str, int], list[float]] = {way: [] for way in ways}
    answers: list[set[str]] = [set() for _ in range(arguments.pictures + 1)]
    for number in range(arguments.rounds):
        for way, busy in [*ways[number % 4 :], *ways[: number % 4]]:
            with serving(way) as address, others(busy):
                for picture in range(arguments.pictures + 1):
                    *seconds, said = ask(address, picture)
                    answers[picture].add(said)
                    if picture:  # the first answer of a server finds cold caches
                        first[way, busy].append(seconds[0])
                        whole[way, busy].append(seconds[1])
            print(f"round {number + 1}: {way}, {busy} busy: {first[way, busy][-arguments.pictures :]}", file=sys.stderr)
    assert all(len(said) == 1 for said in answers), f"answers differ: {answers}"
    print("| threads that wait | busy cores | s to the first word | at most | s to the eighth |\n|---|---|---|---|---|")
    for key in ways:
        figures = statistics.median(first[key]), max(first[key]), statistics.median(whole[key])
        print(f"| {key[0]} | {key[1]} | " + " | ".join(f"{value:.2f}" for value in figures) + " |")
    machine = f"{platform.machine()}, {cores} cores, load {load_before:.1f} before"
    print(f"\n{machine}; medians; `{shlex.join(['python', *sys.argv])}`")


if __name__ == "__main__":
    main()
