"""What there is to say about each kind of weights: version, sizes, what it fits, what it lacks.

Knows headers and small text files; `inspection` tells which kind something is.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from minigpt4.errors import WeightsError
from minigpt4.model import MiniGPT4Config
from minigpt4.weights.alignment import ALIGNMENT_FILE, TENSORS_FILE
from minigpt4.weights.files.tensors import TensorFiles
from minigpt4.weights.inventory import list_models
from minigpt4.weights.llama.tokenizer import FAST_FILE, VOCABULARY_FILE, mended_ids, mended_tokenizer
from minigpt4.weights.llama.version import EMBEDDINGS, tell_version
from minigpt4.weights.original.names import LORA_NAMES, Kind
from minigpt4.weights.original.names import QFORMER_FILE as BLIP2
from minigpt4.weights.original.names import VISION_FILE as EVA
from minigpt4.weights.original.plan import expected_shapes
from minigpt4.weights.original.sizes import (
    EVA_BLOCKS,
    EVA_BLOCKS_USED,
    FLAN_T5_WIDTHS,
    KNOWN_PROJECTIONS,
    MERGED_TOKENS,
    MINIGPT_V2,
    QFORMER_WIDTH,
    depth,
    family_of,
)

KIND_NAMES = {
    Kind.VISION: "vision encoder",
    Kind.QFORMER: "Q-Former",
    Kind.CHECKPOINT: "MiniGPT-4 checkpoint",
    Kind.LANGUAGE_MODEL: "language model",
    Kind.HUB_BLIP2: "BLIP-2 folder",
    Kind.MINIGPT_V2: "MiniGPT-v2 checkpoint",
    Kind.META: "Meta's LLaMA",
    Kind.OURS: "model folder",
}
PART_NAMES = {"blip_2_vision_model": "EVA-ViT", "efficientnet_lite": "EfficientNet-Lite", "llama": "LLaMA"}
"""What the library's own names of some parts mean; the others say it themselves."""

_STAGES = {"cc_sbu_align": "stage 2", "laion": "stage 1", "cc_sbu": "stage 1"}
"""The datasets of the original's two stages of training."""


@dataclass
class Inspection:
    """What a file or folder is.

    Args:
        path: As it was given.
        kind: In a few words, the same for all of a kind.
        title: In a phrase.
        version: `"Vicuna v0, merged"`; empty where the kind has no versions.
        sizes: Widths, depths and counts by name.
        parameters: Numbers in it, without what is known and not needed; None where headers do not tell.
        dtypes: How many of them are of which type.
        bytes: On disk.
        template: The prompt template that fits.
        fits: What goes with it.
        missing: What it lacks to be used.
        notes: What else is worth knowing.
    """

    path: str
    kind: str
    title: str
    version: str = ""
    sizes: dict[str, int | str] = field(default_factory=dict)
    parameters: int | None = None
    dtypes: dict[str, int] = field(default_factory=dict)
    bytes: int = 0
    template: str | None = None
    fits: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Return it ready for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Source:
    """A file or folder of the original's, and what it is."""

    path: Path
    kind: Kind
    tensors: TensorFiles

    def shape(self, name: str, axes: int) -> tuple[int, ...]:
        """Return a tensor's shape, of as many axes as it must have.

        Raises:
            WeightsError: There is no such tensor, or it has another number of axes.
        """
        if name not in self.tensors:
            raise WeightsError(
                f"{self.path} has no tensor {name}, which {self.kind.value} holds",
                "the download may be incomplete: fetch it again",
            )
        shape = tuple(self.tensors.shape(name))
        if len(shape) != axes:
            raise WeightsError(
                f"tensor {name} in {self.path} is {shape}, expected {axes} axes", "the file is damaged or another's"
            )
        return shape

    def depth(self, prefix: str) -> int:
        """Count the layers below a name."""
        return depth({name: tuple(self.tensors.shape(name)) for name in self.tensors.names()}, prefix)


def of_kind(source: Source) -> Inspection:
    """Describe one of the original's files, or a folder that it takes."""
    found = Inspection(str(source.path), KIND_NAMES[source.kind], source.kind.value)
    _DESCRIBERS[source.kind](source, found)
    return found


