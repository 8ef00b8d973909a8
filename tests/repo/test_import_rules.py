"""Imports point down, and each dependency has one owner. A new arrow is a change of the tables here.

All files are read, none is imported: also an import inside a function counts.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from functools import lru_cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from tests.conftest import REPO

HALL = {"bridgetower.errors", "bridgetower.dist", "bridgetower.batch", "bridgetower.rng"}


def rooms(names: str) -> set[str]:
    return HALL | {f"bridgetower.{name}" for name in names.split()}


# Each room of the code, and the rooms that it may import beside itself.
MAY_IMPORT: dict[str, set[str]] = {
    "bridgetower": set(),
    "bridgetower.errors": set(),
    "bridgetower.batch": set(),
    "bridgetower.dist": set(),
    "bridgetower.rng": set(),
    "bridgetower.io": {"bridgetower.errors"},
    "bridgetower.config": {"bridgetower.errors", "bridgetower.io"},
    "bridgetower.shards": {"bridgetower.errors", "bridgetower.rng", "bridgetower.io"},
    "bridgetower.data": rooms("io config shards"),
    "bridgetower.kernels": HALL,
    "bridgetower.model": rooms("config kernels"),
    "bridgetower.objectives": rooms("config model"),
    "bridgetower.step": rooms("config kernels model objectives"),
    "bridgetower.cost": rooms("config kernels model objectives step"),
    # Is given models and data, and imports neither.
    "bridgetower.engine": rooms("io config"),
    "bridgetower.interop": rooms("io config model"),
    "bridgetower.interop.open": rooms("io config model interop engine"),  # a run's weights are the engine's files
    "bridgetower.tasks": rooms("config kernels model objectives step cost"),
    "bridgetower.evaluation": rooms("io config engine tasks"),
    "bridgetower.run": rooms(
        "io config shards data kernels model objectives step cost engine interop tasks evaluation"
    ),
    "data_prep": {"bridgetower.errors", "bridgetower.rng"}
    | {f"bridgetower.{n}" for n in ("io", "config", "shards", "data")},
}
ENTRY_FOLDERS = ("pretrain", "finetune", "data_prep", "benchmarks")
for top in ("pretrain", "finetune", "benchmarks"):
    MAY_IMPORT[top] = {part for part in MAY_IMPORT if part.startswith("bridgetower")}

# Who may import a library. "script" is a file that a user starts.
OWNERS = {
    "deepspeed": ("bridgetower.engine",),
    "apex": ("bridgetower.engine",),
    "wandb": ("bridgetower.engine.wandb_mirror", "pretrain.dashboard"),
    "wandb_workspaces": ("pretrain.dashboard", "pretrain.dashboard_panels"),
    "webdataset": ("bridgetower.data", "data_prep", "benchmarks"),
    "triton": ("bridgetower.kernels",),
    "fire": ("script",),
}
# transformers imports these where they are installed, as other tools do.
OFTEN_THERE = {"datasets", "evaluate"}


COMPUTED = "(computed)"
"""In place of a module that importlib is given by a variable."""
# Sources of corpora are found by their file names, and public names of the package by a table.
COMPUTES_NAMES = {"bridgetower", "data_prep.build_shards"}


def is_within(module: str, part: str) -> bool:
    return module == part or module.startswith(f"{part}.")


def imported_modules(source: str) -> Iterator[str]:
    """Full names, so that ``from bridgetower import dist`` is bridgetower.dist."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            prefix = "." * node.level + (node.module or "")
            yield from (f"{prefix}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and _called(node.func) in ("import_module", "__import__"):
            given = [*node.args, *(keyword.value for keyword in node.keywords if keyword.arg == "name")]
            name = given[0].value if given and isinstance(given[0], ast.Constant) else COMPUTED
            yield str(name)


def _called(function: ast.expr) -> str:
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def part_of(name: str) -> str | None:
    """The part of MAY_IMPORT that a module, or something in one, belongs to."""
    parts = [part for part in MAY_IMPORT if is_within(name, part)]
    return max(parts, key=len) if parts else None


def violations(module: str, source: str) -> list[str]:
    """The rules that a module breaks, a sentence each."""
    own, found = part_of(module), []
    if own is None or (own == "bridgetower" and module != "bridgetower"):
        return [f"{module} is in no part of the table"]
    is_script = module.split(".")[0] in ENTRY_FOLDERS and '__name__ == "__main__"' in source
    for name in imported_modules(source):
        if name.startswith("."):
            found.append(f"{module} imports {name} by a relative name")
            continue
        if name == COMPUTED:
            if module not in COMPUTES_NAMES:
                found.append(f"{module} imports a module whose name is computed")
            continue
        other = part_of(name)
        if other is not None and other != own and other not in MAY_IMPORT[own]:
            found.append(f"{module} imports {name}, but {own} may not import {other}")
        owners = OWNERS.get(name.split(".")[0])
        is_owner = owners is None or any(is_script if o == "script" else is_within(module, o) for o in owners)
        if not is_owner:
            found.append(f"{module} imports {name}, which belongs to {' and '.join(owners or ())}")
    return found


@lru_cache
def modules() -> dict[str, Path]:
    """Every module of the repository but the tests."""
    paths = [path for top in ("bridgetower", *ENTRY_FOLDERS) for path in sorted((REPO / top).rglob("*.py"))]
    names = {path: ".".join(path.relative_to(REPO).with_suffix("").parts) for path in paths}
    return {name.removesuffix(".__init__"): path for path, name in names.items()}


def test_all_files_keep_the_rules():
    assert [broken for name, path in modules().items() for broken in violations(name, path.read_text())] == []


def test_each_part_of_the_table_exists():
    assert [part for part in MAY_IMPORT if part not in modules()] == []


@pytest.mark.parametrize(
    ("module", "source", "broken"),
    [
        ("bridgetower.model.heads", "from bridgetower.data.order import Order", "may not import bridgetower.data"),
        ("bridgetower.data.order", "import bridgetower.model.heads", "may not import bridgetower.model"),
        (
            "bridgetower.engine.loop",
            "from bridgetower.tasks.pretraining import PretrainTask",
            "may not import bridgetower.tasks",
        ),
        ("bridgetower.engine.loop", "from bridgetower.data import order", "may not import bridgetower.data"),
        ("bridgetower.config.cli", "from bridgetower import dist", "may not import bridgetower.dist"),
        ("bridgetower.tasks.pretraining", "from pretrain.presets import tiny", "may not import pretrain"),
        ("pretrain.train", "import data_prep.record", "may not import data_prep"),
        ("bridgetower.model.heads", "def f():\n    import deepspeed", "belongs to bridgetower.engine"),
        (
            "bridgetower.engine.loop",
            "import wandb",
            "belongs to bridgetower.engine.wandb_mirror and",
        ),
        ("pretrain.report", "import wandb_workspaces", "belongs to pretrain.dashboard and pretrain.dashboard_panels"),
        (
            "bridgetower.engine.launch",
            "from webdataset import TarWriter",
            "belongs to bridgetower.data and data_prep and benchmarks",
        ),
        ("bridgetower.config.cli", "import fire", "belongs to script"),
        ("pretrain.assemble", "import fire", "belongs to script"),
        ("bridgetower.model.heads", "from apex.normalization import FusedLayerNorm", "belongs to bridgetower.engine"),
        ("bridgetower.model.heads", "import triton", "belongs to bridgetower.kernels"),
        ("bridgetower.kernels.ops", "from bridgetower.model.heads import ITMHead", "may not import bridgetower.model"),
        ("bridgetower.model.heads", 'import_module("bridgetower.data.order")', "may not import bridgetower.data"),
        ("bridgetower.model.heads", 'importlib.import_module(name="triton")', "belongs to bridgetower.kernels"),
        ("bridgetower.model.heads", '__import__("wandb")', "belongs to bridgetower.engine.wandb_mirror and"),
        ("bridgetower.model.heads", "importlib.import_module(name)", "imports a module whose name is computed"),
        ("bridgetower.data.order", "from . import index", "by a relative name"),
        ("bridgetower.new.thing", "", "is in no part of the table"),
    ],
)
def test_broken_rule_is_noticed(module, source, broken):
    (found,) = violations(module, source)
    assert broken in found


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("bridgetower.engine.loop", "import torch\nfrom bridgetower.engine.tracker import Tracker"),
        ("bridgetower.engine.launch", "def start():\n    import deepspeed"),
        ("bridgetower.engine.wandb_mirror", "import wandb.errors"),
        ("bridgetower.tasks.pretraining", "from bridgetower.model.heads import ITMHead\nfrom bridgetower import dist"),
        ("pretrain.train", 'import fire\nif __name__ == "__main__":\n    fire.Fire()'),
        ("data_prep.shard_writer", "import webdataset"),
    ],
)
def test_kept_rule_is_not_complained_of(module, source):
    assert violations(module, source) == []


