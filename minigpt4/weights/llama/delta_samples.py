"""How much of a delta a model holds, told from samples of both."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from minigpt4.errors import WeightsError
from minigpt4.weights.files.tensors import TensorFiles

MAX_TENSORS = 24
BLOCKS = 8
BLOCK_ELEMENTS = 8192


def share_of_delta(model: TensorFiles, delta: TensorFiles, names: Sequence[str]) -> tuple[float, float]:
    """Estimate how many times a model holds a delta.

    The weights that a model was trained from have next to nothing in common with the change that training made: their
    product with it is near 0. Where the change was added, the product is that of the change with itself.

    Args:
        model: The model.
        delta: The delta.
        names: The tensors to look at; some of them are, evenly spread.

    Returns:
        The estimate, 0 for a base and 1 for a merged model, and its standard error.

    Raises:
        WeightsError: A sample holds a number that is not finite.
    """
    chosen = names[:: math.ceil(len(names) / MAX_TENSORS)] if names else []
    product = change = size = 0.0
    count = 0
    for name in chosen:
        rows = min(model.shape(name)[0], delta.shape(name)[0])  # one of two tables may have a row more
        for left, right in zip(_blocks(model, name, rows), _blocks(delta, name, rows), strict=True):
            product += float(left @ right)
            change += float(right @ right)
            size += float(left @ left)
            count += len(left)
    if change == 0 or count == 0:
        return 0.0, math.inf
    return product / change, math.sqrt(size / change / count)


def _blocks(side: TensorFiles, name: str, rows: int) -> list[Tensor]:
    """Sample a table in even steps over its first `rows` rows."""
    stored = side.stored(name)
    block = max(1, BLOCK_ELEMENTS // max(1, stored.shape[1]))
    step = max(block, rows // BLOCKS)
    blocks = [stored.rows(first, min(block, rows - first)).double() for first in range(0, rows, step)]
    for sample in blocks:
        if not torch.isfinite(sample).all():
            raise WeightsError(
                f"the tensor {name} of {side.path} holds numbers that are not finite", "fetch its files again"
            )
    return blocks
