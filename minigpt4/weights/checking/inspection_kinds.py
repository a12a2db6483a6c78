"""What is said about each kind of weights that is told by the names of its tensors: the table `KINDS`."""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from minigpt4.errors import WeightsError
from minigpt4.model import MiniGPT4Config
from minigpt4.text import first_line, read_json_object
from minigpt4.weights.files.tensor_files import TensorFiles
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

PART_NAMES = {"blip_2_vision_model": "EVA-ViT", "efficientnet_lite": "EfficientNet-Lite", "llama": "LLaMA"}
"""What the library's own names of some parts mean; the others say it themselves."""

_STAGES = {"cc_sbu_align": "stage 2", "laion": "stage 1", "cc_sbu": "stage 1"}
"""The data sets of the original's two stages of training."""


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


def read_small(path: Path) -> dict[str, Any]:
    """Read a small JSON file of a folder."""
    return read_json_object(path, WeightsError, "fetch the folder again, with its small files")


def config_of(folder: Path) -> dict[str, Any]:
    """Read a folder's `config.json`, nothing where there is none."""
    return read_small(folder / "config.json") if (folder / "config.json").is_file() else {}


@dataclass(frozen=True)
class Source:
    """A file or folder of a known kind."""

    path: Path
    kind: Kind
    tensors: TensorFiles

    @property
    def folder(self) -> Path:
        """Where its small text files are."""
        return self.path if self.path.is_dir() else self.path.parent

    def size(self, name: str, axis: int | None) -> int:
        """Return the length of a tensor's axis; without one, the number of layers below a name.

        Raises:
            WeightsError: There is no such tensor, or it has too few axes.
        """
        if axis is None:
            return depth({tensor: tuple(self.tensors.shape(tensor)) for tensor in self.tensors.names()}, name)
        shape = tuple(self.tensors.shape(name)) if name in self.tensors else ()
        if not -len(shape) <= axis < len(shape):
            raise WeightsError(
                f"{self.path} has no tensor {name} of a shape that {self.kind.value} holds",
                "the download may be incomplete: fetch it again",
            )
        return shape[axis]


def described(source: Source) -> Inspection:
    """Describe a file or folder by its kind."""
    row = KINDS[source.kind]
    found = Inspection(str(source.path), row.name, source.kind.value)
    found.sizes = {label: source.size(*place) for label, place in row.sizes.items()}
    row.describe(source, found)
    return found


def _vision(source: Source, found: Inspection) -> None:
    width, blocks = found.sizes["width"], found.sizes["blocks"]
    found.sizes["pixels"] = math.isqrt(source.size("pos_embed", 1) - 1) * source.size("patch_embed.proj.weight", -1)
    found.fits = [
        f"a Q-Former that reads {width} numbers a token ({BLIP2})",
        f"a projection without a Q-Former that reads {int(width) * MERGED_TOKENS} numbers a token",
    ]
    if blocks == EVA_BLOCKS:
        found.notes.append(f"the original uses blocks 0 to {EVA_BLOCKS_USED - 1} of the {EVA_BLOCKS}")


def _qformer(source: Source, found: Inspection) -> None:
    found.fits = [
        f"a vision encoder {found.sizes['reads']} wide ({EVA})",
        f"a projection that reads {found.sizes['width']} numbers a token",
    ]
    if "t5_proj.weight" in source.tensors:
        made_for = source.size("t5_proj.weight", 0)
        found.version = FLAN_T5_WIDTHS.get(made_for, f"flan-t5, {made_for} wide")
    elif "opt_proj.weight" in source.tensors:
        found.version = "OPT"
    if found.version in ("OPT", "flan-t5-xl"):
        found.fits = []
        found.notes.append(f"trained for {found.version}; MiniGPT-4 needs the one for flan-t5-xxl, {BLIP2}")


