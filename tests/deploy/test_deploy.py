"""What Docker, compose and systemd run is so: options and addresses exist, and checks tell a server from none.

No image is built and no unit started: what they would run is run here, where that is possible.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
import yaml

from minigpt4.cli.run import app as commands
from minigpt4.serving.settings import KEY_VARIABLE, Limits, Settings
from tests.serving.live import MODEL, Live, live
from tests.test_docs import parse

ROOT = Path(__file__).resolve().parents[2]
KEY = "correct-horse-battery"
SERVICE = yaml.safe_load((ROOT / "deploy/compose.yaml").read_text("utf-8"))["services"]["minigpt4"]


def joined(name: str) -> list[str]:
    """The lines of a file of `deploy/` that are no comments, continued ones joined."""
    text = re.sub(r"^#.*\n", "", (ROOT / "deploy" / name).read_text("utf-8"), flags=re.MULTILINE)
    return re.sub(r"\\\n\s*", " ", text).splitlines()


STEPS = [line.split(" ", 1) for line in joined("Dockerfile") if line]
UNIT = dict(line.split("=", 1) for line in joined("minigpt4.service") if "=" in line)


def steps(word: str) -> list[str]:
    return [rest for instruction, rest in STEPS if instruction == word]


def accepted(words: list[str]) -> None:
    """Parse a command line as `minigpt4` does."""
    group = typer.main.get_command(commands)
    assert isinstance(group, typer.core.TyperGroup)
    parse(group, words)


def test_every_option_is_one_of_the_command() -> None:
    assert json.loads(steps("ENTRYPOINT")[0]) == ["minigpt4"]
    accepted(json.loads(steps("CMD")[0]))
    accepted(UNIT["ExecStart"].split()[1:])
    with pytest.raises(Exception, match="No such option"):
        accepted(["serve", "--api-key", "x"])


def test_what_the_image_copies_is_all_that_an_installation_needs() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    copied = {word for step in steps("COPY") for word in step.split() if not word.startswith(("--", "/app"))}
    assert [source for source in copied if not (ROOT / source).exists()] == []
    assert {project["readme"], *project["license-files"], "pyproject.toml", "constraints.txt", "minigpt4"} <= copied


def test_the_cache_is_the_users_before_it_is_a_volume() -> None:
    (cache,), (user,) = steps("VOLUME"), steps("USER")
    assert re.search(rf"useradd .*\b{user}\b.* install -d -o {user} .*{cache}\b", " ".join(steps("RUN")))
    assert SERVICE["volumes"] == [f"cache:{cache}"]
    assert f"MINIGPT4_HOME={cache}" in steps("ENV")[0]


@pytest.mark.parametrize("number", range(len(steps("RUN"))))
def test_the_shell_of_every_step_can_be_read(number: int) -> None:
    subprocess.run(["sh", "-n", "-c", steps("RUN")[number]], check=True)


def test_compose_asks_for_a_key_and_gives_it_to_the_server() -> None:
    assert SERVICE["environment"][KEY_VARIABLE].startswith("${" + KEY_VARIABLE + ":?")
    assert SERVICE["ports"] == ["127.0.0.1:8000:8000"]
    assert SERVICE["read_only"] is True and "/tmp" in SERVICE["tmpfs"]


def test_the_end_is_waited_for_as_long_as_answers_in_progress_may_take() -> None:
    for waited in (SERVICE["stop_grace_period"].removesuffix("s"), UNIT["TimeoutStopSec"]):
        assert float(waited) > Limits().drain_seconds + 2
    assert UNIT["KillMode"] == "mixed"  # else the decoders end with the first signal


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    with live(Settings(MODEL, KEY, decoders=1)) as running:
        yield running


def test_the_health_check_tells_a_server_that_lives_from_none(server: Live) -> None:
    check = steps("HEALTHCHECK")[0].partition(" CMD python ")[2]
    environment = os.environ | {"http_proxy": "http://127.0.0.1:1"}

    def status(port: int) -> int:
        words = shlex.split(check.replace(":8000/", f":{port}/"))
        return subprocess.run([sys.executable, *words], env=environment, stderr=subprocess.DEVNULL).returncode

    assert status(server.port) == 0
    assert status(1) != 0


@pytest.mark.skipif(not shutil.which("curl"), reason="no curl")
def test_the_unit_is_started_when_questions_are_answered_and_fails_with_the_server(
    server: Live, tmp_path: Path
) -> None:
    program, option, script = shlex.split(UNIT["ExecStartPost"].removeprefix("+").replace("%%", "%").replace("$$", "$"))
    (tmp_path / "key").write_text(KEY + "\n")
    script = script.replace("/etc/minigpt4/key", str(tmp_path / "key"))

    def status(port: int, main: int) -> int:
        here = script.replace(":8000/", f":{port}/")
        environment = os.environ | {"MAINPID": str(main), "http_proxy": "http://127.0.0.1:1"}
        return subprocess.run(
            [program, option, here], env=environment, stderr=subprocess.DEVNULL, timeout=60
        ).returncode

    ended = subprocess.Popen(["true"])
    ended.wait()
    assert status(server.port, os.getpid()) == 0
    assert status(1, ended.pid) == 1
    (tmp_path / "key").write_text("another-key-than-it-has")
    assert status(server.port, ended.pid) == 1


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="no systemd")
def test_systemd_has_no_complaint(tmp_path: Path) -> None:
    text = (ROOT / "deploy/minigpt4.service").read_text("utf-8")
    (tmp_path / "minigpt4.service").write_text(text.replace(UNIT["ExecStart"].split()[0], sys.executable))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(tmp_path / "minigpt4.service")], capture_output=True, text=True
    )
    complaints = [line for line in done.stderr.splitlines() if "minigpt4" in line]  # not those of other units
    assert (done.returncode, complaints) == (0, [])
