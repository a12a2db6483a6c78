"""With `compat: original`, training gives the numbers that the original's own loop recorded.

Losses, learning rates, the projection after every update and the optimizer's state, with and without
accumulation, with truncated captions. Floats lie within 1e-5 of the largest value of their tensor.
"""

from pathlib import Path
from typing import Any

import pytest
from accelerate import PartialState
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import Dataset

import minigpt4
from minigpt4.data.examples import Layout, padded
from minigpt4.data.record import Record
from minigpt4.training.checkpoint import State
from minigpt4.training.loop import Progress, train
from minigpt4.training.objectives import TrainingStep
from minigpt4.training.processes import processes
from minigpt4.training.recipe import Recipe, StageRecipe, make_recipe
from minigpt4.training.stage_data import layout_of
from tests import golden
from tests.weights.original.test_golden_import import RELATIVE, imported

pytestmark = pytest.mark.reference
RUNS = ("accum1", "accum2", "max_txt_len_10")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return imported(tmp_path_factory.mktemp("model") / "model")


class RecordedBatches(Dataset[dict[str, Any]]):
    """The recorded batches with the prompts that were drawn for them."""

    def __init__(self, run: dict[str, Any], layout: Layout, pixels: Tensor) -> None:
        self.run, self.layout, self.pixels = run, layout, pixels

    def __len__(self) -> int:
        return len(self.run["batches"])

    def __getitem__(self, item: int) -> dict[str, Any]:
        batch = self.run["batches"][item]
        prompt = self.run["prompts"][item]
        before, after = self.layout.prompt_template.split("{}")
        question = prompt.removeprefix(before).removesuffix(after)
        texts = [self.layout.encode(Record("", b"", (("", text),)), question) for text in batch["text_input"]]
        rows = padded(texts, self.layout.processor.tokenizer.pad_token_id)
        return {**rows, "pixel_values": self.pixels[batch["images"]], "keys": []}


class Watcher:
    """Keeps the projection after every update."""

    def __init__(self, model: minigpt4.MiniGPT4ForConditionalGeneration) -> None:
        self.projection = model.model.language_projection
        self.steps: list[Progress] = []
        self.after: list[tuple[Tensor, Tensor]] = []

    def on_update(self, progress: Progress) -> None:
        self.steps.append(progress)
        self.after.append((self.projection.weight.detach().clone(), self.projection.bias.detach().clone()))

    def on_resume(self, state: State) -> None:
        pass

    def on_stop_request(self) -> None:
        pass

    def on_validation(self, module: TrainingStep, stage: StageRecipe, step: int) -> float | None:
        return None


def recipe_of(run: dict[str, Any], output: Path) -> Recipe:
    """What the run's options say, by our names."""
    options = dict(option.removeprefix("run.").split("=") for option in run["options"] + run["model_options"])
    accumulation = int(options.get("accum_grad_iters", 1))
    stage = {
        "name": "only",
        "steps": run["updates"],
        "batch_size": 2,
        "accumulation": accumulation,
        "steps_per_epoch": run["iters_per_epoch"],
        "learning_rate": float(options["init_lr"]),
        "final_learning_rate": float(options["min_lr"]),
        "warmup_learning_rate": float(options["warmup_lr"]),
        "warmup_steps": int(options["warmup_steps"]),
        "weight_decay": float(options["weight_decay"]),
        "max_text_tokens": int(options.get("model.max_txt_len", 160)),
    }
    content = {
        "model": "unused",
        "output": str(output),
        "trainable": ["language_projection"],
        "compat": "original",
        "data": {"sources": [{"path": "unused"}]},
        "stages": [stage],
        "workers": 0,
    }
    return make_recipe(content, Path("recorded"))


def close(actual: Tensor, recorded: Tensor, name: str) -> None:
    error = (actual - recorded).abs().max() / recorded.abs().max()
    assert error <= RELATIVE, f"{name}: {error:.1e}"


@pytest.mark.parametrize("name", RUNS)
def test_every_update_is_the_originals(name: str, model_folder: Path, tmp_path: Path) -> None:
    run = golden.content("golden/train_steps.json")["runs"][name]
    recorded = golden.tensors("golden/train_steps.safetensors")
    pixels = golden.tensors("inputs/pixel_values.safetensors")["pixel_values"]
    recipe = recipe_of(run, tmp_path)
    model, processor = minigpt4.load(model_folder, device="cpu")
    data = RecordedBatches(run, layout_of(recipe.stages[0], processor), pixels)
    watcher = Watcher(model)

    seen: list[Optimizer] = []
    hook = register_optimizer_step_post_hook(lambda optimizer, *_: seen.append(optimizer))
    train(recipe, model, lambda number, stage: data, watcher, processes())
    hook.remove()

    assert len(watcher.after) == run["updates"]
    for number, (weight, bias) in enumerate(watcher.after):
        close(weight, recorded[f"{name}/after_update_{number}/llama_proj.weight"], f"weight after {number}")
        close(bias, recorded[f"{name}/after_update_{number}/llama_proj.bias"], f"bias after {number}")
    for place, parameter in enumerate((watcher.projection.weight, watcher.projection.bias)):
        for moment, value in seen[-1].state[parameter].items():
            close(value, recorded[f"{name}/optimizer_state/{place}/{moment}"], f"{moment} of {place}")
    for group, settings in zip(seen[-1].param_groups, run["optimizer_param_groups"], strict=True):
        # Its learning rate is that of its last update; the original set one for a batch left over, too.
        told = {key: group[key] for key in settings if key not in ("lr", "betas", "params")}
        assert told == pytest.approx({key: settings[key] for key in told}, rel=1e-12)
        assert (list(group["betas"]), len(group["params"])) == (settings["betas"], len(settings["params"]))
    if recipe.stages[0].accumulation == 1:
        assert [s.learning_rate for s in watcher.steps] == pytest.approx([s["lr"] for s in run["steps"]], rel=1e-12)
        assert [s.loss for s in watcher.steps] == pytest.approx([s["loss"] for s in run["steps"]], rel=1e-5)
    assert PartialState().num_processes == 1
