"""The configuration of a MiniGPT-4: three parts and how they are joined.

Knows no text and no files. Written for transformers 5.19 and newer: `sub_configs` and an own `__post_init__`
instead of the later `SubConfigSpec`, so that engines which pin an older transformers load it unchanged.
"""

from dataclasses import field
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

PARTS = ("vision_model", "query_tokens", "qformer", "language_projection", "language_model")


@strict
class MiniGPT4Config(PreTrainedConfig):
    """What a MiniGPT-4 is made of; the defaults are the published 7B model's sizes.

    Args:
        vision_config: Any vision model of the library, or `efficientnet_lite`; default EVA-ViT-g as BLIP-2 has it.
        qformer_config: A `blip_2_qformer`, or None: then `num_merged_tokens` neighbouring vision tokens are joined
            into one, as MiniGPT-4 for Llama-2 and MiniGPT-v2 do.
        text_config: A causal language model of the library made of one decoder and one linear head, as nearly all are
            (`language_model.py` refuses the others); default LLaMA.
        num_query_tokens: Learned queries, and so image tokens a picture; unused without a Q-Former.
        num_merged_tokens: Vision tokens in one image token; unused with a Q-Former.
        num_prefix_tokens: Vision tokens before the patches (class and register tokens), dropped before merging;
            unused with a Q-Former, which reads them all.
        post_layernorm_eps: Epsilon of the norm after the vision encoder where it has a `post_layernorm`; 1e-5 in the
            original (its `ln_vision`), while the library's BLIP-2 uses the encoder's own 1e-6. None leaves it alone.
        image_token_id: The id that marks an image token's place among the ids. Its embedding is never read.
        trainable_parts: The parts that learn, of `PARTS`; everything else is frozen.
        initializer_range: Standard deviation of new weights of the joining parts.
    """

    model_type = "minigpt4"
    sub_configs: ClassVar[dict[str, Any]] = {
        "vision_config": AutoConfig,
        "qformer_config": AutoConfig,
        "text_config": AutoConfig,
    }

    # A dict, a configuration or None as given; a configuration object after `__post_init__`.
    vision_config: Any = None
    qformer_config: Any = field(default_factory=lambda: {"model_type": "blip_2_qformer"})
    text_config: Any = None
    num_query_tokens: int = 32
    num_merged_tokens: int = 4
    num_prefix_tokens: int = 1
    post_layernorm_eps: float | None = 1e-5
    image_token_id: int = 0
    trainable_parts: list[str] | tuple[str, ...] = ("language_projection",)
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        """Build the parts' configurations and make their widths meet.

        Raises:
            ValueError: A part to train that does not exist.
            TypeError: A part that is neither a dict nor a configuration object.
        """
        self.vision_config = _build("vision_config", self.vision_config, default="blip_2_vision_model")
        self.text_config = _build("text_config", self.text_config, default="llama")
        if self.qformer_config is not None:
            self.qformer_config = _build("qformer_config", self.qformer_config, default="blip_2_qformer")
            self.qformer_config.encoder_hidden_size = self.vision_config.hidden_size
        unknown = sorted(set(self.trainable_parts) - set(PARTS))
        if unknown:
            raise ValueError(f"trainable_parts has {', '.join(unknown)}, expected some of {', '.join(PARTS)}")
        # Whether the head is the embedding table is the language model's own business.
        self.tie_word_embeddings = bool(getattr(self.text_config, "tie_word_embeddings", False))
        super().__post_init__(**kwargs)

    @property
    def num_image_tokens(self) -> int:
        """Places a picture takes in the language model's context."""
        if self.qformer_config is not None:
            return self.num_query_tokens
        return self._num_patches // self.num_merged_tokens

    @property
    def _num_patches(self) -> int:
        grid = getattr(self.vision_config, "num_patches", None)
        if grid is None:
            grid = (self.vision_config.image_size // self.vision_config.patch_size) ** 2
        return int(grid)

    @property
    def max_context(self) -> int | None:
        """Tokens that the language model reads at most; None where its configuration does not say."""
        length = getattr(self.text_config.get_text_config(), "max_position_embeddings", None)
        return length if isinstance(length, int) else None

    @property
    def image_embed_size(self) -> int:
        """Width of what the language projection reads."""
        if self.qformer_config is not None:
            return int(self.qformer_config.hidden_size)
        return int(self.vision_config.hidden_size * self.num_merged_tokens)


def _build(name: str, config: dict[str, Any] | PreTrainedConfig | None, default: str) -> PreTrainedConfig:
    """Turn a dict, or nothing, into a configuration object."""
    if isinstance(config, PreTrainedConfig):
        return config
    if not isinstance(config, dict | None):
        raise TypeError(f"{name} is a {type(config).__name__}, expected a dict or a configuration object")
    values = dict(config or {})
    return CONFIG_MAPPING[values.pop("model_type", default)](**values)