def _vision(source: Source, found: Inspection) -> None:
    width, patch = source.shape("cls_token", 3)[-1], source.shape("patch_embed.proj.weight", 4)[-1]
    grid = math.isqrt(source.shape("pos_embed", 3)[1] - 1)
    blocks = source.depth("blocks")
    found.sizes = {"width": width, "blocks": blocks, "patch": patch, "pixels": grid * patch}
    found.fits = [
        f"a Q-Former that reads {width} numbers a token ({BLIP2})",
        f"a projection without a Q-Former that reads {width * MERGED_TOKENS} numbers a token",
    ]
    if blocks == EVA_BLOCKS:
        found.notes.append(f"the original uses blocks 0 to {EVA_BLOCKS_USED - 1} of the {EVA_BLOCKS}")


def _qformer(source: Source, found: Inspection) -> None:
    _, queries, width = source.shape("query_tokens", 3)
    reads = source.shape("Qformer.bert.encoder.layer.0.crossattention.self.key.weight", 2)[1]
    found.sizes = {"queries": queries, "width": width, "layers": source.depth("Qformer.bert.encoder.layer")}
    found.sizes["reads"] = reads
    found.fits = [f"a vision encoder {reads} wide ({EVA})", f"a projection that reads {width} numbers a token"]
    names = set(source.tensors.names())
    if "t5_proj.weight" in names:
        made_for = source.shape("t5_proj.weight", 2)[0]
        found.version = FLAN_T5_WIDTHS.get(made_for, f"flan-t5, {made_for} wide")
    elif "opt_proj.weight" in names:
        found.version = "OPT"
    if found.version in ("OPT", "flan-t5-xl"):
        found.fits = []
        found.notes.append(f"trained for {found.version}; MiniGPT-4 needs the one for flan-t5-xxl, {BLIP2}")


def _checkpoint(source: Source, found: Inspection) -> None:
    made, reads = source.shape("llama_proj.weight", 2)
    config, epoch = source.tensors.other.get("config"), source.tensors.other.get("epoch")
    config = config if isinstance(config, dict) else {}
    known = KNOWN_PROJECTIONS.get((made, reads))
    datasets = config.get("datasets")
    trained_on = set(datasets) if isinstance(datasets, dict) else set()
    stage = next((stage for name, stage in _STAGES.items() if name in trained_on), "")
    found.version = f"for {known[1]}" if known else f"for a language model {made} wide, none of the published"
    found.version += f", {stage}" if stage else ""
    found.sizes = {"reads": reads, "makes": made}
    if isinstance(epoch, int):
        found.sizes["epoch"] = epoch
    with_qformer, template = _reads_qformer(reads, known is not None, config)
    found.template = template
    found.fits.append(f"a language model {made} wide" + (f" ({known[1].split(',')[0]})" if known else ""))
    found.fits.append(_reads_from(reads, with_qformer))
    if stage == "stage 1":
        found.notes.append("after stage 1 alone answers are short and repeat themselves; stage 2 mends that")


def _reads_from(reads: int, with_qformer: bool | None) -> str:
    """Say which part gives a checkpoint's projection what it reads."""
    encoder = f"a vision encoder {reads // MERGED_TOKENS} wide"
    if with_qformer is False:
        return f"{encoder} ({EVA}), and no Q-Former"
    if with_qformer is None and reads % MERGED_TOKENS == 0:
        return f"a Q-Former {reads} wide ({BLIP2}), or {encoder} and no Q-Former: the file does not say which"
    return f"a Q-Former {reads} wide ({BLIP2})"


def _reads_qformer(reads: int, is_known: bool, config: Mapping[str, Any]) -> tuple[bool | None, str | None]:
    """Tell whether a checkpoint reads a Q-Former's output, and its prompt template; None where that is unknown."""
    model = config.get("model")
    settings = model if isinstance(model, dict) else {}
    prompt = str(settings.get("prompt_template", ""))
    template = "llama-2" if "[INST]" in prompt else "vicuna-v0" if "###Human" in prompt else None
    if is_known:
        with_qformer = reads == QFORMER_WIDTH
        return with_qformer, template or family_of(has_qformer=with_qformer).template
    if settings:
        return bool(settings.get("has_qformer", True)), template
    return None, template


