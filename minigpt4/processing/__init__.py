"""Pictures and conversations to model inputs. `prompts` and `messages` load neither torch nor transformers."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minigpt4.processing.image_processing_minigpt4 import MiniGPT4ImageProcessor
    from minigpt4.processing.processing_minigpt4 import MiniGPT4Processor
    from minigpt4.processing.prompts import PromptTemplate

__all__ = ["MiniGPT4ImageProcessor", "MiniGPT4Processor", "PromptTemplate"]

_HOMES = {
    "MiniGPT4ImageProcessor": "image_processing_minigpt4",
    "MiniGPT4Processor": "processing_minigpt4",
    "PromptTemplate": "prompts",
}


def __getattr__(name: str) -> Any:  # noqa: ANN401  (whatever the name stands for)
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
