"""What a user can see of the package: its names, and how little `minigpt4 --help` loads."""

import importlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import minigpt4

ROOT = Path(__file__).resolve().parents[1]
PUBLIC_NAMES = [
    "ChatSession",
    "Engine",
    "MiniGPT4Config",
    "MiniGPT4Error",
    "MiniGPT4ForConditionalGeneration",
    "MiniGPT4ImageProcessor",
    "MiniGPT4Model",
    "MiniGPT4Processor",
    "PromptTemplate",
    "__version__",
    "load",
]
HEAVY = {"torch", "transformers", "accelerate", "peft", "numpy", "PIL", "fastapi"}


def modules_loaded_by(statements: str) -> set[str]:
    """The top-level packages that a fresh interpreter imports while it runs the statements."""
    result = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", statements],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return set(re.findall(r"^import time:.*\|\s*(\w+)", result.stderr, flags=re.MULTILINE))


def test_public_names_are_pinned() -> None:
    assert sorted(minigpt4.__all__) == PUBLIC_NAMES


@pytest.mark.parametrize("name", PUBLIC_NAMES)
def test_public_name_can_be_imported(name: str) -> None:
    assert getattr(minigpt4, name) is not None


def test_public_names_are_listed_by_dir() -> None:
    assert set(PUBLIC_NAMES) <= set(dir(minigpt4))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        getattr(minigpt4, "no_such_name")  # noqa: B009


def test_help_loads_no_heavy_library() -> None:
    loaded = modules_loaded_by(
        "import sys; sys.argv = ['minigpt4', '--help']\n"
        "from minigpt4.cli import main\n"
        "try:\n    main()\n"
        "except SystemExit as end:\n    assert not end.code, end.code"
    )

    assert "minigpt4" in loaded
    assert loaded & HEAVY == set()


def test_import_loads_no_heavy_library() -> None:
    loaded = modules_loaded_by("import minigpt4")

    assert "minigpt4" in loaded
    assert loaded & HEAVY == set()


def test_a_loaded_library_would_be_seen() -> None:
    assert "numpy" in modules_loaded_by("import numpy")


def entry_points() -> dict[str, str]:
    """The commands and plugins that pyproject.toml promises, as {name: module:function}."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    plugins = {name: target for group in project.get("entry-points", {}).values() for name, target in group.items()}
    return {**project["scripts"], **plugins}


@pytest.mark.parametrize("target", entry_points().values(), ids=entry_points().keys())
def test_entry_point_exists(target: str) -> None:
    module, _, function = target.partition(":")

    assert callable(getattr(importlib.import_module(module), function))


@pytest.mark.parametrize(
    "statement",
    [
        "from minigpt4.processing import MiniGPT4Processor",
        "from minigpt4.model import MiniGPT4Config",
        "import minigpt4.processing.prompts, transformers",
        "import transformers, minigpt4.processing.prompts",
        "import minigpt4, transformers",
    ],
)
def test_auto_classes_know_ours_after_any_import(statement: str) -> None:
    check = (
        "from transformers.models.auto.processing_auto import PROCESSOR_MAPPING as known\n"
        "print([value.__name__ for value in known._extra_content.values()])"
    )
    result = subprocess.run([sys.executable, "-c", f"{statement}\n{check}"], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "['MiniGPT4Processor']"
