"""Adding a delta to its base, and making one: tensor by tensor, piece by piece, whatever the model's size.

A delta is the difference of a published model and the base it was trained from. Two kinds exist for Vicuna: v0, whose
tables of words have one row more than LLaMA's, for the token `[PAD]`; and v1.1, with LLaMA's rows.

`plan_delta` finds every mistake from the files' lists, and from samples where lists cannot tell a model from a delta,
before a byte is written. Memory holds a few pieces, never a tensor. Interrupted, the same call goes on with the file it
was at.
"""

import math
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from minigpt4.errors import UsageError, WeightsError
from minigpt4.text import read_json_object
from minigpt4.weights.files.atomic import refuse_existing
from minigpt4.weights.files.disk import storing
from minigpt4.weights.files.model_writer import (
    PIECE_BYTES,
    SHARD_BYTES,
    Entry,
    Format,
    Report,
    json_bytes,
    kept_note,
    write_model,
)
from minigpt4.weights.files.tensor_files import TensorFiles, open_tensors
from minigpt4.weights.llama.tokenizer import mended_ids, mended_tokenizer
from minigpt4.weights.llama.version import (
    EMBEDDINGS,
    LARGEST_NORM_OF_A_DELTA,
    LAST_NORM,
    LLAMA_ROWS,
    SIZE_NAMES,
    VICUNA_V0_ROWS,
    is_delta,
    tell_version,
)
from minigpt4.weights.original.sizes import KNOWN_PROJECTIONS, QFORMER_WIDTH

TABLES = (EMBEDDINGS, "lm_head.weight")
"""The tensors with a row for each word."""

FREQUENCIES = "rotary_emb.inv_freq"
"""Numbers that follow from the configuration; some folders hold them as tensors, others do not."""

MERGED_FROM = 0.5
"""A model holds none of the delta that was made from it; one that the delta was added to holds it once."""

SAMPLED_TENSORS, SAMPLED_BLOCKS, BLOCK_NUMBERS = 24, 8, 8192

Operation = Literal["add", "subtract"]
Precision = Literal["float16", "bfloat16", "float32"]


