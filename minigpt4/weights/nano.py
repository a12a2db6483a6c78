"""nano: the small default model, joined from SmolLM2-135M-Instruct and EfficientNet-Lite0.

Converts the two files of their packages, and joins them as they are before training: the words of the classifier that
EfficientNet-Lite0 was trained as start the queries.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerBase

from minigpt4.errors import WeightsError
from minigpt4.model import (
    EfficientNetLiteConfig,
    EfficientNetLiteModel,
    MiniGPT4Config,
    MiniGPT4ForConditionalGeneration,
)
from minigpt4.processing.image_processing_minigpt4 import MiniGPT4ImageProcessor
from minigpt4.processing.processing_minigpt4 import MiniGPT4Processor
from minigpt4.processing.prompts import IMAGE_TOKEN
from minigpt4.text import first_line
from minigpt4.weights.files.atomic import write_folder
from minigpt4.weights.files.torch_files import read_torch_file
from minigpt4.weights.hub import Report
from minigpt4.weights.parts import EFFICIENTNET_LITE0, SMOLLM2, fetch, home

ALIGNMENT_DIR = Path(__file__).with_name("nano_alignment")
"""The alignment that comes with the package."""

WORDS_FILE = Path(__file__).with_name("imagenet_words.json")
UNUSED_TOKEN = "<repo_name>"
"""A control token of SmolLM2 for source code; its id becomes that of `IMAGE_TOKEN`."""

FEATURE_SCALES = (1 / 6.34, 1 / 2.71)
"""The inverse root mean square of the two feature maps, measured on 48 photographs."""

BATCH_NORM_EPS = 1e-3
"""Of TensorFlow's EfficientNets; PyTorch's default is 1e-5."""

_BLOCK_PARTS = {
    "_expand_conv": ("_bn0", "expand.0"),
    "_depthwise_conv": ("_bn1", "depthwise.0"),
    "_project_conv": ("_bn2", "project"),
}
_OTHER_PARTS = {"_conv_stem": ("_bn0", "stem.0"), "_conv_head": ("_bn1", "head.0")}


def class_words() -> list[str]:
    """Return the names of the 1,000 classes that the vision encoder tells apart."""
    words: list[str] = json.loads(WORDS_FILE.read_text(encoding="utf-8"))
    return words


def frozen_parts(report: Report | None = None, language_model: Path | None = None) -> tuple[Path, dict[str, Tensor]]:
    """Fetch and convert what nano is made of, once.

    `language_model` is a folder of SmolLM2-135M-Instruct to take in place of the package's file. Returns the language
    model's folder, and the vision encoder's tensors.

    Raises:
        DownloadError: A part is not here and cannot be fetched.
    """
    language_file = language_model or fetch(SMOLLM2, progress=report)
    vision_file = fetch(EFFICIENTNET_LITE0, progress=report)
    language_model_dir = home() / "models" / f"language-model-{version(language_model)}"
    if not language_model_dir.exists():
        if report:
            report("converting the language model", 0, 0)
        with write_folder(language_model_dir, overwrite=True) as folder:
            convert_language_model(language_file, folder)
    return language_model_dir, convert_vision_weights(read_torch_file(vision_file))


def version(language_model: Path | None = None) -> str:
    """Name the language model by its files: the digest of the package's, or path, sizes and times of a folder's."""
    if language_model is None:
        return SMOLLM2.member_sha256[:16]
    if not language_model.is_dir():
        raise WeightsError(f"{language_model} is not a folder", hint="name the folder of the language model")
    files = sorted(path for path in language_model.resolve().iterdir() if path.is_file())
    listing = [f"{path} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in files]
    return hashlib.sha256("\n".join(listing).encode()).hexdigest()[:16]


def make_processor(config: MiniGPT4Config, tokenizer: PreTrainedTokenizerBase) -> MiniGPT4Processor:
    """Return nano's processor: the encoder's own normalisation, ChatML conversations."""
    size = config.vision_config.image_size
    image_processor = MiniGPT4ImageProcessor(
        size={"height": size, "width": size}, image_mean=[127 / 255] * 3, image_std=[128 / 255] * 3
    )
    return MiniGPT4Processor(
        image_processor,
        tokenizer,
        num_image_tokens=config.num_image_tokens,
        image_token=IMAGE_TOKEN,
        template="chatml",
    )


def convert_vision_weights(original: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Turn the tensors of `efficientnet-lite0-*.pth` into those of `EfficientNetLiteModel`.

    Each batch norm is folded into the convolution before it, in double precision.
    """
    repeats = EfficientNetLiteConfig().stage_repeats
    blocks = [f"{stage}.{block}" for stage, count in enumerate(repeats) for block in range(count)]
    converted = {"classifier.weight": original["_fc.weight"], "classifier.bias": original["_fc.bias"]}
    for name in original:
        prefix, _, part = name.removesuffix(".weight").rpartition(".")
        if part in _BLOCK_PARTS:
            norm, target = _BLOCK_PARTS[part]
            target = f"stages.{blocks[int(prefix.rpartition('.')[2])]}.{target}"
            converted |= _fold(original, name, f"{prefix}.{norm}", target)
        elif part in _OTHER_PARTS:
            norm, target = _OTHER_PARTS[part]
            converted |= _fold(original, name, norm, target)
    return converted


