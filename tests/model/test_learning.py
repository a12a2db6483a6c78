"""What learns and what does not: freezing, modes, gradients, adapters and quantized parts."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForImageTextToText, BitsAndBytesConfig

from minigpt4.model import MiniGPT4ForConditionalGeneration
from minigpt4.model.configuration_minigpt4 import PARTS
from tests.model import tiny

peft = pytest.importorskip("peft")

# The library's names for checkpointing in its version 5.19, and peft's use of them.
pytestmark = pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing.*` is deprecated:FutureWarning")

CHOICES = [
    ["language_projection"],
    ["query_tokens", "qformer", "language_projection"],
    ["language_model"],
    ["vision_model", "language_projection"],
    [],
]


def trainable(model: torch.nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def expected_trainable(model: MiniGPT4ForConditionalGeneration, parts: list[str]) -> set[str]:
    prefixes = tuple(f"model.{part}" for part in parts) + (("lm_head",) if "language_model" in parts else ())
    return {name for name, _ in model.named_parameters() if name.startswith(prefixes)} if prefixes else set()


def inputs(model: MiniGPT4ForConditionalGeneration, learn: bool = True) -> dict[str, torch.Tensor]:
    ids = torch.tensor([tiny.row(1, 6), tiny.row(1, 6, seed=1)])
    labels = {"labels": ids.masked_fill(ids == tiny.IMAGE_TOKEN_ID, -100)} if learn else {}
    return {"input_ids": ids, "pixel_values": tiny.pictures(2), **labels}


@pytest.mark.parametrize("parts", CHOICES)
def test_only_the_chosen_parts_learn_in_a_new_and_in_a_loaded_model(tmp_path: Path, parts: list[str]) -> None:
    model = tiny.model(trainable_parts=parts)
    expected = expected_trainable(model, parts)
    assert trainable(model) == expected
    assert bool(expected) == bool(parts)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    also_info, info = MiniGPT4ForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert trainable(loaded) == trainable(also_info) == expected
    headless = AutoModel.from_pretrained(tmp_path)
    assert trainable(headless) == {name.removeprefix("model.") for name in expected if not name.startswith("lm_head")}


def test_a_new_model_without_a_head_is_frozen_as_well() -> None:
    headless = AutoModel.from_config(tiny.config())
    assert trainable(headless) == {"language_projection.weight", "language_projection.bias"}


def test_original_trains_the_projection_alone() -> None:
    assert trainable(tiny.model()) == {"model.language_projection.weight", "model.language_projection.bias"}


@pytest.mark.parametrize("vision", ["blip_2_vision_model", "efficientnet_lite"])
@pytest.mark.parametrize("parts", CHOICES[:4])
def test_gradients_reach_every_chosen_tensor_and_no_other(parts: list[str], vision: str) -> None:
    model = tiny.model(vision=vision, trainable_parts=parts).train()
    model(**inputs(model)).loss.backward()
    reached = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    expected = expected_trainable(model, parts)
    # What comes after the tokens, and feeds only the classifier, is not on the way to the words.
    unread = {name for name in expected if ".head." in name or ".classifier." in name}
    if vision == "efficientnet_lite":
        unread = set()  # there the classes' probabilities are words of the prompt
    assert reached == expected - unread
    flat = {name for name in reached if not model.get_parameter(name).grad.abs().max() > 0}
    # The bias of a key moves every score of a query alike: its gradient is zero in exact arithmetic.
    assert all("key.bias" in name for name in flat), flat


def test_frozen_parts_stay_in_evaluation_mode_while_others_train() -> None:
    model = tiny.model().train()
    assert model.training
    modes = {part: getattr(model.model, part).training for part in PARTS if part != "query_tokens"}
    assert modes == {"vision_model": False, "qformer": False, "language_projection": True, "language_model": False}
    assert not any(module.training for module in model.model.qformer.modules())
    learning = tiny.model(trainable_parts=["qformer"]).train()
    assert all(module.training for module in learning.model.qformer.modules())
    assert not any(module.training for module in learning.eval().modules())


def test_frozen_qformer_does_not_drop_out_during_training() -> None:
    model = tiny.model()
    assert model.config.qformer_config.hidden_dropout_prob > 0
    expected = model(**inputs(model)).loss
    assert torch.equal(model.train()(**inputs(model)).loss, expected)
    learning = tiny.model(trainable_parts=["qformer"]).train()
    assert not torch.equal(learning(**inputs(learning)).loss, expected)


def test_one_step_changes_the_projection_alone_and_lowers_the_loss() -> None:
    model = tiny.model().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(**inputs(model)).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"model.language_projection.weight", "model.language_projection.bias"}


@pytest.mark.parametrize("train_first", [True, False])
@pytest.mark.parametrize("parts", [CHOICES[0], list(PARTS)])
def test_checkpointed_activations_are_computed_twice_and_give_the_same_gradients(
    parts: list[str], train_first: bool
) -> None:
    gradients, readings = [], []
    for checkpointing in (False, True):
        model = tiny.model(trainable_parts=parts)
        for dropout in (module for module in model.modules() if isinstance(module, torch.nn.Dropout)):
            dropout.p = 0.5 if parts == CHOICES[0] else 0.0  # what is frozen drops nothing out
        if train_first:
            model.train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        if not train_first:
            model.train()
        readings.append(0)

        def count(*_: object) -> None:
            readings[-1] += 1

        model.model.language_model.layers[0].mlp.register_forward_pre_hook(count)
        model(**inputs(model), use_cache=False).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert readings == [1, 2]
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, rtol=0.0, atol=1e-5)


def test_nothing_is_left_in_training_mode_by_checkpointing() -> None:
    model = tiny.model()
    model.gradient_checkpointing_enable()
    assert not any(module.training for module in model.modules())
    model.train()
    model.gradient_checkpointing_disable()
    assert not any(module.training for module in model.model.language_model.modules())


def with_lora(model: MiniGPT4ForConditionalGeneration) -> "peft.PeftModel":
    options = peft.LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=r".*language_model.*\.(q_proj|v_proj)",
        modules_to_save=["language_projection"],
        init_lora_weights=False,  # not the identity, so that the tests below see it
    )
    return peft.get_peft_model(model, options)


def test_lora_trains_the_adapter_and_the_projection_alone() -> None:
    adapted = with_lora(tiny.model()).train()
    names = trainable(adapted)
    assert {"lora" in name or "language_projection.modules_to_save" in name for name in names} == {True}
    assert len(names) == 2 * 2 * 2 + 2  # two layers, two projections, A and B; weight and bias
    adapted(**inputs(adapted)).loss.backward()
    assert {name for name, parameter in adapted.named_parameters() if parameter.grad is not None} == names
    base = adapted.get_base_model().model
    assert not base.vision_model.training and not base.qformer.training and base.language_model.training


def test_lora_generates_and_comes_back_from_its_folder(tmp_path: Path) -> None:
    plain = tiny.model()
    question = {"input_ids": torch.tensor([tiny.row(1, 4)]), "pixel_values": tiny.pictures(1)}
    with torch.no_grad():
        unadapted = plain(**question).logits
        adapted = with_lora(plain).eval()
        projection = adapted.get_base_model().model.language_projection.modules_to_save["default"]
        projection.bias.add_(1.0)
        expected = adapted(**question).logits
        assert (expected - unadapted).abs().max() > 0.1
        adapted.save_pretrained(tmp_path)
        loaded = peft.PeftModel.from_pretrained(tiny.model(), tmp_path).eval()
        assert torch.equal(loaded(**question).logits, expected)
        options = {"do_sample": False, "max_new_tokens": 8, "suppress_tokens": [2, tiny.IMAGE_TOKEN_ID]}
        assert torch.equal(loaded.generate(**question, **options), adapted.generate(**question, **options))
        merged = loaded.merge_and_unload()
        torch.testing.assert_close(merged(**question).logits, expected, rtol=0.0, atol=2e-5)
    stored = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    assert stored < 40_000  # the adapter and the projection, not the model


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_quantized_language_model_answers_nearly_the_same(tmp_path: Path, kind: str) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    model = tiny.model()
    model.save_pretrained(tmp_path)
    # By their full names: the library skips a module where its name begins or ends like this.
    skipped = ["model.vision_model", "model.qformer", "model.language_projection", "lm_head"]
    options: dict[str, Any] = {"load_in_8bit": True} if kind == "int8" else {"load_in_4bit": True}
    if kind == "nf4":
        options |= {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
    quantized = AutoModelForImageTextToText.from_pretrained(
        tmp_path,
        device_map={"": "cpu"},
        dtype=torch.float32,
        quantization_config=BitsAndBytesConfig(llm_int8_skip_modules=skipped, **options),
    )
    for part in ("vision_model", "qformer", "language_projection"):
        assert {p.dtype for p in getattr(quantized.model, part).parameters()} == {torch.float32}
    assert quantized.lm_head.weight.dtype == torch.float32
    assert {torch.int8, torch.uint8} & {p.dtype for p in quantized.model.language_model.parameters()}
    assert trainable(quantized) == {"model.language_projection.weight", "model.language_projection.bias"}
    question = {"input_ids": torch.tensor([tiny.row(1, 4)]), "pixel_values": tiny.pictures(1)}
    with torch.no_grad():
        exact, actual = model(**question).logits, quantized(**question).logits
    # 8 bits: a hundredth of a logit's deviation; 4 bits: a third of it.
    assert (actual - exact).abs().mean() < {"int8": 0.1, "nf4": 0.5}[kind] * exact.std()
    assert not torch.equal(actual, exact)
    answer = quantized.generate(**question, do_sample=False, max_new_tokens=4, suppress_tokens=[2, 3])
    assert answer.shape == (1, question["input_ids"].shape[1] + 4)