@dataclass
class Plan:
    """What is to be done: add the `other` folder, a delta, to the base, or subtract the base from it, a model."""

    operation: Operation
    base: TensorFiles
    other: TensorFiles
    entries: list[Entry]
    version: str


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
        report: Called with the progress of the writing.

    Raises:
        UsageError: Paths that cannot be meant.
        WeightsError: A side is missing, incomplete, damaged or hostile, or does not fit the other; or a sum is not
            finite. All but the last is found before anything is written.
        StorageError: The target exists, or there is no room for it.
    """
    plan = plan_delta("add", base, delta, target, dtype=dtype, trust=trust)
    result = _write(plan, target, file_format, shard_bytes, report)
    rows, base_rows = plan.other.shape(EMBEDDINGS)[0], plan.base.shape(EMBEDDINGS)[0]
    if result.version == "v1.1":
        told = [
            f"the delta is v1.1: {rows} rows, as the base has",
            "no MiniGPT-4 checkpoint was trained with Vicuna v1.1, answers may be garbled; the one for it is v0",
        ]
    else:
        result.template = "vicuna-v0"
        result.checkpoint = KNOWN_PROJECTIONS.get((plan.base.shape(EMBEDDINGS)[1], QFORMER_WIDTH), (None, ""))[0]
        added = f"; the base's {base_rows} count as zeros in the last one" if rows > base_rows else ""
        fitting = result.checkpoint or "a MiniGPT-4 checkpoint of its width"
        told = [
            f"the delta is v0: {rows} rows, the last one for [PAD]{added}",
            f"it goes with the prompt template vicuna-v0 and {fitting}",
        ]
    result.notes = [*told, *result.notes]
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
    """Make the delta that turns a base into a model; the inverse of `apply_delta`, whose options and errors it shares.

    Args:
        base: The folder of the LLaMA.
        model: The folder of the model that was trained from it; its tables may have one row more.
        target: The folder to appear, whole or not at all.
        file_format: `safetensors` or `bin`.
        dtype: Round both sides to this type first.
        shard_bytes: Size of a weight file.
        report: Called with the progress of the writing.
    """
    plan = plan_delta("subtract", base, model, target, dtype=dtype)
    result = _write(plan, target, file_format, shard_bytes, report)
    result.notes.insert(0, f"a delta of {result.version}: {model} less {base}")
    change = [side.read(LAST_NORM).float() for side in (plan.other, plan.base) if LAST_NORM in side]
    if len(change) < 2 or (change[0] - change[1]).mean().abs() >= LARGEST_NORM_OF_A_DELTA:
        result.notes.append(
            f"{model} differs from {base} as unrelated models do: check that it was trained from it; apply-delta takes "
            "this delta only with --trust-files"
        )
    return result


def plan_delta(
    operation: Operation,
    base_path: Path,
    other_path: Path,
    target: Path,
    *,
    dtype: Precision | None = None,
    trust: bool = False,
) -> Plan:
    """Check everything and decide what is done; arguments and errors are those of `apply_delta` and `make_delta`."""
    names = ("--base", "--delta") if operation == "add" else ("--base", "--model")
    _check_paths(dict(zip(names, (base_path, other_path), strict=True)), target)
    base, other = (open_tensors(path) for path in (base_path, other_path))
    for option, side in zip(names, (base, other), strict=True):
        _check_language_model(option, side)
    if not trust:
        _check_roles(operation, base, other)
    _check_names(names, base, other)
    version = _version(operation, base, other)
    _check_shapes(names, base, other)
    entries = [
        Entry(
            name,
            _dtype(names, base, other, name, dtype),
            other.shape(name) if name in other and name in TABLES else base.shape(name),
        )
        for name in base
        if name in other or name.endswith(FREQUENCIES)
    ]
    if not trust and operation == "add":
        _check_unmerged(base, other, [entry.name for entry in entries if len(entry.shape) == 2])
    return Plan(operation, base, other, entries, version)


def _check_paths(sides: dict[str, Path], target: Path) -> None:
    for option, path in sides.items():
        if not path.exists():
            raise UsageError(f"{option} {path} does not exist", _cure_of_path(path))
        if not path.is_dir():
            raise UsageError(f"{option} {path} is a file", "name the folder it lies in")
        if os.path.realpath(path) == os.path.realpath(target):
            raise UsageError(f"--target {target} is the folder of {option}", "name a new folder")
    first, second = (os.path.realpath(path) for path in sides.values())
    if first == second:
        raise UsageError(f"{' and '.join(sides)} are the same folder", "name two")
    refuse_existing(target, overwrite=False)


def _cure_of_path(path: Path) -> str:
    text = str(path)
    if "/path/to" in text or "path_to" in text:
        return "put your own path where the tutorial has a placeholder"
    if text.count("/") == 1 and not text.startswith((".", "/", "~")):
        return f"check the path; a model of the hub must be fetched first: hf download {text} --local-dir DIR"
    return "check the path"


def _check_language_model(option: str, side: TensorFiles) -> None:
    if any(name.endswith((".qweight", ".qzeros", ".weight_scale")) for name in side):
        raise WeightsError(f"{option} {side.path} is quantized", "use the folder with float16 weights")
    for name in TABLES:
        if name not in side:
            raise WeightsError(
                f"{option} {side.path} has no tensor {name}, so it is not a LLaMA or Vicuna folder",
                "name the folder with all files of the model",
            )
        if len(side.shape(name)) != 2:
            raise WeightsError(f"the tensor {name} of {option} {side.path} is not a table", "fetch the folder again")


def _check_roles(operation: Operation, base: TensorFiles, other: TensorFiles) -> None:
    """Tell models from deltas by the last norm's weights."""
    base_is_delta, other_is_delta, adds = is_delta(base), is_delta(other), operation == "add"
    if base_is_delta and adds and not other_is_delta:
        raise WeightsError(
            f"--base {base.path} is a delta and --delta {other.path} is a model", "exchange --base and --delta"
        )
    if base_is_delta:
        raise WeightsError(f"--base {base.path} is a delta, not a model", "give the LLaMA that the delta was made from")
    if adds and not other_is_delta:
        raise WeightsError(
            f"--delta {other.path} is a model, not a delta",
            "if it is a merged Vicuna, use it as it is; otherwise name the folder of the delta; --trust-files takes it "
            "for one all the same",
        )
    if not adds and other_is_delta:
        raise WeightsError(f"--model {other.path} is a delta already", "name the folder of the whole model")