def _checkpoint(source: Source, found: Inspection) -> None:
    made, reads = source.size("llama_proj.weight", 0), source.size("llama_proj.weight", 1)
    config, epoch = source.tensors.other.get("config"), source.tensors.other.get("epoch")
    config = config if isinstance(config, dict) else {}
    _, model = KNOWN_PROJECTIONS.get((made, reads), ("", ""))
    datasets = config.get("datasets")
    trained_on = set(datasets) if isinstance(datasets, dict) else set()
    stage = next((stage for name, stage in _STAGES.items() if name in trained_on), "")
    found.version = f"for {model}" if model else f"for a language model {made} wide, none of the published"
    found.version += f", {stage}" if stage else ""
    if isinstance(epoch, int):
        found.sizes["epoch"] = epoch
    with_qformer, found.template = _reads_qformer(reads, bool(model), config)
    encoder = f"a vision encoder {reads // MERGED_TOKENS} wide"
    qformer = f"a Q-Former {reads} wide ({BLIP2})"
    if with_qformer is None and reads % MERGED_TOKENS == 0:
        qformer += f", or {encoder} and no Q-Former: the file does not say which"
    found.fits = [f"a language model {made} wide" + (f" ({model.split(',')[0]})" if model else "")]
    found.fits.append(f"{encoder} ({EVA}), and no Q-Former" if with_qformer is False else qformer)
    if stage == "stage 1":
        found.notes.append("after stage 1 alone answers are short and repeat themselves; stage 2 mends that")


def _reads_qformer(reads: int, is_known: bool, config: Mapping[str, Any]) -> tuple[bool | None, str | None]:
    """Tell whether a checkpoint reads a Q-Former's output, and its prompt template; None where that is unknown."""
    model = config.get("model")
    settings = model if isinstance(model, dict) else {}
    prompt = str(settings.get("prompt_template", ""))
    template = "llama-2" if "[INST]" in prompt else "vicuna-v0" if "###Human" in prompt else None
    if is_known:
        with_qformer = reads == QFORMER_WIDTH
        return with_qformer, template or family_of(has_qformer=with_qformer).template
    return (bool(settings.get("has_qformer", True)) if settings else None), template


def _v2(source: Source, found: Inspection) -> None:
    changes = sorted(name for name in source.tensors.names() if LORA_NAMES[0].to_ours(name))
    made = found.sizes["makes"]
    found.sizes |= {"LoRA rank": source.size(changes[0], 0), "LoRA layers": len(changes)}
    found.template = MINIGPT_V2.template
    found.fits = [
        "Llama-2-chat 7B" if made == 4096 else f"a Llama-2-chat {made} wide",
        f"{EVA}, at {MINIGPT_V2.image_size} pixels",
    ]
    if MINIGPT_V2.refusal:
        found.notes.append(f"{MINIGPT_V2.name} {MINIGPT_V2.refusal}")


def _language(source: Source, found: Inspection) -> None:
    folder, rows, width = source.folder, found.sizes["rows"], found.sizes["width"]
    config = config_of(folder)
    version = tell_version(source.path, source.tensors, config)
    found.version, found.template = f"{version.name}, {version.size}", version.template
    found.fits = [
        f"{name} ({model})"
        for (made, reads), (name, model) in KNOWN_PROJECTIONS.items()
        if made == width and (version.template is None or (reads == QFORMER_WIDTH) == (version.template != "llama-2"))
    ] or [f"a projection that makes {width} numbers a token"]
    if version.is_delta:
        found.kind, found.title = "delta", "a delta, the difference of two language models"
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


def _meta(source: Source, found: Inspection) -> None:
    folder = source.folder
    if (folder / "params.json").is_file():
        params = read_small(folder / "params.json")
        names = {"dim": "width", "n_layers": "layers", "n_heads": "heads"}
        found.sizes = {name: params[key] for key, name in names.items() if key in params}
    else:
        found.missing.append("params.json")
    if not any((place / VOCABULARY_FILE).is_file() for place in (folder, folder.parent)):
        found.missing.append(VOCABULARY_FILE)
    found.notes.append("convert it with `minigpt4 weights from-meta`")


