"""What whole runs are tried with: a tiny model, six pictures of a colour each, and a recipe over both."""

import csv
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from minigpt4.training.recipe import Recipe, make_recipe
from tests import tiny_chat

COLOURS = ("red", "green", "blue", "white", "black", "yellow")


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    tiny_chat.model().save_pretrained(folder)
    tiny_chat.processor().save_pretrained(folder)
    return folder


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    with (folder / "captions.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file_name", "caption"])
        for colour in COLOURS:
            Image.new("RGB", (24, 24), colour).save(folder / f"{colour}.png")
            writer.writerow([f"{colour}.png", f"it is {colour}"])
    return folder


def recipe(model: Path, pictures: Path, output: Path, **changes: Any) -> Recipe:
    stage = {"name": "only", "steps": 4, "batch_size": 3, "learning_rate": 1e-3, "warmup_steps": 1}
    content = {
        "model": str(model),
        "output": str(output),
        "trainable": ["language_projection"],
        "data": {"sources": [{"path": str(pictures)}]},
        "stages": [stage],
        "workers": 0,
        "checkpoint_steps": 2,
        **changes,
    }
    return make_recipe(content, Path("made up"))
