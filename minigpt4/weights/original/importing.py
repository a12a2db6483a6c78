"""The original's files into one model folder: vision encoder, Q-Former, language model, projection.

Everything is checked from headers first (`plan`); then tensor after tensor is read, joined where the original keeps
two, and written piece by piece: the model is never in memory. Interrupted, the same call goes on with the file it was
at.
"""

import math
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, GenerationConfig, PreTrainedTokenizerBase

from minigpt4.errors import WeightsError
from minigpt4.model import MiniGPT4Config
from minigpt4.processing.image_processing_minigpt4 import MiniGPT4ImageProcessor
from minigpt4.processing.processing_minigpt4 import MiniGPT4Processor
from minigpt4.processing.prompts import template as template_named
from minigpt4.text import read_json_object
from minigpt4.weights.files.model_writer import PIECE_BYTES, SHARD_BYTES, Entry, Report, kept_note, write_model
from minigpt4.weights.files.tensor_files import open_tensors
from minigpt4.weights.llama.tokenizer import ORIGINAL_DIR, load_llama_tokenizer, mended_ids, mended_tokenizer
from minigpt4.weights.llama.version import is_delta
from minigpt4.weights.original import names
from minigpt4.weights.original.names import Kind, OriginalFiles
from minigpt4.weights.original.plan import NORMS, POSITIONS, Plan, Source, Tensors, plan_import
from minigpt4.weights.original.sizes import FLAN_T5_WIDTHS, MINIGPT_V2, family_of, read_overrides

_FILES_OF = {
    "--vision": (Kind.VISION, Kind.HUB_BLIP2),
    "--qformer": (Kind.QFORMER, Kind.HUB_BLIP2),
    "--language-model": (Kind.LANGUAGE_MODEL,),
    "--projection": (Kind.CHECKPOINT,),
}


@dataclass
class Imported:
    """What an import did, or would do.

    Args:
        folder: The model folder.
        plan: Where everything came from.
        template: The prompt template's name.
        notes: Sentences for the user, in order.
    """

    folder: Path
    plan: Plan
    template: str
    notes: list[str] = field(default_factory=list)


def import_original(
    target: Path,
    files: OriginalFiles,
    *,
    overrides: Sequence[str] = (),
    template: str | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    shard_bytes: int = SHARD_BYTES,
    report: Report | None = None,
) -> Imported:
    """Make a model folder of the original's files.

    Args:
        target: The folder to appear, whole or not at all.
        files: What it is made of.
        overrides: `key=value` each, for what shapes cannot tell (`vision_config.num_attention_heads=2`).
        template: The prompt template; default `vicuna-v0`, or `llama-2` for a model without a Q-Former.
        overwrite: Replace an existing model folder.
        dry_run: Check everything and write nothing.
        shard_bytes: Size of a weight file; a larger tensor has a file of its own.
        report: Called with the progress of the writing.

    Raises:
        WeightsError: A file that is missing, damaged, of another kind, or that does not fit the others.
        ConfigError: An override or a template that does not exist.
        StorageError: The target exists, or there is no room for it.
    """
    wanted = read_overrides(overrides)
    sources = [_open(option, path) for option, path in files.by_option().items()]
    text_config, notes = _text_config(files.language_model)
    plan = plan_import(sources, text_config, wanted)
    chosen = template or family_of(has_qformer=plan.config.qformer_config is not None).template
    tokenizer, mends = load_llama_tokenizer(files.language_model)
    _fit_tokenizer(plan.config, tokenizer, chosen, keeps_image_token="image_token_id" in wanted)
    imported = Imported(target, plan, chosen, [*plan.notes, *notes, *mends])
    if dry_run:
        return imported
    kept = write_model(
        target,
        [Entry(name, plan.dtype(name), shape) for name, shape in plan.shapes.items()],
        partial(_pieces, plan),
        _small_files(plan, tokenizer, chosen, files.language_model),
        sources={option: _members(path) for option, path in files.by_option().items()},
        shard_bytes=shard_bytes,
        overwrite=overwrite,
        report=report,
    )
    if kept:
        imported.notes.append(kept_note(kept))
    return imported


