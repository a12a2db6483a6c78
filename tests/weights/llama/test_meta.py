"""Meta's files become a model in transformers' format that computes what Meta's model computes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from minigpt4.errors import MiniGPT4Error
from minigpt4.weights.files.atomic import verify_folder
from minigpt4.weights.files.tensor_files import open_tensors
from minigpt4.weights.llama.meta import from_meta, halves_from_pairs
from tests.weights.llama.delta_files import GOLDEN, present

WIDTH, HEADS, LAYERS, MLP, ROWS = 16, 4, 2, 24, 400
SIZE = WIDTH // HEADS
COLUMNS = ("tok_embeddings.weight", "wo.weight", "w2.weight")
PARAMS = {"dim": WIDTH, "n_heads": HEADS, "n_layers": LAYERS, "norm_eps": 1e-6, "vocab_size": -1, "multiple_of": 8}


def meta_tensors(kv_heads: int = HEADS) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes: dict[str, tuple[int, ...]] = {"tok_embeddings.weight": (ROWS, WIDTH), "norm.weight": (WIDTH,)}
    for layer in range(LAYERS):
        start = f"layers.{layer}"
        shapes |= {f"{start}.attention.{name}.weight": (WIDTH, WIDTH) for name in ("wq", "wo")}
        shapes |= {f"{start}.attention.{name}.weight": (kv_heads * SIZE, WIDTH) for name in ("wk", "wv")}
        shapes |= {f"{start}.feed_forward.{name}.weight": (MLP, WIDTH) for name in ("w1", "w3")}
        shapes |= {f"{start}.feed_forward.w2.weight": (WIDTH, MLP), f"{start}.attention_norm.weight": (WIDTH,)}
        shapes |= {f"{start}.ffn_norm.weight": (WIDTH,)}
    shapes["output.weight"] = (ROWS, WIDTH)
    return {
        name: (torch.randn(shape, generator=generator) * 0.3 + (len(shape) == 1)).half()
        for name, shape in shapes.items()
    }


def write_meta(folder: Path, *, parts: int = 1, kv_heads: int = HEADS, **params: object) -> dict[str, Tensor]:
    """Write a model as Meta publishes it, in `parts` files."""
    folder.mkdir()
    tensors = meta_tensors(kv_heads)
    for part in range(parts):
        content = {}
        for name, tensor in tensors.items():
            if tensor.ndim == 1:
                content[name] = tensor
            else:
                content[name] = tensor.chunk(parts, dim=1 if name.endswith(COLUMNS) else 0)[part].clone()
        content["rope.freqs"] = torch.ones(SIZE // 2)
        torch.save(content, folder / f"consolidated.{part:02}.pth")
    more: dict[str, Any] = {"n_kv_heads": kv_heads} if kv_heads != HEADS else {}
    (folder / "params.json").write_text(json.dumps({**PARAMS, **more, **params}), encoding="utf-8")
    (folder / "tokenizer.model").write_bytes((GOLDEN / "base" / "tokenizer.model").read_bytes())
    return tensors


def meta_forward(weights: dict[str, Tensor], ids: Tensor, kv_heads: int) -> Tensor:
    """Compute the logits as Meta's code does: neighbouring pairs are one complex number that is turned."""
    weights = {name: tensor.float() for name, tensor in weights.items()}
    length = len(ids)
    angles = torch.outer(torch.arange(length).float(), 10000.0 ** (-torch.arange(0, SIZE, 2).float() / SIZE))
    turns = torch.polar(torch.ones_like(angles), angles)[:, None]
    hidden = weights["tok_embeddings.weight"][ids]

    def norm(x: Tensor, name: str) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * weights[name]

    def turned(x: Tensor) -> Tensor:
        return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * turns).flatten(-2)

    for layer in range(LAYERS):
        start = f"layers.{layer}"
        x = norm(hidden, f"{start}.attention_norm.weight")
        query, key, value = (x @ weights[f"{start}.attention.{name}.weight"].T for name in ("wq", "wk", "wv"))
        query, key = (turned(part.unflatten(-1, (-1, SIZE))) for part in (query, key))
        key, value = (
            part.repeat_interleave(HEADS // kv_heads, dim=1) for part in (key, value.unflatten(-1, (-1, SIZE)))
        )
        scores = torch.einsum("qhd,khd->hqk", query, key) / SIZE**0.5
        scores = scores + torch.full((length, length), float("-inf")).triu(1)
        mixed = torch.einsum("hqk,khd->qhd", scores.softmax(-1), value).flatten(1)
        hidden = hidden + mixed @ weights[f"{start}.attention.wo.weight"].T
        x = norm(hidden, f"{start}.ffn_norm.weight")
        gate, up = (x @ weights[f"{start}.feed_forward.{name}.weight"].T for name in ("w1", "w3"))
        hidden = hidden + (torch.nn.functional.silu(gate) * up) @ weights[f"{start}.feed_forward.w2.weight"].T
    return norm(hidden, "norm.weight") @ weights["output.weight"].T


@pytest.mark.parametrize(("parts", "kv_heads"), [(1, 4), (2, 4), (4, 4), (2, 2)])
def test_converted_model_computes_what_metas_computes(parts: int, kv_heads: int, tmp_path: Path) -> None:
    tensors = write_meta(tmp_path / "meta", parts=parts, kv_heads=kv_heads)

    from_meta(tmp_path / "meta", tmp_path / "llama", shard_bytes=4000)

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "llama", dtype=torch.float32)
    ids = torch.tensor([1, 5, 77, 300, 12, 9])
    with torch.no_grad():
        actual = model(ids[None]).logits[0]
    torch.testing.assert_close(actual, meta_forward(tensors, ids, kv_heads), atol=2e-5, rtol=1e-4)
    verify_folder(tmp_path / "llama")


