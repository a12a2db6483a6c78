"""Features of pictures on disk: what the frozen parts of a model made of each, found again by the picture's bytes.

A store is a folder. `store.json` says what made the features; every `*.safetensors` (a shard) holds those of some
pictures; `done/` names the shards there were when all that a stage reads had been computed. Files are only added, each
whole or not at all, so a killed program loses at most the shard it was about to write. Only damaged ones are removed.

A row of every feature tensor of a shard is a picture's. Beside them lie the sha256 of each picture's encoded bytes
(`digests`) and a checksum of each picture's rows (`checksums`), so that one picture can be read and compared alone. The
header has a checksum of both (`tables`) and of `bad`, which older versions filled. Knows neither recipes nor pictures.
"""

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from minigpt4.errors import ConfigError, StorageError
from minigpt4.model import MiniGPT4ForConditionalGeneration
from minigpt4.weights.files.atomic import write_file
from minigpt4.weights.files.disk import make_folder, storing

FORMAT_VERSION = 2
ABOUT_FILE = "store.json"
DONE_FOLDER = "done"

SHARD_BYTES = 64 * 2**20
SHARD_PICTURES = 1024
SHARD_SECONDS = 300.0
"""A shard is written when its features take this many bytes, are of this many pictures, or were collected this long."""

DIGESTS, DIGEST_BYTES = "digests", 32
CHECKSUMS, CHECKSUM_BYTES = "checksums", 16
"""Of a sha256: enough for accidental damage."""

Kind = Literal["qformer_outputs", "vision_outputs"]

_CHANGE_NO_NUMBER = {"transformers_version", "dtype", "torch_dtype", "architectures", "_name_or_path",
                     "image_processor_type", "processor_class"}  # fmt: skip

logger = logging.getLogger(__name__)


class DamagedShardError(StorageError):
    """A shard whose bytes are not those that were written, or that is gone."""

    def __init__(self, path: Path, what: str = "is damaged") -> None:
        hint = "minigpt4 data features RECIPE.yaml finds what is damaged and computes it again"
        super().__init__(f"{path} {what}", hint=hint)


