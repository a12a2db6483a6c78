"""A frozen language model of 8 or 4 bits: what learns over it, and that it stays as it was loaded."""

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import minigpt4
from minigpt4.training import run as runs
from minigpt4.training.model_setup import Prepared, prepare_model
from minigpt4.training.recipe import make_recipe
from tests import tiny_chat

STEPS = 3


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.filterwarnings("default")  # bitsandbytes' own, about processors and number types
@pytest.mark.parametrize(("quantize", "bits"), [("int8", torch.int8), ("nf4", torch.uint8)])
def test_a_projection_learns_over_fewer_bits_and_answers_over_the_same_model(
    quantize: str, bits: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_chat.saved(tmp_path / "model")
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number in range(4):
        tiny_chat.picture(number).save(pictures / f"{number}.png")
        (pictures / f"{number}.txt").write_text(f"picture {number}")
    used: list[Prepared] = []
    before: dict[str, torch.Tensor] = {}

    def seen(*arguments: Any, **options: Any) -> Prepared:
        used.append(prepare_model(*arguments, **options))
        before.update({name: tensor.clone() for name, tensor in used[0].model.state_dict().items()})
        return used[0]

    monkeypatch.setattr(runs, "prepare_model", seen)
    # As on every processor with AVX512-BF16, where 4-bit layers would pack themselves.
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    stage = {"name": "only", "steps": STEPS, "batch_size": 2, "learning_rate": 1e-2, "warmup_steps": 1}
    content = {
        "model": str(folder),
        "output": str(tmp_path / "run"),
        "trainable": ["language_projection"],
        "quantize": quantize,
        "data": {"sources": [{"path": str(pictures)}]},
        "stages": [stage],
        "workers": 0,
    }

    alignment = runs.run(make_recipe(content, Path("made up")))

    monkeypatch.undo()
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert all(math.isfinite(line["loss"]) and line["grad_norm"] > 0 and not line["skipped"] for line in lines)
    after = used[0].model.state_dict()
    assert bits in {tensor.dtype for name, tensor in before.items() if ".language_model." in name}
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert changed == {"model.language_projection.weight", "model.language_projection.bias"}
    stored = load_file(alignment / "alignment.safetensors")
    assert all(torch.equal(tensor, after[f"model.{name}"]) for name, tensor in stored.items())
    model, processor = minigpt4.load(alignment, device="cpu", quantize=quantize)
    loaded = model.state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in after.items() if tensor.dtype == bits)
    chat = minigpt4.ChatSession(model, processor)
    chat.add_image(pictures / "0.png")
    assert isinstance(chat.ask("What is it?", max_new_tokens=4), str)
    assert chat.answer.completion_tokens >= 1
