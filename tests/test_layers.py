"""The rules that keep the package a stack of layers, read from the source of every module.

`docs/architecture.md` draws the layers. Each rule below is also shown to catch a planted violation, so that a
checker that has gone blind does not pass for a clean package.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "minigpt4"

# A module imports from layers with a smaller number, and from its own unit.
LAYERS = {
    "errors": 0,
    "text": 0,
    "model": 1,
    "processing": 1,
    "weights": 2,
    "inference": 3,
    "data": 3,
    "training": 4,
    "evaluation": 4,
    "serving": 4,
    "integrations": 4,
    "__init__": 5,
    "cli": 6,
    "__main__": 7,
}
TORCH_FREE = {"cli", "errors", "text", "processing.prompts"}  # `--help` is instant, and prompts are text
TORCH = {"torch", "transformers", "accelerate", "peft", "safetensors"}
ONE_DOOR = "weights.files.torch_files"  # the one module that opens pickled tensor files

# A library that has one home in the package.
HOMES = {
    "fastapi": {"serving"},
    "starlette": {"serving"},
    "uvicorn": {"serving"},
    "safetensors": {"weights", "training"},  # model folders; the state of a run
    "typer": {"cli"},
}
# What a unit must not know about.
NEVER = {"model": {"PIL", "json", "pathlib", "sentencepiece", "tokenizers"}}  # it knows no text and no files
ONE_SYSTEM = {"fcntl", "grp", "pwd", "readline", "resource", "termios", "tty", "winreg"}  # not every system has them
SAFE_VALUES = {"allow_pickle": "False", "trust_remote_code": "False", "weights_only": "True"}
UNPICKLERS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
UNPICKLING_CALLS = {"torch.load", "torch.jit.load", "torch.export.load"}
YAML_CALLS = {"yaml.load", "yaml.load_all", "yaml.full_load", "yaml.unsafe_load"}


def module_name(path: Path) -> str:
    """The dotted name below `minigpt4`: `weights.files.atomic`, `weights.__init__`, `cli`."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def imports(tree: ast.Module, module: str) -> Iterator[tuple[int, str]]:
    """Every imported module or name as (line, absolute dotted name), relative imports resolved."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = ["minigpt4", *module.split(".")]
            base = package[: len(package) - node.level] if node.level else []
            origin = ".".join([*base, *(node.module or "").split(".")]).strip(".")
            yield from ((node.lineno, f"{origin}.{alias.name}") for alias in node.names)


def type_only_lines(tree: ast.Module) -> set[int]:
    """The lines under `if TYPE_CHECKING:`, which never run."""
    return {
        line
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for child in node.body
        for line in range(child.lineno, (child.end_lineno or child.lineno) + 1)
    }


def unit(module: str) -> str:
    """The part of the package a module belongs to: `weights` for `weights.files.atomic`."""
    return module.split(".")[0]


def import_violations(tree: ast.Module, module: str) -> Iterator[str]:
    """What is wrong with where a module's imports come from."""
    never_run = type_only_lines(tree)
    for line, name in imports(tree, module):
        library, _, rest = name.partition(".")
        if library == "minigpt4" and rest != "__version__":
            imported = unit(rest) if unit(rest) in LAYERS else "__init__"
            if imported != unit(module) and LAYERS[imported] >= LAYERS[unit(module)]:
                yield f"line {line}: {unit(module)} may not import {name}, which is not below it"
        if library == "nano":
            yield f"line {line}: nano uses the package, not the package nano"
        if library in TORCH and TORCH_FREE & {module, unit(module)} and line not in never_run:
            yield f"line {line}: {module} must not import {library}"
        if library in HOMES and unit(module) not in HOMES[library]:
            yield f"line {line}: only {', '.join(HOMES[library])} may import {library}"
        if library in NEVER.get(unit(module), set()):
            yield f"line {line}: {unit(module)} must not import {library}"
        if library in UNPICKLERS and module != ONE_DOOR:
            yield f"line {line}: only {ONE_DOOR} may import {library}"
        if name in UNPICKLING_CALLS | YAML_CALLS:
            yield f"line {line}: import the module, not {name}, so that this test can see the call"


def start_violations(tree: ast.Module) -> Iterator[str]:
    """What a module needs at once although not every system has it."""
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            for line, name in imports(ast.Module([node], []), ""):
                if name.partition(".")[0] in ONE_SYSTEM:
                    yield f"line {line}: import {name} where it is used, for systems without it"


