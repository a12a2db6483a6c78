"""The MiniGPT-4 model: a picture becomes a few embeddings that a language model reads like words.

Tensors only: knows no text, no files and no prompt. Everything but the joining is the library's: any of its vision
models, BLIP-2's Q-Former, any of its causal language models, their attention backends, caches and `generate`.

Source: Zhu et al., "MiniGPT-4" (arXiv 2304.10592), section 3; without a Q-Former, Chen et al., "MiniGPT-v2"
(arXiv 2310.09478), section 2. Known difference: the original merges tokens in strips of four, not in 2 x 2 squares as
the paper says; so does this model.
"""

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import AutoModel, Blip2QFormerModel, Blip2VisionModel, Cache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from .configuration_minigpt4 import PARTS, MiniGPT4Config
from .language_model import split_causal_lm
from .vision_efficientnet_lite import EfficientNetLiteConfig, EfficientNetLiteModel


@dataclass
class MiniGPT4ImageFeatures(BaseModelOutputWithPooling):
    """A picture as the language model will read it, and how it came about.

    Args:
        last_hidden_state: The vision encoder's tokens, `(pictures, tokens, vision width)`.
        pooler_output: The image embeddings, `(pictures, num_image_tokens, text width)`.
        hidden_states: The vision encoder's, where asked for and where it has them.
        attentions: The vision encoder's, likewise.
        cross_attentions: The Q-Former's over the vision tokens, one a cross-attending layer, each
            `(pictures, heads, num_query_tokens, tokens)`; needs eager attention and `output_attentions=True`.
    """

    cross_attentions: tuple[Tensor, ...] | None = None


@dataclass
class MiniGPT4ModelOutput(BaseModelOutputWithPast):
    """The language model's output, and the image embeddings it read.

    Args:
        cross_attentions: Of a language model that could have them; none here.
        router_logits: Of a mixture of experts, where asked for: `(places, experts)` a layer.
        image_hidden_states: `(pictures, num_image_tokens, text width)`.
    """

    cross_attentions: tuple[Tensor, ...] | None = None
    router_logits: tuple[Tensor, ...] | None = None
    image_hidden_states: Tensor | None = None


@dataclass
class MiniGPT4CausalLMOutput(CausalLMOutputWithPast):
    """Loss and logits, and the image embeddings that were read.

    Args:
        cross_attentions: Of a language model that could have them; none here.
        aux_loss: Of a mixture of experts: how unevenly they are used; `loss` holds its share of it.
        router_logits: Of a mixture of experts, where asked for: `(places, experts)` a layer.
        image_hidden_states: `(pictures, num_image_tokens, text width)`.
    """

    cross_attentions: tuple[Tensor, ...] | None = None
    aux_loss: Tensor | None = None
    router_logits: tuple[Tensor, ...] | None = None
    image_hidden_states: Tensor | None = None


class MiniGPT4PreTrainedModel(PreTrainedModel):
    """What both models share: what the library may do with them, new weights, freezing."""

    config: MiniGPT4Config
    config_class = MiniGPT4Config
    base_model_prefix = "model"
    input_modalities = ["image", "text"]  # noqa: RUF012  (the library's own form)
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012  (the library's own form)
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, MiniGPT4Model) and module.query_tokens is not None:
            init.normal_(module.query_tokens, std=self.config.initializer_range)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As the library's, and frozen: it puts new parameters, which all learn, in place of those of `__init__`."""
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # a tuple with `output_loading_info=True`
        model.freeze()
        return loaded

    def freeze(self) -> Self:
        """Let only `config.trainable_parts` learn; the original trains `language_projection` alone."""
        for name, parameter in self.base_model.named_parameters():
            learns = name.partition(".")[0] in self.config.trainable_parts
            parameter.requires_grad_(learns and parameter.is_floating_point())  # the integers of quantization cannot
        head = self.get_output_embeddings()
        for parameter in () if head is None else head.parameters():
            parameter.requires_grad_("language_model" in self.config.trainable_parts and parameter.is_floating_point())
        return self

    def train(self, mode: bool = True) -> Self:
        """Set training mode, except in parts without a trainable parameter: those stay in evaluation mode.

        A frozen Q-Former would otherwise drop out a tenth of its activations (BLIP-2 was trained with dropout). Layers
        that checkpoint their activations do so in training mode only, so these have it, and what they consist of has
        not: the way back to the projection leads through the frozen language model.
        """
        super().train(mode)
        for part in PARTS:
            module = getattr(self.base_model, part, None)
            if isinstance(module, nn.Module) and not any(p.requires_grad for p in module.parameters()):
                for inner in module.modules():
                    checkpoints = isinstance(inner, GradientCheckpointingLayer) and inner.gradient_checkpointing
                    inner.training = mode and checkpoints
        return self

    def _set_gradient_checkpointing(self, *args: Any, **kwargs: Any) -> None:
        super()._set_gradient_checkpointing(*args, **kwargs)
        self.train(self.training)


