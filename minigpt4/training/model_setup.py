"""The model of a run: loaded or put together, on its device, and with the right parts learning."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from minigpt4.errors import ConfigError
from minigpt4.model import MiniGPT4ForConditionalGeneration
from minigpt4.model.configuration_minigpt4 import PARTS
from minigpt4.processing import MiniGPT4Processor
from minigpt4.training.optimizer_step import chosen_precision
from minigpt4.training.processes import by_the_main_process, waits_on_the_cpu
from minigpt4.training.recipe import PartsRecipe, Recipe
from minigpt4.training.run_folder import COMPOSED_FOLDER
from minigpt4.weights import nano
from minigpt4.weights.alignment import Origin, add_lora, require_peft
from minigpt4.weights.compose import compose
from minigpt4.weights.folder import load, origin, quantization
from minigpt4.weights.hub import Report

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


@dataclass(frozen=True)
class Prepared:
    """A model that is ready to be trained, its processor, and the frozen parts it began from."""

    model: MiniGPT4ForConditionalGeneration
    processor: MiniGPT4Processor
    origin: Origin


def check_libraries(recipe: Recipe) -> None:
    """Refuse what needs a library that is not installed, before anything is loaded.

    Raises:
        ConfigError: `lora` without peft, `quantize` without bitsandbytes.
    """
    quantization(recipe.quantize, torch.device("cpu"))
    if "lora" in (recipe.trainable or []):
        require_peft()


def prepare_model(recipe: Recipe, here: PartialState, report: Report | None = None) -> Prepared:
    """Load the model of a recipe, and let learn what the recipe says.

    Args:
        recipe: The run's.
        here: The processes; the model goes to this one's device, or waits on the CPU for being spread.
        report: Called with the bytes of frozen parts that are fetched and converted.

    Raises:
        ConfigError: The parts do not fit each other or the recipe.
        WeightsError: A part is missing or damaged.
    """
    model, processor, origin_, is_new = _loaded(recipe, here, report)
    if "lora" in (recipe.trainable or []):
        origin_ = _with_adapters(model, recipe, origin_)
    _let_learn(model, recipe)
    if "vision_model" in model.config.trainable_parts:
        _freeze_unread(model, processor)
        _keep_key_biases(model)
    if recipe.joining_parts == "new" and not is_new:
        _initialize_joining_parts(model)
    if recipe.gradient_checkpointing:
        # The library renamed it after 5.19.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    if recipe.quantize == "none" and not waits_on_the_cpu(recipe.parallel, here):
        model.to(here.device)
    return Prepared(model, processor, origin_)


@contextmanager
def seeing_on(model: MiniGPT4ForConditionalGeneration, device: torch.device) -> Iterator[None]:
    """Keep all of a model but its language model on a device meanwhile, where the model waits on the CPU."""
    seeing = [m for name, part in model.model.named_children() if name != "language_model" for m in part.modules()]
    held = [
        (module, name, tensor)
        for module in (model.model, *seeing)
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
    ]
    try:
        for module, name, tensor in held:
            moved = tensor.detach().to(device)
            is_weight = isinstance(tensor, nn.Parameter)
            setattr(module, name, nn.Parameter(moved, tensor.requires_grad) if is_weight else moved)
        yield
    finally:
        for module, name, tensor in held:
            setattr(module, name, tensor)


def _loaded(
    recipe: Recipe, here: PartialState, report: Report | None
) -> tuple[MiniGPT4ForConditionalGeneration, MiniGPT4Processor, Origin, bool]:
    """Return model and processor, what names its frozen parts, and whether its joining parts are new."""
    dtype = DTYPES[chosen_precision(recipe, here.device)]
    name, origin_ = recipe.model, None
    if isinstance(name, PartsRecipe):
        parts, target = name, recipe.output / COMPOSED_FOLDER
        by_the_main_process(lambda: _compose(target, parts, recipe.seed, report), here)
        # Named from the alignment's folder, so that the run's can be moved.
        name, origin_ = str(target), Origin(f"../{COMPOSED_FOLDER}")
    if name == "nano" and recipe.joining_parts == "new":
        model, tokenizer = nano.assemble(*nano.frozen_parts(report))
        for parameter in model.parameters():  # as the library loads others: buffers keep their bits
            parameter.data = parameter.data.to(getattr(torch, dtype))
        return model, nano.make_processor(model.config, tokenizer), origin(name), True
    # Fewer bits are made where the model is loaded, and it stays there.
    device = "cpu" if recipe.quantize == "none" else str(here.device)
    model, processor = load(name, device=device, dtype=dtype, quantize=recipe.quantize, report=report)
    for module in model.modules():
        # On a CPU with AVX512-BF16 bitsandbytes packs 4-bit layers at their first forward without gradients; gradients
        # through packed layers are zero, and their absolute maxima have lost bits.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010  (its type is that of tensors)
    return model, processor, origin_ or origin(name), origin_ is not None


def _compose(target: Path, parts: PartsRecipe, seed: int, report: Report | None) -> None:
    compose(target, **parts.model_dump(), seed=seed, report=report)


def _with_adapters(model: MiniGPT4ForConditionalGeneration, recipe: Recipe, origin_: Origin) -> Origin:
    """Add adapters, unless the model has some, which go on; refuses a recipe that says other things of those."""
    if not origin_.lora:
        origin_ = replace(origin_, lora=recipe.lora.model_dump())
        add_lora(model, origin_.lora)
        return origin_
    for key in sorted(recipe.lora.model_fields_set):
        wanted, there = getattr(recipe.lora, key), origin_.lora.get(key)
        if wanted != there:
            raise ConfigError(
                f"lora.{key} is {wanted!r}, and {recipe.model} has adapters with {there!r}, which go on",
                hint=f"remove lora.{key}, or begin with a model that has no adapters",
            )
    return origin_


def _initialize_joining_parts(model: MiniGPT4ForConditionalGeneration) -> None:
    """Give the joining parts that learn random weights, as a new model has them."""
    joining = model.model
    for part in (joining.language_projection, joining.qformer):
        for module in part.modules() if part is not None else ():
            if any(p.requires_grad for p in module.parameters(recurse=False)):
                for parameter in module.parameters(recurse=False):
                    parameter._is_hf_initialized = False  # else the library takes it for loaded and leaves it
                model._init_weights(module)
    if joining.query_tokens is not None and joining.query_tokens.requires_grad:
        nn.init.normal_(joining.query_tokens, std=model.config.initializer_range)


def _let_learn(model: MiniGPT4ForConditionalGeneration, recipe: Recipe) -> None:
    """Freeze everything but what the recipe names; what learns is kept in float32."""
    vision_model = model.model.vision_model
    if recipe.trainable is not None:
        _freeze_all_but(recipe.trainable, model)
    counting = [name for name, module in vision_model.named_modules() if isinstance(module, _BatchNorm)]
    if counting and any(p.requires_grad for p in vision_model.parameters()):
        raise ConfigError(
            f"the vision encoder cannot learn: its {counting[0]} is a batch norm, whose statistics no alignment holds",
            hint="leave vision_model and vision_layernorms out of trainable",
        )
    learning = [p for p in model.parameters() if p.requires_grad]
    if not learning:
        raise ConfigError("nothing learns in this model", hint="set trainable, for example to [language_projection]")
    for parameter in learning:
        parameter.data = parameter.data.to(torch.float32)


def _freeze_all_but(trainable: Sequence[str], model: MiniGPT4ForConditionalGeneration) -> None:
    for part in trainable:
        if part in PARTS and getattr(model.model, part) is None:
            raise ConfigError(f"the model has no {part} that could learn", hint=f"leave {part} out of trainable")
    model.config.trainable_parts = tuple(part for part in trainable if part in PARTS)
    model.freeze()
    if "vision_layernorms" in trainable:
        norms = [module for module in model.model.vision_model.modules() if isinstance(module, nn.LayerNorm)]
        if not norms:
            raise ConfigError(
                "the vision encoder has no LayerNorm that could learn", hint="leave vision_layernorms out"
            )
        for norm in norms:
            norm.requires_grad_(True)
    if "lora" in trainable:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter.requires_grad or ".lora_" in name)


def _freeze_unread(model: MiniGPT4ForConditionalGeneration, processor: MiniGPT4Processor) -> None:
    """Freeze what no answer depends on, such as a pooler: `ddp` refuses a gradient that never comes.

    Found with an encoder without numbers (torch's device `meta`), since gradients exist there, too.
    """
    vision_model, size = model.model.vision_model, processor.image_processor.size
    with torch.device("meta"):
        built: Any = type(vision_model)(vision_model.config)
        seen = built(torch.zeros(1, 3, size["height"], size["width"]))
    read = [seen.last_hidden_state.sum(), *(c.sum() for c in [getattr(seen, "concept_embeds", None)] if c is not None)]
    names, tensors = zip(*built.named_parameters(), strict=True)
    for name, gradient in zip(names, torch.autograd.grad(read, tensors, allow_unused=True), strict=True):
        if gradient is None:
            vision_model.get_parameter(name).requires_grad_(False)


class _KeyBiasKept(nn.Linear):
    """Queries, keys and values in one, `(..., width)` to `(..., 3 * width)`; the keys' third of the bias is kept."""

    def forward(self, input: Tensor) -> Tensor:
        """As a linear layer; no gradient reaches the keys' bias."""
        query, key, value = self.bias.chunk(3)
        return nn.functional.linear(input, self.weight, torch.cat([query, key.detach(), value]))


def _keep_key_biases(model: MiniGPT4ForConditionalGeneration) -> None:
    """Keep the key biases of EVA-ViT zero: the original has none.

    A key bias moves all scores of a query alike and changes no attention, so its gradient is nothing but rounding, of
    which Adam makes steps of full size. The gradient is cut off where the bias is read, since a hook on the parameter
    is lost where `fsdp2` puts another in its place.
    """
    if model.config.vision_config.model_type != "blip_2_vision_model":
        return
    for layer in model.model.vision_model.encoder.layers:
        fused = layer.self_attn.qkv
        if fused.bias is not None:
            kept = _KeyBiasKept(fused.in_features, fused.out_features, device="meta")
            kept.weight, kept.bias = fused.weight, fused.bias
            layer.self_attn.qkv = kept
