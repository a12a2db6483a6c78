"""The README does what it says: its commands run, its file tree is the folder, and it is short."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.readme import ROOT, SHELLS, blocks, install_commands, is_install, tree_paths

LEFT_BEHIND = {".git", ".venv", "build", "dist", "runs"}


@pytest.fixture(scope="module")
def readme() -> str:
    return (ROOT / "README.md").read_text(encoding="utf-8")


def copy_project(target: Path) -> Path:
    """Copy the project without what builds and runs leave in it."""
    return shutil.copytree(ROOT, target, ignore=lambda folder, _: LEFT_BEHIND if Path(folder) == ROOT else set())


def run_in_order(commands: list[str], folder: Path) -> None:
    """Run commands in a copy of the project whose `.venv` is this interpreter's.

    Raises:
        AssertionError: A command failed; the message has the command and what it printed.
    """
    (folder / ".venv").symlink_to(sys.prefix)
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    for command in commands:
        result = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", command],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"


def test_readme_is_short(readme: str) -> None:
    assert len(readme.splitlines()) <= 120


def test_two_commands_install_the_project(readme: str) -> None:
    first, second = install_commands(readme)

    assert "minigpt4 ask examples/" in first
    assert "pytest" in second


def test_a_block_that_is_not_run_says_why(readme: str) -> None:
    skipped = [block for block in blocks(readme) if block.skip_reason is not None]

    assert [block for block in skipped if not block.skip_reason] == []


@pytest.mark.network
@pytest.mark.timeout(1200)
def test_commands_run(readme: str, tmp_path: Path) -> None:
    shell_blocks = [block for block in blocks(readme) if block.language in SHELLS and block.skip_reason is None]
    commands = [command for block in shell_blocks for command in block.commands if not is_install(command)]

    run_in_order(commands, copy_project(tmp_path / "project"))


def test_file_tree_lists_only_what_exists(readme: str) -> None:
    paths = tree_paths(readme)

    assert "minigpt4/" in paths
    assert [path for path in paths if not (ROOT / path).exists()] == []
    assert [path for path in paths if (ROOT / path).is_dir() != path.endswith("/")] == []


def test_file_tree_lists_every_folder(readme: str) -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout
    if not tracked:
        pytest.skip("no git checkout")
    folders = {line.split("/")[0] + "/" for line in tracked.splitlines() if "/" in line}
    package = {"/".join(line.split("/")[:2]) + "/" for line in tracked.splitlines() if re.match("minigpt4/.*/", line)}

    assert {folder for folder in folders | package if not folder.startswith(".")} <= set(tree_paths(readme))


SAMPLE = """
Text with `code`.

```bash
pip install -q . && \\
    minigpt4 ask a.jpg "What?"
# a comment
minigpt4 models
```

```console
$ minigpt4 doctor
fine
```

```bash no-test: serves until it is stopped
minigpt4 serve
```

```python
import minigpt4
```

```text
.ci/run         what CI runs
minigpt4/       the package
  cli.py        every command
  model/        tensors only
    a.py, b.py  two parts
  errors.py     one family
tests/          mirrors the package
```
"""


def test_commands_are_read_from_shell_blocks_only() -> None:
    bash, console, skipped, python, _ = blocks(SAMPLE)

    assert bash.commands == ['pip install -q . && minigpt4 ask a.jpg "What?"', "minigpt4 models"]
    assert console.commands == ["minigpt4 doctor"]
    assert (bash.skip_reason, skipped.skip_reason) == (None, "serves until it is stopped")
    assert python.language == "python"
    assert install_commands(SAMPLE) == ['pip install -q . && minigpt4 ask a.jpg "What?"']


@pytest.mark.parametrize("indent", ["  ", "\N{BOX DRAWINGS LIGHT VERTICAL} "])
def test_file_tree_is_read_by_indentation(indent: str) -> None:
    assert tree_paths(SAMPLE.replace("  a.py", f"{indent}a.py")) == [
        ".ci/run",
        "minigpt4/",
        "minigpt4/cli.py",
        "minigpt4/model/",
        "minigpt4/model/a.py",
        "minigpt4/model/b.py",
        "minigpt4/errors.py",
        "tests/",
    ]


def test_a_failing_command_is_reported(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"(?s)ls no-such-file.*No such file"):
        run_in_order(["true", "ls no-such-file"], tmp_path)