def _hub_blip2(source: Source, found: Inspection) -> None:
    config = config_of(source.folder)
    section = config.get("text_config")
    text = section if isinstance(section, dict) else {}
    width, kind = text.get("d_model", text.get("hidden_size")), str(text.get("model_type", "opt"))
    found.version = FLAN_T5_WIDTHS.get(width if isinstance(width, int) else 0, "") if kind == "t5" else kind
    if found.version == "flan-t5-xxl":
        found.fits = [f"MiniGPT-4, in place of {EVA} and {BLIP2}"]
    else:
        found.notes.append(
            f"trained for {found.version or 'an unknown model'}; MiniGPT-4 needs the one for flan-t5-xxl"
        )
    if not config:
        found.missing.append("config.json")


def _ours(source: Source, found: Inspection) -> None:
    path = source.path
    if not (source.folder / "config.json").is_file():
        found.missing.append("config.json")
        return
    try:
        config = MiniGPT4Config.from_pretrained(source.folder, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        message = f"{source.folder / 'config.json'} describes no model of minigpt4: {first_line(error)}"
        raise WeightsError(message, "write it again") from error
    text = config.text_config
    encoder, joint = config.vision_config.model_type, "no Q-Former" if config.qformer_config is None else "a Q-Former"
    found.version = ", ".join(PART_NAMES.get(part, part) for part in (encoder, joint, text.model_type))
    found.sizes = {
        "picture tokens": config.num_image_tokens,
        "rows": text.vocab_size,
        "width": text.hidden_size,
        "layers": text.num_hidden_layers,
    }
    found.missing = sorted(set(expected_shapes(config)) - set(source.tensors.names()))
    if (source.folder / "processor_config.json").is_file():
        found.template = read_small(source.folder / "processor_config.json").get("template")
    else:
        found.missing.append("processor_config.json")
    if not found.missing:
        found.fits = [f"nothing else is needed: minigpt4 ask -m {path}"]


@dataclass(frozen=True)
class Row:
    """What is said about a kind.

    Args:
        name: The kind in a few words.
        describe: Adds what is not in the sizes.
        sizes: Tensor and axis of each size; without an axis, the name whose layers are counted.
    """

    name: str
    describe: Callable[[Source, Inspection], None]
    sizes: Mapping[str, tuple[str, int | None]] = field(default_factory=dict)


_LAYERS = "Qformer.bert.encoder.layer"
_PROJECTION: Mapping[str, tuple[str, int | None]] = {
    "reads": ("llama_proj.weight", 1),
    "makes": ("llama_proj.weight", 0),
}
KINDS = {
    Kind.VISION: Row(
        "vision encoder",
        _vision,
        {"width": ("cls_token", -1), "blocks": ("blocks", None), "patch": ("patch_embed.proj.weight", -1)},
    ),
    Kind.QFORMER: Row(
        "Q-Former",
        _qformer,
        {
            "queries": ("query_tokens", 1),
            "width": ("query_tokens", 2),
            "layers": (_LAYERS, None),
            "reads": (f"{_LAYERS}.0.crossattention.self.key.weight", 1),
        },
    ),
    Kind.CHECKPOINT: Row("MiniGPT-4 checkpoint", _checkpoint, _PROJECTION),
    Kind.MINIGPT_V2: Row("MiniGPT-v2 checkpoint", _v2, _PROJECTION),
    Kind.LANGUAGE_MODEL: Row(
        "language model",
        _language,
        {"rows": (EMBEDDINGS, 0), "width": (EMBEDDINGS, 1), "layers": ("model.layers", None)},
    ),
    Kind.META: Row("Meta's LLaMA", _meta),
    Kind.HUB_BLIP2: Row(
        "BLIP-2 folder",
        _hub_blip2,
        {"width": ("vision_model.embeddings.class_embedding", -1), "queries": ("query_tokens", 1)},
    ),
    Kind.OURS: Row("model folder", _ours),
}