def _check_names(options: Sequence[str], base: TensorFiles, other: TensorFiles) -> None:
    sides = [(options[0], base), (options[1], other)]
    for (option, side), (wanting, lacking) in (sides, sides[::-1]):
        missing = [name for name in side if name not in lacking and not name.endswith(FREQUENCIES)]
        if missing:
            more = f" and {len(missing) - 1} others" if len(missing) > 1 else ""
            raise WeightsError(
                f"{wanting} {lacking.path} lacks the tensor {missing[0]}{more}, which {option} {side.path} has",
                "fetch all files of the folder, and check that both are of one size (7B, 13B)",
            )


def _version(operation: Operation, base: TensorFiles, other: TensorFiles) -> str:
    """Tell the version by the rows, and refuse rows that fit no version."""
    base_rows, rows = base.shape(EMBEDDINGS)[0], other.shape(EMBEDDINGS)[0]
    if rows == base_rows + 1:
        return "v0"
    if rows == base_rows:
        told = tell_version(other.path, other, _read_config(other.path, "config.json"))
        return "v0" if rows == VICUNA_V0_ROWS or told.template == "vicuna-v0" else "v1.1"
    cure = "a delta fits only the LLaMA it was made from: 32000 rows, with a delta of 32000 (v1.1) or 32001 (v0)"
    if rows + 1 == base_rows:
        cure = (
            "give the LLaMA without the row for [PAD] as the base; a base of 32001 rows may be a Vicuna v0 that is "
            "merged already and needs no delta"
        )
    meaning = {LLAMA_ROWS: "LLaMA, or Vicuna v1.1 and later", VICUNA_V0_ROWS: "Vicuna v0, with [PAD]"}
    base_meaning, other_meaning = (meaning.get(number, "no version of Vicuna") for number in (base_rows, rows))
    what = "delta" if operation == "add" else "model"
    raise WeightsError(
        f"the base {base.path} has {base_rows} rows ({base_meaning}) and the {what} {other.path} has {rows} "
        f"({other_meaning})",
        cure,
    )


def _check_shapes(options: Sequence[str], base: TensorFiles, other: TensorFiles) -> None:
    widths = base.shape(EMBEDDINGS)[1], other.shape(EMBEDDINGS)[1]
    if widths[0] != widths[1]:
        known = {width: name for (width, _), name in SIZE_NAMES.items()}
        sizes = [f"{width} ({known[width]})" if width in known else str(width) for width in widths]
        raise WeightsError(
            f"{options[0]} {base.path} is {sizes[0]} wide and {options[1]} {other.path} is {sizes[1]}",
            "both must be of one size",
        )
    rows = base.shape(EMBEDDINGS)[0], other.shape(EMBEDDINGS)[0]
    for name in base:
        if name not in other:
            continue
        shapes = base.shape(name), other.shape(name)
        agree = shapes[0] == shapes[1]
        if name in TABLES:
            agree = (shapes[0][0], shapes[1][0]) == rows and shapes[0][1:] == shapes[1][1:]
        if not agree:
            first, second = (" x ".join(map(str, shape)) or "one number" for shape in shapes)
            raise WeightsError(
                f"the tensor {name} is {first} in {options[0]} {base.path} and {second} in {options[1]} {other.path}",
                "both must be of one size and version",
            )


