"""Ask questions about pictures: MiniGPT-4 rebuilt.

Importing this package loads nothing heavy: each public name brings its module when it is first used.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from minigpt4.errors import MiniGPT4Error
    from minigpt4.inference.chat import ChatSession
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
    "ChatSession": "inference.chat",
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
    found = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    if "transformers" in sys.modules:
        _register()
    return found


def _register(finished: str = "") -> None:
    """Make transformers' Auto classes and pipelines know this package's classes; importing does it.

    While a module of this package loads, other than the one that just `finished`, the rest has to wait for it.
    """
    ours = [name for name in sys.modules if name.startswith(f"{__name__}.") and name != finished]
    if not any(_is_loading(sys.modules[name]) for name in ours):
        import_module(f"{__name__}.weights.folder")


def _is_loading(module: ModuleType) -> bool:
    return bool(getattr(module.__spec__, "_initializing", False))  # importlib's own mark


class _TransformersFinder(MetaPathFinder):
    """Calls `_register` right after transformers is imported, so that importing this package need not do it."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != "transformers":
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                _register()

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


class _OwnFinder(MetaPathFinder):
    """Calls `_register` after a module of this package that brought transformers with it: it had to wait for it."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if not name.startswith(f"{__name__}."):
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                if "transformers" in sys.modules and f"{__name__}.weights.folder" not in sys.modules:
                    _register(finished=name)

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, _OwnFinder())
if "transformers" in sys.modules:
    _register()
else:
    sys.meta_path.insert(0, _TransformersFinder())


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