def ways_to_torch(sources: dict[str, str]) -> dict[str, tuple[str, ...]]:
    """The modules from each one to torch, over imports of modules that are given; none: it does not get there."""
    imported = {name: sorted(set(imported_modules(source))) for name, source in sources.items()}
    ways: dict[str, tuple[str, ...]] = {
        name: (name, found)
        for name, names in imported.items()
        for found in names
        if found.split(".")[0] in ("torch", "torchvision")
    }
    is_growing = True
    while is_growing:
        is_growing = False
        for name in imported.keys() - ways.keys():
            # A name is a module, or something in one.
            targets = {target for found in imported[name] for target in (found, found.rpartition(".")[0])}
            step = min(targets & ways.keys(), default=None)
            if step is not None:
                ways[name] = (name, *ways[step])
                is_growing = True
    return ways


def cycles(imports: dict[str, set[str]]) -> list[list[str]]:
    """Modules that import each other, directly or through others, a list each."""
    reached: dict[str, set[str]] = {}
    for name in imports:
        seen: set[str] = set()
        waiting = [name]
        while waiting:
            for other in imports.get(waiting.pop(), set()) - seen:
                seen.add(other)
                waiting.append(other)
        reached[name] = seen
    circles = {name: sorted(other for other in seen if name in reached[other]) for name, seen in reached.items()}
    return [circle for name, circle in circles.items() if circle and circle[0] == name]


