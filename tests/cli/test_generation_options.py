"""Options of an answer that cannot be or change nothing are told before anything loads."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests import tiny_chat
from tests.commands import Run, refused, runner

ASK = ["ask", "cat.png", "What is it?", "-m", "nowhere"]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Runs a command in a folder with `cat.png`."""
    monkeypatch.chdir(tmp_path)
    tiny_chat.picture().save("cat.png")
    return runner(monkeypatch, capfd)


@pytest.mark.parametrize(
    ("option", "value", "needed"),
    [("--top-p", "0.9", "--temperature"), ("--seed", "0", "--temperature"), ("--length-penalty", "1", "--num-beams")],
)
def test_option_that_changes_nothing_is_refused_with_the_one_it_needs(
    option: str, value: str, needed: str, run: Run
) -> None:
    for command in (ASK, ["chat", "-m", "nowhere"]):
        result = run(*command, option, value)
        refused(result, option, "changes nothing")
        assert f"give {needed} too" in result.err

        refused(run(*command, option, value, needed, "2"), "there is no model 'nowhere'")


def test_answer_as_long_as_all_that_the_model_reads_is_refused(run: Run) -> None:
    Path("config.json").write_text(json.dumps({"text_config": {"max_position_embeddings": 128}}))

    result = run("chat", "-m", ".")

    refused(result, "300 tokens", "reads 128")
    assert result.err.endswith("hint: give a lower --max-new-tokens\n")
    refused(run("chat", "-m", "nano", "--max-new-tokens", "8192"), "8192 tokens")


@pytest.mark.parametrize("option", [["--max-new-tokens", "9000"], ["--num-beams", "65"], ["--seed", "1"]])
def test_what_is_wrong_with_an_option_is_told_without_torch(option: list[str], run: Run) -> None:
    code = "import sys; from minigpt4 import cli\ntry: cli.main()\nfinally: print('torch' in sys.modules)"

    done = subprocess.run([sys.executable, "-c", code, *ASK[:3], *option], capture_output=True, text=True, check=False)

    assert (done.returncode, done.stdout) == (2, "False\n"), done.stderr


def test_device_that_is_not_here_is_told_before_the_originals_files_are_imported(run: Run, tmp_path: Path) -> None:
    Path("eval.yaml").write_text("model:\n  arch: mini_gpt4\n")

    refused(run(*ASK[:3], "--cfg-path", "eval.yaml", "--device", "cuda:77"), "device cuda:77 is not available here")
