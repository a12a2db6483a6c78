"""Reads the files of `deploy/` as the programs do that run them: a Dockerfile's steps, a unit's settings."""

import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"


@dataclass(frozen=True)
class Step:
    """One instruction of a Dockerfile, its lines joined.

    Args:
        word: The instruction, as `COPY`.
        rest: What follows it.
    """

    word: str
    rest: str

    @property
    def words(self) -> list[str]:
        """What follows, split: a list in JSON, or as the shell would."""
        listed: list[str] = json.loads(self.rest) if self.rest.startswith("[") else shlex.split(self.rest)
        return listed


def dockerfile() -> list[Step]:
    """Every instruction, in order."""
    lines = [line for line in (DEPLOY / "Dockerfile").read_text("utf-8").splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [Step(*line.split(" ", 1)) for line in joined.splitlines() if line]


def steps(word: str) -> list[Step]:
    """The instructions of one kind."""
    return [step for step in dockerfile() if step.word == word]


def build_arguments() -> dict[str, str]:
    """What a build may be told, and the default of each."""
    return dict(step.rest.split("=", 1) for step in steps("ARG"))


def variables() -> dict[str, str]:
    """The environment of the image."""
    return dict(word.split("=", 1) for step in steps("ENV") for word in step.words)


def unit() -> dict[str, list[str]]:
    """The settings of the systemd unit, every value of each, lines joined."""
    text = (DEPLOY / "minigpt4.service").read_text("utf-8")
    joined = re.sub(r"\\\n\s*", " ", re.sub(r"^#.*\n", "", text, flags=re.MULTILINE))
    found: dict[str, list[str]] = {}
    for line in joined.splitlines():
        if "=" in line:
            name, value = line.split("=", 1)
            found.setdefault(name, []).append(value)
    return found
