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
    from minigpt4.inference.engine import Engine
    from minigpt4.model import MiniGPT4Config, MiniGPT4ForConditionalGeneration, MiniGPT4Model
    from minigpt4.processing import MiniGPT4ImageProcessor, MiniGPT4Processor, PromptTemplate
    from minigpt4.weights import load

__all__ = [
    "ChatSession",
    "Engine",
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
    "Engine": "inference.engine",
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


class _Registering(MetaPathFinder):
    """Finder that registers our classes with transformers' Auto classes once both packages are imported.

    That happens when the outermost import of transformers or of a module of this package ends: within it some of our
    modules are not complete. So transformers need not be loaded here.
    """

    depth = 0

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != "transformers" and not name.startswith(f"{__name__}."):
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                self.depth += 1
                try:
                    execute(module)
                finally:
                    self.depth -= 1
                if self.depth == 0 and "transformers" in sys.modules and self in sys.meta_path:
                    sys.meta_path.remove(self)
                    import_module(f"{__name__}.weights.folder")  # which registers them

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


if "transformers" in sys.modules:
    import_module(f"{__name__}.weights.folder")
else:
    sys.meta_path.insert(0, _Registering())
