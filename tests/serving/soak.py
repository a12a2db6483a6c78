"""The long forms of the server's tests, each of which prints its figure; `make soak` runs them.

Not collected by pytest's usual run: `python -m pytest tests/serving/soak.py -s`. `SOAK` multiplies every amount; 0.01
shows in a minute that all of them work.
"""

import http.client
import json
import os
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from minigpt4.serving.settings import Limits, Settings
from tests.serving.live import HELLO, MODEL, Live, data_url, live, picture_file, request_bytes, seeing
from tests.serving.test_errors import Caller
from tests.serving.test_pictures import bombs, mutants
from tests.serving.test_requests import leave_in_the_middle
from tests.serving.test_schema import keeps_its_description

SCALE = float(os.environ.get("SOAK", "1"))
pytestmark = pytest.mark.timeout(3600)


def amount(number: int) -> int:
    return max(2, round(number * SCALE))


def percentile(values: list[float], part: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * part))]


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    with live(Settings(MODEL, decoders=2)) as running:
        yield running


@pytest.fixture(scope="module")
def caller(server: Live) -> Iterator[Caller]:
    made = Caller(server.port)
    yield made
    made.connection.close()


def test_mutated_pictures(server: Live, caller: Caller) -> None:
    statuses: dict[int, int] = {}
    started = time.monotonic()
    for file in mutants(amount(10_000), seed=1):
        part = {"type": "image_url", "image_url": {"url": data_url(file)}}
        body = {"messages": [{"role": "user", "content": [part]}], "max_tokens": 1}
        status = caller.post(json.dumps(body).encode()).status
        statuses[status] = statuses.get(status, 0) + 1
    deaths = server.server.handler.pool.deaths
    took = time.monotonic() - started
    print(f"\n{amount(10_000)} mutated pictures in {took:.0f} s: {statuses}, children lost: {deaths}")
    assert set(statuses) <= {200, 400}


def test_bombs(server: Live) -> None:
    process = psutil.Process()
    server.chat({"messages": [seeing("x", picture_file())]})
    files = list(bombs())
    before, most, slowest = process.memory_info().rss, 0, 0.0
    for name, file in files:
        started = time.monotonic()
        status = server.chat({"messages": [seeing("x", file)], "max_tokens": 1}).status
        slowest = max(slowest, time.monotonic() - started)
        most = max(most, process.memory_info().rss - before)
        assert status in (200, 400, 413), name
    print(f"\n{len(files)} bombs: server grew by {most / 2**20:.0f} MB at most, slowest {slowest:.1f} s")
    assert most < 64 * 2**20 + max(len(file) for _, file in files) * 3


def test_requests_out_of_the_description() -> None:
    with live(Settings(MODEL, decoders=2, limits=replace(Limits(), max_new_tokens=8))) as server:
        print(f"\n{keeps_its_description(server, amount(500))} requests out of /openapi.json: every answer fits it")


def test_crowd_on_one_place() -> None:
    seconds = max(5.0, 60 * SCALE)
    with live(max_concurrent=1, max_queue=8) as server:
        server.chat(HELLO)  # what the libraries do once at their first call is no part of it
        script = str(Path(__file__).with_name("crowd.py"))
        output = subprocess.check_output([sys.executable, script, str(server.port), "64", str(seconds)])
        server.wait_idle()
        seen = json.loads(output)
        counts = server.engine.counts
        statuses = Counter(status for status, _ in seen)
        refused = [took for status, took in seen if status == 429]
        lost = counts.accepted - 1 - statuses[200]
        p50, p99 = percentile(refused, 0.5) * 1000, percentile(refused, 0.99) * 1000
        print(
            f"\n64 clients, one place, {seconds:.0f} s: {dict(statuses)}, lost {lost}, hung 0, "
            f"429 within {p50:.0f} ms (p50), {p99:.0f} ms (p99)"
        )
        assert lost == 0 and set(statuses) <= {200, 429}
        assert p99 < 50


def test_memory_with_new_pictures() -> None:
    with live(image_bytes=2**20, read_bytes=2**22) as server:
        process = psutil.Process()
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        measured = []
        for number in range(amount(2_000)):
            body = {"messages": [seeing("what?", picture_file(number))], "max_tokens": 2}
            connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
            assert connection.getresponse().read()
            if number in (amount(2_000) // 4, amount(2_000) - 1):
                server.wait_idle()
                measured.append((process.memory_info().rss, process.num_fds(), process.num_threads()))
        connection.close()
        (first, *before), (last, *after) = measured[0], measured[-1]
        print(
            f"\n{amount(2_000)} new pictures: memory {100 * (last / first - 1):+.2f} %, "
            f"files and threads {before} -> {after}"
        )
        assert last < first * 1.02 and all(now <= then for now, then in zip(after, before, strict=True))


def test_disconnects(monkeypatch: pytest.MonkeyPatch) -> None:
    with live(max_concurrent=1) as server:
        wasted = leave_in_the_middle(server, monkeypatch, amount(200))
        counts = server.engine.counts
        print(f"\n{len(wasted)} disconnects: places held {counts.answering}, tokens wasted at most {max(wasted)} each")
        assert counts.answering == 0 and max(wasted) <= 1 and counts.cancelled == len(wasted)
        assert server.chat(HELLO).status == 200


def test_slow_sockets() -> None:
    limits = replace(Limits(), header_seconds=8.0, body_seconds=8.0)
    with live(Settings(MODEL, decoders=1, limits=limits)) as server:
        count, took = amount(200), []
        slow: list[socket.socket] = [server.connect() for _ in range(count)]
        whole = request_bytes(HELLO)
        end = time.monotonic() + max(3.0, 15 * SCALE)
        place = 0
        while time.monotonic() < end:
            for connection in slow:
                try:
                    connection.send(whole[place : place + 1])
                except OSError:
                    continue
            place += 1
            started = time.monotonic()
            assert server.ask("GET", "/health").status == 200
            took.append(time.monotonic() - started)
            time.sleep(0.2)
        assert server.chat(HELLO).status == 200
        print(f"\n{count} slow sockets: /health p99 {percentile(took, 0.99) * 1000:.0f} ms, {place} bytes each")
        for connection in slow:
            connection.close()
        assert percentile(took, 0.99) < 0.1
