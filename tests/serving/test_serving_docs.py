"""The examples of `docs/serving.md` run as they stand there, against a server that is called as the default model."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from minigpt4.serving.settings import Settings
from tests.serving.live import Live, live
from tests.serving.test_errors import bodies
from tests.serving.test_middleware import WRONG_CREDENTIALS
from tests.serving.test_remote_pictures import HOSTILE

ROOT = Path(__file__).resolve().parents[2]
BLOCKS = re.findall(
    r"^```(bash|python)\n(.*?)^```$", (ROOT / "docs/serving.md").read_text("utf-8"), re.DOTALL | re.MULTILINE
)
EXAMPLES = [(language, text) for language, text in BLOCKS if "localhost:8000" in text or "127.0.0.1:8000" in text]


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    with live(Settings("nano", decoders=1)) as running:
        yield running


@pytest.mark.parametrize(("language", "text"), EXAMPLES, ids=[text.split("\n")[0][:60] for _, text in EXAMPLES])
def test_an_example_is_answered(language: str, text: str, server: Live) -> None:
    here = re.sub(r"(localhost|127\.0\.0\.1):8000", f"127.0.0.1:{server.port}", text)
    program = [sys.executable, "-c"] if language == "python" else ["bash", "-euo", "pipefail", "-c"]
    # Proxies of this machine are not asked for this machine.
    environment = {**os.environ, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    done = subprocess.run([*program, here], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert done.stdout and not re.search('"error": ?{"message"', done.stdout), done.stdout


def test_there_is_an_example_for_every_path_and_for_every_field() -> None:
    together = "".join(text for _, text in EXAMPLES)
    for path in ("/v1/chat/completions", "/v1/attention", "/v1/models", "/health", "/ready", "/metrics", "/version"):
        assert path in together
    fields = """messages stream stream_options max_tokens temperature top_p stop seed num_beams top_k min_p
        repetition_penalty length_penalty image_url span"""
    assert [field for field in fields.split() if field not in together] == []


def test_every_figure_that_was_tried_names_a_test_and_those_that_can_be_counted_are_so() -> None:
    tried = (ROOT / "docs/serving.md").read_text("utf-8").partition("## What was tried")[2]
    rows = dict(re.findall(r"^\| `(\w+)`.*? \| ([^|]+) \|", tried, re.MULTILINE))
    sources = "".join(path.read_text("utf-8") for path in (ROOT / "tests/serving").glob("*.py"))

    assert len(rows) >= 11
    assert [name for name in rows if not re.search(rf"^def test_\w*{name}", sources, re.MULTILINE)] == []
    (chosen,) = re.findall(r'tests/serving -k "(.*)"', tried)
    assert [word for word in chosen.split(" or ") if not any(word in name for name in rows)] == []
    assert rows["hostile_addresses"] == str(len(HOSTILE))
    assert rows["bad_requests"] == str(sum(1 for _ in bodies()))
    assert rows["every_wrong_credential"].endswith(f" x {len(WRONG_CREDENTIALS)}")
