"""Too little memory, told in a sentence: the libraries say it in many ways, and of none what would help."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from minigpt4.errors import ConfigError
from minigpt4.training.recipe import StageRecipe


def lacks_memory(error: BaseException | None) -> bool:
    """Tell whether an error, or what it was raised from, says that there was not enough memory."""
    while error is not None:
        words = str(error)
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in words:
            return True
        if isinstance(error, RuntimeError) and "out of memory" in words:  # other accelerators
            return True
        error = error.__cause__
    return False


@contextmanager
def memory_for(stage: StageRecipe) -> Iterator[None]:
    """Do what an update of a stage takes.

    Raises:
        ConfigError: There was not enough memory for it.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not lacks_memory(error):
            raise
        raise ConfigError(
            f"there was not enough memory for an update of stage {stage.name}, {stage.batch_size:,} examples at once",
            hint="a smaller batch_size with as much more accumulation, gradient_checkpointing: true, or quantize: nf4",
        ) from error
