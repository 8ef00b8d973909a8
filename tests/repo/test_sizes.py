"""Files and functions stay small enough to be read at once."""

from __future__ import annotations

import ast
from pathlib import Path

from tests.conftest import REPO
from tests.repo.test_import_rules import modules

LONGEST_FILE, LONGEST_FUNCTION = 400, 60
LOOSE = {"__init__", "errors", "dist", "batch", "rng"}


def lines_of_functions(path: Path) -> dict[str, int]:
    """Lines of each function of a file, its decorators and docstring included."""
    functions = [
        n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))
    ]
    return {node.name: (node.end_lineno or node.lineno) - node.lineno + 1 for node in functions}


def test_no_file_is_longer_than_400_lines():
    lengths = {name: len(path.read_text().splitlines()) for name, path in modules().items()}
    assert {name: length for name, length in lengths.items() if length > LONGEST_FILE} == {}


def test_no_function_is_longer_than_60_lines():
    lengths = {
        f"{module}.{name}": n for module, path in modules().items() for name, n in lines_of_functions(path).items()
    }
    assert {name: length for name, length in lengths.items() if length > LONGEST_FUNCTION} == {}


def test_every_module_of_the_library_stands_in_a_room():
    assert {path.stem for path in (REPO / "bridgetower").glob("*.py")} == LOOSE
