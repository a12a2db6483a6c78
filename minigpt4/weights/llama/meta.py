"""Meta's own LLaMA files to a folder in transformers' format.

Meta's `consolidated.00.pth`, `.01.pth`, ... each hold a slice of every matrix along one side; `params.json` says the
rest. The slices are joined, and the rows of the query and key matrices are reordered: Meta rotates neighbouring
pairs of numbers by their position, transformers rotates halves.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
from minigpt4.weights.llama.tokenizer import VOCABULARY_FILE, mended_tokenizer

PARAMS_FILE = "params.json"
DTYPE = torch.float16
"""What converters write, and what deltas were made from."""

_LLAMA_2_EPSILON = 1e-5

_ROWS, _COLUMNS, _WHOLE = 0, 1, None
# Meta's name, our name, and the side along which the parts lie.
_NAMES: dict[str, tuple[str, int | None]] = {
    "tok_embeddings.weight": ("model.embed_tokens.weight", _COLUMNS),
    "attention.wq.weight": ("self_attn.q_proj.weight", _ROWS),
    "attention.wk.weight": ("self_attn.k_proj.weight", _ROWS),
    "attention.wv.weight": ("self_attn.v_proj.weight", _ROWS),
    "attention.wo.weight": ("self_attn.o_proj.weight", _COLUMNS),
    "feed_forward.w1.weight": ("mlp.gate_proj.weight", _ROWS),
    "feed_forward.w2.weight": ("mlp.down_proj.weight", _COLUMNS),
    "feed_forward.w3.weight": ("mlp.up_proj.weight", _ROWS),
    "attention_norm.weight": ("input_layernorm.weight", _WHOLE),
    "ffn_norm.weight": ("post_attention_layernorm.weight", _WHOLE),
    "norm.weight": ("model.norm.weight", _WHOLE),
    "output.weight": ("lm_head.weight", _ROWS),
}
_LAYER = re.compile(r"layers\.(\d+)\.(.+)")


@dataclass(frozen=True)
class _Origin:
    """Where a tensor comes from: Meta's name, the side its parts lie along, and its heads if rows are reordered."""

    name: str
    side: int | None
    heads: int | None


