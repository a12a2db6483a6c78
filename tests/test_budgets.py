"""The package stays small enough to be read. A change that needs more than these numbers makes room first."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = sorted((ROOT / "minigpt4").rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))

MAX_LINES = 28_200
MAX_FILES = 145
MAX_LINES_OF_A_FILE = 500
MAX_LINES_OF_A_FUNCTION = 60
MAX_SHARE_OF_TESTS = 1.22


def num_lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def test_package_has_a_bounded_number_of_lines_and_files() -> None:
    assert sum(map(num_lines, PACKAGE)) <= MAX_LINES
    assert len(PACKAGE) <= MAX_FILES


def test_tests_are_in_proportion_to_the_package() -> None:
    assert sum(map(num_lines, TESTS)) <= MAX_SHARE_OF_TESTS * sum(map(num_lines, PACKAGE))


@pytest.mark.parametrize("path", PACKAGE, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_and_its_functions_are_of_readable_length(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    lengths = {function.name: (function.end_lineno or 0) - function.lineno + 1 for function in functions}

    assert num_lines(path) <= MAX_LINES_OF_A_FILE
    assert [name for name, length in lengths.items() if length > MAX_LINES_OF_A_FUNCTION] == []