@dataclass(frozen=True)
class Fingerprint:
    """What made the features of a store; any other model, preprocessing or precision makes others.

    Args:
        kind: The input of the projection, or the output of the vision encoder.
        weights: Digest of the frozen tensors that features come from, and of their parts' settings.
        precision: Of the computation: `fp32`, `bf16` or `fp16`.
        preprocessing: Settings of the image processor.
    """

    kind: Kind
    weights: str
    precision: str
    preprocessing: Mapping[str, Any]

    @property
    def digest(self) -> str:
        """Name of the fingerprint: 16 hexadecimal digits."""
        return hashlib.sha256(json.dumps(self.as_dict(), sort_keys=True).encode()).hexdigest()[:16]

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON."""
        return {"format_version": FORMAT_VERSION, **asdict(self)}


class FeatureStore:
    """The features in a folder, to be read in any number of processes; 56 bytes of memory a picture.

    Raises:
        ConfigError: Its features are of another fingerprint.
        StorageError: It is not there, cannot be read, or is damaged.
    """

    def __init__(self, folder: Path, fingerprint: Fingerprint) -> None:
        _check_fingerprint(folder, fingerprint)
        self.folder = folder
        self._paths = _shard_paths(folder)
        tables = [_read_tables(path) for path in self._paths]
        counts = [len(digests) for digests, _ in tables]
        unsorted = np.frombuffer(b"".join(digests.tobytes() for digests, _ in tables), f"S{DIGEST_BYTES}")
        order = np.argsort(unsorted, kind="stable")
        self._digests = unsorted[order]
        self._checksums = np.concatenate([np.empty((0, CHECKSUM_BYTES), np.uint8), *(sums for _, sums in tables)])[
            order
        ]
        self._shards = np.repeat(np.arange(len(counts), dtype=np.uint32), counts)[order]
        self._rows = np.concatenate([np.arange(count, dtype=np.uint32) for count in (0, *counts)])[order]

    def __len__(self) -> int:
        """Number of pictures."""
        return len(self._digests)

    def __contains__(self, digest: bytes) -> bool:
        """Whether a picture has features."""
        return self._find(digest) is not None

    def read(self, digest: bytes) -> dict[str, Tensor]:
        """Return the features of a picture, by the sha256 of its encoded bytes.

        Raises:
            StorageError: There are none, or they cannot be read or are damaged.
        """
        at = self._find(digest)
        if at is None:
            raise StorageError(
                f"the features of a picture (sha256 {digest.hex()[:16]}...) are not in {self.folder}",
                hint="minigpt4 data features RECIPE.yaml computes what is missing",
            )
        return _read_row(self._paths[self._shards[at]], int(self._rows[at]), self._checksums[at])

    def _find(self, digest: bytes) -> int | None:
        at = int(np.searchsorted(self._digests, np.array(digest, self._digests.dtype)))
        return at if self._digests[at : at + 1].tobytes() == digest else None


def fingerprint_of(
    model: MiniGPT4ForConditionalGeneration, preprocessing: dict[str, Any], precision: str
) -> Fingerprint:
    """Return what identifies the features of a model, with the settings of its image processor."""
    kind = _kind_of(model)
    return Fingerprint(kind, _weights_digest(model, kind), precision, _plain(preprocessing))


def _kind_of(model: MiniGPT4ForConditionalGeneration) -> Kind:
    """Return which features are worth keeping: the last ones before anything that learns."""
    joining = model.model
    queries = joining.query_tokens is not None and joining.query_tokens.requires_grad
    resampler = joining.qformer is not None and any(p.requires_grad for p in joining.qformer.parameters())
    return "vision_outputs" if queries or resampler else "qformer_outputs"


def _weights_digest(model: MiniGPT4ForConditionalGeneration, kind: Kind) -> str:
    """Return the sha256 over every frozen tensor that features come from, and over the settings of their parts."""
    config, joining = model.config, model.model
    tensors = {f"vision_model.{name}": t for name, t in joining.vision_model.state_dict().items()}
    settings: dict[str, Any] = {"vision": config.vision_config.to_dict(), "norm": config.post_layernorm_eps}
    if kind == "qformer_outputs":
        settings["merged"] = [config.num_prefix_tokens, config.num_image_tokens]
        if joining.qformer is not None and joining.query_tokens is not None:
            tensors |= {f"qformer.{name}": t for name, t in joining.qformer.state_dict().items()}
            tensors["query_tokens"] = joining.query_tokens
            settings["qformer"] = config.qformer_config.to_dict()
    with ThreadPoolExecutor() as pool:  # large tensors take seconds, and hashing frees the interpreter
        digests = list(pool.map(_tensor_digest, tensors.values()))
    entries = [
        [name, str(tensor.dtype), list(tensor.shape), digest]
        for (name, tensor), digest in zip(tensors.items(), digests, strict=True)
    ]
    return hashlib.sha256(json.dumps([sorted(entries), _plain(settings)], sort_keys=True).encode()).hexdigest()


def _tensor_digest(tensor: Tensor) -> str:
    raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(raw.numpy().data).hexdigest()


def _plain(settings: Any) -> Any:  # noqa: ANN401  (a configuration's values)
    """Return settings as JSON has them, without what changes no number."""
    if isinstance(settings, dict):
        return {str(key): _plain(value) for key, value in settings.items() if key not in _CHANGE_NO_NUMBER}
    if isinstance(settings, list | tuple):
        return [_plain(value) for value in settings]
    return int(settings) if isinstance(settings, int) and not isinstance(settings, bool) else settings


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


def remove_damaged(
    folder: Path, *, thorough: bool, report: Callable[[str, int, int], None] | None = None
) -> Iterator[None]:
    """Remove damaged shards, each with a warning, so that what they held is computed again.

    Args:
        folder: Of a store that nobody else writes.
        thorough: Compare every picture's features with their checksum, not the tables alone.
        report: Called with the pictures compared.

    Yields:
        After each shard.

    Raises:
        StorageError: The store cannot be read, or a shard not be removed.
    """
    sums = {}
    for path in _shard_paths(folder):
        with _removed_if_damaged(path):
            sums[path] = _read_tables(path)[1]
        yield
    checked, pictures = 0, sum(map(len, sums.values()))
    for path in sums if thorough else ():
        with _removed_if_damaged(path):
            for row, checksum in enumerate(sums[path]):
                _read_row(path, row, checksum)
        checked += len(sums[path])
        if report is not None:
            report("features checked", checked, pictures)
        yield


def is_done(folder: Path, work: str) -> bool:
    """Whether all of a stage was computed, and no shard has gone since."""
    path = folder / DONE_FOLDER / work
    with storing(path, doing="read"), suppress(FileNotFoundError, ValueError, TypeError):
        return {str(name) for name in json.loads(path.read_bytes())} <= {path.name for path in _shard_paths(folder)}
    return False


def note_done(folder: Path, work: str) -> None:
    """Note that all of a stage was computed; call it after the last shard is written."""
    with write_file(folder / DONE_FOLDER / work, "w") as file:
        json.dump([path.name for path in _shard_paths(folder)], file)


class ShardWriter:
    """Collects features and writes them to a store's folder, shard by shard."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._clear()

    def _clear(self) -> None:
        self._digests: list[bytes] = []
        self._rows: dict[str, list[Tensor]] = {}
        self._bytes = 0
        self._begun = time.monotonic()

    def add(self, digests: list[bytes], features: Mapping[str, Tensor]) -> None:
        """Add the features of some pictures: tensors on the CPU with a row for each.

        Raises:
            StorageError: A shard was full and cannot be written.
        """
        self._digests += digests
        for name, rows in features.items():
            self._rows.setdefault(name, []).append(rows)
            self._bytes += rows.numel() * rows.element_size()
        is_late = time.monotonic() - self._begun > SHARD_SECONDS
        if self._bytes >= SHARD_BYTES or len(self._digests) >= SHARD_PICTURES or is_late:
            self.write()

    def write(self) -> None:
        """Write what was collected as a shard, named by the pictures in it.

        Raises:
            StorageError: It cannot be written.
        """
        if self._digests:
            rows = {name: torch.cat(parts) for name, parts in self._rows.items()}
            sums = [_checksum({name: rows[name][at] for name in rows}) for at in range(len(self._digests))]
            tables = {DIGESTS: _table(self._digests, DIGEST_BYTES), CHECKSUMS: _table(sums, CHECKSUM_BYTES)}
            digests = b"".join(self._digests)
            notes = {"bad": "{}", "tables": _checksum_of_tables(digests, b"".join(sums), "{}")}
            with write_file(self.folder / f"{hashlib.sha256(digests).hexdigest()[:16]}.safetensors") as file:
                file.write(save(rows | tables, notes))
        self._clear()


