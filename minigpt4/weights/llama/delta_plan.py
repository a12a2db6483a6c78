"""What adding a delta to a base will do: decided, and every mistake found, before a byte is written.

A delta is the difference of a published model and the base it was trained from, tensor by tensor. Two kinds exist for
Vicuna: v0, whose tables of words have one row more than LLaMA's, for the token `[PAD]`; and v1.1, with LLaMA's rows.

Looks at files' lists only, and at samples of the numbers where lists cannot tell a delta from a model.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from minigpt4.errors import UsageError, WeightsError
from minigpt4.weights.files.atomic import refuse_existing
from minigpt4.weights.files.disk import storing
from minigpt4.weights.files.shard_files import Entry
from minigpt4.weights.files.tensors import TensorFiles, open_tensors
from minigpt4.weights.llama.delta_samples import share_of_delta
from minigpt4.weights.llama.version import EMBEDDINGS, LLAMA_ROWS, VICUNA_V0_ROWS, is_delta, tell_version

TABLES = (EMBEDDINGS, "lm_head.weight")
"""The tensors with a row for each word."""

MERGED_FROM = 0.5
"""A model holds none of the delta that was made from it; one that the delta was added to holds it once."""

FREQUENCIES = "rotary_emb.inv_freq"
"""Numbers that follow from the configuration, which some folders hold as tensors and others do not."""

MAX_CONFIG_BYTES = 2**20

Operation = Literal["add", "subtract"]


@dataclass
class Plan:
    """What is to be done.

    Args:
        operation: `add`: base and delta to a model; `subtract`: a model and its base to a delta.
        base: The base.
        other: The delta, or the model.
        entries: What will be written, in the base's order.
        version: `v0` or `v1.1`.
        width: The model's width.
        notes: Sentences for the user.
    """

    operation: Operation
    base: TensorFiles
    other: TensorFiles
    entries: list[Entry]
    version: str
    width: int
    notes: list[str] = field(default_factory=list)

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensors to be written."""
        return sum(entry.num_bytes for entry in self.entries)


def plan_delta(
    operation: Operation,
    base_path: Path,
    other_path: Path,
    target: Path,
    *,
    dtype: torch.dtype | None = None,
    trust: bool = False,
) -> Plan:
    """Check everything and decide what is done.

    Args:
        operation: What is wanted.
        base_path: The base's folder.
        other_path: The delta's folder, or the model's.
        target: The folder to be.
        dtype: Round both sides to this type first, as the original tool does to float16; None wants them of one type.
        trust: Leave out what is told from samples of the numbers.

    Raises:
        UsageError: Paths that cannot be meant.
        WeightsError: A side that is missing, incomplete, damaged or hostile, or that does not fit the other.
        StorageError: The target exists already, or a side cannot be read.
    """
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
        Entry(name, _dtype(names, base, other, name, dtype), _shape(base, other, name))
        for name in _written(base, other)
    ]
    plan = Plan(operation, base, other, entries, version, base.shape(EMBEDDINGS)[1])
    if not trust and operation == "add":
        _check_unmerged(plan)
    return plan


def read_config(folder: Path) -> dict[str, Any]:
    """Read a folder's `config.json`; empty where there is none.

    Raises:
        WeightsError: It is no configuration, or one that wants code to be run.
        StorageError: It cannot be read.
    """
    path = folder / "config.json"
    with storing(path, doing="read"):
        if not path.is_file():
            return {}
        text = path.read_bytes()[: MAX_CONFIG_BYTES + 1]
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path} cannot be read as JSON", "fetch it again") from error
    if not isinstance(config, dict):
        raise WeightsError(f"{path} holds no keys", "fetch it again")
    if "auto_map" in config:
        raise WeightsError(
            f"{path} wants code of the model's publisher to be run, which is never done", "remove auto_map"
        )
    return config


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
    base_is_delta, other_is_delta = is_delta(base), is_delta(other)
    wants_delta = operation == "add"
    if base_is_delta and wants_delta and not other_is_delta:
        raise WeightsError(
            f"--base {base.path} is a delta and --delta {other.path} is a model", "exchange --base and --delta"
        )
    if base_is_delta:
        raise WeightsError(f"--base {base.path} is a delta, not a model", "give the LLaMA that the delta was made from")
    if wants_delta and not other_is_delta:
        raise WeightsError(
            f"--delta {other.path} is a model, not a delta",
            "if it is a merged Vicuna, use it as it is; otherwise name the folder of the delta; --trust-files takes it "
            "for one all the same",
        )
    if not wants_delta and other_is_delta:
        raise WeightsError(f"--model {other.path} is a delta already", "name the folder of the whole model")


