"""A model folder back into the original's files, so that what was trained here runs in the original code.

The tensors keep their bits and their types.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from transformers import AutoTokenizer

from minigpt4.errors import ConfigError, WeightsError
from minigpt4.model import MiniGPT4Config
from minigpt4.text import first_line, read_json_object
from minigpt4.weights.alignment import ALIGNMENT_FILE, NANO, TENSORS_FILE, frozen_parts_of, read_description
from minigpt4.weights.files.atomic import verify_folder, write_folder
from minigpt4.weights.files.disk import require_free_space
from minigpt4.weights.files.model_writer import Report, json_bytes
from minigpt4.weights.files.tensor_files import TensorFiles, open_tensors
from minigpt4.weights.llama.tokenizer import ORIGINAL_DIR, TOKENIZER_FILES, VOCABULARY_FILE
from minigpt4.weights.original.names import (
    CHECKPOINT_FILE,
    LANGUAGE_NAMES,
    NUM_BLOCKS_MARK,
    QFORMER_FILE,
    QFORMER_NAMES,
    STATE_DICT_NAMES,
    VISION_FILE,
    VISION_NAMES,
    Pair,
    to_original,
)
from minigpt4.weights.original.sizes import HEADS, PUBLISHED, family_of, published_heads

LANGUAGE_DIR = "language-model"
YAML_FILE = "minigpt4_eval.yaml"
MAX_SHARD_BYTES = 2**31

_ROOM = 64 * 2**20
_FIT = "only models of EVA-ViT and a LLaMA can be exported, such as `minigpt4 weights import` writes"
_NORMS = "model.vision_model.post_layernorm."
_TEXT_KEYS = (
    "bos_token_id", "eos_token_id", "hidden_act", "hidden_size", "initializer_range", "intermediate_size",
    "max_position_embeddings", "model_type", "num_attention_heads", "num_hidden_layers", "num_key_value_heads",
    "pad_token_id", "rms_norm_eps", "tie_word_embeddings", "vocab_size", "head_dim", "attention_bias", "mlp_bias",
)  # fmt: skip

Group = tuple[Sequence[Pair], list[str]]
"""What a file calls its tensors, and this package's names of those that go into it."""


def export_original(
    model: Path, target: Path, *, only_checkpoint: bool = False, overwrite: bool = False, report: Report | None = None
) -> list[str]:
    """Write a model folder as the original's files.

    Args:
        model: A full model folder with EVA-ViT, a Q-Former or none, and a LLaMA; or an alignment over one.
        target: The folder to appear: `pretrained_minigpt4.pth` and, unless `only_checkpoint`, `eva_vit_g.pth`,
            `blip2_pretrained_flant5xxl.pth`, the language model's folder and an eval YAML that names them.
        only_checkpoint: Write only what was trained, as the original's checkpoints do: the configuration's trainable
            parts, and whatever the alignment holds.
        overwrite: Replace an earlier export.
        report: Called with the progress of the writing.

    Returns:
        Sentences for the user.

    Raises:
        WeightsError: The folder is damaged, or the original has no place for a part of it.
        StorageError: The target exists, or there is no room for it.
    """
    frozen, alignment = _frozen_parts(model)
    config = _config(frozen)
    tensors, trained = _tensors(frozen, alignment)
    names = list(tensors.names())
    parts = tuple(f"model.{part}" for part in config.trainable_parts)
    checkpoint = [name for name in names if name.startswith(parts) or name in trained]
    groups: dict[str, Group] = {CHECKPOINT_FILE: (STATE_DICT_NAMES, checkpoint)}
    if not only_checkpoint:
        groups = _whole_set(names, checkpoint)
    _check_places(groups, [] if only_checkpoint else names)
    sizes = {file: _bytes(tensors, group) for file, (_, group) in groups.items()}
    done, total = 0, sum(sizes.values())
    require_free_space(target.absolute().parent, total + _ROOM)
    notes: list[str] = []
    with write_folder(target, overwrite=overwrite) as folder:
        for file, (pairs, group) in groups.items():
            if file == LANGUAGE_DIR:
                _write_shards(folder / file, tensors, group)
            else:
                content = _originals(tensors, pairs, group)
                mark = {NUM_BLOCKS_MARK: torch.tensor(config.vision_config.num_hidden_layers)}
                torch.save(content | mark if file == VISION_FILE else {"model": content}, folder / file)
            done += sizes[file]
            if report:
                report("writing the original's files", done, total)
        if not only_checkpoint:
            notes += _write_language_files(frozen, config, folder / LANGUAGE_DIR)
            (folder / YAML_FILE).write_text(_eval_yaml(config), encoding="utf-8", newline="\n")
    return notes


