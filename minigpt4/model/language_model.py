"""A causal language model of the library in two pieces: its decoder, and what its own class does after the decoder.

The second differs from kind to kind: a head with or without a bias, logits scaled or capped, a loss with a term for the
balance of experts, a cache that is dropped when positions change their scale. The library's class of the kind knows all
of it, so that class does it here, with `_SpokenDecoder` in the decoder's place. Knows no pictures.
"""

import inspect
from typing import Any, NoReturn

from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_MAPPING,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import ModelOutput

from minigpt4.errors import ConfigError

_HINT = "LLaMA, Qwen, Gemma, Phi, Mistral, Mixtral, Granite, Cohere, OLMo, GPT-2, OPT, BLOOM and their like work"


class CausalLMHead:
    """What the library's class of a kind does with the states of its decoder.

    Args:
        model: The class's own model, without its decoder.
        head_name: The name its head has there.
    """

    def __init__(self, model: PreTrainedModel, head_name: str) -> None:
        self.model = model
        self.head_name = head_name

    def __call__(self, head: nn.Module, outputs: ModelOutput, **kwargs: Any) -> CausalLMOutputWithPast:
        """Turn the decoder's outputs into logits, and a loss where there are `labels`.

        Args:
            head: The head of the whole; another one than at first where it was resized, quantized or adapted.
            outputs: What the decoder returned.
            kwargs: Of the class's `forward`: `labels`, `logits_to_keep`, `attention_mask`, ...
        """
        if getattr(self.model, self.head_name) is not head:
            setattr(self.model, self.head_name, head)
        said: CausalLMOutputWithPast = self.model(inputs_embeds=outputs, return_dict=True, **kwargs)
        return said

    def prepare_inputs(self, input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:
        """Choose what the next step of `generate` reads, the way the class does: `prepare_inputs_for_generation`."""
        model: Any = self.model
        inputs: dict[str, Any] = model.prepare_inputs_for_generation(input_ids, **kwargs)
        return inputs


class _SpokenDecoder(nn.Module):
    """Stands in the decoder's place when the decoder has run already: its outputs come as `inputs_embeds`."""

    def __init__(self, decoder: PreTrainedModel) -> None:
        super().__init__()
        self.__dict__["real"] = decoder  # out of the modules' sight: it belongs to the whole

    def __getattr__(self, name: str) -> Any:
        """What the class looks up in its decoder, such as Falcon-H1's `lm_head_multiplier`."""
        if name == "real":  # while it is being copied
            raise AttributeError(name)
        return getattr(self.real, name)

    @property
    def decoder(self) -> nn.Module:
        """What OPT's class calls: the inside of its decoder."""
        return self

    def forward(self, *_: Any, inputs_embeds: ModelOutput, **__: Any) -> ModelOutput:
        """Hand over the outputs."""
        return inputs_embeds


def split_causal_lm(config: PreTrainedConfig) -> tuple[PreTrainedModel, nn.Module, CausalLMHead]:
    """Build a causal language model and take it apart.

    Returns:
        The decoder, which is what `AutoModel` builds; the head, a linear layer; what the model's class does with both.

    Raises:
        ConfigError: A kind that is not made of one decoder, which reads `inputs_embeds` and keeps `past_key_values`,
            and one linear head.
    """
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        _refuse(config, "is none of the causal language models of transformers")
    if config.get_text_config() is not config:
        _refuse(config, "has towers of its own; name the kind of its language model alone")
    model = AutoModelForCausalLM.from_config(config)
    decoder_class: object = MODEL_MAPPING.get(type(config), None)
    decoders = [name for name, child in model.named_children() if type(child) is decoder_class]
    head = model.get_output_embeddings()
    heads = [name for name, child in model.named_children() if child is head]
    if len(decoders) != 1 or len(heads) != 1 or not isinstance(head, nn.Linear):
        _refuse(config, "is not made of one decoder and one linear head")
    if not {"inputs_embeds", "past_key_values"} <= set(inspect.signature(model.forward).parameters):
        _refuse(config, "does not read inputs_embeds and keep past_key_values")
    if not model._supports_default_dynamic_cache():
        _refuse(config, "has a cache of its own kind")
    if _reads_ids(config):
        _refuse(config, "reads the ids of words in its layers, and pictures have none")
    decoder = getattr(model, decoders[0])
    setattr(model, decoders[0], _SpokenDecoder(decoder))
    if {id(parameter) for parameter in model.parameters()} != {id(parameter) for parameter in head.parameters()}:
        _refuse(config, "has more layers between its decoder and its logits than one head")
    return decoder, head, CausalLMHead(model, heads[0])


def _reads_ids(config: PreTrainedConfig) -> bool:
    """Whether layers look at ids besides embeddings: Gemma 3n and 4, Qwen 4, DeepSeek-V4 have such."""
    return bool(
        getattr(config, "hidden_size_per_layer_input", None)
        or getattr(config, "ple_layer_ids", None)
        or "hash_moe" in (getattr(config, "mlp_layer_types", None) or ())
    )


def _refuse(config: PreTrainedConfig, why: str) -> NoReturn:
    raise ConfigError(f"text_config is of the kind '{config.model_type}', which {why}", _HINT)
