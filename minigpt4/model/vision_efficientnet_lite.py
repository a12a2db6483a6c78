"""EfficientNet-Lite as a vision encoder: its feature maps, and the words of its own classifier, as tokens.

The library's `EfficientNetModel` always has squeeze-and-excite and swish; the Lite family has neither.
This module knows tensors only: which words the classes stand for is a table of embeddings given to it.

Source: Tan and Le, "EfficientNet" (arXiv 1905.11946); the Lite variant of TensorFlow's TPU models (2020): no
squeeze-and-excite, ReLU6, stem and head of fixed width, TensorFlow's "SAME" padding. The encoder is frozen, so its
batch norms are folded into the convolutions when the weights are converted; there are none here.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.utils.generic import ModelOutput, can_return_tuple


@strict
class EfficientNetLiteConfig(PreTrainedConfig):
    """Sizes of an EfficientNet-Lite encoder; the defaults are Lite0's.

    Args:
        stage_repeats: Blocks in each stage.
        stage_kernels: Kernel side of each stage's depthwise convolutions, in pixels.
        stage_strides: Stride of the first block of each stage.
        stage_expansions: Width of each stage's inner layer, as a multiple of its input.
        stage_channels: Output channels of each stage.
        stem_channels: Channels after the first convolution.
        head_channels: Channels before the classifier.
        image_size: Side of the square picture, in pixels.
        num_classes: Classes of the classifier.
        feature_stages: Stages (counted from 0) whose maps become tokens, finest first; every coarser map is
            repeated to the finest one's grid.
        feature_scales: One factor a stage in `feature_stages`; brings the maps to a root mean square near 1.
        color_bins: Levels of red, green and blue each in a token's colour histogram, which has `color_bins ** 3`
            channels; 0 for none. The deeper maps of a classifier keep what a thing is and lose its colour.
        position_channels: Channels of each token that say where it is; a multiple of 4.
        num_concepts: The best so many classes are told as words; 0 for none.
        concept_length: Word pieces a class name may take.
        concept_size: Width of a word piece's embedding.
        initializer_range: Standard deviation of new weights.
    """

    model_type = "efficientnet_lite"
    base_config_key = "vision_config"

    stage_repeats: list[int] | tuple[int, ...] = (1, 2, 2, 3, 3, 4, 1)
    stage_kernels: list[int] | tuple[int, ...] = (3, 3, 5, 3, 5, 5, 3)
    stage_strides: list[int] | tuple[int, ...] = (1, 2, 2, 2, 1, 2, 1)
    stage_expansions: list[int] | tuple[int, ...] = (1, 6, 6, 6, 6, 6, 6)
    stage_channels: list[int] | tuple[int, ...] = (16, 24, 40, 80, 112, 192, 320)
    stem_channels: int = 32
    head_channels: int = 1280
    image_size: int = 224
    num_classes: int = 1000
    feature_stages: list[int] | tuple[int, ...] = (4, 6)
    feature_scales: list[float] | tuple[float, ...] = (1.0, 1.0)
    color_bins: int = 4
    position_channels: int = 16
    num_concepts: int = 4
    concept_length: int = 4
    concept_size: int = 576
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        """Derive the token width, the face every vision encoder shows.

        Raises:
            ValueError: `position_channels` is not a multiple of 4.
        """
        if self.position_channels % 4:
            raise ValueError(f"position_channels is {self.position_channels}, expected a multiple of 4")
        super().__post_init__(**kwargs)

    @property
    def hidden_size(self) -> int:
        """Width of a token: the channels of the chosen maps, of the colours and of the position."""
        maps = sum(self.stage_channels[stage] for stage in self.feature_stages)
        return maps + self.color_bins**3 + self.position_channels

    @property
    def num_patches(self) -> int:
        """Tokens a picture takes: the places of the finest chosen map; strides round up, as "SAME" padding does."""
        side = self.image_size
        for stride in [2, *self.stage_strides[: min(self.feature_stages) + 1]]:
            side = math.ceil(side / stride)
        return side * side

    @property
    def num_concept_tokens(self) -> int:
        """Word pieces told about each picture."""
        return self.num_concepts * self.concept_length


@dataclass
class EfficientNetLiteOutput(ModelOutput):
    """What the encoder saw.

    Args:
        last_hidden_state: `(batch, tokens, hidden_size)`, raster order.
        pooler_output: `(batch, head_channels)`, the classifier's input.
        logits: `(batch, num_classes)`.
        concept_embeds: `(batch, num_concept_tokens, concept_size)`: the word pieces of the best classes, best first,
            each scaled by its class's probability; None where the configuration asks for none.
        hidden_states: The stem's map and each stage's, `(batch, channels, height, width)`, where asked for.
    """

    last_hidden_state: Tensor | None = None
    pooler_output: Tensor | None = None
    logits: Tensor | None = None
    concept_embeds: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None


class SamePadConv2d(nn.Conv2d):
    """A convolution padded as TensorFlow does: the odd pixel goes to the right and the bottom."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> None:
        # With stride 1 the padding is the same on all sides, and the convolution does it itself.
        super().__init__(inputs, outputs, kernel, stride, groups=groups, padding=kernel // 2 if stride == 1 else 0)

    def forward(self, input: Tensor) -> Tensor:
        """Pad `(batch, channels, height, width)`, then convolve."""
        if self.stride == (1, 1):
            return super().forward(input)
        padding = []
        for side, kernel, stride in zip(
            reversed(input.shape[-2:]), reversed(self.kernel_size), reversed(self.stride), strict=True
        ):
            total = max((math.ceil(side / stride) - 1) * stride + kernel - side, 0)
            padding += [total // 2, total - total // 2]
        return super().forward(nn.functional.pad(input, padding))


def _activated(convolution: SamePadConv2d) -> nn.Sequential:
    return nn.Sequential(convolution, nn.ReLU6())


class InvertedBottleneck(nn.Module):
    """Widen, convolve each channel, narrow; add the input where the shape allows."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = inputs * expansion
        self.expand = _activated(SamePadConv2d(inputs, inner)) if expansion != 1 else nn.Identity()
        self.depthwise = _activated(SamePadConv2d(inner, inner, kernel, stride, groups=inner))
        self.project = SamePadConv2d(inner, outputs)
        self.has_shortcut = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """`(batch, inputs, height, width)` to `(batch, outputs, height / stride, width / stride)`."""
        y = self.project(self.depthwise(self.expand(x)))
        return x + y if self.has_shortcut else y


class EfficientNetLiteModel(PreTrainedModel):
    """A picture in, tokens and concept words out."""

    config: EfficientNetLiteConfig
    config_class = EfficientNetLiteConfig
    base_model_prefix = "efficientnet_lite"
    main_input_name = "pixel_values"
    input_modalities = ["image"]  # noqa: RUF012  (the library's own form)
    _no_split_modules = ["InvertedBottleneck"]  # noqa: RUF012  (the library's own form)
    # There is no attention here, so whichever kind is asked of the whole model suits this part of it.
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: EfficientNetLiteConfig) -> None:
        super().__init__(config)
        self.stem = _activated(SamePadConv2d(3, config.stem_channels, kernel=3, stride=2))
        self.stages = nn.ModuleList()
        inputs = config.stem_channels
        for repeats, kernel, stride, expansion, outputs in zip(
            config.stage_repeats,
            config.stage_kernels,
            config.stage_strides,
            config.stage_expansions,
            config.stage_channels,
            strict=True,
        ):
            blocks = [InvertedBottleneck(inputs, outputs, kernel, stride, expansion)]
            blocks += [InvertedBottleneck(outputs, outputs, kernel, 1, expansion) for _ in range(repeats - 1)]
            self.stages.append(nn.Sequential(*blocks))
            inputs = outputs
        self.head = _activated(SamePadConv2d(inputs, config.head_channels))
        self.classifier = nn.Linear(config.head_channels, config.num_classes)
        if config.num_concepts:
            self.concept_embeddings = nn.Embedding(config.num_classes, config.concept_length * config.concept_size)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.Conv2d):
            init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @can_return_tuple
    def forward(
        self, pixel_values: Tensor, output_hidden_states: bool | None = None, **kwargs: Any
    ) -> EfficientNetLiteOutput:
        """See `EfficientNetLiteOutput`.

        Args:
            pixel_values: `(batch, 3, image_size, image_size)`, RGB, normalised with mean 127/255, deviation 128/255.
            output_hidden_states: Whether to return the maps; by default as the configuration says.
            kwargs: Options of attention models (`output_attentions`, ...); a network of convolutions has none.
        """
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        # Twice as fast on a CPU as the default layout.
        pixel_values = pixel_values.to(self.classifier.weight.dtype, memory_format=torch.channels_last)
        stem = x = self.stem(pixel_values)
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        pooled = self.head(x).mean(dim=(2, 3))
        logits = self.classifier(pooled)
        return EfficientNetLiteOutput(
            last_hidden_state=self._tokens([maps[stage] for stage in self.config.feature_stages], pixel_values),
            pooler_output=pooled,
            logits=logits,
            concept_embeds=self.concepts(logits) if self.config.num_concepts else None,
            hidden_states=(stem, *maps) if output_hidden_states else None,
        )

    def _tokens(self, maps: list[Tensor], pixel_values: Tensor) -> Tensor:
        """Lay the maps over one another on the finest grid, add colour and position: `(batch, tokens, hidden_size)`."""
        batch, _, height, width = maps[0].shape
        layers = [
            nn.functional.interpolate(x * scale, size=(height, width), mode="nearest")
            for x, scale in zip(maps, self.config.feature_scales, strict=True)
        ]
        if self.config.color_bins:
            layers.append(_color_histograms(pixel_values, self.config.color_bins, height, width))
        position = _position_code(height, width, self.config.position_channels, maps[0])
        return torch.cat([*layers, position.expand(batch, -1, -1, -1)], dim=1).flatten(2).transpose(1, 2)

    def concepts(self, logits: Tensor) -> Tensor:
        """Word pieces of the best classes, scaled by probability: `(batch, num_concept_tokens, concept_size)`."""
        best = logits.float().softmax(dim=-1).topk(self.config.num_concepts, dim=-1)
        words = self.concept_embeddings(best.indices) * best.values.unsqueeze(-1).to(logits.dtype)
        return words.unflatten(-1, (self.config.concept_length, self.config.concept_size)).flatten(1, 2)


def _color_histograms(pixel_values: Tensor, bins: int, height: int, width: int) -> Tensor:
    """How much of each place has which colour: `(batch, bins ** 3, height, width)`.

    A pixel is shared between the two nearest levels of each of red, green and blue (Swain and Ballard 1991, with linear
    shares), so the histogram changes smoothly with the colour. Scaled to a root mean square of 1 for a plain place.
    """
    colors = (nn.functional.avg_pool2d(pixel_values, 2) + 1).clamp(0, 2) / 2
    levels = torch.linspace(0, 1, bins, device=colors.device, dtype=colors.dtype).view(1, 1, bins, 1, 1)
    shares = (1 - (colors.unsqueeze(2) - levels).abs() * (bins - 1)).clamp(min=0)
    red, green, blue = shares.unbind(1)
    joint = torch.einsum("brhw,bghw,bchw->brgchw", red, green, blue).flatten(1, 3)
    return nn.functional.adaptive_avg_pool2d(joint, (height, width)) * bins**1.5


def _position_code(height: int, width: int, channels: int, like: Tensor) -> Tensor:
    """Sines and cosines of the row and the column, in `[-1, 1]`: `(1, channels, height, width)`."""
    octaves = torch.pi * 2.0 ** torch.arange(channels // 4, device=like.device)
    rows = (torch.arange(height, device=like.device) + 0.5) / height
    columns = (torch.arange(width, device=like.device) + 0.5) / width
    row_code = (octaves[:, None] * rows)[:, :, None].expand(-1, -1, width)
    column_code = (octaves[:, None] * columns)[:, None, :].expand(-1, height, -1)
    code = torch.cat([row_code.sin(), row_code.cos(), column_code.sin(), column_code.cos()])
    return code.unsqueeze(0).to(like.dtype)
