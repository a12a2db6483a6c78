"""From one of the original's YAML files to a model folder that can be loaded: find the files, import them once.

Paths in a YAML resolve against its own folder, then the working directory, then the folder above (the root of an
original tree, from which the original is started). The imported folder lies in the cache, named by what it was made of.
"""

import hashlib
import importlib.util
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import torch

from minigpt4.errors import ConfigError, MiniGPT4Error
from minigpt4.weights.files.atomic import lock, make_folder, verify_folder
from minigpt4.weights.files.model_writer import Report
from minigpt4.weights.original.configs import OriginalYaml, read_original_yaml
from minigpt4.weights.original.exporting import QFORMER_FILE, VISION_FILE
from minigpt4.weights.original.importing import OriginalFiles, import_original
from minigpt4.weights.original.paths import candidates, is_placeholder
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
"""What names the same in a YAML as an option of `weights import` does."""

DEFAULT_GENERATION = {"max_new_tokens": 300, "num_beams": 1}
"""What the original's demo asks for."""


@dataclass(frozen=True)
class OriginalModel:
    """A model that one of the original's YAML files names, ready to be loaded.

    Args:
        folder: A full model folder in the cache.
        device: For `load`.
        quantize: For `load`.
        template: Name of the prompt template.
        generation: The original demo's generation options.
        notes: Sentences for the user.
    """

    folder: Path
    device: str
    quantize: str
    template: str
    generation: dict[str, int] = field(default_factory=lambda: dict(DEFAULT_GENERATION))
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
        report: Told how far an import is.
        training: The model is to be trained: it needs no checkpoint, and keys of training are not said to be ignored.

    Raises:
        ConfigError: The YAML is wrong, or names a placeholder or something that does not exist.
        WeightsError: A file is damaged, or they do not fit each other.
        StorageError: There is no room for the model folder.
    """
    read = read_original_yaml(cfg_path, options)
    files = find_files(read, training=training)
    chosen, notes = chosen_device(gpu_id, device)
    quantize = "none"
    if read.value("low_resource", False):
        quantize, sentence = low_resource(chosen)
        notes.append(sentence)
    said = [] if training else read.notes
    target = home() / "models" / f"original-{_digest(files, read)}"
    make_folder(target.parent)
    with lock(target):  # all processes of a training run come here at once: the first imports
        if target.exists():
            verify_folder(target, deep=False)
            return OriginalModel(target, chosen, quantize, read.template, notes=[*said, *notes])
        try:
            imported = import_original(
                target, files, overrides=read.overrides, template=read.template, overwrite=True, report=report
            )
        except MiniGPT4Error as error:
            raise type(error)(_by_key(error.message), _by_key(error.hint)) from error
    made = [_by_key(note) for note in imported.notes]
    return OriginalModel(target, chosen, quantize, read.template, notes=[*said, *made, *notes])


def _by_key(text: str) -> str:
    """Name what `weights import` takes as options by the YAML's keys, which are all that was given."""
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
        training: Whether a model without a checkpoint makes sense: the first stage of training begins so.

    Raises:
        ConfigError: A placeholder, a path that leads nowhere, or a key that is missing.
    """
    known = {name: path for name, path in (given or {}).items() if path is not None}
    language_model = known.get("language_model") or _named(
        read, "llama_model", "the folder of Vicuna or LLaMA", folder=True
    )
    projection = known.get("projection")
    if projection is None and (not training or read.value("ckpt")):
        projection = _named(read, "ckpt", "pretrained_minigpt4.pth or prerained_minigpt4_7b.pth")
    beside = [language_model, language_model.parent, *([projection.parent] if projection else [])]
    qformer = known.get("qformer") or _qformer(read, beside)
    vision = known.get("vision") or _vision(read, [*beside, *([qformer.parent] if qformer else [])])
    return OriginalFiles(vision, language_model, qformer, projection)


def _qformer(read: OriginalYaml, beside: Sequence[Path]) -> Path | None:
    if not read.value("has_qformer", True):
        return None
    named = str(read.value("q_former_model", ""))
    if named and not named.startswith(("http://", "https://")):
        return _named(read, "q_former_model", QFORMER_FILE)
    return _downloaded(read, PurePosixPath(named).name or QFORMER_FILE, "q_former_model", beside)


def _vision(read: OriginalYaml, beside: Sequence[Path]) -> Path:
    if read.value("vit_model", KNOWN_VISION) == KNOWN_VISION:
        return _downloaded(read, VISION_FILE, "vit_model", beside)
    return _named(read, "vit_model", VISION_FILE)


def chosen_device(gpu_id: int | None, device: str) -> tuple[str, list[str]]:
    """Turn the original's `--gpu-id` into a device.

    Returns:
        The device for `load`, and a sentence where it is not the one asked for.

    Raises:
        ConfigError: There are CUDA devices, but none of this number.
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


def _named(read: OriginalYaml, name: str, what: str, *, folder: bool = False) -> Path:
    """Resolve a path in the section `model`."""
    setting = read.model(name)
    if setting is None or not setting.value:
        where = setting.place if setting is not None else str(read.path)
        searched = f", and {_expected_defaults(read)} was not found near it" if read.defaults is None else ""
        raise ConfigError(
            f"{where}: `model` gives no `{name}`{searched}",
            f"add `{name}:` with {what}, or --options model.{name}=PATH",
        )
    text = str(setting.value)
    if is_placeholder(text):
        raise ConfigError(
            f"{setting.place}: `{name}` is still the placeholder {text!r}",
            f"put the path of {what} there, or add --options model.{name}=PATH",
        )
    for candidate in candidates(text, setting, read):
        if candidate.is_dir() if folder else candidate.exists():
            return candidate
    tried = " nor ".join(dict.fromkeys(str(candidate.parent) for candidate in candidates(text, setting, read)))
    raise ConfigError(
        f"{setting.place}: `{name}` names {text!r}, which is neither in {tried}" if " nor " in tried
        else f"{setting.place}: `{name}` names {text!r}, which does not exist",
        f"put the path of {what} there, or add --options model.{name}=PATH",
    )  # fmt: skip


def _expected_defaults(read: OriginalYaml) -> str:
    return f"the model's own YAML ({read.value('arch')}, {read.value('model_type', 'no model_type')})"


def _downloaded(read: OriginalYaml, name: str, key: str, beside: Sequence[Path]) -> Path:
    """Find a file that the original downloads by itself: beside the others, or where the original keeps it."""
    root = read.path.absolute().parent
    folders = [root, Path.cwd(), root.parent, *beside, _torch_hub() / "checkpoints"]
    for folder in dict.fromkeys(folders):
        for candidate in (folder / name, folder / "weights" / name):
            if candidate.is_file():
                return candidate
    raise ConfigError(
        f"{read.path}: {name}, which the original downloads by itself, is not here; looked beside the YAML, the other "
        f"files and in {folders[-1]}",
        f"download it and put it beside the checkpoint, or add --options model.{key}=PATH",
    )


def _torch_hub() -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
    return Path(os.environ.get("TORCH_HOME", cache / "torch")).expanduser() / "hub"


def _digest(files: OriginalFiles, read: OriginalYaml) -> str:
    """Name an import by its files (path, size, time) and by what is not in them."""
    lines = [FORMAT, read.template, *read.overrides]
    for path in files.by_option().values():
        members = sorted(path.iterdir()) if path.is_dir() else [path]
        for member in members:
            if member.is_file():
                seen = member.stat()
                lines.append(f"{member.resolve()} {seen.st_size} {seen.st_mtime_ns}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
