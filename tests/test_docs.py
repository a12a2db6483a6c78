"""The pages on weights, in English and Chinese: commands and links are real, and both have the same parts."""

import re
import shlex
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer

from minigpt4.cli.options import spread_options
from minigpt4.cli.run import app

ROOT = Path(__file__).resolve().parents[1]
ENGLISH, CHINESE = ROOT / "docs/weights.md", ROOT / "docs/zh/weights.md"
PAGES = pytest.mark.parametrize("path", [ENGLISH, CHINESE], ids=("english", "chinese"))


@dataclass
class Page:
    """What is checked of a page.

    Args:
        headings: How many `#` each has.
        rows: Number of table rows.
        commands: The lines of all blocks that run minigpt4.
        links: Where links lead, as they are written.
    """

    headings: list[int] = field(default_factory=list)
    rows: int = 0
    commands: list[str] = field(default_factory=list)
    links: list[str] = field(default_factory=list)


@cache
def page(path: Path) -> Page:
    read = Page()
    in_block = False
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("```"):
            in_block = not in_block
        elif in_block:
            read.commands += [line.removeprefix("$ ")] if re.match(r"\$ (.*\| )?minigpt4 ", line) else []
        else:
            read.rows += line.startswith("|")
            read.headings += [len(line) - len(line.lstrip("#"))] if line.startswith("#") else []
            read.links += re.findall(r"\]\(([^)]+)\)", line)
    return read


@pytest.fixture(scope="module")
def command() -> typer.core.TyperGroup:
    group = typer.main.get_command(app)
    assert isinstance(group, typer.core.TyperGroup)
    return group


def parse(group: typer.core.TyperGroup, words: list[str]) -> None:
    """Parse a command line down to its last command, and run nothing.

    Raises:
        Exception: The parser's own, for a command, an option or an argument that does not exist or is missing.
    """
    context = group.make_context("minigpt4", list(words))
    inner: Any = group
    while hasattr(inner, "resolve_command"):
        name, inner, rest = inner.resolve_command(context, [*context._protected_args, *context.args])
        context = inner.make_context(name, list(rest), parent=context)


def words_of(line: str) -> list[str]:
    """Split a line of a page as the shell would, from `minigpt4` on; one `--options` may take several values."""
    return spread_options(shlex.split(line.rpartition("| ")[2] if "| minigpt4" in line else line)[1:])


@PAGES
def test_every_command_on_the_page_exists(path: Path, command: typer.core.TyperGroup) -> None:
    lines = page(path).commands

    for line in lines:
        parse(command, words_of(line))
    assert len(lines) > 20


def test_a_command_that_does_not_exist_is_noticed(command: typer.core.TyperGroup) -> None:
    for line in ("weights verify folder --deeply", "weights import", "weights improve --output folder"):
        with pytest.raises(Exception, match=r"No such|Missing"):
            parse(command, line.split())


def test_both_languages_have_the_same_parts() -> None:
    english, chinese = page(ENGLISH), page(CHINESE)

    assert english.headings == chinese.headings
    assert english.rows == chinese.rows
    assert english.commands == chinese.commands


@PAGES
def test_links_lead_to_files(path: Path) -> None:
    links = page(path).links

    assert links
    assert [link for link in links if not (path.parent / link).is_file()] == []
