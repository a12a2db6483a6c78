"""A new MiniGPT-4 of any vision encoder and any causal language model, with new parts to join them.

Everything that can be wrong is found from configurations first; then each part is loaded once, in its stored number
type, and the model is written as a full folder, whole or not at all. The joining parts are not trained yet.
"""

import json
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import Blip2QFormerConfig, Blip2QFormerModel, PreTrainedModel

from minigpt4.errors import ConfigError, WeightsError
from minigpt4.model import MiniGPT4Config, MiniGPT4ForConditionalGeneration
from minigpt4.processing.processing_minigpt4 import MiniGPT4Processor
from minigpt4.processing.prompts import PromptTemplate
from minigpt4.processing.prompts import template as template_named
from minigpt4.text import first_line, read_json_object
from minigpt4.weights import nano
from minigpt4.weights.alignment import NANO
from minigpt4.weights.compose_language import LANGUAGE, LanguagePart, read_language
from minigpt4.weights.compose_parts import UNREADABLE, part_folder, quiet_library
from minigpt4.weights.compose_vision import VISION, VisionPart, read_vision
from minigpt4.weights.files.atomic import recover, refuse_existing, verify_folder, write_folder
from minigpt4.weights.files.disk import require_free_space
from minigpt4.weights.folder import built_folder
from minigpt4.weights.hub import Report

COMPOSED_FILE = "composed_of.json"
"""Beside the model's own files: the parts by which it was asked for."""

QFORMER_WIDTH = 768
"""Of BLIP-2's; for a narrower language model it is as wide as that."""

HEAD_WIDTH = 64
NUM_MERGED_TOKENS = 4
SHARD_SIZE = "2GB"
SAMPLED_EMBEDDINGS = 4096
JOINED_PARTS = {"new": ["query_tokens", "qformer", "language_projection"], "none": ["language_projection"]}


def compose(
    target: Path,
    *,
    vision_model: str,
    language_model: str,
    qformer: Literal["new", "none"] = "new",
    qformer_layers: int = 4,
    num_query_tokens: int = 32,
    template: str = "chatml",
    seed: int = 1,
    report: Report | None = None,
) -> Path:
    """Make a full model folder of two models, or find that it was made already.

    Args:
        target: The folder to appear, whole or not at all.
        vision_model: A folder or hub id of a vision model of transformers, or of one that has such a part: CLIP,
            SigLIP, BLIP-2. `nano`: its vision encoder, without the words it recognises.
        language_model: A folder or hub id of a causal language model, with its tokenizer. `nano`: its language model.
        qformer: `new` for a Q-Former with new weights; `none` joins four neighbouring tokens in one, as in MiniGPT-v2.
        qformer_layers: Of the new Q-Former, above 0; every other one looks at the picture.
        num_query_tokens: Places of a picture with a Q-Former, above 0.
        template: Name of the prompt template.
        seed: Of the new weights.
        report: Called with what is being done.

    Raises:
        ConfigError: A part is of a kind that cannot be used, or the parts do not fit each other or the choices; or
            `target` was made of other parts.
        WeightsError: A part is missing, incomplete or damaged.
        DownloadError, PromptError: The hub does not give a part; there is no such template.
        StorageError: `target` holds something else, or there is no room for it.
    """
    asked = {
        "vision_model": str(vision_model),
        "language_model": str(language_model),
        "qformer": qformer,
        "qformer_layers": qformer_layers if qformer == "new" else None,
        "num_query_tokens": num_query_tokens if qformer == "new" else None,
        "template": template,
        "seed": seed,
    }
    if _is_there(target, asked):
        return target
    vision, language = _read_parts(vision_model, language_model, template_named(template), report)
    config = _config(vision, language, qformer, qformer_layers, num_query_tokens)
    model = _without_weights(config, language)
    stored = sum(path.stat().st_size for path in language.folder.glob("*.safetensors"))
    others = sum(p.numel() for name, p in model.model.named_parameters() if not name.startswith("language_model."))
    require_free_space(target, stored + 4 * others)  # float32 at most
    if report:
        report("joining the parts", 0, 0)
    with quiet_library():
        _join(model, vision.load(), language.load(), seed)
    model.generation_config = language.generation_config()
    with write_folder(target) as folder:
        model.save_pretrained(folder, max_shard_size=SHARD_SIZE)
        _processor(vision, language, config).save_pretrained(folder)
        (folder / COMPOSED_FILE).write_text(json.dumps(asked, indent=2) + "\n", encoding="utf-8")
    return target


def _read_parts(
    vision_model: str, language_model: str, template: PromptTemplate, report: Report | None
) -> tuple[VisionPart, LanguagePart]:
    """Read the two models' settings from their folders, fetched where they are nano's or a hub's."""
    vision_folder = built_folder(nano.ALIGNMENT_DIR, report) if vision_model == NANO else None
    language_folder = nano.frozen_parts(report)[0] if language_model == NANO else None
    vision = read_vision(vision_folder or part_folder(str(vision_model), VISION, report))
    language = read_language(language_folder or part_folder(str(language_model), LANGUAGE, report), template)
    return vision, language


def _processor(vision: VisionPart, language: LanguagePart, config: MiniGPT4Config) -> MiniGPT4Processor:
    return MiniGPT4Processor(
        vision.pictures,
        language.tokenizer,
        num_image_tokens=config.num_image_tokens,
        image_token=language.image_token,
        template=language.template.name,
    )