def _v2(source: Source, found: Inspection) -> None:
    made, reads = source.shape("llama_proj.weight", 2)
    changes = sorted(name for name in source.tensors.names() if LORA_NAMES[0].to_ours(name))
    found.sizes = {
        "reads": reads,
        "makes": made,
        "LoRA rank": source.shape(changes[0], 2)[0],
        "LoRA layers": len(changes),
    }
    found.template = MINIGPT_V2.template
    found.fits = [
        "Llama-2-chat 7B" if made == 4096 else f"a Llama-2-chat {made} wide",
        f"{EVA}, at {MINIGPT_V2.image_size} pixels",
    ]
    if MINIGPT_V2.refusal:
        found.notes.append(f"{MINIGPT_V2.name} {MINIGPT_V2.refusal}")


def _language(source: Source, found: Inspection) -> None:
    folder = source.path if source.path.is_dir() else source.path.parent
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    rows, width = source.shape(EMBEDDINGS, 2)
    version = tell_version(source.path, source.tensors, config)
    if version.is_delta:
        found.kind, found.title = "delta", "a delta, the difference of two language models"
    found.version, found.template = f"{version.name}, {version.size}", version.template
    found.sizes = {"rows": rows, "width": width, "layers": source.depth("model.layers")}
    found.fits = _projections_for(width, version.template)
    if version.is_delta:
        found.fits = [f"the LLaMA that it was made from ({version.size})", *(f"merged: {what}" for what in found.fits)]
    found.notes = list(version.notes)
    if not config:
        found.missing.append("config.json")
    elif config.get("vocab_size", rows) != rows:
        found.notes.append(f"config.json says {config['vocab_size']} words, the table has {rows} rows")
    if not (folder / VOCABULARY_FILE).is_file() and not (folder / FAST_FILE).is_file():
        found.missing.append(VOCABULARY_FILE)
    else:
        mends = [*mended_tokenizer(folder).notes, *mended_ids(config, "config.json")[1]]
        found.notes += [f"mended when it is used: {note}" for note in mends]


def _projections_for(width: int, template: str | None) -> list[str]:
    """Name the published checkpoints for a language model of this width."""
    fitting = []
    for (made, reads), (name, model) in KNOWN_PROJECTIONS.items():
        with_qformer = reads == QFORMER_WIDTH
        if made == width and (template is None or with_qformer == (template != "llama-2")):
            fitting.append(f"{name} ({model})")
    return fitting or [f"a projection that makes {width} numbers a token"]


def _meta(source: Source, found: Inspection) -> None:
    folder = source.path if source.path.is_dir() else source.path.parent
    if (folder / "params.json").is_file():
        params = read_json(folder / "params.json")
        names = {"dim": "width", "n_layers": "layers", "n_heads": "heads"}
        found.sizes = {name: params[key] for key, name in names.items() if key in params}
    else:
        found.missing.append("params.json")
    if not any((place / VOCABULARY_FILE).is_file() for place in (folder, folder.parent)):
        found.missing.append(VOCABULARY_FILE)
    found.notes.append("convert it with `minigpt4 weights from-meta`")


def _hub(source: Source, found: Inspection) -> None:
    folder = source.path if source.path.is_dir() else source.path.parent
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    section = config.get("text_config")
    text = section if isinstance(section, dict) else {}
    width = text.get("d_model", text.get("hidden_size"))
    model = (
        FLAN_T5_WIDTHS.get(width if isinstance(width, int) else 0, "")
        if text.get("model_type") == "t5"
        else str(text.get("model_type", "opt"))
    )
    found.version = model
    found.sizes = {"width": source.shape("vision_model.embeddings.class_embedding", 3)[-1]}
    found.sizes["queries"] = source.shape("query_tokens", 3)[1]
    if model == "flan-t5-xxl":
        found.fits = [f"MiniGPT-4, in place of {EVA} and {BLIP2}"]
    else:
        found.notes.append(f"trained for {model or 'an unknown model'}; MiniGPT-4 needs the one for flan-t5-xxl")
    if not config:
        found.missing.append("config.json")


