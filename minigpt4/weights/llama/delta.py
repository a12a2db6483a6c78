"""Adding a delta to its base, and making one: tensor by tensor, piece by piece, whatever the model's size.

`delta_plan` has checked everything before; here the pieces are added and written. Memory holds a few pieces, never a
tensor. Interrupted, the same call goes on with the file it was at.
"""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from minigpt4.errors import WeightsError
from minigpt4.weights.files.disk import storing
from minigpt4.weights.files.model_writer import SHARD_BYTES, Format, Report, json_bytes, kept_note, write_model
from minigpt4.weights.files.shard_files import PIECE_BYTES, Entry
from minigpt4.weights.llama.delta_plan import FREQUENCIES, Plan, plan_delta, read_config
from minigpt4.weights.llama.tokenizer import mended_ids, mended_tokenizer
from minigpt4.weights.llama.version import EMBEDDINGS, LARGEST_NORM_OF_A_DELTA, LAST_NORM

CHECKPOINTS = {4096: "prerained_minigpt4_7b.pth", 5120: "pretrained_minigpt4.pth"}
"""The published MiniGPT-4 checkpoint for Vicuna v0, by width."""

_CONFIG_FILES = ("config.json", "generation_config.json")


Precision = Literal["float16", "bfloat16", "float32"]


@dataclass
class Result:
    """What was written.

    Args:
        folder: Where.
        version: `v0` or `v1.1`.
        template: The prompt template that fits the merged model; None where MiniGPT-4 has none.
        checkpoint: The published MiniGPT-4 checkpoint that was trained with the merged model; None where there is none.
        kept: Files that an interrupted run had finished.
        notes: Sentences for the user: what was seen, what was mended.
    """

    folder: Path
    version: str
    template: str | None = None
    checkpoint: str | None = None
    kept: int = 0
    notes: list[str] = field(default_factory=list)


def apply_delta(
    base: Path,
    delta: Path,
    target: Path,
    *,
    file_format: Format = "safetensors",
    dtype: Precision | None = None,
    trust: bool = False,
    shard_bytes: int = SHARD_BYTES,
    report: Report | None = None,
) -> Result:
    """Add a delta to the base it was made from.

    Args:
        base: The folder of the LLaMA.
        delta: The folder of the delta, v0 or v1.1.
        target: The folder to appear, whole or not at all.
        file_format: `safetensors`, or `bin` for tools that read `pytorch_model-N.bin`.
        dtype: Round both sides to this type first; None wants them of one type.
        trust: Do not tell deltas from models by their numbers.
        shard_bytes: Size of a weight file; a larger tensor has a file of its own.
        report: Told how far the writing is.

    Raises:
        UsageError: Paths that cannot be meant.
        WeightsError: A side is missing, incomplete, damaged or hostile, or does not fit the other; or a sum is not
            finite. All but the last is found before anything is written.
        StorageError: The target exists, or there is no room for it.
    """
    plan = plan_delta("add", base, delta, target, dtype=_dtype(dtype), trust=trust)
    result = _write(plan, target, file_format, shard_bytes, report)
    result.notes = [*_version_notes(plan, result), *result.notes]
    return result


def make_delta(
    base: Path,
    model: Path,
    target: Path,
    *,
    file_format: Format = "safetensors",
    dtype: Precision | None = None,
    shard_bytes: int = SHARD_BYTES,
    report: Report | None = None,
) -> Result:
    """Make the delta that turns a base into a model; the inverse of `apply_delta`.

    Args:
        base: The folder of the LLaMA.
        model: The folder of the model that was trained from it; its tables may have one row more.
        target: The folder to appear, whole or not at all.
        file_format: `safetensors` or `bin`.
        dtype: Round both sides to this type first; None wants them of one type.
        shard_bytes: Size of a weight file.
        report: Told how far the writing is.

    Raises:
        UsageError: Paths that cannot be meant.
        WeightsError: A side is missing, incomplete, damaged or hostile, or does not fit the other.
        StorageError: The target exists, or there is no room for it.
    """
    plan = plan_delta("subtract", base, model, target, dtype=_dtype(dtype))
    result = _write(plan, target, file_format, shard_bytes, report)
    result.notes.insert(0, f"a delta of {result.version}: {model} less {base}")
    if not _looks_like_a_delta(plan):
        result.notes.append(
            f"{model} differs from {base} as unrelated models do: check that it was trained from it; apply-delta takes "
            "this delta only with --trust-files"
        )
    return result


def _looks_like_a_delta(plan: Plan) -> bool:
    """Whether a difference will be recognised as one: by its last norm, as `version.is_delta` does."""
    if LAST_NORM not in plan.other or LAST_NORM not in plan.base:
        return False
    change = plan.other.read(LAST_NORM).float() - plan.base.read(LAST_NORM).float()
    return bool(change.mean().abs() < LARGEST_NORM_OF_A_DELTA)


def _dtype(precision: Precision | None) -> torch.dtype | None:
    dtypes = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
    return None if precision is None else dtypes[precision]


