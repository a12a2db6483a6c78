"""What Docker, compose and systemd are told is so: options, paths, variables, ports and addresses exist.

No image is built and no unit started: what they would run is run here, where that is possible.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from fastapi import FastAPI

from minigpt4.cli.running import app as commands
from minigpt4.serving.api import make_app
from minigpt4.serving.http.security import KEY_VARIABLE
from minigpt4.serving.settings import Limits, Settings
from tests.deploy.recipe import DEPLOY, ROOT, build_arguments, dockerfile, steps, unit, variables
from tests.readme import blocks
from tests.serving.live import MODEL, Live, live
from tests.serving.test_security import KEY, call
from tests.test_docs import parse

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
COMPOSE: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text("utf-8"))
SERVICE: dict[str, Any] = COMPOSE["services"]["minigpt4"]
PAGE = (ROOT / "docs/serving.md").read_text("utf-8")
TOLD = "\n".join([PAGE, *(path.read_text("utf-8") for path in DEPLOY.iterdir())])


def accepted(words: list[str]) -> None:
    """Parse a command line as `minigpt4` does."""
    group = typer.main.get_command(commands)
    assert isinstance(group, typer.core.TyperGroup)
    parse(group, words)


def port_of(words: list[str]) -> str:
    return words[words.index("--port") + 1]


def seconds(text: str) -> float:
    """A time as compose and systemd write it."""
    number, name = re.fullmatch(r"(\d+)(s|min|)", text).groups()  # type: ignore[union-attr]
    return float(number) * (60 if name == "min" else 1)


def test_every_option_is_one_of_the_command() -> None:
    (entry,), (command,) = steps("ENTRYPOINT"), steps("CMD")
    started = unit()["ExecStart"][0].split()

    assert (entry.words, Path(started[0]).name) == (["minigpt4"], "minigpt4")
    accepted(command.words)
    accepted(started[1:])
    with pytest.raises(Exception, match="No such option"):
        accepted([*command.words, "--api-key", "x"])


def test_the_commands_of_the_page_have_options_and_arguments_that_exist() -> None:
    lines = [line for block in blocks(PAGE) if block.skip_reason for line in block.commands]
    ran = [shlex.split(line, comments=True) for line in lines if line.startswith("docker run")]
    for words in ran:
        accepted(words[words.index("minigpt4") + 1 :])
        assert f"{steps('VOLUME')[0].rest}" in " ".join(words)
    assert len(ran) == 1
    for path in re.findall(r"(?<![\w/])deploy/[\w.]+", TOLD):
        assert (ROOT / path.rstrip(".")).is_file(), path


def test_every_build_argument_that_is_named_exists_and_is_used() -> None:
    known = build_arguments()
    named = set(re.findall(r"--build-arg (\w+)=", TOLD)) | set(SERVICE["build"]["args"])
    shell = " ".join(step.rest for step in dockerfile() if step.word in ("FROM", "RUN"))

    assert named == set(known)
    for name in known:
        assert re.search(rf"\$\{{?{name}\b", shell), name
    assert set(re.findall(r"\$\{?([A-Z_]+)", shell)) - {"PATH"} == set(known)


def test_extras_and_the_python_of_the_image_are_the_projects() -> None:
    for name in re.findall(r"--build-arg EXTRAS=(\w+)", TOLD):
        assert name in PROJECT["optional-dependencies"]
    (python,) = re.findall(r"^python:3\.(\d+)", build_arguments()["BASE"])
    assert int(python) >= int(PROJECT["requires-python"].rpartition(".")[2])


def test_what_the_image_copies_is_in_the_repository_and_is_all_that_an_installation_needs() -> None:
    copied = [word for step in steps("COPY") for word in step.words if not word.startswith("--")]
    sources = [word for word in copied if not word.startswith("/app")]

    assert [source for source in sources if not (ROOT / source).exists()] == []
    needed = {PROJECT["readme"], *PROJECT["license-files"], "pyproject.toml", "minigpt4"}
    needed |= set(re.findall(r"-c (\S+)", " ".join(step.rest for step in steps("RUN"))))
    assert needed <= set(sources)


def test_the_cache_is_the_users_before_it_is_a_volume() -> None:
    order = [step.word for step in dockerfile()]
    cache, user = steps("VOLUME")[0].rest, steps("USER")[0].rest
    (prepared,) = (step.rest for step in steps("RUN") if "useradd" in step.rest)

    assert re.search(rf"useradd .*\b{user}\b", prepared)
    assert re.search(rf"install -d -o {user} .*{cache}\b", prepared)
    assert order.index("RUN") < order.index("USER") < order.index("VOLUME")
    assert (variables()["MINIGPT4_HOME"], Path(variables()["HF_HOME"]).parent) == (cache, Path(cache))
    assert [mounted.partition(":")[::2] for mounted in SERVICE["volumes"]] == [("cache", cache)]
    assert list(COMPOSE["volumes"]) == ["cache"]


@pytest.mark.parametrize("number", range(len(steps("RUN"))))
def test_the_shell_of_every_step_can_be_read(number: int) -> None:
    subprocess.run(["sh", "-n", "-c", steps("RUN")[number].rest], check=True)


def test_the_installation_names_the_extras_that_were_asked_for() -> None:
    (install,) = re.findall(r'"(\.\S*EXTRAS\S*)"', " ".join(step.rest for step in steps("RUN")))
    for given, expected in (("", "."), ("quant", ".[quant]")):
        told = subprocess.check_output(["sh", "-c", f'printf %s "{install}"'], env={"EXTRAS": given}, text=True)
        assert told == expected


def test_one_port_is_told_everywhere() -> None:
    ports = {
        steps("EXPOSE")[0].rest,
        port_of(steps("CMD")[0].words),
        SERVICE["ports"][0].rpartition(":")[2],
        port_of(unit()["ExecStart"][0].split()),
        *re.findall(r"127\.0\.0\.1:(\d+)/", steps("HEALTHCHECK")[0].rest + unit()["ExecStartPost"][0]),
    }
    assert ports == {"8000"}
    assert SERVICE["ports"][0].startswith("127.0.0.1:")


def test_the_addresses_that_are_asked_exist() -> None:
    application: FastAPI = make_app(None, Settings(MODEL, KEY))
    routes = {getattr(route, "path", "") for route in application.routes}
    (health,) = re.findall(r"8000(/\w+)", steps("HEALTHCHECK")[0].rest)
    (ready,) = re.findall(r"8000(/\w+)", unit()["ExecStartPost"][0])

    assert {health, ready} <= routes
    assert call(application, health, [])[0] == 200  # it has no key to send


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    with live(Settings(MODEL, KEY, decoders=1)) as running:
        yield running


def test_the_health_check_tells_a_server_that_lives_from_none(server: Live) -> None:
    check = steps("HEALTHCHECK")[0].rest.partition(" CMD python ")[2]
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
    (command,) = unit()["ExecStartPost"]
    program, option, script = shlex.split(command.removeprefix("+").replace("%%", "%").replace("$$", "$"))
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


def test_compose_builds_the_image_and_asks_for_what_is_read() -> None:
    build = SERVICE["build"]
    root = (DEPLOY / build["context"]).resolve()
    assert (root, root / build["dockerfile"]) == (ROOT, DEPLOY / "Dockerfile")
    assert set(SERVICE["environment"]) == {KEY_VARIABLE}
    assert SERVICE["environment"][KEY_VARIABLE].startswith("${" + KEY_VARIABLE + ":?")
    for name, value in build["args"].items():
        assert value == f"${{{name}:-{build_arguments()[name]}}}"
    assert SERVICE["read_only"] is True and "/tmp" in SERVICE["tmpfs"]


def test_the_end_is_waited_for_as_long_as_answers_in_progress_may_take() -> None:
    for waited in (SERVICE["stop_grace_period"], unit()["TimeoutStopSec"][0]):
        assert seconds(waited) > Limits().drain_seconds + 2
    assert unit()["KillMode"] == ["mixed"]  # else the decoders end with the first signal


def test_the_units_folders_are_those_of_its_variables() -> None:
    told = dict(word.split("=", 1) for line in unit()["Environment"] for word in line.split())
    state = f"/var/lib/{unit()['StateDirectory'][0]}"
    name, path = unit()["LoadCredential"][0].split(":")

    assert (told["MINIGPT4_HOME"], str(Path(told["HF_HOME"]).parent)) == (state, state)
    assert unit()["ExecStart"][0].endswith(f"--api-key-file ${{CREDENTIALS_DIRECTORY}}/{name}")
    assert path in unit()["ExecStartPost"][0] and path in PAGE


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="no systemd")
def test_systemd_has_no_complaint(tmp_path: Path) -> None:
    text = (DEPLOY / "minigpt4.service").read_text("utf-8")
    program = unit()["ExecStart"][0].split()[0]
    (tmp_path / "minigpt4.service").write_text(text.replace(program, sys.executable))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(tmp_path / "minigpt4.service")], capture_output=True, text=True
    )
    complaints = [line for line in done.stderr.splitlines() if "minigpt4" in line]  # not those of other units
    assert (done.returncode, complaints) == (0, [])


def test_the_page_says_that_nothing_was_built() -> None:
    assert "No image was built and no unit started" in PAGE
