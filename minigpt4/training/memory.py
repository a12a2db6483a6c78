"""Too little memory for a computation, in a sentence: the libraries say it in many ways, and never what would help."""

from collections.abc import Iterator
from contextlib import contextmanager

from minigpt4.data.memory import lacks_memory
from minigpt4.errors import ConfigError


@contextmanager
def memory_for(what: str, helps: str) -> Iterator[None]:
    """Compute something.

    Args:
        what: It, for people.
        helps: What they can do.

    Raises:
        ConfigError: There was not enough memory for it.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not lacks_memory(error):
            raise
        raise ConfigError(f"there was not enough memory for {what}", hint=helps) from error