def _open(option: str, path: Path) -> Source:
    if not path.exists():
        raise WeightsError(f"{option} {path} does not exist", "check the path")
    tensors = open_tensors(path)
    kind = names.recognise(set(tensors.names()))
    wanted = " or ".join(kind.value for kind in _FILES_OF[option])
    if kind is Kind.MINIGPT_V2 and MINIGPT_V2.refusal:
        raise WeightsError(
            f"{path} is {kind.value}, which {MINIGPT_V2.refusal}",
            "use a MiniGPT-4 checkpoint: pretrained_minigpt4.pth, prerained_minigpt4_7b.pth",
        )
    if kind is None:
        first = next(iter(tensors.names()), None)
        what = f"its first tensor is {first}" if first else "it holds no tensor"
        raise WeightsError(f"{path} is none of the original's files: {what}", f"expected for {option}: {wanted}")
    if kind not in _FILES_OF[option]:
        fitting = next((f"give it as {other}" for other, kinds in _FILES_OF.items() if kind in kinds), "")
        if kind is Kind.META:
            fitting = "convert them first: minigpt4 weights from-meta"
        raise WeightsError(
            f"{option} {path} is {kind.value}, expected {wanted}", fitting or "give one of the original's files"
        )
    if kind in (Kind.QFORMER, Kind.HUB_BLIP2):
        _check_made_for(path, tensors, kind)
    if kind is Kind.LANGUAGE_MODEL and is_delta(tensors):
        raise WeightsError(
            f"{option} {path} is a delta, the difference of two language models",
            "merge it first: minigpt4 weights apply-delta --base LLAMA --delta THIS --target VICUNA",
        )
    return Source(kind, path, tensors)


def _check_made_for(path: Path, tensors: Tensors, kind: Kind) -> None:
    """Refuse the Q-Formers of BLIP-2's other language models, whose weights are others."""
    wanted, width = FLAN_T5_WIDTHS[4096], 4096
    if kind is Kind.QFORMER:
        made_for = "OPT" if "opt_proj.weight" in tensors.names() else wanted
        if "t5_proj.weight" in tensors.names():
            made_for = FLAN_T5_WIDTHS.get(tensors.shape("t5_proj.weight")[0], wanted)
        if made_for != wanted:
            raise WeightsError(
                f"the Q-Former in {path} was trained for {made_for}, MiniGPT-4's is the one for {wanted}",
                f"use {names.QFORMER_FILE}",
            )
        return
    text = _read_json(path / "config.json" if path.is_dir() else path.parent / "config.json").get("text_config") or {}
    found = text.get("model_type", "opt"), text.get("d_model", text.get("hidden_size", "unknown"))
    if found != ("t5", width):
        raise WeightsError(
            f"the BLIP-2 folder {path} was trained for a {found[0]} language model {found[1]} wide; MiniGPT-4 uses the "
            f"Q-Former for {wanted} (t5, {width} wide), and each has other weights",
            f"use a BLIP-2 folder of {wanted}, or {names.VISION_FILE} and {names.QFORMER_FILE}",
        )


def _text_config(folder: Path) -> tuple[dict[str, Any], list[str]]:
    config = _read_json(folder / "config.json")
    if config.get("model_type") not in CONFIG_MAPPING:
        raise WeightsError(
            f"{folder / 'config.json'} names the model type {config.get('model_type')!r}, which transformers lacks",
            "use a LLaMA or Vicuna folder in the transformers format",
        )
    return mended_ids(config, "config.json")


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise WeightsError(f"{path} is missing", "fetch the folder again, with its small files")
    return read_json_object(path, WeightsError, "fetch it again")


def _fit_tokenizer(
    config: MiniGPT4Config, tokenizer: PreTrainedTokenizerBase, template: str, *, keeps_image_token: bool
) -> None:
    """Choose the token that holds a picture's places, and pad as the original does."""
    template_named(template)  # refuses a name that does not exist
    rows = config.text_config.vocab_size
    if len(tokenizer) > rows:
        raise WeightsError(
            f"the tokenizer has {len(tokenizer)} tokens, the language model's table {rows} rows",
            "the tokenizer files are of another version of the model: 32001 is v0, 32000 is v1.1 and LLaMA",
        )
    tokenizer.pad_token = tokenizer.eos_token
    if not keeps_image_token:
        config.image_token_id = _spare_token(tokenizer)