def call_violations(node: ast.Call, module: str) -> Iterator[str]:
    """What is wrong with a call: printing, unpickling, running text as code."""
    called = ast.unparse(node.func)
    if called == "print" and unit(module) != "cli":
        yield "only cli prints"
    if called in {"eval", "exec"}:
        yield f"{called}() runs text as code"
    if called in YAML_CALLS:
        yield f"{called}() can build any object: use yaml.safe_load, or a SafeLoader's get_single_data()"
    if called in UNPICKLING_CALLS and module != ONE_DOOR:
        yield f"only {ONE_DOOR} may call {called}()"
    for keyword in node.keywords:
        safe = SAFE_VALUES.get(keyword.arg or "")
        if safe and ast.unparse(keyword.value) != safe:
            yield f"{keyword.arg} may only be {safe}"


def violations(source: str, module: str) -> list[str]:
    """Every broken rule in the source of one module."""
    tree = ast.parse(source)
    found = [*import_violations(tree, module), *start_violations(tree)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            found += [f"line {node.lineno}: {message}" for message in call_violations(node, module)]
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == "sys.stdout" and unit(module) != "cli":
            found.append(f"line {node.lineno}: only cli writes to stdout")
        elif isinstance(node, ast.Dict):
            keys = [ast.unparse(key) for key in node.keys if key]
            found += [
                f"line {node.lineno}: trust_remote_code hidden in a dict" for key in keys if "trust_remote" in key
            ]
    return found


MODULES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_module_keeps_the_rules(path: Path) -> None:
    assert unit(module_name(path)) in LAYERS, f"{path.name} has no layer: give it one here and in architecture.md"

    assert violations(path.read_text(encoding="utf-8"), module_name(path)) == []


def test_every_module_is_read() -> None:
    assert {"errors", "model.__init__", "weights.__init__"} <= {module_name(path) for path in MODULES}


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("errors", "import minigpt4.inference.chat"),
        ("model.anything", "from minigpt4 import weights"),
        ("model.anything", "from ..processing import prompts"),
        ("model.anything", "from minigpt4.processing.prompts import PromptTemplate"),
        ("weights.folder", "def late():\n    from minigpt4.training import recipe"),
        ("weights.folder", "from minigpt4 import load"),
        ("model.anything", "from pathlib import Path"),
        ("inference.chat", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from minigpt4.serving import app"),
        ("serving.app", "from minigpt4.cli import main"),
        ("cli.ask", "import torch"),
        ("cli.doctor", "def doctor():\n    import torch.cuda"),
        ("processing.prompts", "from transformers import PreTrainedTokenizerBase"),
        ("errors", "import torch"),
        ("training.run", "from nano.run import train"),
        ("inference.chat", "import fastapi"),
        ("evaluation.run", "from safetensors.torch import load_file"),
        ("inference.chat", "print('hello')"),
        ("inference.chat", "import sys\nsys.stdout.write('hello')"),
        ("weights.original.names", "import pickle"),
        ("weights.original.names", "import torch\ntorch.load('x.pth', weights_only=True)"),
        ("weights.original.names", "from torch import load"),
        ("weights.files.torch_files", "import torch\ntorch.load('x.pth', weights_only=False)"),
        ("training.features", "import numpy as np\nnp.load('x.npy', allow_pickle=True)"),
        ("inference.chat", "eval('1')"),
        ("inference.chat", "exec('1')"),
        ("training.recipe", "import yaml\nyaml.load('x', Loader=yaml.SafeLoader)"),
        ("weights.folder", "AutoModel.from_pretrained('x', trust_remote_code=True)"),
        ("weights.folder", "options = {'trust_remote_code': True}"),
        ("training.loop", "import resource"),
        ("weights.files.disk", "from fcntl import flock"),
    ],
)
def test_a_planted_violation_is_caught(module: str, source: str) -> None:
    assert len(violations(source, module)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("weights.folder", "from minigpt4.model.modeling_minigpt4 import MiniGPT4Model"),
        ("weights.folder", "from . import atomic\nfrom .atomic import write_folder"),
        ("weights.files.torch_files", "import torch\ntorch.load('x.pth', weights_only=True, mmap=True)"),
        ("inference.chat", "from minigpt4.weights import folder\nmodel.eval()"),
        ("cli.ask", "print('answer')"),
        ("processing.prompts", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch"),
        ("training.recipe", "import yaml\nyaml.safe_load('x')"),
        ("training.features", "import numpy as np\nnp.load('x.npy', mmap_mode='r')"),
        ("serving.app", "import fastapi\nfrom minigpt4 import __version__"),
        ("weights.files.disk", "import sys\nif sys.platform != 'win32':\n    import fcntl"),
        ("training.loop", "def peak():\n    import resource"),
    ],
)
def test_an_allowed_line_is_not_caught(module: str, source: str) -> None:
    assert violations(source, module) == []
