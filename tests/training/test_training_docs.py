"""What docs/training.md shows is so: its recipes are recipes, its tables say what the program does."""

import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import yaml

from minigpt4.training.recipe import ORIGINAL, StageRecipe, make_recipe
from tests import tiny_chat

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


def test_costs_shown_are_those_that_the_command_computes_from_what_it_measured() -> None:
    [block] = [block for block in blocks("console") if "benchmarks/scale.py" in block]
    command, printed = block.lstrip().split("\n", 1)
    measured = re.search(r"without measuring again:\s+(.*)", printed)
    assert measured and "--measure --encoder eva-vit-g " in command
    words = command.removeprefix("$ python ").replace("--measure --encoder eva-vit-g ", "") + " " + measured[1]
    done = subprocess.run([sys.executable, *words.split()], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == printed[measured.end() :].replace("measured here", "given").split()


def scale(*arguments: str) -> dict[str, list[str]]:
    """The table of `benchmarks/scale.py`: rate, its origin, hours, device hours, price and storage of each step."""
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
    assert {cell for row in table.values() for cell in row[:5]} == {"not given", "none"}


def test_each_step_costs_what_its_own_rate_comes_to() -> None:
    table = scale(
        "--addresses", "7200000", "--success", "0.5", "--kept", "0.5", "--kilobytes", "10", "--download-per-second",
        "1000", "--filter-per-second", "500", "--index-per-second", "250", "--features-per-second", "100",
        "--images-per-second", "200", "--devices", "4", "--price", "3", "--machine-price", "2",
    )  # fmt: skip
    assert table["filtering"] == ["500", "given", "4.00", "none", "8.00", "the list"]
    assert table["fetching"] == ["1,000", "given", "1.00", "none", "2.00", "18.00 GB"]
    assert table["index"] == ["250", "given", "2.00", "none", "4.00", "0.06 GB"]
    assert table["features of stage 1, if kept"] == ["100", "given", "5.00", "20.00", "60.00", "88.56 GB"]
    assert table["stage 1 (20,000 x 256)"] == ["200", "given", "7.11", "28.44", "85.33", "38 MB a checkpoint"]


def test_what_was_not_measured_says_from_what_it_follows() -> None:
    table = scale(
        "--download-machines", "2", "--devices", "4", "--device-teraflops", "80", "--features-gflop", "500",
        "--features-per-second", "0.1",
    )  # fmt: skip
    assert table["fetching"][:3] == ["2,780", "img2dataset's README", "0.70"]
    assert table["features of stage 1, if kept"][:4] == ["640", "operations / assumed speed", "2.13", "8.51"]


def test_rates_are_measured_on_this_machine(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    folder = tiny_chat.saved(tmp_path / "model")
    table = scale("--measure", "--encoder", str(folder), "--sample", "20000", "--pictures", "2", "--machine-price", "1")
    for step in ("filtering", "index", "features of stage 1, if kept"):
        rate, origin, hours, device_hours, price, _ = table[step]
        assert float(rate.replace(",", "")) > 0 and (origin, device_hours) == ("measured here", "none")
        assert hours == price  # of a machine without a device, at 1 an hour
    assert table["fetching"][1] == table["stage 1 (20,000 x 256)"][1] == "not given"


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