def _frozen_parts(model: Path) -> tuple[Path, Path | None]:
    """Return the full model folder, and the alignment that goes over it or None."""
    if not (model / ALIGNMENT_FILE).is_file():
        return model, None
    named = frozen_parts_of(model)
    if named == NANO:
        raise ConfigError(f"{model} is an alignment over the frozen parts of nano, which the original cannot run", _FIT)
    if read_description(model).get("lora"):
        raise ConfigError(
            f"{model} has adapters on its language model (LoRA), for which MiniGPT-4's files have no place",
            "export an alignment that was trained without them",
        )
    if not Path(named).is_dir():
        raise WeightsError(
            f"{model} is an alignment over the frozen parts of {named}, which is not a folder here",
            "fetch that model, and name its folder in alignment.json as frozen_parts",
        )
    verify_folder(model)
    return Path(named), model


def _tensors(frozen: Path, alignment: Path | None) -> tuple[TensorFiles, set[str]]:
    """Open a model's tensors, those of the alignment in place of the frozen parts' own; with the names of those."""
    whole = open_tensors(frozen)
    if alignment is None:
        return whole, set()
    trained = open_tensors(alignment / TENSORS_FILE)
    stored = {name: whole.stored(name) for name in whole}
    for name in trained:
        ours = f"model.{name}"
        if ours not in stored or stored[ours].shape != trained.shape(name):
            raise WeightsError(
                f"tensor {name} of the alignment {alignment} has no place in {frozen}",
                "it was trained over another model; name that one in alignment.json as frozen_parts",
            )
        stored[ours] = trained.stored(name)
    return TensorFiles(alignment, stored, {}), {f"model.{name}" for name in trained}


def _config(model: Path) -> MiniGPT4Config:
    path = model / "config.json"
    if not path.is_file():
        what = "is not a model folder: it has no config.json" if model.exists() else "does not exist"
        raise WeightsError(f"{model} {what}", f"name the folder of a model; {_FIT}")
    content = read_json_object(path, WeightsError, "write the folder again")
    if content.get("model_type") != MiniGPT4Config.model_type:
        raise WeightsError(f"{model} is a model of the type {content.get('model_type')!r}, expected minigpt4", _FIT)
    try:
        config = MiniGPT4Config.from_dict(content)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        reason = f"{path} cannot be read as a model's configuration: {first_line(error)}"
        raise WeightsError(reason, "write the folder again") from error
    for part, kind in (("vision_config", "blip_2_vision_model"), ("text_config", "llama")):
        found = getattr(config, part).model_type
        if found != kind:
            raise ConfigError(
                f"the original cannot run this model: its {part} is of the type {found}, expected {kind}", _FIT
            )
    return config


def _whole_set(names: Sequence[str], checkpoint: list[str]) -> dict[str, Group]:
    """Return which tensors go into which file."""
    vision, qformer, language = ([name for name in names if to_original(pairs, name)]
                                 for pairs in (VISION_NAMES, QFORMER_NAMES, LANGUAGE_NAMES))  # fmt: skip
    language = [name for name in language if name.startswith(("model.language_model.", "lm_head."))]
    has_qformer = "model.query_tokens" in qformer
    if not has_qformer:  # the norm after the vision encoder has no other file then
        norms = [name for name in names if name.startswith(_NORMS)]
        checkpoint = list(dict.fromkeys([*checkpoint, *norms]))
    groups: dict[str, Group] = {CHECKPOINT_FILE: (STATE_DICT_NAMES, checkpoint), VISION_FILE: (VISION_NAMES, vision)}
    if has_qformer:
        groups[QFORMER_FILE] = (QFORMER_NAMES, qformer)
    return groups | {LANGUAGE_DIR: (LANGUAGE_NAMES, language)}


def _check_places(groups: Mapping[str, Group], names: Iterable[str]) -> None:
    """Refuse a tensor that the original has no place for."""
    placed = {name for _, group in groups.values() for name in group}
    lost = [name for pairs, group in groups.values() for name in group if not to_original(pairs, name)]
    lost += [name for name in names if name not in placed]
    if lost:
        raise WeightsError(f"the original has no place for tensor {lost[0]}", "only its own parts can be exported")


def _bytes(tensors: TensorFiles, names: Iterable[str]) -> int:
    return sum(torch.Size(tensors.shape(name)).numel() * tensors.dtype(name).itemsize for name in names)


def _originals(tensors: TensorFiles, pairs: Sequence[Pair], names: Iterable[str]) -> dict[str, Tensor]:
    content: dict[str, Tensor] = {}
    for name in names:
        tensor = tensors.read(name)
        for original, third in to_original(pairs, name):
            content[original] = tensor if third is None else _third(tensor, third, name)
    return content