def _dtype(
    options: Sequence[str], base: TensorFiles, other: TensorFiles, name: str, wanted: Precision | None
) -> torch.dtype:
    here = base.dtype(name)
    if name.endswith(FREQUENCIES):
        return here
    there = other.dtype(name)
    short, other_short = (str(dtype).removeprefix("torch.") for dtype in (here, there))
    if not (here.is_floating_point and there.is_floating_point):
        raise WeightsError(f"the tensor {name} is of the type {short}, expected float16", "use float16 weights")
    if wanted is not None:
        return {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}[wanted]
    if here != there:
        raise WeightsError(
            f"the tensor {name} is {short} in {options[0]} {base.path} and {other_short} in {options[1]} {other.path}",
            "use float16 files on both sides, or let --dtype float16 round them, as the original tool does",
        )
    return here


def _check_unmerged(base: TensorFiles, delta: TensorFiles, names: Sequence[str]) -> None:
    """Refuse a base that holds the delta already, which neither rows nor the last norm tell of a v1.1.

    The weights that a model was trained from have next to nothing in common with the change that training made: their
    product with it is near 0. Where the change was added, the product is that of the change with itself. Both are
    taken over samples, with the standard error of that.
    """
    product = change = size = 0.0
    count = 0
    for name in names[:: math.ceil(len(names) / SAMPLED_TENSORS)]:
        rows = min(base.shape(name)[0], delta.shape(name)[0])  # one of two tables may have a row more
        block = max(1, BLOCK_NUMBERS // max(1, base.shape(name)[1]))
        for first in range(0, rows, max(block, rows // SAMPLED_BLOCKS)):
            taken = min(block, rows - first)
            left, right = (side.stored(name).rows(first, taken).double() for side in (base, delta))
            for side, sample in ((base, left), (delta, right)):
                if not sample.isfinite().all():
                    raise WeightsError(
                        f"the tensor {name} of {side.path} holds numbers that are not finite", "fetch its files again"
                    )
            product, change = product + float(left @ right), change + float(right @ right)
            size, count = size + float(left @ left), count + len(left)
    share = product / change if change else 0.0
    if share > MERGED_FROM and share > 4 * math.sqrt(size / change / count):
        raise WeightsError(
            f"--base {base.path} holds the delta already ({share:.0%} of it, by samples of the weights)",
            "it is merged: use it as it is, or give the LLaMA that the delta was made from; --trust-files adds all the "
            "same",
        )


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
    files, notes = _tokenizer(*folders)
    for name in ("config.json", "generation_config.json"):
        folder = next((folder for folder in folders if (folder / name).is_file()), None)
        if folder is None:
            continue
        config, mends = mended_ids(_read_config(folder, name), name)
        notes += mends
        if name == "config.json":
            table = next(entry for entry in plan.entries if entry.name == EMBEDDINGS)
            if config.get("vocab_size") != table.shape[0]:
                said = f"config.json said vocab_size {config.get('vocab_size')}"
                notes.append(f"{said}, the model has {table.shape[0]} rows")
            config |= {"vocab_size": table.shape[0], "torch_dtype": str(table.dtype).removeprefix("torch.")}
            config.pop("_name_or_path", None)
        files[name] = json_bytes(config)
    if "config.json" not in files:
        raise WeightsError(
            f"neither {plan.base.path} nor {plan.other.path} has a config.json", "fetch the small files of the folders"
        )
    return files, notes


def _tokenizer(other: Path, base: Path) -> tuple[dict[str, bytes], list[str]]:
    """Take the delta's tokenizer, as the original tool does since it writes a right one; else the base's."""
    try:
        mended = mended_tokenizer(other)
    except WeightsError:
        if any((other / name).is_file() for name in ("tokenizer.model", "tokenizer.json")):
            raise  # it has one, and it is broken
        mended = mended_tokenizer(base)
        mended.notes.append(f"{other} has no tokenizer, it is that of {base}")
    return dict(mended.files), list(mended.notes)


def _read_config(folder: Path, name: str) -> dict[str, Any]:
    """Read a configuration; empty where there is none."""
    path = folder / name
    with storing(path, doing="read"):
        if not path.is_file():
            return {}
    config = read_json_object(path, WeightsError, "fetch it again")
    if "auto_map" in config:
        raise WeightsError(
            f"{path} wants code of the model's publisher to be run, which is never done", "remove auto_map"
        )
    return config
