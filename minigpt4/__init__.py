"""Ask questions about pictures: MiniGPT-4 rebuilt.

Importing this package loads nothing heavy: each public name brings its module when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from minigpt4.chat import ChatSession
    from minigpt4.errors import MiniGPT4Error
    from minigpt4.model import MiniGPT4Config, MiniGPT4ForConditionalGeneration, MiniGPT4Model
    from minigpt4.processing import MiniGPT4ImageProcessor, MiniGPT4Processor, PromptTemplate
    from minigpt4.weights import load

__all__ = [
    "ChatSession",
    "MiniGPT4Config",
    "MiniGPT4Error",
    "MiniGPT4ForConditionalGeneration",
    "MiniGPT4ImageProcessor",
    "MiniGPT4Model",
    "MiniGPT4Processor",
    "PromptTemplate",
    "__version__",
    "load",
]

_HOMES = {
    "ChatSession": "chat",
    "MiniGPT4Config": "model",
    "MiniGPT4Error": "errors",
    "MiniGPT4ForConditionalGeneration": "model",
    "MiniGPT4ImageProcessor": "processing",
    "MiniGPT4Model": "model",
    "MiniGPT4Processor": "processing",
    "PromptTemplate": "processing",
    "load": "weights",
}


def __getattr__(name: str) -> Any:  # noqa: ANN401  (whatever the name stands for)
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