def _fold(original: Mapping[str, Tensor], convolution: str, norm: str, target: str) -> dict[str, Tensor]:
    weight, bias, mean, variance = (
        original[f"{norm}.{part}"].double() for part in ("weight", "bias", "running_mean", "running_var")
    )
    scale = weight / (variance + BATCH_NORM_EPS).sqrt()
    kernel = original[convolution].double() * scale[:, None, None, None]
    return {f"{target}.weight": kernel.float(), f"{target}.bias": (bias - mean * scale).float()}


def convert_language_model(original: Path, target: Path) -> None:
    """Write SmolLM2 as nano reads it: bfloat16 safetensors, and a tokenizer with `IMAGE_TOKEN`.

    `original` is a GGUF file, or a folder of the same model from a hub; `target` an empty folder.

    Raises:
        WeightsError: The folder holds no language model with its tokenizer, or one of another kind.
    """
    source: dict[str, Any] = {"pretrained_model_name_or_path": original, "local_files_only": True}
    if original.is_file():
        source |= {"pretrained_model_name_or_path": original.parent, "gguf_file": original.name}
    hint = "name a folder of SmolLM2-135M-Instruct as it comes from a hub"
    try:
        read = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(**source)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise WeightsError(f"{original} is not a folder of a language model: {first_line(error)}", hint) from error
    if read.config.model_type != LlamaConfig.model_type:
        raise WeightsError(
            f"{original} holds a language model of kind {read.config.model_type}, expected {LlamaConfig.model_type}",
            hint,
        )
    config = LlamaConfig(**{k: v for k, v in read.config.to_dict().items() if k != "quantization_config"})
    # A model read from GGUF refuses to be saved ("quantized"); a new one with its tensors does not.
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    tokenizer_file = target / "tokenizer.json"
    text = tokenizer_file.read_text(encoding="utf-8")
    tokenizer_file.write_text(text.replace(json.dumps(UNUSED_TOKEN), json.dumps(IMAGE_TOKEN)), encoding="utf-8")


def read_language_model(folder: Path) -> tuple[Any, Any]:
    """Read a folder as `convert_language_model` writes it: the model in float32 with its head, and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    return model, AutoTokenizer.from_pretrained(folder, local_files_only=True)


def nano_config(text_config: LlamaConfig, image_token_id: int) -> MiniGPT4Config:
    """Return nano's configuration: three Q-Former layers, as wide as the language model."""
    width = text_config.hidden_size
    return MiniGPT4Config(
        vision_config=EfficientNetLiteConfig(feature_scales=FEATURE_SCALES, concept_size=width),
        qformer_config={
            "model_type": "blip_2_qformer",
            "hidden_size": width,
            "num_hidden_layers": 3,
            "num_attention_heads": width // 64,
            "intermediate_size": 768,
            "cross_attention_frequency": 2,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        },
        text_config=text_config,
        num_query_tokens=32,
        image_token_id=image_token_id,
        trainable_parts=["query_tokens", "qformer", "language_projection"],
    )


def assemble(
    language_model_dir: Path, vision_weights: Mapping[str, Tensor]
) -> tuple[MiniGPT4ForConditionalGeneration, PreTrainedTokenizerBase]:
    """Join the folder of `convert_language_model` and the tensors of `convert_vision_weights`.

    Returns:
        The model in float32 and evaluation mode, its joining parts as before training, and its tokenizer.
    """
    language_model, tokenizer = read_language_model(language_model_dir)
    config = nano_config(language_model.config, tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))
    model = MiniGPT4ForConditionalGeneration(config)
    model.model.language_model.load_state_dict(language_model.model.state_dict())
    vision_model: EfficientNetLiteModel = model.model.vision_model
    words = concept_embeddings(tokenizer, language_model.get_input_embeddings().weight, config.vision_config)
    vision_model.load_state_dict({**vision_weights, "concept_embeddings.weight": words})
    model.tie_weights()
    start_as_identity(model)
    return model.eval(), tokenizer


@torch.no_grad()
def concept_embeddings(
    tokenizer: PreTrainedTokenizerBase, embeddings: Tensor, config: EfficientNetLiteConfig
) -> Tensor:
    """Spell every class name in the language model's word pieces.

    Returns:
        `(num_classes, concept_length * concept_size)`: the pieces' embeddings less the mean embedding, zero after the
        name's end. The mean is two thirds of an embedding's length and says nothing.
    """
    table = torch.zeros(config.num_classes, config.concept_length, config.concept_size)
    mean = embeddings.mean(dim=0)
    for row, name in zip(table, class_words(), strict=True):
        ids = tokenizer(" " + name, add_special_tokens=False).input_ids[: config.concept_length]
        row[: len(ids)] = embeddings[ids] - mean
    return table.flatten(1)


@torch.no_grad()
def start_as_identity(model: MiniGPT4ForConditionalGeneration) -> None:
    """Set the joining parts so that a concept word passes them unchanged in direction.

    Every block of the Q-Former starts by adding nothing, and the projection scales a normalised vector back to an
    embedding, so the names of all classes reach the language model as words before the first step of training.
    """
    for layer in model.model.qformer.encoder.layer:
        outputs = [layer.attention.output, layer.output_query]
        outputs += [layer.crossattention.output] if layer.has_cross_attention else []
        for output in outputs:
            output.dense.weight.zero_()
            output.dense.bias.zero_()
    embeddings = model.get_input_embeddings().weight.float()
    mean = embeddings.mean(dim=0)
    projection = model.model.language_projection
    projection.weight.copy_(torch.eye(len(projection.weight)) * (embeddings - mean).square().mean().sqrt())
    projection.bias.copy_(mean)
