"""Files and functions stay small enough to be read in one go."""

from __future__ import annotations

import ast
from pathlib import Path

from tests.conftest import REPO
from tests.repo.test_import_rules import HALL, modules

MAX_FILE_LINES, MAX_FUNCTION_LINES = 400, 60


def count_lines(path: Path) -> dict[str, int]:
    """Return the number of lines of each function of a file by name and line: methods of classes share names."""
    nodes = ast.walk(ast.parse(path.read_text()))
    functions = [node for node in nodes if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    return {f"{node.name}:{node.lineno}": (node.end_lineno or node.lineno) - node.lineno + 1 for node in functions}


def test_no_file_is_longer_than_400_lines():
    lengths = {name: len(path.read_text().splitlines()) for name, path in modules().items()}
    assert {name: length for name, length in lengths.items() if length > MAX_FILE_LINES} == {}


def test_no_function_is_longer_than_60_lines():
    lengths = {
        f"{module}.{name}": length for module, path in modules().items() for name, length in count_lines(path).items()
    }
    assert {name: length for name, length in lengths.items() if length > MAX_FUNCTION_LINES} == {}


def test_methods_of_one_name_are_all_counted(tmp_path):
    source = "class A:\n    def f(self):\n        pass\n        pass\n\nclass B:\n    def f(self):\n        pass\n"
    (tmp_path / "two.py").write_text(source)
    assert sorted(count_lines(tmp_path / "two.py").values()) == [2, 3]


def test_every_module_of_the_library_stands_in_a_room():
    hall = {"__init__", *(name.removeprefix("bridgetower.") for name in HALL)}
    assert {path.stem for path in (REPO / "bridgetower").glob("*.py")} == hall
