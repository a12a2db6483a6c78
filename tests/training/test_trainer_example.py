"""The example with transformers' `Trainer`: it learns, it learns only what may, and it is as short as it says."""

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Trainer

from minigpt4.data.examples import Layout, padded, pixel_values
from minigpt4.data.record import Record
from minigpt4.model import MiniGPT4ForConditionalGeneration
from minigpt4.training.objectives import TrainingStep, num_targets
from tests import tiny_chat

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "train_with_trainer.py"
CAPTIONS = ("a red circle", "a blue field", "it is yellow")
OPTIONS: dict[str, Any] = {
    "use_cpu": True, "report_to": [], "disable_tqdm": True, "per_device_train_batch_size": 3, "seed": 1,
    "dataloader_pin_memory": False, "logging_strategy": "no", "learning_rate": 0.01,
}  # fmt: skip


@pytest.fixture
def example() -> ModuleType:
    """The example as a module; nothing of it runs by being imported."""
    spec = importlib.util.spec_from_file_location("train_with_trainer", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def drawn_pairs(folder: Path) -> list[tuple[Path, str]]:
    pairs = [(folder / f"{number}.png", caption) for number, caption in enumerate(CAPTIONS)]
    for number, (path, _) in enumerate(pairs):
        tiny_chat.picture(number).save(path)
    return pairs


def tensors(model: MiniGPT4ForConditionalGeneration) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@torch.no_grad()
def loss_of(model: MiniGPT4ForConditionalGeneration, trainer: Trainer) -> float:
    """The loss of all pairs a target token, with the trainer's own batch."""
    return float(model.eval()(**next(iter(trainer.get_train_dataloader()))).loss)


def test_example_learns(example: ModuleType, tmp_path: Path) -> None:
    model, processor, pairs = tiny_chat.model(), tiny_chat.processor(), drawn_pairs(tmp_path)

    trainer = example.train(model, processor, pairs, tmp_path / "out", max_steps=40, **OPTIONS)

    assert loss_of(model, trainer) < 0.7 * loss_of(tiny_chat.model(), trainer)


def test_example_has_the_loss_of_our_own_training(example: ModuleType, tmp_path: Path) -> None:
    model, processor, pairs = tiny_chat.model(), tiny_chat.processor(), drawn_pairs(tmp_path)
    trainer = example.train(model, processor, pairs, tmp_path / "out", max_steps=1, **{**OPTIONS, "learning_rate": 0.0})
    records = [Record(caption, path.read_bytes(), (("", caption),)) for path, caption in pairs]
    batch = padded([Layout(processor).encode(record, example.QUESTION) for record in records], 0)
    batch["pixel_values"] = torch.stack([pixel_values(record, processor, None) for record in records])

    with torch.no_grad():
        expected = TrainingStep(model.eval())(batch).loss.item() / num_targets(batch)

    assert loss_of(model, trainer) == pytest.approx(expected, rel=1e-5)  # padded on the other side, so not to the bit


def test_example_moves_what_may_learn_and_nothing_else(example: ModuleType, tmp_path: Path) -> None:
    model = tiny_chat.model()
    model.config.trainable_parts = ("language_projection",)
    before = tensors(model.freeze())

    example.train(model, tiny_chat.processor(), drawn_pairs(tmp_path), tmp_path / "out", max_steps=2, **OPTIONS)

    moved = {name for name, tensor in tensors(model).items() if not torch.equal(tensor, before[name])}
    assert moved == {"model.language_projection.weight", "model.language_projection.bias"}


def test_example_takes_its_loss_where_answers_are(example: ModuleType, tmp_path: Path) -> None:
    model, processor = tiny_chat.model(), tiny_chat.processor()
    trainer = example.train(model, processor, drawn_pairs(tmp_path), tmp_path / "out", max_steps=1, **OPTIONS)

    batch = next(iter(trainer.get_train_dataloader()))

    learned = [processor.tokenizer.decode(row[row != -100]) for row in batch["labels"]]
    assert sorted(learned) == sorted(f"{caption}<|im_end|>" for caption in CAPTIONS)


def test_example_takes_pictures_that_have_a_caption_of_their_name(example: ModuleType, tmp_path: Path) -> None:
    for name in ("dog.png", "cat.JPG", "no_caption.png", "captions.csv"):
        (tmp_path / name).touch()
    for name in ("dog", "cat", "no_picture"):
        (tmp_path / f"{name}.txt").write_text(f" a {name}\n", encoding="utf-8")

    assert example.pairs_in(tmp_path) == [(tmp_path / "cat.JPG", "a cat"), (tmp_path / "dog.png", "a dog")]


def test_example_says_what_it_wants_of_a_folder_without_captions(tmp_path: Path) -> None:
    (tmp_path / "captions.csv").touch()
    command = [sys.executable, str(EXAMPLE), str(tmp_path), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)

    assert done.returncode == 1
    # The last line: on some processors bitsandbytes, where it is installed, has something to say when it is imported.
    assert done.stderr.splitlines()[-1] == (
        f"{tmp_path} holds no picture with a caption of its name beside it, such as cat.jpg and cat.txt"
    )


def test_example_is_ten_lines_long() -> None:
    function = next(
        node for node in ast.parse(EXAMPLE.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name == "train"
    )  # fmt: skip
    statements = [node for node in ast.walk(function) if isinstance(node, ast.stmt) and node is not function]

    assert len(statements) <= 12  # its docstring and the collator's head among them
