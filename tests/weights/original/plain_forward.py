"""The original's forward pass from its own files' tensors, written plainly; no class of the package or the library."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

Weights = Mapping[str, Tensor]


def attention(query: Tensor, key: Tensor, value: Tensor, heads: int, mask: Tensor | float = 0.0) -> Tensor:
    """Let `(batch, length, width)` attend with so many heads."""
    size = query.shape[-1] // heads
    query, key, value = (t.unflatten(-1, (heads, size)).transpose(1, 2) for t in (query, key, value))
    weights = (query @ key.transpose(-1, -2) / math.sqrt(size) + mask).softmax(-1)
    return (weights @ value).transpose(1, 2).flatten(2)


def linear(weights: Weights, name: str, inputs: Tensor) -> Tensor:
    return functional.linear(inputs, weights[f"{name}.weight"], weights.get(f"{name}.bias"))


def norm(weights: Weights, name: str, inputs: Tensor, epsilon: float) -> Tensor:
    return functional.layer_norm(inputs, inputs.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], epsilon)


def positions(table: Tensor, grid: int) -> Tensor:
    """Fit the table of positions to a grid."""
    side = math.isqrt(table.shape[1] - 1)
    if side == grid:
        return table
    picture = table[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
    picture = functional.interpolate(picture, size=(grid, grid), mode="bicubic", align_corners=False)
    return torch.cat([table[:, :1], picture.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)


def vision_tokens(weights: Weights, pixels: Tensor, heads: int, blocks: int) -> Tensor:
    """The class token and the patches after so many blocks, without a last norm."""
    kernel = weights["patch_embed.proj.weight"]
    patches = functional.conv2d(pixels, kernel, weights["patch_embed.proj.bias"], stride=kernel.shape[-1])
    tokens = torch.cat([weights["cls_token"].expand(len(pixels), -1, -1), patches.flatten(2).transpose(1, 2)], dim=1)
    tokens = tokens + positions(weights["pos_embed"], patches.shape[-1])
    for block in (f"blocks.{number}" for number in range(blocks)):
        query, value = weights[f"{block}.attn.q_bias"], weights[f"{block}.attn.v_bias"]
        bias = torch.cat([query, torch.zeros_like(query), value])
        inputs = norm(weights, f"{block}.norm1", tokens, 1e-6)
        query, key, value = functional.linear(inputs, weights[f"{block}.attn.qkv.weight"], bias).chunk(3, -1)
        tokens = tokens + linear(weights, f"{block}.attn.proj", attention(query, key, value, heads))
        inputs = linear(weights, f"{block}.mlp.fc1", norm(weights, f"{block}.norm2", tokens, 1e-6))
        tokens = tokens + linear(weights, f"{block}.mlp.fc2", functional.gelu(inputs))
    return tokens


def image_embeddings(weights: Weights, tokens: Tensor, heads: int, layers: int) -> Tensor:
    """What the language model reads: after the norm, the Q-Former and the projection."""
    tokens = norm(weights, "ln_vision", tokens, 1e-5)
    start = weights["query_tokens"].expand(len(tokens), -1, -1)
    queries = norm(weights, "Qformer.bert.embeddings.LayerNorm", start, 1e-12)
    for layer in (f"Qformer.bert.encoder.layer.{number}" for number in range(layers)):
        for part in ("attention", "crossattention"):
            name = f"{layer}.{part}"
            if f"{name}.self.query.weight" in weights:
                read = queries if part == "attention" else tokens
                asked = linear(weights, f"{name}.self.query", queries)
                key, value = (linear(weights, f"{name}.self.{one}", read) for one in ("key", "value"))
                found = attention(asked, key, value, heads)
                found = linear(weights, f"{name}.output.dense", found)
                queries = norm(weights, f"{name}.output.LayerNorm", found + queries, 1e-12)
        inner = functional.gelu(linear(weights, f"{layer}.intermediate_query.dense", queries))
        inner = linear(weights, f"{layer}.output_query.dense", inner)
        queries = norm(weights, f"{layer}.output_query.LayerNorm", inner + queries, 1e-12)
    return linear(weights, "llama_proj", queries)


def language_logits(weights: Weights, embeds: Tensor, heads: int, layers: int, epsilon: float) -> Tensor:
    """A LLaMA's logits, of embeddings `(batch, length, width)`."""
    length, size = embeds.shape[1], embeds.shape[2] // heads
    angles = torch.arange(length).float()[:, None] / 10000 ** (torch.arange(0, size, 2).float() / size)
    cosine, sine = torch.cat([angles, angles], -1).cos(), torch.cat([angles, angles], -1).sin()
    mask = torch.full((length, length), -torch.inf).triu(1)

    def scaled(name: str, inputs: Tensor) -> Tensor:
        return inputs * torch.rsqrt(inputs.pow(2).mean(-1, keepdim=True) + epsilon) * weights[f"{name}.weight"]

    def turned(inputs: Tensor) -> Tensor:
        parts = inputs.unflatten(-1, (heads, size)).transpose(1, 2)
        half = torch.cat([-parts[..., size // 2 :], parts[..., : size // 2]], -1)
        return (parts * cosine + half * sine).transpose(1, 2).flatten(2)

    for layer in (f"model.layers.{number}" for number in range(layers)):
        inputs = scaled(f"{layer}.input_layernorm", embeds)
        query, key, value = (linear(weights, f"{layer}.self_attn.{one}_proj", inputs) for one in "qkv")
        found = attention(turned(query), turned(key), value, heads, mask)
        embeds = embeds + linear(weights, f"{layer}.self_attn.o_proj", found)
        inputs = scaled(f"{layer}.post_attention_layernorm", embeds)
        gate = functional.silu(linear(weights, f"{layer}.mlp.gate_proj", inputs))
        embeds = embeds + linear(
            weights, f"{layer}.mlp.down_proj", gate * linear(weights, f"{layer}.mlp.up_proj", inputs)
        )
    return linear(weights, "lm_head", scaled("model.norm", embeds))
