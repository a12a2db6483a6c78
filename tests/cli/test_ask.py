"""`minigpt4 ask` and `chat` take models from where they are told, and say what they have and that they stop."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from minigpt4.cli import options
from minigpt4.weights import nano
from minigpt4.weights.parts import home
from tests import tiny_chat
from tests.commands import runner
from tests.terminal import on_a_terminal
from tests.weights import hub_server

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-m", "minigpt4", "ask", "cat.png", "What is it?", "--max-new-tokens", "4", "-m"]


@pytest.fixture
def variables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An environment in which nothing is said about the hub, put back after the test."""
    monkeypatch.setattr(os, "environ", {})
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("variables")
@pytest.mark.parametrize(
    ("model", "offline"),
    [("nano", "1"), ("someone/tiny", "0"), ("someone/tiny@v2", "0"), ("models/mine", "1"), ("nowhere", "1")],
)
def test_libraries_are_off_the_network_unless_the_model_comes_from_the_hub(model: str, offline: str) -> None:
    Path("models/mine").mkdir(parents=True)

    options.quiet_for(model)
    options.quiet()  # as a later step of the command does

    assert os.environ["HF_HUB_OFFLINE"] == offline


@pytest.mark.usefixtures("variables")
def test_what_the_person_says_about_the_hub_holds() -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"

    options.quiet_for("someone/tiny")

    assert os.environ["HF_HUB_OFFLINE"] == "1"


@pytest.mark.slow
def test_model_of_the_hub_is_fetched_and_then_answers_without_it(tmp_path: Path) -> None:
    (tmp_path / "served").mkdir()
    tiny_chat.saved(tmp_path / "served")
    tiny_chat.picture().save(tmp_path / "cat.png")

    with hub_server.running(tmp_path / "served") as hub:
        # Without a `no_proxy` a machine's proxy would be asked for 127.0.0.1.
        settings = {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "hub"), "no_proxy": "127.0.0.1"}

        def answered(model: str, **more: str) -> subprocess.CompletedProcess[str]:
            environment = {**os.environ, **settings, **more}
            for name in {"HF_HUB_OFFLINE", "HF_HUB_CACHE", "HF_TOKEN"} - more.keys():
                environment.pop(name, None)
            return subprocess.run(
                [*COMMAND, model], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
            )

        fetched = answered("someone/tiny")
        assert fetched.returncode == 0, fetched.stderr
        assert fetched.stderr.splitlines()[0] == "asking the hub for someone/tiny"
        assert "Fetching" not in fetched.stderr  # the client's own bars
        assert fetched.stdout.strip()

        hub.asked.clear()
        cached = answered("someone/tiny", HF_HUB_OFFLINE="1")
        folder = answered("served")
        assert (cached.stdout, folder.stdout) == (fetched.stdout, fetched.stdout)
        assert hub.asked == []

        refused = answered("someone/other")
        assert (refused.returncode, refused.stdout) == (2, "")
        assert refused.stderr.splitlines()[-2:] == [
            "error: the hub has no model someone/other, or does not show it to you",
            "hint: check the name, `hf auth login` for a private model, or name a folder",
        ]


@pytest.mark.timeout(900)  # longer than a program may be silent
def test_ctrl_c_while_a_model_is_awaited_ends_it_with_a_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_chat.picture().save("cat.png")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        with on_a_terminal([*COMMAND, "someone/tiny"]) as terminal:
            terminal.wait_for("loading someone/tiny")
            terminal.type(b"\x03")

            assert terminal.wait_for_end() == 130
    assert terminal.said.endswith("stopped\r\n")
    assert "Traceback" not in terminal.said


def test_chat_without_a_picture_says_how_to_add_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_chat.saved(Path("mine"))
    tiny_chat.picture().save("cat.png")
    chat = [runner(monkeypatch, capfd)("chat", *pictures, "-m", "mine") for pictures in ([], ["cat.png"])]

    assert [result.err for result in chat] == [
        "mine is ready, without a picture: /image PATH adds one; /help lists the commands\n",
        "mine is ready; /help lists the commands\n",
    ]


@pytest.mark.network
@pytest.mark.timeout(900)  # two processes that load nano, one of which joins it first
def test_nano_answers_the_same_with_its_language_model_as_a_hub_has_it(tmp_path: Path) -> None:
    converted, _ = nano.frozen_parts()
    own = tmp_path / "home"
    own.mkdir()
    (own / "parts").symlink_to(home() / "parts")  # a home of its own: what is joined here is of no use later
    hub_like = tmp_path / "SmolLM2-135M-Instruct"
    hub_like.mkdir()
    for path in converted.glob("[!.]*"):
        (hub_like / path.name).symlink_to(path)
    (hub_like / "manifest.json").unlink()
    words = (converted / "tokenizer.json").read_text(encoding="utf-8")
    words = words.replace(json.dumps(nano.IMAGE_TOKEN), json.dumps(nano.UNUSED_TOKEN))
    (hub_like / "tokenizer.json").unlink()
    (hub_like / "tokenizer.json").write_text(words, encoding="utf-8")

    picture = str(ROOT / "examples" / "sunflower.jpg")
    ask = [sys.executable, "-m", "minigpt4", "ask", picture, "What is in this picture?"]
    answers = [
        subprocess.run([*ask, *more], env={**os.environ, **place}, capture_output=True, text=True, check=False)
        for more, place in [([], {}), (["--language-model", str(hub_like)], {"MINIGPT4_HOME": str(own)})]
    ]
    joined = [path.name for path in (own / "models").iterdir()]
    shutil.rmtree(own / "models")  # most of a gigabyte

    assert [answer.returncode for answer in answers] == [0, 0], answers
    assert answers[0].stdout == answers[1].stdout != ""
    assert {name.rpartition("-")[0] for name in joined} == {"language-model", "nano"}