def _third(bias: Tensor, third: int, name: str) -> Tensor:
    """Take the query's or the value's third of a fused bias; the key's has no place in the original."""
    size = len(bias) // 3
    if bias[size : 2 * size].any():
        raise WeightsError(
            f"tensor {name} has a key bias that is not zero, and the original has none",
            "export one whose vision encoder was trained by `minigpt4 train`, which leaves these biases zero",
        )
    return bias[third * size : (third + 1) * size].clone()


def _write_shards(folder: Path, tensors: TensorFiles, names: Sequence[str]) -> None:
    """Write the language model as `pytorch_model-*.bin`, which any version of transformers reads."""
    folder.mkdir()
    shards: list[list[str]] = [[]]
    filled = 0
    for name in names:
        size = _bytes(tensors, [name])
        if shards[-1] and filled + size > MAX_SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"pytorch_model-{number:05}-of-{len(shards):05}.bin"
        content = _originals(tensors, LANGUAGE_NAMES, shard)
        torch.save(content, folder / file)
        places |= dict.fromkeys(content, file)
    index = {"metadata": {"total_size": _bytes(tensors, names)}, "weight_map": places}
    (folder / "pytorch_model.bin.index.json").write_bytes(json_bytes(index))


def _write_language_files(model: Path, config: MiniGPT4Config, folder: Path) -> list[str]:
    """Write configuration and tokenizer of the language model."""
    text = config.text_config.to_dict()
    rope = text.get("rope_parameters") or {}
    values: dict[str, Any] = {"architectures": ["LlamaForCausalLM"]}
    values |= {key: text[key] for key in _TEXT_KEYS if key in text}
    values["rope_theta"] = rope.get("rope_theta", 10000.0)
    if rope.get("rope_type", "default") != "default":
        values["rope_parameters"] = rope
    values["torch_dtype"] = str(config.dtype or "float16").removeprefix("torch.")
    (folder / "config.json").write_bytes(json_bytes(values))
    ids = {key: values.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    (folder / "generation_config.json").write_bytes(json_bytes(ids))
    kept = model / ORIGINAL_DIR
    if (kept / VOCABULARY_FILE).is_file():
        for name in TOKENIZER_FILES:
            if (kept / name).is_file():
                (folder / name).write_bytes((kept / name).read_bytes())
        return []
    tokenizer: Any = AutoTokenizer.from_pretrained(model, local_files_only=True)
    tokenizer.save_pretrained(folder)
    return [f"{model} does not hold {VOCABULARY_FILE}; copy the language model's into {LANGUAGE_DIR} for the original"]


def _eval_yaml(config: MiniGPT4Config) -> str:
    """Write the YAML that runs the exported files, in the original and here."""
    has_qformer = config.qformer_config is not None
    family = family_of(has_qformer=has_qformer)
    values: dict[str, Any] = {
        "arch": "mini_gpt4",
        "model_type": family.model_type,
        "image_size": config.vision_config.image_size,
        "freeze_vit": True,
        "freeze_qformer": True,
        "max_txt_len": 160,
        "end_sym": family.end_symbol,
        "low_resource": False,
        "prompt_template": "###Human: {} ###Assistant: " if has_qformer else "[INST] {} [/INST] ",
        "llama_model": LANGUAGE_DIR,
        "ckpt": CHECKPOINT_FILE,
        "vision_config": _differences("vision_config", config),
    }
    if has_qformer:
        values |= {"num_query_token": config.num_query_tokens, "q_former_model": QFORMER_FILE}
        values["qformer_config"] = _differences("qformer_config", config)
    else:
        values["has_qformer"] = False
    # The original's demo takes its picture processor from a data set, and does not begin without the other sections.
    pictures = {"name": "blip2_image_eval", "image_size": config.vision_config.image_size}
    dataset = {"vis_processor": {"train": pictures}, "text_processor": {"train": {"name": "blip_caption"}}}
    content = {
        "model": {key: value for key, value in values.items() if value != {}},
        "datasets": {"cc_sbu_align": dataset},
        "run": {"task": "image_text_pretrain"},
    }
    return yaml.safe_dump(content, sort_keys=False)


def _differences(section: str, config: MiniGPT4Config) -> dict[str, Any]:
    """List what an import would not assume: other than published, or than a width tells."""
    part = getattr(config, section).to_dict()
    assumed = {**PUBLISHED[section], HEADS: published_heads(section, part["hidden_size"])}
    return {key: part[key] for key, value in assumed.items() if part.get(key) != value}
