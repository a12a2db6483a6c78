"""The pages on weights say what the program does: commands, messages and links are real, in both languages alike."""

import ast
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer

from minigpt4.cli.original import spread_options
from minigpt4.cli.running import app

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "minigpt4"
ENGLISH, CHINESE = ROOT / "docs/weights.md", ROOT / "docs/zh/weights.md"
PAGES = (ENGLISH, CHINESE)

TELLING = (
    "weights/files", "weights/llama", "weights/original", "weights/checking",
    "weights/folder.py", "cli/delta.py", "cli/original.py", "cli/checking.py",
)  # fmt: skip
"""Whose every message for a user's mistake stands in the tables."""

RAISERS = re.compile(r"\w*Error|refused|_damaged")
BUILT_IN = {"ValueError", "KeyError", "OSError", "TypeError", "AssertionError", "SafetensorError"}
HOLE = "\0"
"""Stands for what differs from one printing of a message to the next."""


@dataclass
class Page:
    """What is checked of a page.

    Args:
        headings: How many `#` each has.
        tables: The first cells of each table's rows, without the header.
        commands: The lines that run minigpt4, of all blocks.
        links: Where links lead, as they are written.
    """

    headings: list[int] = field(default_factory=list)
    tables: list[list[str]] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)
    links: list[str] = field(default_factory=list)

    @property
    def messages(self) -> list[str]:
        """The quoted messages, with holes: the code spans of the tables that are headed by a message."""
        cells = [cell for table in self.tables if table[0] in ("message", "消息") for cell in table[1:]]
        return [with_holes(span) for cell in cells for span in code_spans(cell)]


@cache
def page(path: Path) -> Page:
    """Read a page."""
    read = Page()
    in_block, in_table = False, False
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("```"):
            in_block = not in_block
        elif in_block:
            read.commands += [line.removeprefix("$ ")] if re.match(r"\$ (.*\| )?minigpt4 ", line) else []
        elif line.startswith("|"):
            cell = line.strip("|").split(" | ")[0].strip()
            if not in_table:
                read.tables.append([])
            if not re.fullmatch(r"[-| ]+", line):
                read.tables[-1].append(cell)
        elif line.startswith("#"):
            read.headings.append(len(line) - len(line.lstrip("#")))
        in_table = line.startswith("|") and not in_block
        if not in_block:
            read.links += re.findall(r"\]\(([^)]+)\)", line)
    return read


def code_spans(text: str) -> list[str]:
    """List what stands between backticks, one or two."""
    return [double or single for double, single in re.findall(r"``\s?(.+?)\s?``(?!`)|(?<!`)`([^`]+)`", text)]


def with_holes(message: str) -> str:
    """Put a hole in place of every `{...}`, and one in place of several in a row."""
    return re.sub(f"{HOLE}+", HOLE, re.sub(r"\{[^}]*\}", HOLE, message))


def literal(node: ast.expr) -> str | None:
    """Return a string or f-string with holes; None for any other expression."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        parts = (str(part.value) if isinstance(part, ast.Constant) else HOLE for part in node.values)
        return re.sub(f"{HOLE}+", HOLE, "".join(parts))
    return None


@cache
def literals() -> frozenset[str]:
    """Collect every string of the package."""
    trees = (ast.parse(path.read_text(encoding="utf-8")) for path in PACKAGE.rglob("*.py"))
    texts = (literal(node) for tree in trees for node in ast.walk(tree) if isinstance(node, ast.expr))
    return frozenset(text for text in texts if text is not None)


def raised(path: Path) -> Iterator[str]:
    """Yield the messages of the errors that a module makes, where they are written out there."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
        named = {
            target.id: text
            for node in ast.walk(function)
            if isinstance(node, ast.Assign) and (text := literal(node.value))
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        for node in ast.walk(function):
            if not (isinstance(node, ast.Call) and RAISERS.fullmatch(_called(node))) or _called(node) in BUILT_IN:
                continue
            place = 1 if _called(node) == "refused" else 0  # the file comes first there
            for choice in _choices(node.args[place] if len(node.args) > place else None):
                text = named.get(choice.id) if isinstance(choice, ast.Name) else literal(choice)
                if text is not None and text.strip(HOLE + ": "):
                    yield text


def _choices(node: ast.expr | None) -> list[ast.expr]:
    """Return both sides of an `a if condition else b`."""
    if isinstance(node, ast.IfExp):
        return [*_choices(node.body), *_choices(node.orelse)]
    return [node] if node is not None else []


def _called(node: ast.Call) -> str:
    return node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")


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


@pytest.mark.parametrize("path", PAGES, ids=("english", "chinese"))
def test_every_command_on_the_page_exists(path: Path, command: typer.core.TyperGroup) -> None:
    lines = page(path).commands

    for line in lines:
        parse(command, words_of(line))
    assert len(lines) > 20


def test_a_command_that_does_not_exist_is_noticed(command: typer.core.TyperGroup) -> None:
    for line in ("weights verify folder --deeply", "weights import", "weights improve --output folder"):
        with pytest.raises(Exception, match=r"No such|Missing"):
            parse(command, line.split())


@pytest.mark.parametrize("path", PAGES, ids=("english", "chinese"))
def test_every_quoted_message_is_in_the_source(path: Path) -> None:
    quoted = page(path).messages

    assert [message.replace(HOLE, "{}") for message in quoted if message not in literals()] == []
    assert len(quoted) > 150


def test_every_message_of_these_commands_is_quoted() -> None:
    quoted = set(page(ENGLISH).messages)
    modules = [path for name in TELLING for path in (PACKAGE / name).rglob("*.py")]
    modules += [PACKAGE / name for name in TELLING if name.endswith(".py")]

    lacking = {
        f"{path.relative_to(PACKAGE)}: {message.replace(HOLE, '{}')}"
        for path in modules
        for message in raised(path)
        if message not in quoted
    }
    assert lacking == set(), "add a row to section 10 of docs/weights.md and of docs/zh/weights.md"


def test_both_languages_have_the_same_parts() -> None:
    english, chinese = page(ENGLISH), page(CHINESE)

    assert english.headings == chinese.headings
    assert [len(table) for table in english.tables] == [len(table) for table in chinese.tables]
    assert english.commands == chinese.commands
    assert english.messages == chinese.messages


@pytest.mark.parametrize("path", PAGES, ids=("english", "chinese"))
def test_links_lead_to_files(path: Path) -> None:
    links = page(path).links

    assert links
    assert [link for link in links if not (path.parent / link).is_file()] == []