def _is_there(target: Path, asked: dict[str, Any]) -> bool:
    """Tell whether the folder was made before, of the same parts by the same names."""
    recover(target)
    if not (target / COMPOSED_FILE).is_file():
        refuse_existing(target, overwrite=False)
        return False
    verify_folder(target, deep=False)
    made_of = read_json_object(target / COMPOSED_FILE, WeightsError, f"remove {target}")
    for name, value in asked.items():
        if made_of.get(name) != value:
            raise ConfigError(
                f"the model in {target} was put together with {name} {made_of.get(name)!r}, now it is {value!r}",
                hint="choose another place, undo the change, or remove that folder",
            )
    return True


def _config(
    vision: VisionPart, language: LanguagePart, qformer: str, qformer_layers: int, num_query_tokens: int
) -> MiniGPT4Config:
    """Return the whole's configuration, after checking that a picture fits into it."""
    if qformer == "none":
        _fit_merging(vision)
    config = MiniGPT4Config(
        vision_config=vision.config,
        qformer_config=_qformer_config(language, qformer_layers) if qformer == "new" else None,
        text_config=language.config,
        num_query_tokens=num_query_tokens,
        num_merged_tokens=NUM_MERGED_TOKENS,
        num_prefix_tokens=vision.num_prefix_tokens,
        post_layernorm_eps=None,  # the encoder's own
        image_token_id=language.image_token_id,
        trainable_parts=JOINED_PARTS[qformer],
    )
    needed, context = language.question_length(config.num_image_tokens), config.max_context
    if context is not None and needed >= context:
        raise ConfigError(
            f"a picture of {config.num_image_tokens} tokens and a short question make {needed} tokens, the language "
            f"model in {language.folder} reads less than {context}",
            hint="set qformer to new, num_query_tokens to less, or name a model with a longer context",
        )
    return config


def _fit_merging(vision: VisionPart) -> None:
    """Refuse tokens that cannot be joined by fours; correct their number in the configuration.

    DINOv2 is configured for pictures of 518 pixels, and reads others, such as the 224 of its settings for pictures.
    """
    if vision.num_patches == 0 or vision.num_patches % NUM_MERGED_TOKENS:
        raise ConfigError(
            f"the vision encoder in {vision.folder} makes {vision.num_patches} patch tokens of a picture, without a "
            f"Q-Former {NUM_MERGED_TOKENS} are joined in one and none may be left over",
            hint="set qformer to new, which reads any number",
        )
    if getattr(vision.config, "num_patches", None) != vision.num_patches:
        vision.config.num_patches = vision.num_patches


def _qformer_config(language: LanguagePart, layers: int) -> Blip2QFormerConfig:
    """Return a new Q-Former's sizes: BLIP-2's, no wider than the language model, and no dropout."""
    text_width = int(language.config.get_text_config().hidden_size)
    width = min(QFORMER_WIDTH, text_width)
    heads = max(1, width // HEAD_WIDTH)
    width -= width % heads
    return Blip2QFormerConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        cross_attention_frequency=2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )


def _without_weights(config: MiniGPT4Config, language: LanguagePart) -> MiniGPT4ForConditionalGeneration:
    """Build the whole without memory, which finds out whether its language model can be a part."""
    try:
        with torch.device("meta"):
            return MiniGPT4ForConditionalGeneration(config)
    except ConfigError as error:
        raise ConfigError(
            f"the language model in {language.folder} cannot be used: {error.message}", error.hint
        ) from error
    except UNREADABLE as error:
        raise ConfigError(
            f"no model can be built of these parts: {first_line(error)}", hint="name other parts"
        ) from error


def _join(
    model: MiniGPT4ForConditionalGeneration, vision: PreTrainedModel, language: PreTrainedModel, seed: int
) -> None:
    """Put loaded parts and new ones in the places of those without weights."""
    whole = model.model
    decoder_class = type(whole.language_model)
    [decoder] = [child for child in language.children() if type(child) is decoder_class]
    whole.vision_model, whole.language_model = vision, decoder
    model.lm_head = language.get_output_embeddings()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if whole.qformer is not None:
            whole.qformer = Blip2QFormerModel._from_config(model.config.qformer_config)
            queries = torch.empty(whole.query_tokens.shape)
            whole.query_tokens = torch.nn.Parameter(queries.normal_(std=model.config.initializer_range))
        whole.language_projection = _new_projection(whole.language_projection, decoder)
    model.freeze()


@torch.no_grad()
def _new_projection(shape: torch.nn.Linear, decoder: torch.nn.Module) -> torch.nn.Linear:
    """Return a projection whose outputs, for normalised tokens, are spread like the embeddings of words.

    So the language model can use them from the first step. Measured at the table's output, which some models scale.
    """
    table: Any = decoder.get_input_embeddings()  # type: ignore[operator]  # a decoder of the library
    ids = torch.linspace(0, table.num_embeddings - 1, min(SAMPLED_EMBEDDINGS, table.num_embeddings)).long()
    words = table(ids).float()
    mean = words.mean(dim=0)
    projection = torch.nn.Linear(shape.in_features, shape.out_features)
    projection.weight.normal_(std=float((words - mean).square().mean().sqrt()) / shape.in_features**0.5)
    projection.bias.copy_(mean)
    return projection
