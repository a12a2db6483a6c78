"""Reads README.md: its commands and its file tree. Knows nothing of what they mean.

Run as `python3 tests/readme.py`, it prints the commands that install the project, one a line, for `.ci/run`.
It needs the standard library only, since it runs before anything is installed.
"""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SHELLS = {"bash", "sh", "console"}
FENCE = re.compile(r"^(?P<fence>`{3,})(?P<info>[^`\n]*)\n(?P<text>.*?)^(?P=fence)[ \t]*$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        language: The first word after the fence.
        options: The rest of that line.
        text: What is inside.
    """

    language: str
    options: str
    text: str

    @property
    def commands(self) -> list[str]:
        r"""The shell commands, each whole: lines ending in `\` joined, comments and (in `console`) output left out."""
        joined = self.text.replace("\\\n", " ")
        lines = [re.sub(r"\s+", " ", line).strip() for line in joined.splitlines()]
        if self.language == "console":
            lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
        return [line for line in lines if line and not line.startswith("#")]

    @property
    def skip_reason(self) -> str | None:
        """Why the block is not run: what follows `no-test` on the fence's line; None when it is run."""
        marker, _, reason = self.options.partition("no-test")
        return None if marker == self.options else reason.strip(" :")


def blocks(markdown: str) -> list[Block]:
    """Every fenced block, in order."""
    found = []
    for match in FENCE.finditer(markdown):
        language, _, options = match["info"].strip().partition(" ")
        found.append(Block(language, options.strip(), match["text"]))
    return found


def is_install(command: str) -> bool:
    """Whether a command installs the project, which only `.ci/run` tries."""
    return "pip install" in command


def install_commands(markdown: str) -> list[str]:
    """The commands that install the project, in order."""
    shell_blocks = [block for block in blocks(markdown) if block.language in SHELLS]
    return [command for block in shell_blocks for command in block.commands if is_install(command)]


def tree_paths(markdown: str) -> list[str]:
    """The paths in the file tree, which is the block of language `text` that has a line starting `minigpt4/`.

    One line has one name, or several separated by a comma and one space, then what they are for. Folders end in
    `/`. What belongs to a folder is indented more than it is, by spaces or by box-drawing lines.

    Returns:
        Paths relative to the project, folders with their final `/`; empty when there is no tree.
    """
    trees = [block.text for block in blocks(markdown) if re.search(r"^\W*minigpt4/", block.text, re.MULTILINE)]
    paths: list[str] = []
    parents: list[tuple[int, str]] = []
    for line in "".join(trees[:1]).splitlines():
        entry = re.match(r"(?P<indent>[^\w./]*)(?P<names>[^\s,]+(?:, [^\s,]+)*)", line)
        if entry is None:
            continue
        depth = len(entry["indent"])
        parents = [(level, folder) for level, folder in parents if level < depth]
        folder = parents[-1][1] if parents else ""
        names = [folder + name for name in entry["names"].split(", ")]
        paths += names
        if names[-1].endswith("/"):
            parents.append((depth, names[-1]))
    return paths


if __name__ == "__main__":
    print("\n".join(install_commands((ROOT / "README.md").read_text(encoding="utf-8"))))