def _check_names(options: Sequence[str], base: TensorFiles, other: TensorFiles) -> None:
    for (option, side), (wanting, lacking) in (
        ((options[0], base), (options[1], other)),
        ((options[1], other), (options[0], base)),
    ):
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
        told = tell_version(other.path, other, read_config(other.path))
        return "v0" if rows == VICUNA_V0_ROWS or told.template == "vicuna-v0" else "v1.1"
    what = "the delta" if operation == "add" else "the model"
    if rows + 1 == base_rows:
        cure = (
            "give the LLaMA without the row for [PAD] as the base; a base of 32001 rows may be a Vicuna v0 that is "
            "merged already and needs no delta"
        )
    else:
        cure = "a delta fits only the LLaMA it was made from: 32000 rows, with a delta of 32000 (v1.1) or 32001 (v0)"
    raise WeightsError(
        f"the base {base.path} has {base_rows} rows ({_meaning(base_rows)}) and {what} {other.path} has {rows} "
        f"({_meaning(rows)})",
        cure,
    )


def _meaning(rows: int) -> str:
    if rows == LLAMA_ROWS:
        return "LLaMA, or Vicuna v1.1 and later"
    if rows == VICUNA_V0_ROWS:
        return "Vicuna v0, with [PAD]"
    return "no version of Vicuna"


def _check_shapes(options: Sequence[str], base: TensorFiles, other: TensorFiles) -> None:
    widths = base.shape(EMBEDDINGS)[1], other.shape(EMBEDDINGS)[1]
    if widths[0] != widths[1]:
        sizes = [f"{width} ({_size(width)})" if _size(width) else str(width) for width in widths]
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
            raise WeightsError(
                f"the tensor {name} is {_by(shapes[0])} in {options[0]} {base.path} and {_by(shapes[1])} in "
                f"{options[1]} {other.path}",
                "both must be of one size and version",
            )


def _size(width: int) -> str:
    return {4096: "7B", 5120: "13B", 6656: "30B", 8192: "65B"}.get(width, "")


def _by(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape)) or "one number"


def _written(base: TensorFiles, other: TensorFiles) -> list[str]:
    """List what is written: all that both have, and the base's frequencies even where the other lacks them."""
    return [name for name in base if name in other or name.endswith(FREQUENCIES)]


def _shape(base: TensorFiles, other: TensorFiles, name: str) -> tuple[int, ...]:
    return other.shape(name) if name in other and name in TABLES else base.shape(name)


def _dtype(
    options: Sequence[str], base: TensorFiles, other: TensorFiles, name: str, wanted: torch.dtype | None
) -> torch.dtype:
    here = base.dtype(name)
    if name.endswith(FREQUENCIES):
        return here
    there = other.dtype(name)
    if not (here.is_floating_point and there.is_floating_point):
        raise WeightsError(f"the tensor {name} is of the type {_short(here)}, expected float16", "use float16 weights")
    if wanted is not None:
        return wanted
    if here != there:
        raise WeightsError(
            f"the tensor {name} is {_short(here)} in {options[0]} {base.path} and {_short(there)} in {options[1]} "
            f"{other.path}",
            "use float16 files on both sides, or let --dtype float16 round them, as the original tool does",
        )
    return here


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check_unmerged(plan: Plan) -> None:
    """Refuse a base that holds the delta already."""
    names = [entry.name for entry in plan.entries if len(entry.shape) == 2]
    share, error = share_of_delta(plan.base, plan.other, names)
    if share > MERGED_FROM and share > 4 * error:
        raise WeightsError(
            f"--base {plan.base.path} holds the delta already ({share:.0%} of it, by samples of the weights)",
            "it is merged: use it as it is, or give the LLaMA that the delta was made from; --trust-files adds all the "
            "same",
        )
