"""What a file or folder of weights is: its kind, version and sizes, what it fits, and what is missing.

Reads headers, small text files and, of a language model, the few numbers that tell a delta from a model. Loads nothing
and changes nothing. What is said about each kind is in `inspection_kinds`.
"""

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from minigpt4.errors import WeightsError
from minigpt4.text import size_text
from minigpt4.weights.alignment import ALIGNMENT_FILE, TENSORS_FILE
from minigpt4.weights.checking.inspection_kinds import (
    KIND_NAMES,
    Inspection,
    Source,
    alignment,
    full_folder,
    lora_adapter,
    of_kind,
    read_json,
)
from minigpt4.weights.checking.inspection_parts import classifier, gguf_file, training_checkpoint, wheel
from minigpt4.weights.files.disk import storing
from minigpt4.weights.files.tensors import INDEX_FILES, TensorFiles, open_tensors, read_index
from minigpt4.weights.llama.tokenizer import LFS_POINTER
from minigpt4.weights.original.names import IGNORED, Kind, recognise, why_ignored

WEIGHT_ENDINGS = (".safetensors", ".bin", ".pth", ".pt", ".ckpt")
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
POINTER_BYTES = 1024
"""A git-lfs pointer is three short lines."""

HINT = "expected a file or folder of MiniGPT-4, LLaMA, Vicuna, BLIP-2 or this package; docs/weights.md lists them"


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
        found = _inspect_folder(path) if path.is_dir() else _inspect_file(path)
        found.bytes = sum(file.stat().st_size for file in _files(path))
    return found


def _inspect_file(path: Path) -> Inspection:
    if (pointer := _pointer(path)) is not None:
        return pointer
    if (part := wheel(path) or gguf_file(path)) is not None:
        return part
    return _inspect_tensors(path, open_tensors(path))


def _inspect_folder(path: Path) -> Inspection:
    if (path / ALIGNMENT_FILE).is_file():
        tensors = open_tensors(path / TENSORS_FILE) if (path / TENSORS_FILE).is_file() else None
        return _counted(alignment(path, tensors), tensors)
    if (path / ADAPTER_CONFIG).is_file():
        return _inspect_adapter(path)
    if (checkpoint := training_checkpoint(path)) is not None:
        return checkpoint
    lacking = _lacking(path)
    if lacking:
        return _incomplete(path, lacking)
    if consolidated := sorted(path.glob("consolidated.*.pth")):
        return _inspect_meta(path, consolidated)
    files = [file for file in _files(path) if file.name.endswith(WEIGHT_ENDINGS)]
    if not files:
        what = "neither weights nor a config.json" if not (path / "config.json").is_file() else "no weights"
        raise WeightsError(f"{path} holds {what}", HINT)
    return _inspect_tensors(path, open_tensors(path))


def _inspect_tensors(path: Path, tensors: TensorFiles) -> Inspection:
    names = set(tensors.names())
    kind = recognise(names)
    if kind is None and any(".lora_A." in name for name in names):
        return _counted(lora_adapter(path, tensors, {}), tensors)
    if kind is None and (part := classifier(path, tensors)) is not None:
        return _counted(part, tensors)
    if kind is None:
        first = min(names, default=None)
        what = f"its first tensor is {first}" if first else "it holds no tensors"
        raise WeightsError(f"{path} is nothing that is known here: {what}", HINT)
    if kind is Kind.OURS:
        return _counted(full_folder(path, tensors), tensors)
    return _counted(of_kind(Source(path, kind, tensors)), tensors, kind)


def _inspect_adapter(path: Path) -> Inspection:
    file = next((path / name for name in ADAPTER_FILES if (path / name).is_file()), None)
    config = read_json(path / ADAPTER_CONFIG)
    if file is None:
        found = lora_adapter(path, None, config)
        found.missing.append(ADAPTER_FILES[0])
        return found
    if (pointer := _pointer(file)) is not None:
        return pointer
    tensors = open_tensors(file)
    return _counted(lora_adapter(path, tensors, config), tensors)


def _inspect_meta(path: Path, consolidated: list[Path]) -> Inspection:
    """Describe Meta's folder by its first file: the others are slices of the same tensors."""
    tensors = open_tensors(consolidated[0])
    if recognise(set(tensors.names())) is not Kind.META:
        return _inspect_tensors(consolidated[0], tensors)
    found = _counted(of_kind(Source(path, Kind.META, tensors)), tensors, Kind.META)
    found.parameters = None  # norms are in every file, the rest in slices
    numbers = {int(number[1]) for file in consolidated if (number := re.search(r"\.(\d+)\.", file.name))}
    found.missing += [f"consolidated.{n:02}.pth" for n in sorted(set(range(max(numbers) + 1)) - numbers)]
    found.sizes["files"] = len(consolidated)
    return found


def _counted(found: Inspection, tensors: TensorFiles | None, kind: Kind | None = None) -> Inspection:
    """Add the number of parameters, and of what types they are; what is known and not needed does not count."""
    if tensors is None:
        return found
    counts: Counter[str] = Counter()
    for name in tensors.names():
        if kind in IGNORED and why_ignored(kind, name) is not None:
            continue
        numbers = 1
        for length in tensors.shape(name):
            numbers *= length
        counts[str(tensors.dtype(name)).removeprefix("torch.")] += numbers
    found.parameters = sum(counts.values())
    found.dtypes = dict(counts.most_common())
    return found


def _files(path: Path) -> list[Path]:
    return sorted(file for file in path.iterdir() if file.is_file()) if path.is_dir() else [path]


def _pointer(path: Path) -> Inspection | None:
    """Describe a git-lfs pointer, the few lines that stand for a file; None for any other file."""
    with storing(path, doing="read"):
        if path.stat().st_size > POINTER_BYTES:
            return None
        text = path.read_bytes()
    if not text.startswith(LFS_POINTER):
        return None
    size = re.search(rb"^size (\d+)", text, re.MULTILINE)
    return Inspection(
        path=str(path),
        kind="git-lfs pointer",
        title="a git-lfs pointer: the name of a file, not the file itself",
        missing=[f"{path.name} itself" + (f", {size_text(int(size[1]))}" if size else "")],
        notes=["run `git lfs install` and `git lfs pull` in its folder"],
    )


def _lacking(path: Path) -> list[str]:
    """List the weight files of a folder that its index names and that are not there, or only as pointers."""
    lacking = [file.name for file in _files(path) if file.name.endswith((*WEIGHT_ENDINGS, ".model")) and _pointer(file)]
    for index in INDEX_FILES:
        if (path / index).is_file():
            shards = set(read_index(path / index).values())
            lacking += sorted(shard for shard in shards if not (path / shard).is_file())
    return lacking


def _incomplete(path: Path, lacking: Iterable[str]) -> Inspection:
    """Describe a folder of which weight files are missing, from its index and its configuration."""
    names = {name for index in INDEX_FILES if (path / index).is_file() for name in read_index(path / index)}
    config = read_json(path / "config.json") if (path / "config.json").is_file() else {}
    kind = recognise(names)
    title = kind.value if kind else f"a folder of a {config.get('model_type', 'model')}"
    return Inspection(
        path=str(path),
        kind=KIND_NAMES[kind] if kind else "incomplete folder",
        title=f"{title}, incomplete",
        missing=list(lacking),
        notes=["fetch the missing files again; for git-lfs pointers: `git lfs pull`"],
    )
