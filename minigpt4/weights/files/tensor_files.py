"""The tensors of any model file or folder, by name, read one at a time.

A `.pth` or `.bin` file, a `.safetensors` file, or a folder of either in any number of shards, with or without an index.
What is there is known from the files' lists alone; a tensor's bytes are read when that tensor is asked for.
This module knows no models.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from minigpt4.errors import WeightsError
from minigpt4.weights.files.disk import storing
from minigpt4.weights.files.stored_tensor import StoredTensor, read_safetensors_header
from minigpt4.weights.files.torch_files import refuse_other_kinds, refuse_words, scan_torch_file, tensors_in

WRAPPERS = ("model", "state_dict", "module")
"""Under these keys a checkpoint keeps its tensors when it holds more than tensors."""

INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
MAX_INDEX_BYTES = 64 * 2**20

_WHOLE_FILES = ("model.safetensors", "pytorch_model.bin")
_SHARDS = ("*.safetensors", "pytorch_model*.bin", "*.bin", "*.pth", "*.pt")
_NOT_WEIGHTS = {"training_args.bin", "optimizer.bin", "scheduler.bin", "optimizer.pt", "scheduler.pt"}
_NUMBERED = re.compile(r"(?P<stem>.+)-(?P<number>\d+)-of-(?P<count>\d+)\.[a-z]+")


class TensorFiles:
    """Named tensors in a file or folder.

    Args:
        path: The file or folder.
        stored: Where each tensor lies.
        other: What the files hold besides tensors: the plain values round them.
    """

    def __init__(self, path: Path, stored: Mapping[str, StoredTensor], other: Mapping[str, Any]) -> None:
        self.path = path
        self.other = dict(other)
        self._stored = dict(stored)

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that hold tensors, in the order of the tensors."""
        return tuple(dict.fromkeys(tensor.path for tensor in self._stored.values()))

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.num_bytes for tensor in self._stored.values())

    def names(self) -> tuple[str, ...]:
        """List the names, file after file, in the order in which the files list them."""
        return tuple(self._stored)

    def stored(self, name: str) -> StoredTensor:
        """Say where a tensor lies.

        Raises:
            WeightsError: There is none of this name.
        """
        if name not in self._stored:
            raise WeightsError(f"{self.path} has no tensor {name}", "check that it is the file or folder you mean")
        return self._stored[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape without reading it."""
        return self.stored(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """Return a tensor's type without reading it."""
        return self.stored(name).dtype

    def read(self, name: str) -> Tensor:
        """Read a tensor: its bytes are mapped from the file, and changes to it do not reach the file."""
        return self.stored(name).read()

    def __contains__(self, name: object) -> bool:
        return name in self._stored

    def __len__(self) -> int:
        return len(self._stored)

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Do nothing: files are open only while one of their tensors is read."""


def open_tensors(path: Path) -> TensorFiles:
    """Look into a model file or folder.

    Args:
        path: A `.pth`, `.pt`, `.bin` or `.safetensors` file, or a folder of them. In a folder that holds the same
            model in both formats, the safetensors files are taken.

    Returns:
        Its tensors. A checkpoint that keeps them under a key such as `model` is unwrapped, the rest is in `other`.

    Raises:
        WeightsError: A file is missing, damaged or hostile, or the folder holds no model or contradicts itself.
        StorageError: A file cannot be read.
    """
    with storing(path, doing="read"):
        if path.is_file():
            return TensorFiles(path, *_scan(path))
        if not path.exists():
            raise WeightsError(f"{path} does not exist", "check the path")
        if not path.is_dir():
            raise WeightsError(f"{path} is neither a file nor a folder", "name a file of tensors, or a folder of them")
        return _open_folder(path)


def _open_folder(folder: Path) -> TensorFiles:
    if any(folder.glob("consolidated.*.pth")):
        raise WeightsError(
            f"{folder} holds Meta's own LLaMA files, whose parts must be put together first",
            f"convert them: minigpt4 weights from-meta --input {folder} --output DIR",
        )
    for name, whole in zip(INDEX_FILES, _WHOLE_FILES, strict=True):
        if (folder / name).is_file():
            return _open_indexed(folder, read_index(folder / name))
        if (folder / whole).is_file():
            return TensorFiles(folder, *_scan(folder / whole))
    return _open_shards(folder, _shards(folder))


def _open_indexed(folder: Path, index: Mapping[str, str]) -> TensorFiles:
    """Open the files that an index names; all it names must be there, and where it says."""
    scans = {}
    for file in sorted(set(index.values())):
        if not (folder / file).is_file():
            raise WeightsError(f"{folder / file} is missing, the folder's index names it", "fetch that file again")
        scans[file] = _scan(folder / file)[0]
    for name, file in index.items():
        if name not in scans[file]:
            raise WeightsError(
                f"{folder / file} does not hold the tensor {name}, which the folder's index says it does",
                "fetch the folder again: its files are of different versions",
            )
    # The index decides where a tensor is taken from; one that it forgot counts too.
    stored = {
        name: tensor
        for file, tensors in scans.items()
        for name, tensor in tensors.items()
        if index.get(name, file) == file
    }
    return TensorFiles(folder, stored, {})


def read_index(path: Path) -> dict[str, str]:
    """Read the index of a folder of shards: the file of each tensor.

    Raises:
        WeightsError: Not an index, or one that names files elsewhere.
        OSError: It cannot be read.
    """
    refuse_other_kinds(path)
    if path.stat().st_size > MAX_INDEX_BYTES:
        raise WeightsError(f"{path} is too large for an index", "fetch it again")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path} cannot be read as JSON", "fetch it again") from error
    index = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(index, dict) or not index or not all(isinstance(file, str) for file in index.values()):
        raise WeightsError(f"{path} has no weight_map, the list of the folder's tensors", "fetch it again")
    for file in index.values():
        if Path(file).name != file:
            raise WeightsError(f"{path} names {file!r}, which is not a file of its folder", "fetch it again")
    return index


def _shards(folder: Path) -> list[Path]:
    """List the weight files of a folder without an index."""
    for pattern in _SHARDS:
        shards = sorted(path for path in folder.glob(pattern) if path.name not in _NOT_WEIGHTS and path.is_file())
        if shards:
            _check_numbers(folder, shards)
            return shards
    partial = next((path for path in folder.iterdir() if path.suffix in (".incomplete", ".part", ".crdownload")), None)
    if partial is not None:
        raise WeightsError(f"{partial} is an unfinished download", "finish it first")
    raise WeightsError(
        f"{folder} holds no model weights: no .safetensors, .bin or .pth file", "name the folder with the weight files"
    )


def _check_numbers(folder: Path, shards: Sequence[Path]) -> None:
    """Refuse a set like 1-of-3 and 3-of-3."""
    present = {path.name for path in shards}
    for path in shards:
        match = _NUMBERED.fullmatch(path.name)
        if match is None or int(match["count"]) > len(shards) + 10_000:
            continue
        for number in range(1, int(match["count"]) + 1):
            digits = len(match["number"])
            name = f"{match['stem']}-{number:0{digits}}-of-{match['count']}{path.suffix}"
            if name not in present:
                raise WeightsError(f"{folder / name} is missing", "fetch that file again")


def _open_shards(folder: Path, shards: Sequence[Path]) -> TensorFiles:
    stored: dict[str, StoredTensor] = {}
    other: dict[str, Any] = {}
    for path in shards:
        tensors, rest = _scan(path)
        twice = next((name for name in tensors if name in stored), None)
        if twice is not None:
            raise WeightsError(
                f"{stored[twice].path} and {path.name} both hold the tensor {twice}, and no index says which counts",
                "name one file, or keep only the files of one model in the folder",
            )
        stored |= tensors
        other |= rest
    return TensorFiles(folder, stored, other)


def _scan(path: Path) -> tuple[dict[str, StoredTensor], dict[str, Any]]:
    """List the tensors of one file, unwrapped, and what is round them."""
    refuse_other_kinds(path)
    refuse_words(path)
    if path.suffix == ".safetensors":
        tensors, notes = read_safetensors_header(path)
        return tensors, dict(notes)
    content = scan_torch_file(path)
    for key in WRAPPERS:
        inner = content.get(key)
        if isinstance(inner, dict) and any(isinstance(value, StoredTensor) for value in inner.values()):
            rest = {str(name): value for name, value in content.items() if name != key}
            return dict(tensors_in(inner)), rest
    tensors = dict(tensors_in(content))
    return tensors, {str(key): value for key, value in content.items() if not isinstance(value, StoredTensor)}