def test_no_modules_import_each_other():
    known = modules()
    imports = {
        name: {
            target
            for imported in imported_modules(path.read_text())
            for target in (imported, imported.rpartition(".")[0])
            if target in known and target != name and known[target].name != "__init__.py"
        }
        for name, path in known.items()
    }
    assert cycles(imports) == []
    assert cycles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == [["b", "c"]]


def test_data_prep_never_imports_torch_not_even_through_others():
    sources = {name: path.read_text() for name, path in modules().items()}
    assert {name: way for name, way in ways_to_torch(sources).items() if is_within(name, "data_prep")} == {}
    assert "pretrain.train" in ways_to_torch(sources)


def test_way_to_torch_is_found_through_others():
    sources = {
        "a": "from b import c\nimport numpy",
        "b.c": "def f():\n    from d import thing",
        "d": "import a\nimport torch.nn",
        "e": "import numpy\nimport e",
    }
    ways = ways_to_torch(sources)
    assert ways["a"] == ("a", "b.c", "d", "torch.nn") and "e" not in ways


def test_no_entry_file_carries_the_name_of_another_module():
    # The folder of a script is first on sys.path: `import report` elsewhere would find pretrain/report.py.
    taken = sys.stdlib_module_names | set(packages_distributions()) | OFTEN_THERE
    files = [path for top in ENTRY_FOLDERS for path in (REPO / top).glob("*.py") if path.stem != "__init__"]
    # Python's own trace is imported by no library that a script here loads.
    assert {path for path in files if path.stem in taken} == {
        REPO / "benchmarks/data_prep.py",
        REPO / "pretrain/trace.py",
    }
    # Beside these, nobody may want the others.
    for folder, name in (("benchmarks", "data_prep"), ("pretrain", "trace")):
        imported = {one for path in (REPO / folder).glob("*.py") for one in imported_modules(path.read_text())}
        assert not any(is_within(one, name) for one in imported)
    assert {"train", "presets", "build_shards"} <= {path.stem for path in files}, "the files were not found"


def test_init_files_import_nothing_so_that_a_name_costs_what_it_needs():
    files = [path for name, path in modules().items() if path.name == "__init__.py"]
    assert len(files) > 8
    found = {path: set(imported_modules(path.read_text())) for path in files}
    # The package's own looks its public names up when they are used.
    assert found.pop(REPO / "bridgetower/__init__.py") == {"importlib", "typing.Any", COMPUTED}
    assert found == {path: set() for path in found}
