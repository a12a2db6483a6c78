"""The header of a `.safetensors` file, checked: names, types, shapes, and bytes that lie one after the other.

The format is eight bytes with the header's length, the header in JSON, and the tensors' bytes without a gap. It has no
checksum: a flipped bit in the header may name another tensor or type, one in the bytes is another number. Only a
manifest (`atomic`), or a look at the numbers (`sanity`), can tell.
"""

import json
import math
from pathlib import Path
from typing import IO, Any

import torch

from minigpt4.errors import WeightsError
from minigpt4.weights.files.stored import StoredTensor, contiguous_strides

MAX_HEADER_BYTES = 64 * 2**20
METADATA = "__metadata__"
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool, "C64": torch.complex64,
}  # fmt: skip


def read_safetensors_header(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Read what a file holds, without its tensors.

    Returns:
        The tensors in the order of their bytes, and the notes in the header.

    Raises:
        WeightsError: Not such a file, or a damaged one.
        OSError: It cannot be read.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
            raise refused(path, "it has no safetensors header")
        header = _header(path, file, length)
    notes = header.pop(METADATA, {})
    if not isinstance(notes, dict) or not all(isinstance(value, str) for value in notes.values()):
        raise refused(path, "its header is damaged")
    tensors = {name: _entry(path, name, entry, 8 + length) for name, entry in header.items()}
    ordered = dict(sorted(tensors.items(), key=lambda item: (item[1].start, item[1].num_bytes)))
    place = 8 + length
    for name, tensor in ordered.items():
        if tensor.start != place:
            raise refused(path, f"the bytes of tensor {name} do not begin where the ones before end")
        place += tensor.num_bytes
    if place != size:
        raise refused(path, f"its tensors need {place:,} bytes and it has {size:,}")
    return ordered, notes


def refused(path: Path, why: str, hint: str = "download the file again from its publisher") -> WeightsError:
    """Make the error for a file that is not believed."""
    return WeightsError(f"{path.name} was not opened: {why}", hint)


def _header(path: Path, file: IO[bytes], length: int) -> dict[str, Any]:
    try:
        header = json.loads(file.read(length).decode("utf-8"), object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise refused(path, "its header is damaged") from error
    if not isinstance(header, dict):
        raise refused(path, "its header is damaged")
    return header


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse a key that comes twice: one reader would take the first, another the last."""
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("a key comes twice")
    return content


def _entry(path: Path, name: str, entry: object, start: int) -> StoredTensor:
    damaged = refused(path, f"what its header says of tensor {name[:80]} makes no sense")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise damaged
    kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(kind, str) or kind not in DTYPES or not _are_sizes(shape) or not _are_sizes(offsets):
        raise damaged
    if len(offsets) != 2 or offsets[1] - offsets[0] != math.prod(shape) * DTYPES[kind].itemsize:
        raise damaged
    dims = tuple(shape)
    return StoredTensor(path, DTYPES[kind], dims, contiguous_strides(dims), start + offsets[0], math.prod(dims))


def _are_sizes(values: object) -> bool:
    return (
        isinstance(values, list)
        and len(values) <= 16
        and all(isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**62 for value in values)
    )
