"""What docs/training.md shows is so: its recipes are recipes, its tables say what the program does."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from minigpt4.training.recipe import ORIGINAL, StageRecipe, make_recipe

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/training.md").read_text(encoding="utf-8")


def table_under(heading: str) -> list[list[str]]:
    """The rows of the first table after a heading, without its own head."""
    lines = PAGE[PAGE.index(heading) :].splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("|"))
    rows = []
    for line in lines[first + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split(" | ")])
    return rows


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}[^\n]*\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


def test_every_switch_of_compat_original_is_documented_with_both_values() -> None:
    rows = {row[0].strip("`"): row[1:] for row in table_under("### What is different from the original")}
    assert rows.keys() == ORIGINAL.keys()
    stage = StageRecipe.model_validate({"name": "a", "steps": 1, "batch_size": 1, "learning_rate": 1})
    for key, (here, original) in rows.items():
        for text, value in ((here, getattr(stage, key)), (original, ORIGINAL[key])):
            if isinstance(value, str):
                assert text.startswith(f"`{value}`"), key
            elif isinstance(value, list | tuple):
                assert text == ", ".join(map(str, value)), key
            elif isinstance(value, int | float) and not isinstance(value, bool):
                assert re.match(rf"{value}\b", text), key


def test_recipes_shown_are_recipes() -> None:
    shown = [yaml.safe_load(block) for block in blocks("yaml")]
    whole = next(content for content in shown if "stages" in content)
    for content in shown:
        make_recipe({**whole, **content}, Path("docs/training.md"))
    assert len(shown) == 2


@pytest.mark.parametrize("block", [b for b in blocks("console") if "benchmarks/scale.py" in b])
def test_costs_shown_are_those_that_the_command_computes(block: str) -> None:
    command, printed = block.lstrip().split("\n", 1)
    words = command.removeprefix("$ python ").split()
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == printed.split()
