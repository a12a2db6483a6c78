"""Several texts side by side in a row of a batch: what the language model needs for it, and whether it can.

A mask of four dimensions says which place sees which, and positions begin anew with each text. Most language models of
the library read both; one that passed over either would learn from texts that see each other, and no error would tell.
"""

from typing import Any

import torch
from torch import Tensor

from minigpt4.data.examples import TextExample
from minigpt4.data.side_by_side import branch_mask, branches_of
from minigpt4.errors import ConfigError
from minigpt4.model import MiniGPT4ForConditionalGeneration

MASKED_BY = ("sdpa", "eager")
"""Ways of attention that take a mask of four dimensions."""
BEGINNING, TEXT = 8, 24
"""Places of the rows that a model is tried with."""
ALIKE = 0.1
"""How far a text beside another may lie from the same text alone, relative to one that follows the other."""


def branches(model: MiniGPT4ForConditionalGeneration, batch: dict[str, Any], first: int = 0) -> dict[str, Tensor]:
    """Return what tells the language model of a batch's branches; nothing where no row has any.

    Args:
        model: The model.
        batch: With `branch_ids` and `position_ids` `(batch, length)` where rows have several texts.
        first: Where the language model begins to read; it has read what comes before.
    """
    if "branch_ids" not in batch:
        return {}
    seen = branch_mask(batch["branch_ids"])[:, :, first:]
    if model.config.text_config._attn_implementation == "eager":  # adds the mask to its scores
        dtype = model.get_input_embeddings().weight.dtype
        seen = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)
    return {"attention_mask": seen, "position_ids": batch["position_ids"][:, first:]}


@torch.no_grad()
def check_branches(model: MiniGPT4ForConditionalGeneration) -> None:
    """Try whether a model reads texts side by side as it reads each alone.

    Raises:
        ConfigError: It does not.
    """
    name, way = model.config.text_config.model_type, model.config.text_config._attn_implementation
    if way not in MASKED_BY:
        raise ConfigError(
            f"texts_per_picture needs the attention {' or '.join(MASKED_BY)}, and the language model has {way}",
            hint="leave texts_per_picture out",
        )
    window = getattr(model.config.text_config, "sliding_window", None)
    if window is not None and getattr(model.config.text_config, "use_sliding_window", True):
        raise ConfigError(
            f"the language model {name} sees {window} places back, which texts side by side would change",
            hint="leave texts_per_picture out",
        )
    drawn = torch.randperm(model.config.text_config.vocab_size, generator=torch.Generator().manual_seed(0))
    words = drawn[drawn != model.config.image_token_id][: BEGINNING + 2 * TEXT].tolist()
    before, first, second = words[:BEGINNING], words[BEGINNING:-TEXT], words[-TEXT:]
    beside = TextExample(before + first + second, [], 0, (BEGINNING, TEXT, TEXT))
    refusal = ConfigError(
        f"the language model {name} does not read texts side by side as it reads each alone",
        hint="leave texts_per_picture out",
    )
    alone = _read(model, before + second, {})
    after = _read(model, before + first + second, {})
    try:
        aside = _read(model, before + first + second, branches_of([beside]))
    except (IndexError, RuntimeError, TypeError, ValueError) as error:  # as Bloom, which unpacks two dimensions
        raise refusal from error
    if (aside - alone).norm() > ALIKE * (after - alone).norm():
        raise refusal


def _read(model: MiniGPT4ForConditionalGeneration, ids: list[int], more: dict[str, Tensor]) -> Tensor:
    """Return what the language model makes of the last text's places."""
    device = model.get_input_embeddings().weight.device
    rows = {name: value.to(device) for name, value in more.items()}
    outputs = model.model(input_ids=torch.tensor([ids], device=device), use_cache=False, **branches(model, rows))
    hidden: Tensor = outputs.last_hidden_state[0, -TEXT:].float()
    return hidden
