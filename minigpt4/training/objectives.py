"""The objectives of training, from a batch to a loss.

`language` is MiniGPT-4's: the language model says the answer. Another one is a function from model and batch to an
`Outcome`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from minigpt4.data.examples import TextExample
from minigpt4.data.packing import packed_mask, packed_positions
from minigpt4.errors import ConfigError
from minigpt4.model import MiniGPT4ForConditionalGeneration
from minigpt4.model.modeling_minigpt4 import MiniGPT4ImageFeatures
from minigpt4.training.prefix_cache import CachedPrefix, PrefixCache

PACKED_ATTENTION = ("sdpa", "eager")
"""Attention implementations that take a mask of four dimensions."""
TRIAL_PREFIX, TRIAL_TEXT = 8, 24
"""Tokens of the rows that packing is tried with."""
TOLERANCE = 0.1
"""Of a packed text to the same text alone, relative to one that follows the other."""


@dataclass(frozen=True)
class Outcome:
    """The result of a batch.

    Args:
        loss: Sum over its targets, with a gradient.
        hits: Targets that are the likeliest token.
    """

    loss: Tensor
    hits: Tensor


Objective = Callable[[MiniGPT4ForConditionalGeneration, dict[str, Any]], Outcome]
"""Computes a batch's loss. The targets are the batch's `labels`: see `num_targets`."""


class TrainingStep(nn.Module):
    """A model with its objective, from a batch to a loss: the one module that is wrapped for several processes.

    Args:
        model: The model.
        objective: Its objective, which each stage sets; None is `language`.
    """

    def __init__(self, model: MiniGPT4ForConditionalGeneration, objective: Objective | None = None) -> None:
        super().__init__()
        self.model = model
        self.objective = objective
        self._prefix_cache = PrefixCache()

    def forward(self, batch: dict[str, Any]) -> Outcome:
        """Compute a batch's loss.

        Args:
            batch: The inputs of the objective, and pictures as `pixel_values`, as `vision_outputs` (of the vision
                model), or as `qformer_outputs` (what the projection reads).
        """
        if self.objective is not None:
            return self.objective(self.model, batch)
        return language(self.model, batch, self._prefix_cache.get(self.model, batch))


def image_features(model: MiniGPT4ForConditionalGeneration, batch: dict[str, Any]) -> MiniGPT4ImageFeatures | None:
    """Project a batch's pictures into the language model's space, from as far as they are computed, if any."""
    if "qformer_outputs" in batch:
        return MiniGPT4ImageFeatures(pooler_output=model.model.language_projection(batch["qformer_outputs"]))
    if "vision_outputs" in batch:
        return model.model.align_image_features(batch["vision_outputs"])
    if "pixel_values" in batch:
        return model.model.get_image_features(batch["pixel_values"], return_dict=True)
    return None


def language(
    model: MiniGPT4ForConditionalGeneration, batch: dict[str, Any], prefix: CachedPrefix | None = None
) -> Outcome:
    """Let the frozen language model say the answers; only their positions get logits.

    Args:
        model: The model.
        batch: Pictures; `input_ids` and `labels` `(batch, length)`, padded on the right, -100 outside answers. No
            position reads a later one, so padding needs no mask, and the last one, which is only predicted, is not
            read. With several texts packed in a row also `segment_ids` and `position_ids` `(batch, length)`.
        prefix: The beginning of all rows, if it is cached.
    """
    features = image_features(model, batch)
    first = prefix.length if prefix else 0
    inputs: dict[str, Any] = {
        name: batch[name][:, :-1] for name in ("input_ids", "segment_ids", "position_ids") if name in batch
    }
    hidden = model.model(
        input_ids=inputs["input_ids"][:, first:],
        mm_encoder_outputs={"image": features} if features is not None else None,
        past_key_values=prefix.cache(len(batch["input_ids"])) if prefix else None,
        use_cache=False,
        **packed_inputs(model, inputs, first),
    ).last_hidden_state
    targets = batch["labels"][:, first + 1 :]
    outcome = outcome_of(model.compute_logits(hidden[targets != -100]), targets[targets != -100])
    if features is not None:
        return outcome
    # Text alone gives the joining parts no gradients, which other processes wait for.
    nothing = sum(p.sum() * 0 for p in model.parameters() if p.requires_grad)
    return Outcome(outcome.loss + nothing, outcome.hits)


def outcome_of(logits: Tensor, targets: Tensor) -> Outcome:
    """Return the cross entropy of scores `(targets, classes)` for targets `(targets,)`, and how many are hit."""
    loss = nn.functional.cross_entropy(logits.float(), targets, reduction="sum")
    return Outcome(loss, (logits.argmax(dim=-1) == targets).sum())


def num_targets(batch: dict[str, Any]) -> int:
    """Return how many targets a batch has: its `labels` without the first position, which nothing comes before."""
    return int((batch["labels"][:, 1:] != -100).sum())


def packed_inputs(model: MiniGPT4ForConditionalGeneration, batch: dict[str, Any], first: int = 0) -> dict[str, Tensor]:
    """Return mask and positions for a batch of packed rows; nothing if no row has several texts.

    Args:
        model: The model.
        batch: With `segment_ids` and `position_ids` `(batch, length)` if rows have several texts.
        first: Length of the cached prefix.
    """
    if "segment_ids" not in batch:
        return {}
    mask = packed_mask(batch["segment_ids"])[:, :, first:]
    if model.config.text_config._attn_implementation == "eager":  # adds the mask to its scores
        dtype = model.get_input_embeddings().weight.dtype
        mask = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)
    return {"attention_mask": mask, "position_ids": batch["position_ids"][:, first:]}


@torch.no_grad()
def check_packing(model: MiniGPT4ForConditionalGeneration) -> None:
    """Try whether a model reads packed texts as it reads each alone.

    One that ignores mask or positions would learn from texts that see each other, without any error.

    Raises:
        ConfigError: It does not.
    """
    name, attention = model.config.text_config.model_type, model.config.text_config._attn_implementation
    if attention not in PACKED_ATTENTION:
        raise ConfigError(
            f"texts_per_picture needs the attention {' or '.join(PACKED_ATTENTION)}, and the language model has "
            f"{attention}",
            hint="leave texts_per_picture out",
        )
    window = getattr(model.config.text_config, "sliding_window", None)
    if window is not None and getattr(model.config.text_config, "use_sliding_window", True):
        raise ConfigError(
            f"the language model {name} sees {window} places back, which texts side by side would change",
            hint="leave texts_per_picture out",
        )
    drawn = torch.randperm(model.config.text_config.vocab_size, generator=torch.Generator().manual_seed(0))
    ids = drawn[drawn != model.config.image_token_id][: TRIAL_PREFIX + 2 * TRIAL_TEXT].tolist()
    prefix, first, second = ids[:TRIAL_PREFIX], ids[TRIAL_PREFIX:-TRIAL_TEXT], ids[-TRIAL_TEXT:]
    refusal = ConfigError(
        f"the language model {name} does not read texts side by side as it reads each alone",
        hint="leave texts_per_picture out",
    )
    alone = _last_text(model, prefix + second, {})
    after = _last_text(model, ids, {})
    try:
        packed = _last_text(
            model, ids, packed_positions([TextExample(ids, [], 0, (TRIAL_PREFIX, len(first), len(second)))])
        )
    except (IndexError, RuntimeError, TypeError, ValueError) as error:  # as Bloom, which unpacks two dimensions
        raise refusal from error
    if (packed - alone).norm() > TOLERANCE * (after - alone).norm():
        raise refusal


def _last_text(model: MiniGPT4ForConditionalGeneration, ids: list[int], packing: dict[str, Tensor]) -> Tensor:
    """Return the language model's last hidden states of the last text."""
    device = model.get_input_embeddings().weight.device
    inputs = packed_inputs(model, {name: value.to(device) for name, value in packing.items()})
    outputs = model.model(input_ids=torch.tensor([ids], device=device), use_cache=False, **inputs)
    hidden: Tensor = outputs.last_hidden_state[0, -TRIAL_TEXT:].float()
    return hidden
