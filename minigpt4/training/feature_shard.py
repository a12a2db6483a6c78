"""One file of a feature store: some pictures' features, and checksums by which damage to them is noticed.

A row of every feature tensor is a picture's. Beside them lie the sha256 of each picture's encoded bytes (`digests`) and
a checksum of each picture's rows (`checksums`), so that a picture is compared when it is read, and nothing else is read
for it. The header has the pictures that cannot be opened, with the reason, and a checksum of all that is read when the
file is opened.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from minigpt4.errors import StorageError, WeightsError
from minigpt4.weights.files.atomic import write_file
from minigpt4.weights.files.disk import storing
from minigpt4.weights.files.safetensors_header import read_safetensors_header
from minigpt4.weights.files.stored import StoredTensor

DIGESTS = "digests"
DIGEST_BYTES = 32
CHECKSUMS = "checksums"
CHECKSUM_BYTES = 16
"""Of a sha256, as many as make damage by accident impossible to miss."""
BAD = "bad"
TABLES = "tables"


class DamagedShardError(StorageError):
    """A shard whose bytes are not those that were written, or that is gone."""


@dataclass(frozen=True)
class Shard:
    """An open shard.

    Args:
        path: The file.
        tensors: Its features, by name.
        checksums: `(pictures, CHECKSUM_BYTES)` bytes.
    """

    path: Path
    tensors: dict[str, StoredTensor]
    checksums: np.ndarray

    def read(self, row: int) -> dict[str, Tensor]:
        """Return a picture's features, mapped from the disk and compared with their checksum.

        Raises:
            DamagedShardError: They differ, or the file became shorter or is gone.
            StorageError: It cannot be read.
        """
        try:
            features = {name: _row(tensor, row) for name, tensor in self.tensors.items()}
        except WeightsError as error:
            raise _damaged(self.path) from error
        except StorageError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                raise _damaged(self.path, "is gone") from error
            raise
        if _checksum(features) != self.checksums[row].tobytes():
            raise _damaged(self.path)
        return features

    def check(self) -> None:
        """Compare every picture's features with their checksum.

        Raises:
            DamagedShardError: One differs.
            StorageError: The file cannot be read.
        """
        for row in range(len(self.checksums)):
            self.read(row)


def write_shard(folder: Path, digests: list[bytes], features: Mapping[str, Tensor], bad: Mapping[str, str]) -> None:
    """Add a shard to a folder, named by the pictures in it.

    Args:
        folder: Of the store.
        digests: Of the pictures.
        features: Tensors with a row for each.
        bad: Pictures that cannot be opened, by hexadecimal digest, and why.

    Raises:
        StorageError: It cannot be written.
    """
    rows = {name: tensor.contiguous() for name, tensor in features.items()}
    sums = [_checksum({name: tensor[row] for name, tensor in rows.items()}) for row in range(len(digests))]
    tensors = rows | {DIGESTS: _table(digests, DIGEST_BYTES), CHECKSUMS: _table(sums, CHECKSUM_BYTES)}
    reasons = json.dumps(bad)
    notes = {BAD: reasons, TABLES: _checksum_of_tables(b"".join(digests), b"".join(sums), reasons)}
    seen = b"".join(digests) + "".join(sorted(bad)).encode()
    with write_file(folder / f"{hashlib.sha256(seen).hexdigest()[:16]}.safetensors") as file:
        file.write(save(tensors, notes))


def open_shard(path: Path) -> tuple[Shard, np.ndarray, dict[bytes, str]]:
    """Open a shard; of its features nothing is read yet.

    Returns:
        The shard, the digests of its pictures `(pictures, DIGEST_BYTES)`, and its bad pictures with the reasons.

    Raises:
        DamagedShardError: What is read of it is not what was written.
        StorageError: It cannot be read.
    """
    try:
        with storing(path, doing="read"):
            tensors, notes = read_safetensors_header(path)
        digests = _read_table(tensors.pop(DIGESTS), DIGEST_BYTES)
        sums = _read_table(tensors.pop(CHECKSUMS), CHECKSUM_BYTES)
        whole = notes[TABLES] == _checksum_of_tables(digests.tobytes(), sums.tobytes(), notes[BAD])
        reasons = {bytes.fromhex(digest): str(reason) for digest, reason in json.loads(notes[BAD]).items()}
    except (WeightsError, ValueError, KeyError, AttributeError) as error:
        raise _damaged(path) from error
    if not whole or any(tensor.shape[:1] != (len(digests),) for tensor in tensors.values()):
        raise _damaged(path)
    return Shard(path, tensors, sums), digests, reasons


def _damaged(path: Path, what: str = "is damaged") -> DamagedShardError:
    return DamagedShardError(
        f"{path} {what}", hint="minigpt4 data features RECIPE.yaml finds what is damaged and computes it again"
    )


def _checksum(features: Mapping[str, Tensor]) -> bytes:
    """Return the checksum of a picture's features: of their names, types, shapes and bytes."""
    found = hashlib.sha256()
    for name, row in sorted(features.items()):
        found.update(f"{name} {row.dtype} {tuple(row.shape)}\n".encode())
        found.update(row.flatten().view(torch.uint8).numpy().data)
    return found.digest()[:CHECKSUM_BYTES]


def _checksum_of_tables(digests: bytes, sums: bytes, reasons: str) -> str:
    return hashlib.sha256(b"".join((digests, sums, reasons.encode()))).hexdigest()


def _table(rows: list[bytes], width: int) -> Tensor:
    return torch.from_numpy(np.frombuffer(b"".join(rows), np.uint8).copy().reshape(-1, width))


def _read_table(table: StoredTensor, width: int) -> np.ndarray:
    if table.dtype != torch.uint8 or table.shape[1:] != (width,):
        raise ValueError("not a table of digests")
    return np.array(table.read().numpy())


def _row(tensor: StoredTensor, row: int) -> Tensor:
    shape = tensor.shape[1:]
    if math.prod(shape) == 0:
        return torch.empty(shape, dtype=tensor.dtype)
    return tensor.rows(row, 1).view(shape)
