"""A model folder from one of the original's YAML files: its files found, and imported once.

Paths in a YAML count from its own folder, then from the working directory, then from the folder above (the root of an
original tree, where the original is started). The imported folder is in the cache, named by what it was made of.
"""

import hashlib
import importlib.util
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import torch

from minigpt4.errors import ConfigError, MiniGPT4Error
from minigpt4.weights.files.atomic import verify_folder
from minigpt4.weights.files.disk import lock, make_folder
from minigpt4.weights.files.model_writer import Report
from minigpt4.weights.original.importing import import_original
from minigpt4.weights.original.names import QFORMER_FILE, VISION_FILE, OriginalFiles
from minigpt4.weights.original.yaml import OriginalYaml, is_placeholder, read_original_yaml
from minigpt4.weights.parts import home

FORMAT = "1"
"""Part of the name of an imported folder; a change in how folders are made changes it."""

KNOWN_VISION = "eva_clip_g"
"""The one value of `vit_model` in the original; its file is found by name."""

_KEYS = {
    "--vision": "model.vit_model",
    "--qformer": "model.q_former_model",
    "--language-model": "model.llama_model",
    "--projection": "model.ckpt",
    "--set ": "--options model.",
}
"""The keys of a YAML that name the same as an option of `weights import`."""


@dataclass(frozen=True)
class OriginalModel:
    """A model that a YAML names: its folder in the cache, what `load` takes, and sentences for the user."""

    folder: Path
    device: str
    quantize: str
    template: str
    notes: list[str] = field(default_factory=list)


def prepare_original(
    cfg_path: Path,
    options: Sequence[str] = (),
    gpu_id: int | None = None,
    *,
    device: str = "auto",
    report: Report | None = None,
    training: bool = False,
) -> OriginalModel:
    """Find what a YAML file of the original names, and import it where that has not been done.

    Args:
        cfg_path: An eval YAML (`eval_configs/minigpt4_eval.yaml`) or a model YAML; a train YAML to train it.
        options: `key=value` each, as after the original's `--options`.
        gpu_id: The original's `--gpu-id`; None where it was not given.
        device: Where to run when there is no `gpu_id`.
        report: Called with the progress of an import.
        training: The model is to be trained: it needs no checkpoint, and keys of training are not said to be ignored.

    Raises:
        ConfigError: The YAML is wrong, or names a placeholder or something that does not exist.
        WeightsError: A file is damaged, or they do not fit each other.
        StorageError: There is no room for the model folder.
    """
    read = read_original_yaml(cfg_path, options)
    files = find_files(read, training=training)
    chosen, device_notes = chosen_device(gpu_id, device)
    quantize = "none"
    if read.value("low_resource", False):
        quantize, sentence = low_resource(chosen)
        device_notes.append(sentence)
    template = read.family.template
    notes = [] if training else list(read.notes)
    target = home() / "models" / f"original-{_digest(files, read)}"
    make_folder(target.parent)
    with lock(target):  # all processes of a training run come here at once: the first imports
        if target.exists():
            verify_folder(target, deep=False)
        else:
            try:
                imported = import_original(
                    target, files, overrides=read.overrides, template=template, overwrite=True, report=report
                )
            except MiniGPT4Error as error:
                raise type(error)(_by_key(error.message), _by_key(error.hint)) from error
            notes += map(_by_key, imported.notes)
    return OriginalModel(target, chosen, quantize, template, [*notes, *device_notes])


def _by_key(text: str) -> str:
    """Replace the options of `weights import` by the YAML's keys, which are all that was given."""
    for option, key in _KEYS.items():
        text = text.replace(option, key)
    return text


def find_files(
    read: OriginalYaml, given: Mapping[str, Path | None] | None = None, *, training: bool = False
) -> OriginalFiles:
    """Find the files that a YAML names, and those that the original downloads by itself.

    Args:
        read: The YAML.
        given: Files that are not to be looked for, by the names of `OriginalFiles`' fields.
        training: Whether a checkpoint may be missing, as in the first stage of training.

    Raises:
        ConfigError: A placeholder, a path that leads nowhere, or a key that is missing.
    """
    known = {name: path for name, path in (given or {}).items() if path is not None}
    language_model = known.get("language_model") or _named(read, "llama_model", "the folder of Vicuna or LLaMA")
    projection = known.get("projection")
    if projection is None and (not training or read.value("ckpt")):
        projection = _named(read, "ckpt", "pretrained_minigpt4.pth or prerained_minigpt4_7b.pth")
    beside = [language_model, language_model.parent, *([projection.parent] if projection else [])]
    qformer = known.get("qformer")
    if qformer is None and read.value("has_qformer", True):
        named = str(read.value("q_former_model", ""))
        if named and not named.startswith(("http://", "https://")):
            qformer = _named(read, "q_former_model", QFORMER_FILE)
        else:
            qformer = _downloaded(read, PurePosixPath(named).name or QFORMER_FILE, "q_former_model", beside)
    vision = known.get("vision")
    if vision is None and read.value("vit_model", KNOWN_VISION) != KNOWN_VISION:
        vision = _named(read, "vit_model", VISION_FILE)
    elif vision is None:
        vision = _downloaded(read, VISION_FILE, "vit_model", [*beside, *([qformer.parent] if qformer else [])])
    return OriginalFiles(vision, language_model, qformer, projection)