def _shard_paths(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def _read_tables(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return the digests `(pictures, DIGEST_BYTES)` and the checksums `(pictures, CHECKSUM_BYTES)` of a shard.

    Raises:
        DamagedShardError: They are not what was written.
        StorageError: The shard cannot be read.
    """
    with _reading(path) as file:
        digests, sums = file.get_tensor(DIGESTS).numpy(), file.get_tensor(CHECKSUMS).numpy()
        notes = file.metadata()
        if notes["tables"] != _checksum_of_tables(digests.tobytes(), sums.tobytes(), notes["bad"]):
            raise DamagedShardError(path)
    return digests, sums


def _read_row(path: Path, row: int, checksum: np.ndarray) -> dict[str, Tensor]:
    """Return the features of a picture, by name.

    Raises:
        DamagedShardError: They differ from their checksum, or the file is cut short or gone.
        StorageError: It cannot be read.
    """
    with _reading(path) as file:
        features = {name: file.get_slice(name)[row] for name in sorted({*file.keys()} - {DIGESTS, CHECKSUMS})}
    if _checksum(features) != checksum.tobytes():
        raise DamagedShardError(path)
    return features


@contextmanager
def _reading(path: Path) -> Iterator[Any]:
    """Open a shard; what does not read as one is damaged."""
    try:
        with storing(path, doing="read"), safe_open(path, "pt") as file:
            yield file
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedShardError(path) from error
    except StorageError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise DamagedShardError(path, "is gone") from error
        raise


@contextmanager
def _removed_if_damaged(path: Path) -> Iterator[None]:
    try:
        yield
    except DamagedShardError as error:
        logger.warning("%s, and what it held is computed again", error.message)
        with storing(path):
            path.unlink(missing_ok=True)


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


def _checksum(features: Mapping[str, Tensor]) -> bytes:
    """Return the checksum of a picture's features: of their names, types, shapes and bytes."""
    found = hashlib.sha256()
    for name, row in sorted(features.items()):
        found.update(f"{name} {row.dtype} {tuple(row.shape)}\n".encode())
        found.update(row.contiguous().flatten().view(torch.uint8).numpy().data)
    return found.digest()[:CHECKSUM_BYTES]


def _checksum_of_tables(digests: bytes, sums: bytes, reasons: str) -> str:
    return hashlib.sha256(b"".join((digests, sums, reasons.encode()))).hexdigest()


def _table(rows: list[bytes], width: int) -> Tensor:
    return torch.from_numpy(np.frombuffer(b"".join(rows), np.uint8).copy().reshape(-1, width))
