"""Run times for the inference engine, by name."""

from importlib import import_module
from typing import Any

from minigpt4.errors import UsageError
from minigpt4.inference.backends.protocol import Backend

BACKENDS = {"torch": "minigpt4.inference.backends.torch.backend"}
"""The module of each run time; its `load` takes a model and what `minigpt4.load` takes. The first is `auto`."""


def load_backend(model: Any, processor: Any, engine: str, template: str | None, **options: Any) -> Backend:  # noqa: ANN401
    """Load a model in a run time.

    Args:
        model: nano, a folder or a hub id; or a loaded model, with its `processor`.
        processor: Of a loaded model.
        engine: A name of `BACKENDS`, or `auto`.
        template: Name of the prompt template; None for the model folder's own.
        options: As for `minigpt4.load`.

    Raises:
        UsageError: There is no such run time.
    """
    if engine != "auto" and engine not in BACKENDS:
        raise UsageError(f"there is no engine {engine!r}", f"expected auto or one of {', '.join(BACKENDS)}")
    name = next(iter(BACKENDS)) if engine == "auto" else engine
    backend: Backend = import_module(BACKENDS[name]).load(model, processor, template, **options)
    return backend
