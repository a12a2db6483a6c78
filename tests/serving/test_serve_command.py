"""The command itself: mistakes are sentences before anything loads, and a signal lets answers finish."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import openai
import pytest
import typer

from minigpt4.cli.run import app
from tests import tiny_chat

ROOT = Path(__file__).resolve().parents[2]


def command(*arguments: str, **environment: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "minigpt4", "serve", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=os.environ | environment,
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_chat.saved(tmp_path_factory.mktemp("models") / "tiny")


def line_of(stream: IO[str] | None, pattern: str) -> str:
    assert stream is not None
    for line in stream:
        if found := re.search(pattern, line):
            return found[1] if found.groups() else line
    raise AssertionError(f"no line like {pattern}")


@contextmanager
def serving(folder: Path, *arguments: str) -> Iterator[tuple[Any, openai.OpenAI]]:
    """The command, when it is ready, and a client."""
    process = command("-m", str(folder), "--port", "0", *arguments)
    try:
        url = line_of(process.stderr, r"listening on (http://\S+);")
        line_of(process.stderr, "tiny is ready")
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60) as client:
            yield process, client
    finally:
        process.kill()
        process.communicate()


def test_demo_takes_exactly_the_options_of_serve() -> None:
    commands: Any = typer.main.get_command(app)
    serve, demo = (
        [(option.opts, option.default, getattr(option, "help", None)) for option in commands.commands[name].params]
        for name in ("serve", "demo")
    )
    assert serve == demo
    assert len(serve) >= 16 and all(explained for _, _, explained in serve)


MISTAKES = [
    (["--host", "0.0.0.0"], "no API key"),
    (["--host", "::"], "no API key"),
    (["--host", "no.such.host.invalid", "--insecure"], "there is no address"),
    (["--cfg-path", "x.yaml", "--language-model", "y"], "both --cfg-path and --language-model"),
    (["--port", "-1"], "--port"),
    (["--port", "65536"], "--port"),
    (["--port", "x"], "--port"),
    (["--api-key-file", "/nonexistent/key"], "cannot be read"),
    (["--api-key-file", "/"], "cannot be read|no plain file"),
    (["--api-key-file", "/dev/null"], "no plain file"),
    (["--allow-image-host", "http://x"], "--allow-image-host"),
    (["--allow-image-host", "127.0.0.1"], "--allow-image-host"),
    (["--allow-host", "a b"], "--allow-host"),
    (["--max-queue", "0"], "--max-queue"),
    (["--max-concurrent", "0"], "--max-concurrent"),
    (["--device", "tpu"], "tpu"),
    (["--dtype", "int3"], "int3"),
    (["--quantize", "q4"], "q4"),
    (["--options", "model.ckpt=x"], "--options"),
    (["surplus"], "surplus"),
]


@pytest.mark.parametrize(
    ("arguments", "said"), MISTAKES, ids=lambda value: value if isinstance(value, str) else " ".join(value)
)
def test_a_mistake_is_a_sentence_before_anything_loads(
    arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from minigpt4.cli import main

    monkeypatch.delenv("MINIGPT4_API_KEY", raising=False)
    monkeypatch.setattr(sys, "argv", ["minigpt4", "serve", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    told = capsys.readouterr()
    assert (ended.value.code, told.out) == (2, "")
    assert re.search(said, told.err) and told.err.count("\n") <= 3 and "Traceback" not in told.err


def test_a_port_in_use_is_a_sentence(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from minigpt4.cli import main

    with socket.create_server(("127.0.0.1", 0)) as taken:
        monkeypatch.setattr(sys, "argv", ["minigpt4", "serve", "--port", str(taken.getsockname()[1])])
        with pytest.raises(SystemExit) as ended:
            main()
    assert ended.value.code == 2 and "is in use" in capsys.readouterr().err


@pytest.mark.slow
def test_a_model_that_is_not_there_ends_the_server_with_a_sentence(tmp_path: Path) -> None:
    process = command("-m", str(tmp_path), "--port", "0")
    _, told = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "error: " in told and "Traceback" not in told


@pytest.mark.slow
def test_a_signal_lets_an_answer_finish_and_ends_with_0(folder: Path) -> None:
    with serving(folder) as (process, client):
        message = {"role": "user", "content": "hello"}
        stream = client.chat.completions.create(model="tiny", messages=[message], max_tokens=100, stream=True)
        pieces = [next(stream)]
        process.send_signal(signal.SIGTERM)
        pieces += list(stream)
        assert pieces[-1].choices[0].finish_reason in ("stop", "length")
        started = time.monotonic()
        assert process.wait(20) == 0
        assert time.monotonic() - started < 10
        assert process.stdout.read() == ""
        assert "stopping; answers in progress: 1, for 8 s at most" in process.stderr.read()


@pytest.mark.slow
def test_a_second_signal_ends_at_once(folder: Path) -> None:
    with serving(folder) as (process, client):
        message = {"role": "user", "content": "hello"}
        stream = client.chat.completions.create(
            model="tiny", messages=[message], max_tokens=900, stream=True, temperature=50, seed=1
        )
        next(stream)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        process.send_signal(signal.SIGTERM)
        started = time.monotonic()
        assert process.wait(20) == 0  # not -6: the interpreter may not end while the engine computes
        assert time.monotonic() - started < 8
