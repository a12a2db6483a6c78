"""Does answering several clients at once pay, and how does `minigpt4 serve` compare with `transformers serve`?

    python benchmarks/serving.py --rounds 3 --clients 1 2 4 8 --json figures.json

Both servers run as processes of their own, with the same weights in float32 and as many threads; this program holds
the clients, each of which sends its next question when the last answer has ended. `transformers serve` loads classes
by a table of its own that no model can be registered in; the program that starts it writes one line there. It answers
one request after the other, so it is measured with one client and with the most.

A round asks, in every setting (a server and a number of clients), the same number of questions of three kinds:

- long answers: no picture; `--tokens` tokens each.
- first questions: what is in a picture that the server has not seen before. Answers are short.
- second questions: each of those conversations goes on; what was read of it is there, if it was kept.

A round begins with another setting each time, and no question comes twice, but both servers are asked the same ones
with the same number of clients: their answers, the likeliest words, are compared. Ratios are taken within a round, so
that a machine that becomes busy changes them little; processor time, of the server and the processes it started, a
busy machine changes least. Ctrl-C ends the program with the rounds that are complete.
"""

import argparse
import base64
import http.client
import io
import itertools
import json
import os
import platform
import random
import shlex
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
from PIL import Image

OURS, THEIRS = "minigpt4 serve", "transformers serve"
KINDS = ("long answers", "first questions", "second questions")
THINGS = ("fox", "river", "train", "island", "clock", "bridge", "violin", "garden", "baker", "tower", "storm", "king")
FIRST, SECOND = "What is in this picture?", "Is it a photo or a drawing?"
LOAD_SECONDS, ANSWER_SECONDS = 300, 600

SAVE = """
import sys, minigpt4
model, processor = minigpt4.load(sys.argv[1])
model.save_pretrained(sys.argv[2])
processor.save_pretrained(sys.argv[2])
"""
SERVE = """
import minigpt4
from transformers.models.auto import modeling_auto
modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES["minigpt4"] = "MiniGPT4ForConditionalGeneration"
from transformers.cli.transformers import main
main()
"""

Messages = list[dict[str, Any]]
Setting = tuple[str, int]


@dataclass(frozen=True)
class Server:
    """A server that runs.

    Args:
        name: Which of the two.
        port: Where it listens.
        process: Its process.
    """

    name: str
    port: int
    process: psutil.Process

    def cpu_seconds(self) -> float:
        """Processor time so far, of the server and the processes it started."""
        return sum(sum(p.cpu_times()[:2]) for p in [self.process, *self.process.children(recursive=True)])


@dataclass(frozen=True)
class Answered:
    """One answer, as its client saw it.

    Args:
        text: The answer.
        tokens: How many it has, as the server counts.
        prompt_tokens: How many were asked.
        cached_tokens: How many of them the server had read before; 0 where it does not tell.
        first: Seconds to the first text.
        whole: Seconds to the end.
    """

    text: str
    tokens: int
    prompt_tokens: int
    cached_tokens: int
    first: float
    whole: float


@dataclass(frozen=True)
class Run:
    """All answers of one kind, in one setting and round.

    Args:
        seconds: From the first question to the last answer.
        cpu_seconds: Processor time of the server.
        answers: In the order of the questions.
    """

    seconds: float
    cpu_seconds: float
    answers: Sequence[Answered]

    @property
    def tokens(self) -> int:
        return sum(answer.tokens for answer in self.answers)

    @property
    def speed(self) -> float:
        """Tokens a second, all clients together."""
        return self.tokens / self.seconds