def chosen_device(gpu_id: int | None, device: str) -> tuple[str, list[str]]:
    """Turn the original's `--gpu-id` into a device.

    Returns:
        The device for `load`, and a sentence where it is not the one asked for.
    """
    if gpu_id is None:
        return device, []
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        return device, [f"--gpu-id {gpu_id}: there is no CUDA device here, the model runs on {_kind(device)} instead"]
    if not 0 <= gpu_id < count:
        raise ConfigError(f"--gpu-id {gpu_id}: there are {count} CUDA devices here", f"give 0 to {count - 1}")
    return f"cuda:{gpu_id}", []


def low_resource(device: str) -> tuple[str, str]:
    """Choose what `low_resource: True`, 8-bit weights of the language model, means on this machine.

    Returns:
        The value of `quantize` for `load`, and a sentence that says what was chosen.
    """
    kind = _kind(device)
    if kind == "mps":
        return "none", "low_resource: 8-bit weights do not run on mps, the language model is loaded in bfloat16 instead"
    if importlib.util.find_spec("bitsandbytes") is None:
        number = "float32" if kind == "cpu" else "bfloat16"
        return "none", (
            f"low_resource: 8-bit weights need bitsandbytes, which is not installed; the language model is loaded in "
            f'{number} instead; for 8 bits: pip install "minigpt4[quant]"'
        )
    return "int8", f"low_resource: the language model is loaded with 8-bit weights on {kind}"


def _kind(device: str) -> str:
    """Return the kind of a device; of `auto` that of the device which is taken."""
    kind = device.partition(":")[0]
    if kind == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    return kind


def _named(read: OriginalYaml, name: str, what: str) -> Path:
    """Resolve a path in the section `model`; the language model is a folder."""
    setting = read.model(name)
    hint = f"put the path of {what} there, or add --options model.{name}=PATH"
    if setting is None or not setting.value:
        where = setting.place if setting is not None else str(read.path)
        model = f"({read.value('arch')}, {read.value('model_type', 'no model_type')})"
        searched = f", and the model's own YAML {model} was not found near it" if read.defaults is None else ""
        raise ConfigError(
            f"{where}: `model` gives no `{name}`{searched}",
            f"add `{name}:` with {what}, or --options model.{name}=PATH",
        )
    text = str(setting.value)
    if is_placeholder(text):
        raise ConfigError(f"{setting.place}: `{name}` is still the placeholder {text!r}", hint)
    candidates = read.candidates(text, setting)
    for candidate in candidates:
        if candidate.is_dir() if name == "llama_model" else candidate.exists():
            return candidate
    tried = " nor ".join(dict.fromkeys(str(candidate.parent) for candidate in candidates))
    which = f"which is neither in {tried}" if " nor " in tried else "which does not exist"
    raise ConfigError(f"{setting.place}: `{name}` names {text!r}, {which}", hint)


def _downloaded(read: OriginalYaml, name: str, key: str, beside: Sequence[Path]) -> Path:
    """Find a file that the original downloads by itself: beside the others, or where the original keeps it."""
    root = read.path.absolute().parent
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
    hub = Path(os.environ.get("TORCH_HOME", cache / "torch")).expanduser() / "hub/checkpoints"
    for folder in dict.fromkeys([root, Path.cwd(), root.parent, *beside, hub]):
        for candidate in (folder / name, folder / "weights" / name):
            if candidate.is_file():
                return candidate
    raise ConfigError(
        f"{read.path}: {name}, which the original downloads by itself, is not here; looked beside the YAML, the other "
        f"files and in {hub}",
        f"download it and put it beside the checkpoint, or add --options model.{key}=PATH",
    )


def _digest(files: OriginalFiles, read: OriginalYaml) -> str:
    """Name an import by its files (path, size, time) and by what is not in them."""
    lines = [FORMAT, read.family.template, *read.overrides]
    for path in files.by_option().values():
        for member in sorted(path.iterdir()) if path.is_dir() else [path]:
            if member.is_file():
                seen = member.stat()
                lines.append(f"{member.resolve()} {seen.st_size} {seen.st_mtime_ns}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