_DESCRIBERS: dict[Kind, Callable[[Source, Inspection], None]] = {
    Kind.VISION: _vision,
    Kind.QFORMER: _qformer,
    Kind.CHECKPOINT: _checkpoint,
    Kind.MINIGPT_V2: _v2,
    Kind.LANGUAGE_MODEL: _language,
    Kind.META: _meta,
    Kind.HUB_BLIP2: _hub,
}


def full_folder(path: Path, tensors: TensorFiles) -> Inspection:
    """Describe a model folder with everything inside."""
    found = Inspection(str(path), KIND_NAMES[Kind.OURS], Kind.OURS.value)
    if not (path / "config.json").is_file():
        found.missing.append("config.json")
        return found
    config = _our_config(path)
    encoder, speaker = config.vision_config.model_type, config.text_config.model_type
    joint = "a Q-Former" if config.qformer_config is not None else "no Q-Former"
    found.version = f"{PART_NAMES.get(encoder, encoder)}, {joint}, {PART_NAMES.get(speaker, speaker)}"
    found.sizes = {
        "picture tokens": config.num_image_tokens,
        "rows": config.text_config.vocab_size,
        "width": config.text_config.hidden_size,
        "layers": config.text_config.num_hidden_layers,
    }
    found.missing = sorted(set(expected_shapes(config)) - set(tensors.names()))
    if not (path / "processor_config.json").is_file():
        found.missing.append("processor_config.json")
    else:
        found.template = read_json(path / "processor_config.json").get("template")
    if not found.missing:
        found.fits = [f"nothing else is needed: minigpt4 ask -m {path}"]
    return found


def _our_config(path: Path) -> MiniGPT4Config:
    try:
        return MiniGPT4Config.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:200].rstrip(".")
        raise WeightsError(
            f"{path / 'config.json'} describes no model of minigpt4: {reason}", "write it again"
        ) from error


def alignment(path: Path, tensors: TensorFiles | None) -> Inspection:
    """Describe a folder of what was trained, without the frozen parts."""
    description = read_json(path / ALIGNMENT_FILE)
    section = description.get("language_model")
    model = section if isinstance(section, dict) else {}
    found = Inspection(str(path), "alignment folder", "what was trained, without the frozen parts")
    found.version = f"{description.get('format')} {description.get('format_version')}"
    found.sizes = {key: model[key] for key in ("vocabulary", "width", "layers") if key in model}
    found.fits = [f"the frozen parts of {description.get('frozen_parts')}, with the language model it was trained with"]
    found.template = "chatml" if description.get("frozen_parts") == "nano" else None
    if tensors is None:
        found.missing.append(TENSORS_FILE)
    found.notes = [
        f"{part['role']} ({part['name']}): {part['state']}"
        for part in list_models()[0]["parts"]
        if part["role"] != "alignment"
    ]
    return found


def lora_adapter(path: Path, tensors: TensorFiles | None, config: Mapping[str, Any]) -> Inspection:
    """Describe low-rank changes of a language model, as PEFT writes them."""
    found = Inspection(str(path), "LoRA adapter", "low-rank changes of a language model (LoRA)")
    found.sizes = {name: config[key] for key, name in (("r", "rank"), ("lora_alpha", "alpha")) if key in config}
    if tensors is not None:
        changes = [name for name in tensors.names() if ".lora_A." in name]
        found.sizes |= {"rank": tensors.shape(changes[0])[0], "layers": len(changes)} if changes else {}
    base = config.get("base_model_name_or_path")
    found.fits = [f"the language model {base}"] if base else []
    found.notes = [f"changes {', '.join(sorted(config['target_modules']))}"] if config.get("target_modules") else []
    return found


def read_json(path: Path) -> dict[str, Any]:
    """Read a small text file of a folder.

    Raises:
        WeightsError: It is missing, or no JSON with keys.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(f"{path} cannot be read as JSON", "fetch the folder again, with its small files") from error
    if not isinstance(value, dict):
        raise WeightsError(f"{path} holds no keys", "fetch the folder again, with its small files")
    return value
