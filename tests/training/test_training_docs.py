"""What docs/training.md shows is so: its recipes are recipes, its tables say what the program does."""

import re
import subprocess
import sys
import textwrap
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
    assert len(shown) == 3


@pytest.mark.parametrize("block", [b for b in blocks("console") if "benchmarks/scale.py" in b])
def test_costs_shown_are_those_that_the_command_computes(block: str) -> None:
    command, printed = block.lstrip().split("\n", 1)
    words = command.removeprefix("$ python ").split()
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == printed.split()


def scale(*arguments: str) -> dict[str, list[str]]:
    """The table of `benchmarks/scale.py`: hours, device hours, price and storage of each step."""
    command = [sys.executable, "benchmarks/scale.py", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")]
    return {row[0]: row[2:] for row in rows[1:]}


def test_a_cost_whose_rate_is_not_given_is_not_assumed() -> None:
    table = scale()
    assert list(table) == [
        "filtering", "fetching", "index", "features of stage 1, if kept", "stage 1 (20,000 x 256)",
        "features of stage 2, if kept", "stage 2 (1,000 x 12)",
    ]  # fmt: skip
    assert {cell for row in table.values() for cell in row[:3]} == {"not given", "none"}


def test_each_step_costs_what_its_own_rate_comes_to() -> None:
    table = scale(
        "--addresses", "7200000", "--success", "0.5", "--kept", "0.5", "--kilobytes", "10", "--download-per-second",
        "1000", "--filter-per-second", "500", "--index-per-second", "250", "--features-per-second", "100",
        "--images-per-second", "200", "--devices", "4", "--price", "3", "--machine-price", "2",
    )  # fmt: skip
    assert table["filtering"] == ["4.00", "none", "8.00", "the list"]
    assert table["fetching"] == ["1.00", "none", "2.00", "18.00 GB"]
    assert table["index"] == ["2.00", "none", "4.00", "0.06 GB"]
    assert table["features of stage 1, if kept"] == ["5.00", "20.00", "60.00", "88.56 GB"]
    assert table["stage 1 (20,000 x 256)"] == ["7.11", "28.44", "85.33", "38 MB a checkpoint"]


def test_the_filter_shown_keeps_what_the_page_says(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [
        ("a", "a dog on the grass", 0.0, 0.0, True),
        ("b", "a dog", 0.0, 0.0, False),
        ("c", "word " * 60, 0.0, 0.79, True),
        ("d", "word " * 61, 0.0, 0.0, False),
        ("e", "see www.example.org for more", 0.0, 0.0, False),
        ("f", "write to me@example.org for more", 0.0, 0.0, False),
        ("g", "a dog on the grass", 0.1, 0.0, False),
        ("h", "a dog on the grass", 0.0, 0.8, False),
        ("a", "the same address once more", 0.0, 0.0, False),
        ("i", "a cat in the house", 0.09, 0.0, True),
    ]
    names = ("url", "caption", "punsafe", "pwatermark")
    table = pyarrow.table({name: [row[at] for row in rows] for at, name in enumerate(names)})
    parquet.write_table(table, tmp_path / "list.parquet", row_group_size=4)
    [block] = re.findall(r"^ *```python\n(.*?)^ *```", PAGE, re.DOTALL | re.MULTILINE)
    subprocess.run([sys.executable, "-c", textwrap.dedent(block)], cwd=tmp_path, check=True)
    kept = parquet.read_table(tmp_path / "filtered.parquet")
    assert kept["url"].to_pylist() == [row[0] for row in rows if row[-1]]
    assert kept.schema == table.schema
