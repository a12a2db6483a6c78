"""With only the language model frozen, loss, gradients and parameter groups are those that the original recorded.

In evaluation mode, where nothing drops out. The loss lies within 1e-5 of the recorded one (reached: 2e-7), each
gradient within 1e-5 of the largest value of its tensor (reached: 4e-6).
"""

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from minigpt4.data.examples import padded
from minigpt4.data.record import Record
from minigpt4.training.model_setup import Prepared, prepare_model
from minigpt4.training.objectives import TrainingStep, num_targets
from minigpt4.training.optimizer_step import make_optimizer
from minigpt4.training.processes import processes
from minigpt4.training.recipe import StageRecipe, make_recipe
from minigpt4.training.stage_data import layout_of
from minigpt4.weights.original.names import Kind, to_ours
from tests import golden
from tests.weights.original.test_golden_import import RELATIVE, imported

pytestmark = pytest.mark.reference
VISION, QFORMER, PROJECTION = ("vision_model",), ("query_tokens", "qformer"), ("language_projection",)
RECORDED = "golden/train_unfrozen_eval_mode"


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return imported(tmp_path_factory.mktemp("model") / "model")


def prepared(model_folder: Path, *trainable: str) -> tuple[Prepared, StageRecipe]:
    """A model as a run has it."""
    stage = {"name": "only", "steps": 1, "batch_size": 3, "learning_rate": 3e-5, "steps_per_epoch": 1}
    content = {
        "model": str(model_folder),
        "output": "unused",
        "trainable": list(trainable),
        "precision": "fp32",
        "compat": "original",
        "data": {"sources": [{"path": "unused"}]},
        "stages": [stage],
    }
    recipe = make_recipe(content, Path("recorded"))
    return prepare_model(recipe, processes()), recipe.stages[0]


def batch_of(run: dict[str, Any], made: Prepared, stage: StageRecipe, pixels: Tensor) -> dict[str, Any]:
    """The recorded batch."""
    layout = layout_of(stage.model_copy(update={"end_symbol": run["end_sym"]}), made.processor)
    before, after = layout.prompt_template.split("{}")
    question = run["prompt"].removeprefix(before).removesuffix(after)
    texts = [layout.encode(Record("", b"", (("", text),)), question) for text in run["text_input"]]
    rows = padded(texts, made.processor.tokenizer.pad_token_id)
    return {**rows, "pixel_values": pixels[run["image_index"]]}


def of_the_original(tensor: Tensor, third: int | None) -> Tensor:
    """What the original has of a tensor: all of it, or the query's or value's third of a fused bias."""
    return tensor if third is None else tensor.chunk(3)[third]


def test_loss_and_every_gradient_are_the_originals(model_folder: Path) -> None:
    run, recorded = golden.content(f"{RECORDED}.json"), golden.tensors(f"{RECORDED}.safetensors")
    made, stage = prepared(model_folder, *VISION, *QFORMER, *PROJECTION)
    pixels = golden.tensors("inputs/pixel_values.safetensors")["pixel_values"]
    batch = batch_of(run, made, stage, pixels)
    made.model.train(False)

    loss = TrainingStep(made.model)(batch).loss / num_targets(batch)
    loss.backward()

    assert loss.item() == pytest.approx(run["loss"], rel=RELATIVE)
    learning = {name: p for name, p in made.model.named_parameters() if p.requires_grad}
    targets = {name: to_ours(Kind.CHECKPOINT, name) for name in run["trainable"]}
    assert {target.name for target in targets.values() if target} == learning.keys()
    for name, target in targets.items():
        assert target is not None
        gradient, expected = learning[target.name].grad, recorded.get(f"grad/{name}")
        assert gradient is not None
        if expected is None:
            continue  # which the whole set has
        # A key's bias moves all scores of a query alike, so both have nothing but rounding there.
        scale = recorded[f"grad/{name.replace('key.bias', 'key.weight')}"].abs().max()
        error = (of_the_original(gradient, target.third) - expected).abs().max() / scale
        assert error <= RELATIVE, f"{name}: {error:.1e}"


def test_key_bias_that_the_original_lacks_gets_no_gradient(model_folder: Path) -> None:
    made, stage = prepared(model_folder, *VISION)
    pixels = golden.tensors("inputs/pixel_values.safetensors")["pixel_values"]
    batch = batch_of(golden.content(f"{RECORDED}.json"), made, stage, pixels)

    TrainingStep(made.model)(batch).loss.backward()

    for layer in made.model.model.vision_model.encoder.layers:
        query, key, value = layer.self_attn.qkv.bias.grad.chunk(3)
        assert query.any() and value.any() and not key.any()


CASES = {
    "frozen_vit_frozen_qformer": PROJECTION,
    "trainable_qformer": (*QFORMER, *PROJECTION),
    "trainable_vit": (*VISION, *PROJECTION),
    "both_trainable": (*VISION, *QFORMER, *PROJECTION),
}


@pytest.mark.parametrize("case", CASES)
def test_the_optimizers_groups_hold_the_originals_tensors_by_decay(case: str, model_folder: Path) -> None:
    """Its query and value biases are one fused bias here."""
    made, stage = prepared(model_folder, *CASES[case])
    names = {id(p): name for name, p in made.model.named_parameters()}
    recorded = golden.content("golden/optimizer_groups.json")[case]

    groups = make_optimizer(made.model, stage).param_groups

    assert len(groups) == len(recorded) == 2
    for ours, theirs in zip(groups, recorded, strict=True):
        targets = [to_ours(Kind.CHECKPOINT, name) for name in theirs["params"]]
        assert {names[id(p)] for p in ours["params"]} == {target.name for target in targets if target}
        assert len(ours["params"]) == len({target.name for target in targets if target})
        for key in ("weight_decay", "lr", "eps", "amsgrad", "maximize"):
            assert ours[key] == theirs[key], key
        assert list(ours["betas"]) == theirs["betas"]


def test_beta2_of_the_options_is_the_optimizers(model_folder: Path) -> None:
    made, stage = prepared(model_folder, *PROJECTION)
    recorded = golden.content("golden/optimizer_groups.json")["beta2_option"]
    changed = stage.model_copy(update={"betas": tuple(recorded[0]["betas"])})

    groups = make_optimizer(made.model, changed).param_groups

    assert [list(group["betas"]) for group in groups] == [group["betas"] for group in recorded]


def test_every_recorded_setting_is_compared() -> None:
    assert golden.content("golden/optimizer_groups.json").keys() == {*CASES, "beta2_option"}