class MiniGPT4Model(MiniGPT4PreTrainedModel):
    """Vision encoder, Q-Former, projection and language model, without the language head.

    Args:
        config: What it is made of.
        language_model: The decoder of a language model that was built already; None builds one.
    """

    def __init__(self, config: MiniGPT4Config, language_model: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        self.vision_model = _vision_model(config)
        if config.qformer_config is None:
            self.qformer = None
            self.query_tokens = None
        else:
            self.qformer = Blip2QFormerModel._from_config(config.qformer_config)
            self.query_tokens = nn.Parameter(torch.zeros(1, config.num_query_tokens, config.qformer_config.hidden_size))
        decoder: Any = AutoModel.from_config(config.text_config) if language_model is None else language_model
        # As wide as a word's embedding, which OPT's layers can be wider than (`word_embed_proj_dim`).
        self.language_projection = nn.Linear(config.image_embed_size, decoder.get_input_embeddings().embedding_dim)
        self.language_model = decoder
        self.post_init()
        self.freeze()

    def get_input_embeddings(self) -> nn.Embedding:
        """The language model's embedding table."""
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the language model's embedding table."""
        self.language_model.set_input_embeddings(value)

    def get_encoder(self, modality: str | None = None) -> nn.Module:
        """The encoder of a modality, of which there is one: the vision encoder for `"image"`."""
        return self.vision_model if modality == "image" else super().get_encoder(modality=modality)

    @can_return_tuple
    def get_image_features(self, pixel_values: Tensor, **kwargs: Any) -> MiniGPT4ImageFeatures:
        """Read pictures into the language model's embedding space.

        Args:
            pixel_values: `(pictures, 3, height, width)`, as `MiniGPT4ImageProcessor` makes them.
            kwargs: For the vision encoder and the Q-Former, for example `output_attentions`.

        Returns:
            The image embeddings as `pooler_output`, and what they came from.

        Source: `encode_img` of the original.
        """
        vision_outputs = self.vision_model(pixel_values, return_dict=True, **kwargs)
        return self.align_image_features(vision_outputs, **kwargs)

    def align_image_features(self, vision_outputs: Any, **kwargs: Any) -> MiniGPT4ImageFeatures:
        """Turn what the vision encoder saw into image embeddings; the part of the way that can learn.

        Args:
            vision_outputs: The vision encoder's output, now or from a cache of features. Where it has
                `concept_embeds` `(pictures, words, width)`, words that the encoder itself recognised, they are added
                to the first queries.
            kwargs: For the Q-Former, for example `output_attentions`.
        """
        tokens = vision_outputs.last_hidden_state
        cross_attentions = None
        if self.qformer is None or self.query_tokens is None:
            tokens = tokens[:, self.config.num_prefix_tokens :]
            image_embeds = tokens.reshape(len(tokens), self.config.num_image_tokens, self.config.image_embed_size)
        else:
            queries = self.query_tokens.expand(len(tokens), -1, -1)
            concepts = getattr(vision_outputs, "concept_embeds", None)
            if concepts is not None:
                queries = queries + nn.functional.pad(concepts, (0, 0, 0, queries.shape[1] - concepts.shape[1]))
            outputs = self.qformer(query_embeds=queries, encoder_hidden_states=tokens, return_dict=True, **kwargs)
            image_embeds, cross_attentions = outputs.last_hidden_state, outputs.cross_attentions
        return MiniGPT4ImageFeatures(
            last_hidden_state=vision_outputs.last_hidden_state,
            pooler_output=self.language_projection(image_embeds.to(self.language_projection.weight.dtype)),
            hidden_states=getattr(vision_outputs, "hidden_states", None),
            attentions=getattr(vision_outputs, "attentions", None),
            cross_attentions=cross_attentions,
        )

    def get_placeholder_mask(
        self, input_ids: Tensor | None, inputs_embeds: Tensor, image_features: Tensor
    ) -> torch.BoolTensor:
        """Find the places of the image embeddings: `(batch, length, text width)`, true where one goes.

        Raises:
            ValueError: More or fewer places than image embeddings.
        """
        if input_ids is None:
            marker = self.get_input_embeddings()(
                torch.tensor(self.config.image_token_id, dtype=torch.long, device=inputs_embeds.device)
            )
            places = (inputs_embeds == marker).all(-1)
        else:
            places = input_ids == self.config.image_token_id
        num_places, num_features = int(places.sum()), image_features.shape[0] * image_features.shape[1]
        if num_places != num_features:
            raise ValueError(
                f"Image features and image tokens do not match: tokens: {num_places}, features {num_features}"
            )
        return places.unsqueeze(-1).expand_as(inputs_embeds).to(inputs_embeds.device)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs: Any,
    ) -> MiniGPT4ModelOutput:
        """Read text and pictures.

        Args:
            input_ids: `(batch, length)`; every picture takes `config.num_image_tokens` ids `config.image_token_id`.
            pixel_values: `(pictures, 3, height, width)`, in the order of their places in the flattened batch.
            attention_mask: `(batch, length)`, 0 at padding.
            position_ids: `(batch, length)`.
            past_key_values: The cache of what was read before; then `input_ids` and the pictures are only the new.
            inputs_embeds: `(batch, length, text width)` in place of `input_ids`.
            mm_encoder_outputs: `{"image": features}`: pictures read before, in place of `pixel_values`; `pooler_output`
                is `(pictures, num_image_tokens, text width)`.
            kwargs: For the language model.

        Raises:
            ValueError: Both or neither of `input_ids` and `inputs_embeds`; both kinds of picture; a number of image
                places that does not fit the pictures.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        features: Any = (mm_encoder_outputs or {}).get("image")
        if pixel_values is not None and features is not None:
            raise ValueError("You cannot specify both pixel_values and mm_encoder_outputs")
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if pixel_values is not None:
            features = self.get_image_features(pixel_values, return_dict=True)
        image_embeds = None
        if features is not None:
            image_embeds = features.pooler_output.to(inputs_embeds.device, inputs_embeds.dtype)
            places = self.get_placeholder_mask(input_ids, inputs_embeds, image_embeds)
            inputs_embeds = inputs_embeds.masked_scatter(places, image_embeds)

        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            return_dict=True,
            **kwargs,
        )
        return MiniGPT4ModelOutput(**outputs, image_hidden_states=image_embeds)


class MiniGPT4ForConditionalGeneration(MiniGPT4PreTrainedModel, GenerationMixin):
    """A MiniGPT-4 that answers."""

    _tp_plan = {"lm_head": "colwise_gather_output"}  # noqa: RUF012  (the library's own form)

    def __init__(self, config: MiniGPT4Config) -> None:
        super().__init__(config)
        decoder, head, self._causal_lm = split_causal_lm(config.text_config)
        self.model = MiniGPT4Model(config, decoder)
        self.lm_head = head
        if self._causal_lm.model._tied_weights_keys:
            embeddings = self.get_input_embeddings().weight
            name = next(name for name, parameter in self.named_parameters() if parameter is embeddings)
            self._tied_weights_keys = {"lm_head.weight": name}  # the table is `embed_tokens` in LLaMA, `wte` in GPT-2
        # Whether tokens can be taken back, and whether a step is one graph, is the language model's business.
        self._is_stateful = self._causal_lm.model._is_stateful
        self._can_compile_fullgraph = self._causal_lm.model._can_compile_fullgraph
        self.post_init()
        self.freeze()

    @property
    def language_model_class(self) -> type[PreTrainedModel]:
        """The library's class of the language model with its head."""
        return type(self._causal_lm.model)

    def get_input_embeddings(self) -> nn.Embedding:
        """The language model's embedding table."""
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the language model's embedding table."""
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Linear:
        """The language head."""
        return self.lm_head

    @can_return_tuple
    def get_image_features(self, pixel_values: Tensor, **kwargs: Any) -> MiniGPT4ImageFeatures:
        """See `MiniGPT4Model.get_image_features`."""
        return self.model.get_image_features(pixel_values, return_dict=True, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As the library's, and `mm_encoder_outputs` stays as it was: beams there repeat the pictures in place."""
        features = kwargs.pop("mm_encoder_outputs", None)
        if features is not None:
            kwargs["mm_encoder_outputs"] = {modality: type(output)(**output) for modality, output in features.items()}
        return super().generate(*args, **kwargs)  # type: ignore[misc]  # the mixin types `self` by a protocol

    def prepare_inputs_for_generation(  # type: ignore[override]  # the library's own classes narrow it likewise
        self,
        input_ids: Tensor,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """As the language model's own class; where that drops its cache to read all again, with the pictures again.

        Phi-3 does so where its positions change their scale (`original_max_position_embeddings`).

        Raises:
            ValueError: All is to be read again, and pictures that were read before are not given.
        """
        kwargs["inputs_embeds"] = inputs_embeds
        inputs = self._causal_lm.prepare_inputs(input_ids, past_key_values=past_key_values, **kwargs)
        if past_key_values is not None and inputs.get("past_key_values") is None:
            kwargs["next_sequence_length"] = None  # all of it, which transformers 5.19 forgets
            inputs = self._causal_lm.prepare_inputs(input_ids, **kwargs)
            pictures = {
                "pixel_values": kwargs.get("pixel_values"),
                "mm_encoder_outputs": kwargs.get("mm_encoder_outputs") or None,  # `generate` makes {} of nothing
            }
            given = any(value is not None for value in pictures.values())
            if not given and (input_ids == self.config.image_token_id).any():
                raise ValueError("The language model reads all again, so all pictures are needed again")
            inputs |= pictures
        return inputs

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs: Any,
    ) -> MiniGPT4CausalLMOutput:
        """Predict the next word at every place; see `MiniGPT4Model.forward` for the inputs.

        Args:
            input_ids: As there, like the other inputs.
            pixel_values: As there.
            attention_mask: As there.
            position_ids: As there.
            past_key_values: As there.
            inputs_embeds: As there.
            labels: `(batch, length)`, the ids themselves, -100 where nothing is learned; the shift is done here.
            logits_to_keep: Only the last so many places get logits, or the places of an index tensor; 0 for all.
            mm_encoder_outputs: As there.
            kwargs: For the language model and the loss (`num_items_in_batch`).
        """
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            mm_encoder_outputs=mm_encoder_outputs,
            return_dict=True,
            **kwargs,
        )
        said = self._causal_lm(
            self.lm_head,
            outputs,
            attention_mask=attention_mask,
            labels=labels,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )
        return MiniGPT4CausalLMOutput(**said, image_hidden_states=outputs.image_hidden_states)

    def compute_logits(self, states: Tensor) -> Tensor:
        """Turn states `(..., text width)` of the language model into logits `(..., vocabulary)`, as `forward` does."""
        outputs = MiniGPT4ModelOutput(last_hidden_state=states.reshape(1, -1, states.shape[-1]))
        logits: Any = self._causal_lm(self.lm_head, outputs).logits
        return torch.reshape(logits, (*states.shape[:-1], logits.shape[-1]))


def _vision_model(config: MiniGPT4Config) -> PreTrainedModel:
    """Build the vision encoder.

    BLIP-2's is not among the library's `AutoModel` classes, so it is built by name.
    """
    vision_config = config.vision_config
    if isinstance(vision_config, EfficientNetLiteConfig):
        return EfficientNetLiteModel._from_config(vision_config)
    if vision_config.model_type != "blip_2_vision_model":
        return AutoModel.from_config(vision_config)
    model = Blip2VisionModel._from_config(vision_config)
    if config.post_layernorm_eps is not None:
        model.post_layernorm.eps = config.post_layernorm_eps
    return model