def test_parts_are_joined_bit_for_bit_and_the_tokenizer_is_made(tmp_path: Path) -> None:
    tensors = write_meta(tmp_path / "meta", parts=4)

    notes = from_meta(tmp_path / "meta", tmp_path / "llama", file_format="bin")

    ours = open_tensors(tmp_path / "llama")
    for name, original in {
        "model.embed_tokens.weight": "tok_embeddings.weight",
        "model.layers.1.mlp.down_proj.weight": "layers.1.feed_forward.w2.weight",
        "model.layers.0.self_attn.o_proj.weight": "layers.0.attention.wo.weight",
        "model.layers.0.self_attn.v_proj.weight": "layers.0.attention.wv.weight",
        "lm_head.weight": "output.weight",
    }.items():
        assert torch.equal(ours.read(name), tensors[original]), name
    assert len(ours) == len(tensors)
    assert notes == ["a LLaMA by its epsilon 1e-06, so it reads 2048 tokens"]
    written = set(present(tmp_path / "llama"))
    assert {"tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"} <= written


def test_rows_of_a_pair_go_to_the_two_halves_of_their_head() -> None:
    weight = torch.arange(8.0)[:, None]  # two heads of two pairs

    assert halves_from_pairs(weight, 2).flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_llama_2_is_told_by_its_epsilon(tmp_path: Path) -> None:
    write_meta(tmp_path / "meta", norm_eps=1e-5)

    from_meta(tmp_path / "meta", tmp_path / "llama")

    assert json.loads((tmp_path / "llama" / "config.json").read_bytes())["max_position_embeddings"] == 4096


def test_tokenizer_beside_the_sizes_folders_is_found(tmp_path: Path) -> None:
    write_meta(tmp_path / "7B")
    (tmp_path / "7B" / "tokenizer.model").rename(tmp_path / "tokenizer.model")

    from_meta(tmp_path / "7B", tmp_path / "llama")

    assert (tmp_path / "llama" / "tokenizer.model").is_file()


def missing_part(folder: Path) -> None:
    (folder / "consolidated.01.pth").unlink()


def missing_first_part(folder: Path) -> None:
    (folder / "consolidated.00.pth").unlink()


def no_params(folder: Path) -> None:
    (folder / "params.json").unlink()


def wrong_params(folder: Path) -> None:
    (folder / "params.json").write_text('{"dim": "wide"}', encoding="utf-8")


def no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.model").unlink()


def cut_short(folder: Path) -> None:
    path = folder / "consolidated.01.pth"
    path.write_bytes(path.read_bytes()[:5000])


def parts_of_two_models(folder: Path) -> None:
    torch.save({"tok_embeddings.weight": torch.ones(ROWS, WIDTH // 2).half()}, folder / "consolidated.01.pth")


def other_tensor(folder: Path) -> None:
    for number in (0, 1):
        path = folder / f"consolidated.{number:02}.pth"
        torch.save(torch.load(path, weights_only=True) | {"layers.0.lora.weight": torch.ones(2)}, path)


@pytest.mark.parametrize(
    ("damage", "message", "hint"),
    [
        (missing_part, r"the 1 files consolidated.*are together 8 wide, params\.json says 16", "copy all 2 files"),
        (missing_first_part, r"consolidated\.00\.pth is missing", "copy it there"),
        (no_params, r"params\.json is missing", "copy it there"),
        (wrong_params, r"params\.json has no dim, or none that makes sense", "copy it again"),
        (no_tokenizer, r"tokenizer\.model is neither in", "--tokenizer FILE"),
        (cut_short, r"consolidated\.01\.pth was not opened", "download the file again"),
        (parts_of_two_models, "do not both hold the tensor", "different models"),
        (other_tensor, r"holds a tensor layers\.0\.lora\.weight, which LLaMA does not have", "Meta's LLaMA files"),
    ],
)
def test_files_that_do_not_fit_are_refused_before_anything_is_written(
    damage: Any,  # noqa: ANN401
    message: str,
    hint: str,
    tmp_path: Path,
) -> None:
    write_meta(tmp_path / "meta", parts=2)
    damage(tmp_path / "meta")
    before = present(tmp_path)

    with pytest.raises(MiniGPT4Error, match=message) as caught:
        from_meta(tmp_path / "meta", tmp_path / "llama")

    assert hint in caught.value.hint
    assert present(tmp_path) == before
