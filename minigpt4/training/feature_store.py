"""Features of pictures on disk: what the frozen parts of a model made of each, found again by the picture's bytes.

A store is a folder. `store.json` says what made the features, every `*.safetensors` holds some pictures'
(`feature_shard`), and `done/` notes which work was gone through to the end, and which shards there were then: without
one of them it is gone through again. Files are only added, each whole or not at all, so a killed program loses at most
the shard it was about to write; only a damaged one is removed.

Knows digests and tensors; what the features are of, and how they are made, it does not.
"""

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from minigpt4.errors import ConfigError, ImageError, StorageError
from minigpt4.training.feature_shard import DIGEST_BYTES, DamagedShardError, Shard, open_shard, write_shard
from minigpt4.weights.files.atomic import lock, make_folder, write_file
from minigpt4.weights.files.disk import storing

FORMAT_VERSION = 2
ABOUT_FILE = "store.json"
DONE_FOLDER = "done"

SHARD_BYTES = 64 * 2**20
"""A shard is written when its features take so many bytes,"""
SHARD_PICTURES = 1024
"""or are of so many pictures,"""
SHARD_SECONDS = 300.0
"""or were collected for so long: a kill loses no more."""

Kind = Literal["qformer_outputs", "vision_outputs"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Fingerprint:
    """What made the features of a store; any other model, preprocessing or precision makes others.

    Args:
        kind: What the projection reads, or what the vision encoder says.
        weights: Digest of the frozen tensors it comes from, and of the sizes they are used with.
        precision: Of the computation: `fp32`, `bf16` or `fp16`.
        preprocessing: Settings of the image processor.
    """

    kind: Kind
    weights: str
    precision: str
    preprocessing: Mapping[str, Any]

    @property
    def digest(self) -> str:
        """Names the fingerprint: 16 hexadecimal digits."""
        return hashlib.sha256(json.dumps(self.as_dict(), sort_keys=True).encode()).hexdigest()[:16]

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON."""
        return {"format_version": FORMAT_VERSION, **asdict(self)}


class FeatureStore:
    """The features in a folder, to be read in any number of processes.

    Digests and checksums are kept in memory (64 bytes a picture). Features are mapped from the files when they are
    asked for, and compared with their checksum then.

    Args:
        folder: Of the store.
        shards: Its files.
        digests: `(pictures, 32)` bytes, sorted.
        places: `(pictures, 2)`: shard and row of each.
        bad: Pictures that cannot be opened, and why.
    """

    def __init__(
        self,
        folder: Path,
        shards: list[Shard],
        digests: np.ndarray,
        places: np.ndarray,
        bad: dict[bytes, str],
    ) -> None:
        self.folder = folder
        self.bad = bad
        self._shards = shards
        self._digests = digests
        self._starts = _starts(digests)
        self._places = places

    @classmethod
    def open(cls, folder: Path, fingerprint: Fingerprint) -> "FeatureStore":
        """Open a store.

        Raises:
            ConfigError: Its features are of another fingerprint.
            StorageError: It is not there, cannot be read, or is damaged.
        """
        _check_fingerprint(folder, fingerprint)
        shards: list[Shard] = []
        digests, places = [], []
        bad: dict[bytes, str] = {}
        for path in _shard_paths(folder):
            shard, here, reasons = open_shard(path)
            digests.append(here)
            places.append(np.stack([np.full(len(here), len(shards)), np.arange(len(here))], axis=1).astype(np.uint32))
            shards.append(shard)
            bad |= reasons
        all_digests = np.concatenate([np.empty((0, DIGEST_BYTES), np.uint8), *digests])
        order = np.argsort(_starts(all_digests), kind="stable")
        all_places = np.concatenate([np.empty((0, 2), np.uint32), *places])
        return cls(folder, shards, all_digests[order], all_places[order], bad)

    def __len__(self) -> int:
        """Number of pictures that have features."""
        return len(self._digests)

    def __contains__(self, digest: bytes) -> bool:
        """Whether a picture was looked at, be it bad."""
        return digest in self.bad or self._find(digest) is not None

    def read(self, digest: bytes) -> dict[str, Tensor]:
        """Return a picture's features, mapped from the disk.

        Args:
            digest: The sha256 of its encoded bytes.

        Raises:
            ImageError: It cannot be opened.
            StorageError: The store has not looked at it, cannot be read, or what it holds of it is damaged.
        """
        if digest in self.bad:
            raise ImageError(self.bad[digest])
        at = self._find(digest)
        if at is None:
            raise StorageError(
                f"the features of a picture (sha256 {digest.hex()[:16]}...) are not in {self.folder}",
                hint="minigpt4 data features RECIPE.yaml computes what is missing",
            )
        shard, row = (int(number) for number in self._places[at])
        return self._shards[shard].read(row)

    def _find(self, digest: bytes) -> int | None:
        at = int(np.searchsorted(self._starts, _start(digest)))
        while at < len(self._starts) and self._starts[at] == _start(digest):
            if self._digests[at].tobytes() == digest:
                return at
            at += 1
        return None


def create_store(folder: Path, fingerprint: Fingerprint) -> None:
    """Make an empty store, unless there is one.

    Raises:
        ConfigError: The one there has another fingerprint.
        StorageError: It cannot be written.
    """
    make_folder(folder)
    if not (folder / ABOUT_FILE).exists():
        with write_file(folder / ABOUT_FILE, "w") as file:
            json.dump(fingerprint.as_dict(), file, indent=1)
    _check_fingerprint(folder, fingerprint)


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Let no other program compute features for a store meanwhile, which would be the same ones.

    Raises:
        StorageError: The folder cannot be written.
    """
    with lock(folder / "features"):
        yield


def remove_damaged(
    folder: Path, *, thorough: bool, report: Callable[[str, int, int], None] | None = None
) -> Iterator[None]:
    """Remove the shards that are damaged, each with a warning: what they held is then missing, and computed again.

    Args:
        folder: Of a store that nobody else writes.
        thorough: Read every picture's features, not only what is read to open a shard.
        report: Told of the pictures whose features were read.

    Yields:
        After each shard.

    Raises:
        StorageError: The store cannot be read, or a shard not be removed.
    """
    whole: list[Shard] = []
    for path in _shard_paths(folder):
        with _removed_if_damaged(path):
            whole.append(open_shard(path)[0])
        yield
    if not thorough:
        return
    pictures = sum(len(shard.checksums) for shard in whole)
    checked = 0
    for shard in whole:
        with _removed_if_damaged(shard.path):
            shard.check()
        checked += len(shard.checksums)
        if report is not None and len(shard.checksums):
            report("features checked", checked, pictures)
        yield


@contextmanager
def _removed_if_damaged(path: Path) -> Iterator[None]:
    try:
        yield
    except DamagedShardError as error:
        logger.warning("%s, and what it held is computed again", error.message)
        with storing(path):
            path.unlink(missing_ok=True)


def is_done(folder: Path, work: str) -> bool:
    """Whether a work was gone through to the end, and no shard is gone since."""
    path = folder / DONE_FOLDER / work
    with storing(path, doing="read"), suppress(FileNotFoundError, ValueError, TypeError):
        return {str(name) for name in json.loads(path.read_bytes())} <= {path.name for path in _shard_paths(folder)}
    return False


def note_done(folder: Path, work: str) -> None:
    """Note that a work was gone through to the end; called after its last shard is written."""
    with write_file(folder / DONE_FOLDER / work, "w") as file:
        json.dump([path.name for path in _shard_paths(folder)], file)


def _shard_paths(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


class ShardWriter:
    """Collects features and writes them, shard by shard.

    Args:
        folder: Of the store.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._digests: list[bytes] = []
        self._rows: dict[str, list[Tensor]] = {}
        self._bad: dict[str, str] = {}
        self._bytes = 0
        self._begun = time.monotonic()

    def add(self, digests: list[bytes], features: Mapping[str, Tensor]) -> None:
        """Take the features of some pictures, a row for each in every tensor, on the CPU.

        Raises:
            StorageError: A shard that is full by them cannot be written.
        """
        self._digests += digests
        for name, rows in features.items():
            self._rows.setdefault(name, []).append(rows)
            self._bytes += rows.numel() * rows.element_size()
        self._write_if_full()

    def add_bad(self, digest: bytes, reason: str) -> None:
        """Take a picture that cannot be opened.

        Raises:
            StorageError: A shard that is full by it cannot be written.
        """
        self._bad[digest.hex()] = reason
        self._write_if_full()

    def _write_if_full(self) -> None:
        pictures = len(self._digests) + len(self._bad)
        late = time.monotonic() - self._begun > SHARD_SECONDS
        if self._bytes >= SHARD_BYTES or pictures >= SHARD_PICTURES or late:
            self.write()

    def write(self) -> None:
        """Write what was collected.

        Raises:
            StorageError: It cannot be written; what was written before stays.
        """
        if self._digests or self._bad:
            write_shard(
                self.folder, self._digests, {name: torch.cat(rows) for name, rows in self._rows.items()}, self._bad
            )
        self._digests, self._rows, self._bad, self._bytes = [], {}, {}, 0
        self._begun = time.monotonic()


def _check_fingerprint(folder: Path, wanted: Fingerprint) -> None:
    path = folder / ABOUT_FILE
    if not path.exists():
        raise StorageError(f"{folder} holds no features", hint="minigpt4 data features RECIPE.yaml computes them")
    with storing(path, doing="read"):
        content = path.read_bytes()
    try:
        found = dict(json.loads(content))
    except (ValueError, TypeError) as error:
        raise StorageError(f"{path} is damaged", hint=f"remove the folder {folder}: it is computed again") from error
    expected = json.loads(json.dumps(wanted.as_dict()))
    differing = [
        f"{name} {_shown(found.get(name))}, here {_shown(expected.get(name))}"
        for name in sorted(found.keys() | expected.keys())
        if found.get(name) != expected.get(name)
    ]
    if differing:
        raise ConfigError(
            f"the features in {folder} were made by something else: {'; '.join(differing)}",
            hint="use another folder, or remove this one: it is computed again",
        )


def _shown(value: object) -> str:
    text = value[:16] if isinstance(value, str) else json.dumps(value, sort_keys=True)
    return text or "''"


def _start(digest: bytes) -> np.uint64:
    return np.uint64(int.from_bytes(digest[:8], "big"))


def _starts(digests: np.ndarray) -> np.ndarray:
    """The first eight bytes of each digest as a number, to search among."""
    return np.ascontiguousarray(digests[:, :8]).view(">u8").reshape(-1).astype(np.uint64)