def from_meta(
    source: Path,
    target: Path,
    *,
    tokenizer: Path | None = None,
    file_format: Format = "safetensors",
    shard_bytes: int = SHARD_BYTES,
    report: Report | None = None,
) -> list[str]:
    """Convert Meta's files; return sentences for the user.

    Args:
        source: The folder with `consolidated.*.pth` and `params.json`.
        target: The folder to appear, whole or not at all.
        tokenizer: `tokenizer.model`; None looks for it in `source` and in the folder above.
        file_format: `safetensors` or `bin`.
        shard_bytes: Size of a weight file.
        report: Called with the progress of the writing.

    Raises:
        UsageError: A path that cannot be meant.
        WeightsError: A file is missing, damaged, hostile, or does not fit the others.
        StorageError: The target exists, or there is no room for it.
    """
    if not source.is_dir():
        raise UsageError(f"--input {source} is not a folder", "name the folder that holds consolidated.00.pth")
    refuse_existing(target, overwrite=False)
    params = _params(source)
    parts = _open_parts(source)
    heads = _sizes(source, params, parts)
    entries, origins = _plan(source, parts, heads)
    files = mended_tokenizer(_tokenizer_folder(source, tokenizer)).files
    config, notes = _config(params, entries, heads)
    small = {
        **files,
        "config.json": json_bytes(config),
        "generation_config.json": json_bytes({"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}),
    }
    kept = write_model(
        target,
        entries,
        lambda entry: _pieces(parts, origins[entry.name]),
        small,
        sources={"from-meta": [path for part in parts for path in part.files]},
        file_format=file_format,
        shard_bytes=shard_bytes,
        report=report,
    )
    if kept:
        notes.append(kept_note(kept))
    return notes


def _params(source: Path) -> dict[str, Any]:
    path = source / PARAMS_FILE
    with storing(path, doing="read"):
        if not path.is_file():
            raise WeightsError(f"{path} is missing", "copy it there: it comes with Meta's files of this size")
    params = read_json_object(path, WeightsError, "copy it again")
    for key, kind in (("dim", int), ("n_heads", int), ("n_layers", int), ("norm_eps", float)):
        value = params.get(key)
        if type(value) is not kind or value <= 0:
            raise WeightsError(f"{path} has no {key}, or none that makes sense", "copy it again")
    return params


def _open_parts(source: Path) -> list[TensorFiles]:
    paths = sorted(source.glob("consolidated.*.pth"))
    if not paths:
        raise WeightsError(f"{source} holds no consolidated.*.pth", "name the folder that holds consolidated.00.pth")
    for number, path in enumerate(paths):
        if path.name != f"consolidated.{number:02}.pth":
            raise WeightsError(f"{source / f'consolidated.{number:02}.pth'} is missing", "copy it there")
    parts = [open_tensors(path) for path in paths]
    for part in parts[1:]:
        different = set(part.names()) ^ set(parts[0].names())
        if different:
            raise WeightsError(
                f"{part.path.name} and {parts[0].path.name} in {source} do not both hold the tensor {min(different)}",
                "copy the files again: they are of different models",
            )
    return parts


def _sizes(source: Path, params: dict[str, Any], parts: Sequence[TensorFiles]) -> tuple[int, int]:
    """Check the parts against `params.json`; return the heads of queries, and of keys and values."""
    if "tok_embeddings.weight" not in parts[0]:
        raise WeightsError(f"{parts[0].path} has no tensor tok_embeddings.weight", "use Meta's own LLaMA files")
    width = sum(part.shape("tok_embeddings.weight")[-1] for part in parts)
    if width != params["dim"]:
        share = parts[0].shape("tok_embeddings.weight")[-1]
        count = params["dim"] // share if share else 0
        raise WeightsError(
            f"the {len(parts)} files consolidated.*.pth in {source} are together {width} wide, params.json says "
            f"{params['dim']}",
            f"copy all {count} files there" if count > len(parts) else "copy the params.json of this size",
        )
    heads, kv_heads = params["n_heads"], params.get("n_kv_heads") or params["n_heads"]
    if not isinstance(kv_heads, int) or kv_heads <= 0 or params["dim"] % heads or heads % kv_heads:
        raise WeightsError(f"{source / PARAMS_FILE} has numbers of heads that do not divide its dim", "copy it again")
    return heads, kv_heads


def _plan(source: Path, parts: Sequence[TensorFiles], heads: tuple[int, int]) -> tuple[list[Entry], dict[str, _Origin]]:
    """Say what every tensor becomes; a name that is not known is an error."""
    entries, origins = [], {}
    for name in parts[0]:
        if name.endswith("rope.freqs"):
            continue
        match = _LAYER.fullmatch(name)
        known = _NAMES.get(match[2] if match else name)
        if known is None:
            raise WeightsError(f"{source} holds a tensor {name}, which LLaMA does not have", "use Meta's LLaMA files")
        ours, side = known
        new = f"model.layers.{match[1]}.{ours}" if match else ours
        shape = _joined_shape(source, parts, name, side)
        reordered = {"q_proj": heads[0], "k_proj": heads[1]}
        turned = next((count for key, count in reordered.items() if key in ours), None)
        if turned is not None and (len(shape) != 2 or shape[0] % (2 * turned)):
            raise WeightsError(f"the tensor {name} has {shape[0]} rows for {turned} heads", "copy params.json again")
        entries.append(Entry(new, DTYPE, shape))
        origins[new] = _Origin(name, side, turned)
    return entries, origins


def _joined_shape(source: Path, parts: Sequence[TensorFiles], name: str, side: int | None) -> tuple[int, ...]:
    shapes = [part.shape(name) for part in parts]
    rest = {shape[:side] + shape[side + 1 :] if side is not None else shape for shape in shapes}
    if len(rest) != 1 or (side is not None and len(shapes[0]) != 2):
        raise WeightsError(
            f"the parts of the tensor {name} in {source} do not fit together",
            "copy the files again: they are of different models",
        )
    if side is None:
        return shapes[0]
    total = sum(shape[side] for shape in shapes)
    return (total, shapes[0][1]) if side == _ROWS else (shapes[0][0], total)


def _pieces(parts: Sequence[TensorFiles], origin: _Origin) -> Iterator[Tensor]:
    if origin.side is None:
        tensor = parts[0].read(origin.name)
    else:
        tensor = torch.cat([part.read(origin.name) for part in parts], dim=origin.side)
    if origin.heads is not None:
        tensor = halves_from_pairs(tensor, origin.heads)
    flat = tensor.flatten()
    for piece in flat.split(PIECE_BYTES // DTYPE.itemsize):
        yield piece.to(DTYPE)


def halves_from_pairs(weight: Tensor, heads: int) -> Tensor:
    """Reorder a query or key matrix from neighbouring pairs to halves.

    Args:
        weight: `(heads * size, width)`, in each head the rows of a pair next to each other.
        heads: Number of heads.

    Returns:
        The same rows, in each head the first of every pair, then the second of every pair.
    """
    rows, width = weight.shape
    return weight.view(heads, rows // heads // 2, 2, width).transpose(1, 2).reshape(rows, width)


def _tokenizer_folder(source: Path, tokenizer: Path | None) -> Path:
    if tokenizer is not None:
        folder = tokenizer if tokenizer.is_dir() else tokenizer.parent
        if not (folder / VOCABULARY_FILE).is_file():
            raise UsageError(f"--tokenizer {tokenizer} is not a {VOCABULARY_FILE}", "name Meta's tokenizer.model")
        return folder
    for folder in (source, source.absolute().parent):
        if (folder / VOCABULARY_FILE).is_file():
            return folder
    raise WeightsError(f"{VOCABULARY_FILE} is neither in {source} nor in the folder above", "name it: --tokenizer FILE")


def _config(
    params: dict[str, Any], entries: Sequence[Entry], heads: tuple[int, int]
) -> tuple[dict[str, Any], list[str]]:
    shapes = {entry.name: entry.shape for entry in entries}
    layers = {name.split(".")[2] for name in shapes if name.startswith("model.layers.")}
    needed = ["model.norm.weight", "lm_head.weight", "model.layers.0.mlp.gate_proj.weight"]
    missing = [name for name in needed if name not in shapes]
    if missing or len(layers) != params["n_layers"]:
        what = missing[0] if missing else f"{params['n_layers'] - len(layers)} of {params['n_layers']} layers"
        raise WeightsError(f"Meta's files lack {what}", "copy them again")
    is_llama_2 = params["norm_eps"] == _LLAMA_2_EPSILON
    context = 4096 if is_llama_2 else 2048  # Meta's files do not say
    config = {
        "architectures": ["LlamaForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": params["dim"],
        "initializer_range": 0.02,
        "intermediate_size": shapes["model.layers.0.mlp.gate_proj.weight"][0],
        "max_position_embeddings": context,
        "model_type": "llama",
        "num_attention_heads": heads[0],
        "num_hidden_layers": params["n_layers"],
        "num_key_value_heads": heads[1],
        "pad_token_id": 0,
        "rms_norm_eps": params["norm_eps"],
        "rope_theta": params.get("rope_theta", 10000.0),
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "use_cache": True,
        "vocab_size": shapes["model.embed_tokens.weight"][0],
    }
    name = "Llama-2" if is_llama_2 else "LLaMA"
    return config, [f"a {name} by its epsilon {params['norm_eps']}, so it reads {context} tokens"]