def _spare_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Find an id that no text encodes to: LLaMA spells what it does not know in bytes and never says `<unk>`."""
    taken = {tokenizer.bos_token_id, tokenizer.eos_token_id}
    if tokenizer.unk_token_id is not None and tokenizer.unk_token_id not in taken:
        return int(tokenizer.unk_token_id)
    for number, token in sorted(tokenizer.added_tokens_decoder.items()):
        if token.special and "reserved" in token.content and number not in taken:
            return int(number)
    raise WeightsError(
        "the language model's tokenizer has no token to spare for the places of pictures",
        "name one: --set image_token_id=N",
    )


def _members(path: Path) -> list[Path]:
    """List the files of a folder; a file is itself."""
    return [path] if path.is_file() else sorted(member for member in path.iterdir() if member.is_file())


def _pieces(plan: Plan, entry: Entry) -> Iterable[Tensor]:
    tensor = assembled(plan, entry.name)
    return tensor.flatten().split(max(1, PIECE_BYTES // tensor.itemsize))


def assembled(plan: Plan, name: str) -> Tensor:
    """Read one tensor of the model: as it is, joined of its thirds, interpolated, or new."""
    parts = plan.parts.get(name)
    if not parts:
        return _new(plan, name)
    tensors = [part.source.tensors.read(part.name) for part in parts]
    if parts[0].third is not None:
        query, value = tensors
        return torch.cat([query, torch.zeros_like(query), value])
    (tensor,) = tensors
    if name == POSITIONS and tuple(tensor.shape) != plan.shapes[name]:
        return interpolated_positions(tensor, math.isqrt(plan.shapes[name][1] - 1))
    return tensor


def interpolated_positions(table: Tensor, grid: int) -> Tensor:
    """Fit the table of positions to another number of patches.

    Args:
        table: `(1, 1 + side * side, width)`, the class token's place first.
        grid: The new number of patches along a side.

    Returns:
        `(1, 1 + grid * grid, width)` in float32.

    Source: `interpolate_pos_embed` of the original.
    """
    side, width = math.isqrt(table.shape[1] - 1), table.shape[-1]
    table = table.float()
    first, places = table[:, :1], table[:, 1:]
    picture = places.reshape(1, side, side, width).permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(picture, size=(grid, grid), mode="bicubic", align_corners=False)
    return torch.cat([first, resized.permute(0, 2, 3, 1).flatten(1, 2)], dim=1).contiguous()


def _new(plan: Plan, name: str) -> Tensor:
    """Make a tensor that no file holds: the norm that the original leaves at its start, or a projection to train."""
    shape = plan.shapes[name]
    if name in NORMS:
        return torch.ones(shape) if name.endswith("weight") else torch.zeros(shape)
    bound = 1 / math.sqrt(plan.config.image_embed_size)  # as a new linear layer of the original's
    return torch.empty(shape).uniform_(-bound, bound, generator=torch.Generator().manual_seed(len(shape)))


def _small_files(
    plan: Plan, tokenizer: PreTrainedTokenizerBase, template: str, language_model: Path
) -> dict[str, bytes]:
    """Make the files beside the weights, by their path in the model folder."""
    config = plan.config
    config.architectures = ["MiniGPT4ForConditionalGeneration"]
    config.dtype = plan.dtype("model.language_model.embed_tokens.weight")
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    size = config.vision_config.image_size
    processor = MiniGPT4Processor(
        MiniGPT4ImageProcessor(size={"height": size, "width": size}),
        tokenizer,
        num_image_tokens=config.num_image_tokens,
        image_token=str(tokenizer.convert_ids_to_tokens(config.image_token_id)),
        template=template,
    )
    with tempfile.TemporaryDirectory(prefix="minigpt4-import-") as scratch:
        for part in (config, GenerationConfig(**ids), processor):
            part.save_pretrained(scratch)
        paths = sorted(path for path in Path(scratch).rglob("*") if path.is_file())
        files = {path.relative_to(scratch).as_posix(): path.read_bytes() for path in paths}
    own = mended_tokenizer(language_model).files
    return files | {f"{ORIGINAL_DIR}/{name}": content for name, content in own.items()}
