"""Where weights come from and how they are kept; the only place that opens tensor files."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minigpt4.weights.folder import load

__all__ = ["load"]


def __getattr__(name: str) -> Any:  # noqa: ANN401  (whatever the name stands for)
    if name != "load":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return import_module(f"{__name__}.folder").load