@contextmanager
def running(name: str, command: Sequence[str], ready: str, threads: int, log: Path) -> Iterator[Server]:
    """Start a server on a free port, wait until `ready` answers 200, and stop it in the end."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    with log.open("wb") as output:
        process = subprocess.Popen([*command, "--port", str(port)], env=environment, stdout=output, stderr=output)
        try:
            deadline = time.monotonic() + LOAD_SECONDS
            while not answers(port, ready):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit(f"{name} did not start:\n{log.read_text(errors='replace')[-2000:]}")
                time.sleep(0.5)
            yield Server(name, port, psutil.Process(process.pid))
        finally:
            process.terminate()
            process.wait()


def answers(port: int, path: str) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10):
            return True
    except OSError:  # nobody listens, or says that it is not ready
        return False


def ask(port: int, messages: Messages, tokens: int) -> Answered:
    """Ask one question on a connection of its own, and read the stream of its answer."""
    body = {"messages": messages, "max_tokens": tokens, "temperature": 0}
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=ANSWER_SECONDS)
    started = time.perf_counter()
    try:
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            raise SystemExit(f"a server answered {response.status}: {response.read().decode()}")
        usage: dict[str, Any] = {}
        text, first = "", 0.0
        for line in response:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise SystemExit(f"a server failed: {event['error']}")
            usage = event.get("usage") or usage
            if event["choices"] and (piece := event["choices"][0]["delta"].get("content")):
                first = first or time.perf_counter() - started
                text += piece
    finally:
        connection.close()
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    whole = time.perf_counter() - started
    return Answered(text, usage["completion_tokens"], usage["prompt_tokens"], cached, first, whole)


def ask_all(server: Server, clients: int, questions: Sequence[Messages], tokens: int) -> Run:
    """Let so many clients at once ask all questions, each the next one that nobody has asked."""
    started, before = time.perf_counter(), server.cpu_seconds()
    with ThreadPoolExecutor(clients) as pool:
        found = list(pool.map(lambda messages: ask(server.port, messages, tokens), questions))
    return Run(time.perf_counter() - started, server.cpu_seconds() - before, found)


def stories(number: int, count: int) -> list[Messages]:
    """Ask for texts that are long; `number` says which, and none comes twice."""
    pairs = list(itertools.permutations(THINGS, 2))
    random.Random(0).shuffle(pairs)  # neighbours would begin alike, and be read once
    if (number + 1) * count > len(pairs):
        raise SystemExit(f"there are {len(pairs)} questions, ask fewer")
    chosen = pairs[number * count : (number + 1) * count]
    return [[{"role": "user", "content": f"Write a long story about a {one} and a {other}."}] for one, other in chosen]


def pictures(folder: Path, number: int, count: int) -> list[Messages]:
    """Ask about pictures, of which one more row and column is cut off each time a file comes again."""
    files = sorted(folder.glob("*.jpg"))
    asked: list[Messages] = []
    for place in range(number * count, (number + 1) * count):
        again, which = divmod(place, len(files))
        with Image.open(files[which]) as whole:
            left = whole.crop((again, again, whole.width, whole.height))
        file = io.BytesIO()
        left.save(file, "JPEG", quality=90)
        url = f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
        parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": FIRST}]
        asked.append([{"role": "user", "content": parts}])
    return asked


def continued(questions: Sequence[Messages], run: Run) -> list[Messages]:
    """Ask on in the same conversations."""
    return [
        [*messages, {"role": "assistant", "content": answer.text}, {"role": "user", "content": SECOND}]
        for messages, answer in zip(questions, run.answers, strict=True)
    ]


def measure(server: Server, clients: int, number: int, arguments: argparse.Namespace) -> dict[str, Run]:
    """Ask the questions of all kinds."""
    first = pictures(arguments.pictures, number, arguments.answers)
    runs = {KINDS[0]: ask_all(server, clients, stories(number, arguments.answers), arguments.tokens)}
    runs[KINDS[1]] = ask_all(server, clients, first, arguments.tokens)
    runs[KINDS[2]] = ask_all(server, clients, continued(first, runs[KINDS[1]]), arguments.tokens)
    return runs


def percentile(values: Sequence[float], percent: int) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1] if len(values) > 1 else values[0]


def summary(runs: Sequence[Run], base: Sequence[Run]) -> dict[str, float]:
    """Take the medians over rounds, the ratios to `base` round by round, and what clients saw over all answers."""
    every = [answer for run in runs for answer in run.answers]
    return {
        "tokens_per_second": statistics.median(run.speed for run in runs),
        "ratio": statistics.median(run.speed / alone.speed for run, alone in zip(runs, base, strict=True)),
        "first_p50": percentile([answer.first for answer in every], 50),
        "first_p95": percentile([answer.first for answer in every], 95),
        "answer_p50": percentile([answer.whole for answer in every], 50),
        "cpu_seconds_per_1000": statistics.median(1000 * run.cpu_seconds / run.tokens for run in runs),
        "cached": sum(answer.cached_tokens for answer in every) / sum(answer.prompt_tokens for answer in every),
        "tokens_an_answer": statistics.mean(answer.tokens for answer in every),
    }


def table(kind: str, rows: Mapping[Setting, Mapping[str, float]]) -> str:
    """Write the figures of one kind of question as Markdown."""
    tokens = statistics.mean(row["tokens_an_answer"] for row in rows.values())
    lines = [
        f"| {kind}, of {tokens:.0f} tokens | clients | tokens/s | to 1 client of ours | first text, s: p50 | p95 "
        "| whole answer, s: p50 | processor s per 1,000 tokens | of the prompt, read before |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for (name, clients), row in rows.items():
        lines.append(
            f"| {name} | {clients} | {row['tokens_per_second']:.1f} | {row['ratio']:.2f} | {row['first_p50']:.2f} "
            f"| {row['first_p95']:.2f} | {row['answer_p50']:.2f} | {row['cpu_seconds_per_1000']:.0f} "
            f"| {row['cached']:.0%} |"
        )
    return "\n".join(lines)


def compare(ours: Sequence[Run], theirs: Sequence[Run]) -> str:
    """Say how many answers are the same on both servers, and write down those that are not."""
    texts = [[answer.text for run in runs for answer in run.answers] for runs in (ours, theirs)]
    apart = [pair for pair in zip(*texts, strict=True) if pair[0] != pair[1]]
    lines = [f"{len(texts[0]) - len(apart)} of {len(texts[0])} answers are the same on both servers"]
    return "\n".join(lines + [f"  {OURS}: {one!r}\n  {THEIRS}: {two!r}" for one, two in apart])


@contextmanager
def servers(arguments: argparse.Namespace) -> Iterator[dict[str, Server]]:
    """Start both servers, or ours alone, and let them do what they do for the first time."""
    with ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        command = [sys.executable, "-m", "minigpt4", "serve", "-m", arguments.model, "--device", "cpu"]
        command += ["--dtype", "float32", "--max-concurrent", str(max(arguments.clients))]
        started = [stack.enter_context(running(OURS, command, "/ready", arguments.threads, place / "ours.log"))]
        if not arguments.alone:
            folder = str(place / "model")
            subprocess.run([sys.executable, "-c", SAVE, arguments.model, folder], check=True, capture_output=True)
            command = [sys.executable, "-c", SERVE, "serve", folder, "--device", "cpu", "--dtype", "float32"]
            log = place / "theirs.log"
            started.append(stack.enter_context(running(THEIRS, command, "/health", arguments.threads, log)))
        for server in started:
            ask(server.port, pictures(arguments.pictures, 0, 1)[0], 2)
        yield {server.name: server for server in started}


def measure_all(settings: Sequence[Setting], arguments: argparse.Namespace) -> dict[Setting, list[dict[str, Run]]]:
    """Make the rounds, and return those that are complete."""
    runs: dict[Setting, list[dict[str, Run]]] = {setting: [] for setting in settings}
    with servers(arguments) as started, suppress(KeyboardInterrupt):
        for number in range(arguments.rounds):
            turn = number % len(settings)
            for name, clients in [*settings[turn:], *settings[:turn]]:
                questions = 1 + number * len(arguments.clients) + arguments.clients.index(clients)
                runs[name, clients].append(measure(started[name], clients, questions, arguments))
                speeds = {kind: round(run.speed, 1) for kind, run in runs[name, clients][-1].items()}
                print(
                    f"round {number + 1}: {name}, clients: {clients}, tokens/s: {speeds}", file=sys.stderr, flush=True
                )
    complete = min(len(done) for done in runs.values())
    if not complete:
        raise SystemExit("no round is complete")
    return {setting: done[:complete] for setting, done in runs.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano", help="nano or a model folder")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 2, 4, 8], help="at once; the first is the base")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--answers", type=int, default=8, help="of each kind, in a setting and round")
    parser.add_argument("--tokens", type=int, default=64, help="of a long answer")
    parser.add_argument("--threads", type=int, default=1, help="of each server")
    parser.add_argument("--pictures", type=Path, default=Path(__file__).parents[1] / "examples", help="folder of .jpg")
    parser.add_argument("--alone", action="store_true", help="without transformers serve")
    parser.add_argument("--json", type=Path, help="file for the figures and all answers")
    arguments = parser.parse_args()
    ends = sorted({arguments.clients[0], arguments.clients[-1]}) if not arguments.alone else []
    load_before = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    settings = [(OURS, clients) for clients in arguments.clients] + [(THEIRS, clients) for clients in ends]
    runs = measure_all(settings, arguments)
    figures: dict[str, Any] = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {arguments.threads} used by each server",
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "date": datetime.now(UTC).date().isoformat(),
        "command": shlex.join(["python", *sys.argv]),
        "load": [load_before, os.getloadavg()[0] if hasattr(os, "getloadavg") else None],
    }
    for kind in KINDS:
        done = {setting: [each[kind] for each in rounds] for setting, rounds in runs.items()}
        rows = {setting: summary(each, done[settings[0]]) for setting, each in done.items()}
        print(table(kind, rows), end="\n\n")
        for clients in ends:
            print(f"{kind}, {clients} at once: {compare(done[OURS, clients], done[THEIRS, clients])}\n")
        figures[kind] = [
            {"server": name, "clients": clients, **rows[name, clients], "runs": [asdict(run) for run in each]}
            for (name, clients), each in done.items()
        ]
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
