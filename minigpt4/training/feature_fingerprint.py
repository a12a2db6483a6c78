"""What identifies cached features: which they are, and everything that their numbers depend on.

Knows the model's parts and the recipe; neither files nor pictures.
"""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor

from minigpt4.errors import ConfigError
from minigpt4.model import MiniGPT4ForConditionalGeneration
from minigpt4.training.feature_store import Fingerprint, Kind
from minigpt4.training.preparing import Prepared
from minigpt4.training.recipe import NanoData, Recipe
from minigpt4.training.update import chosen_precision

_NOT_OF_THE_NUMBERS = {"transformers_version", "dtype", "torch_dtype", "architectures", "_name_or_path",
                       "image_processor_type", "processor_class"}  # fmt: skip


def fingerprint_of(recipe: Recipe, prepared: Prepared, here: PartialState) -> Fingerprint:
    """Return what identifies the features that a run reads.

    Raises:
        ConfigError: Features cannot be kept.
    """
    _refuse_what_changes(recipe, prepared.model)
    kind = kind_of(prepared.model)
    settings = prepared.processor.image_processor.to_dict()
    return Fingerprint(
        kind=kind,
        weights=weights_digest(prepared.model, kind),
        precision=chosen_precision(recipe, here.device),
        preprocessing=_plain(settings),
    )


def kind_of(model: MiniGPT4ForConditionalGeneration) -> Kind:
    """Say which features are worth keeping: the last ones before anything that learns."""
    joining = model.model
    queries = joining.query_tokens is not None and joining.query_tokens.requires_grad
    resampler = joining.qformer is not None and any(p.requires_grad for p in joining.qformer.parameters())
    return "vision_outputs" if queries or resampler else "qformer_outputs"


def weights_digest(model: MiniGPT4ForConditionalGeneration, kind: Kind) -> str:
    """Return the sha256 over every frozen tensor that features come from, and over the settings of their parts."""
    config, joining = model.config, model.model
    tensors = {f"vision_model.{name}": t for name, t in joining.vision_model.state_dict().items()}
    settings: dict[str, Any] = {"vision": config.vision_config.to_dict(), "norm": config.post_layernorm_eps}
    if kind == "qformer_outputs":
        settings["merged"] = [config.num_prefix_tokens, config.num_image_tokens]
        if joining.qformer is not None and joining.query_tokens is not None:
            tensors |= {f"qformer.{name}": t for name, t in joining.qformer.state_dict().items()}
            tensors["query_tokens"] = joining.query_tokens
            settings["qformer"] = config.qformer_config.to_dict()
    with ThreadPoolExecutor() as pool:  # the digests of large tensors take seconds, and free the interpreter
        digests = list(pool.map(_tensor_digest, tensors.values()))
    entries = [
        [name, str(tensor.dtype), list(tensor.shape), digest]
        for (name, tensor), digest in zip(tensors.items(), digests, strict=True)
    ]
    return hashlib.sha256(json.dumps([sorted(entries), _plain(settings)], sort_keys=True).encode()).hexdigest()


def _tensor_digest(tensor: Tensor) -> str:
    raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(raw.numpy().data).hexdigest()


def _plain(settings: Any) -> Any:  # noqa: ANN401  (a configuration's values)
    """Return settings as JSON has them, without what changes no number."""
    if isinstance(settings, dict):
        return {str(key): _plain(value) for key, value in settings.items() if key not in _NOT_OF_THE_NUMBERS}
    if isinstance(settings, list | tuple):
        return [_plain(value) for value in settings]
    return int(settings) if isinstance(settings, int) and not isinstance(settings, bool) else settings


def _refuse_what_changes(recipe: Recipe, model: MiniGPT4ForConditionalGeneration) -> None:
    """Refuse pictures of which another thing is seen each time."""
    if any(p.requires_grad for p in model.model.vision_model.parameters()):
        raise ConfigError(
            "features: cache keeps what the vision encoder sees, and the vision encoder learns",
            hint="leave vision_model and vision_layernorms out of trainable, or set features=compute",
        )
    for stage in recipe.stages:
        data = recipe.data_of(stage)
        if isinstance(data, NanoData):
            raise ConfigError(
                f"features: cache keeps what is seen in a picture, and stage {stage.name} draws new pictures each time",
                hint="name data.sources, or set features=compute",
            )
        if data.crop:
            raise ConfigError(
                f"features: cache keeps what is seen in a whole picture, and stage {stage.name} crops it anew each "
                "time",
                hint="set data.crop=false, or features=compute",
            )