def _version_notes(plan: Plan, result: Result) -> list[str]:
    rows, base_rows = plan.other.shape(EMBEDDINGS)[0], plan.base.shape(EMBEDDINGS)[0]
    if result.version == "v1.1":
        return [
            f"the delta is v1.1: {rows} rows, as the base has",
            "no MiniGPT-4 checkpoint was trained with Vicuna v1.1, answers may be garbled; the one for it is v0",
        ]
    result.template = "vicuna-v0"
    result.checkpoint = CHECKPOINTS.get(plan.width)
    added = f"; the base's {base_rows} count as zeros in the last one" if rows > base_rows else ""
    return [
        f"the delta is v0: {rows} rows, the last one for [PAD]{added}",
        f"it goes with the prompt template vicuna-v0 and {result.checkpoint or 'a MiniGPT-4 checkpoint of its width'}",
    ]


def _write(plan: Plan, target: Path, file_format: Format, shard_bytes: int, report: Report | None) -> Result:
    small, notes = _small_files(plan)
    kept = write_model(
        target,
        plan.entries,
        lambda entry: combined(plan, entry),
        small,
        sources={plan.operation: [*plan.base.files, *plan.other.files]},
        file_format=file_format,
        shard_bytes=shard_bytes,
        report=report,
    )
    if kept:
        notes.append(kept_note(kept))
    return Result(target, plan.version, kept=kept, notes=notes)


def combined(plan: Plan, entry: Entry) -> Iterator[Tensor]:
    """Yield the sum or the difference of a tensor's two sides, flat and in pieces.

    Where the base has a row less, it counts as zeros. The rotary frequencies are the base's own, and 0 in a delta.

    Raises:
        WeightsError: A number of the result is not finite.
    """
    base = plan.base.stored(entry.name)
    step = PIECE_BYTES // entry.dtype.itemsize  # both sides in steps of as many numbers
    if entry.name.endswith(FREQUENCIES):
        for piece in base.pieces(step * base.dtype.itemsize):
            yield piece if plan.operation == "add" else torch.zeros_like(piece)
        return
    other = plan.other.stored(entry.name)
    for left, right in _read_at_once(
        base.pieces(step * base.dtype.itemsize), other.pieces(step * other.dtype.itemsize)
    ):
        first, second = _padded(left, right, entry.dtype), right.to(entry.dtype)
        result = first + second if plan.operation == "add" else second - first
        lowest, highest = result.aminmax()  # not a number, where one is
        if not (lowest.isfinite() and highest.isfinite()):
            raise WeightsError(
                f"the tensor {entry.name} would hold numbers that are not finite",
                f"a file of {plan.base.path} or {plan.other.path} is damaged, or they do not belong together",
            )
        yield result


def _read_at_once(first: Iterator[Tensor], second: Iterator[Tensor]) -> Iterator[tuple[Tensor | None, Tensor]]:
    """Pair the pieces of two files, each read and compared with its checksum beside the other; the first may end."""
    with ThreadPoolExecutor(1) as thread:
        while True:
            left = thread.submit(next, first, None)
            right = next(second, None)
            if right is None:
                left.result()
                return
            yield left.result(), right


def _padded(piece: Tensor | None, like: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the base's piece as long as the other's."""
    if piece is not None and len(piece) == len(like):
        return piece.to(dtype)
    padded = torch.zeros(len(like), dtype=dtype)
    if piece is not None:
        padded[: len(piece)] = piece.to(dtype)
    return padded


def _small_files(plan: Plan) -> tuple[dict[str, bytes], list[str]]:
    """Make the configuration and tokenizer: the delta's or model's own, or the base's where it has none; mended."""
    folders = (plan.other.path, plan.base.path)
    files, notes = _tokenizer(folders)
    for name in _CONFIG_FILES:
        folder = next((folder for folder in folders if (folder / name).is_file()), None)
        if folder is None:
            continue
        config, mends = mended_ids(_read(folder, name), name)
        notes += mends
        if name == "config.json":
            rows = plan.other.shape(EMBEDDINGS)[0]
            if config.get("vocab_size") != rows:
                notes.append(f"config.json said vocab_size {config.get('vocab_size')}, the model has {rows} rows")
            config |= {"vocab_size": rows, "torch_dtype": str(_table(plan).dtype).removeprefix("torch.")}
            config.pop("_name_or_path", None)
        files[name] = json_bytes(config)
    if "config.json" not in files:
        raise WeightsError(
            f"neither {plan.base.path} nor {plan.other.path} has a config.json", "fetch the small files of the folders"
        )
    return files, notes


def _tokenizer(folders: tuple[Path, Path]) -> tuple[dict[str, bytes], list[str]]:
    """Take the delta's tokenizer, as the original tool does since it writes a right one; else the base's."""
    other, base = folders
    try:
        mended = mended_tokenizer(other)
    except WeightsError:
        if any((other / name).is_file() for name in ("tokenizer.model", "tokenizer.json")):
            raise  # it has one, and it is broken
        mended = mended_tokenizer(base)
        mended.notes.append(f"{other} has no tokenizer, it is that of {base}")
    return dict(mended.files), list(mended.notes)


def _table(plan: Plan) -> Entry:
    return next(entry for entry in plan.entries if entry.name == EMBEDDINGS)


def _read(folder: Path, name: str) -> dict[str, Any]:
    if name == "config.json":
        return read_config(folder)
    path = folder / name
    try:
        with storing(path, doing="read"):
            content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path} cannot be read as JSON", "fetch it again") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{path} holds no keys", "fetch it again")
    return content
