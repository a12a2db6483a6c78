"""Too little memory: the machine's fault and not an example's, which is read again where there is more.

Counted among the bad ones, an example would be replaced by another today and not tomorrow: a resumed run would learn
from other examples than one that was never stopped.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from minigpt4.errors import DataError, MiniGPT4Error

_WORDS = ("DefaultCPUAllocator", "out of memory")
"""What torch says in a RuntimeError, of the CPU's memory and of an accelerator's."""


def lacks_memory(error: BaseException | None) -> bool:
    """Tell whether an error, or what it was raised from, says that there was not enough memory."""
    while error is not None:
        if isinstance(error, MemoryError):
            return True
        if isinstance(error, RuntimeError) and any(words in str(error) for words in _WORDS):
            return True
        error = error.__cause__
    return False


@contextmanager
def memory_for_record(source: str, number: int) -> Iterator[None]:
    """Read a record of a source.

    Raises:
        DataError: There was not enough memory for it.
    """
    try:
        yield
    except (MiniGPT4Error, MemoryError, RuntimeError) as error:
        if not lacks_memory(error):
            raise
        raise DataError(
            f"there was not enough memory for record {number} of {source}",
            hint="fewer workers, or end what else needs memory; the same command goes on",
        ) from error
