"""Imports point down, and each dependency has one owner. A new import between rooms is a change to the tables here.

The files are parsed and not imported, so that imports inside functions count too.
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
    """Return the hall and the named rooms, as full module names."""
    return HALL | {f"bridgetower.{name}" for name in names.split()}


# Each room of the code, and the rooms that it may import besides itself.
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
    # The engine is given models and data, and imports neither.
    "bridgetower.engine": rooms("io config"),
    "bridgetower.interop": rooms("io config model"),
    "bridgetower.interop.open": rooms("io config model interop engine"),  # a run's weights are files of the engine
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
MAY_IMPORT["benchmarks"].add("pretrain")  # so that a benchmark builds the step as the program does

# Modules that may import a library. "script" stands for any file that a user starts.
OWNERS = {
    "deepspeed": ("bridgetower.engine",),
    "apex": ("bridgetower.engine",),
    "wandb": ("bridgetower.engine.wandb_mirror", "pretrain.dashboard"),
    "wandb_workspaces": ("pretrain.dashboard", "pretrain.dashboard_panels"),
    "webdataset": ("bridgetower.data", "data_prep", "benchmarks"),
    "triton": ("bridgetower.kernels",),
    "fire": ("script",),
}
# Libraries that are not required here, but that transformers and other tools import where they are installed.
OPTIONAL_LIBRARIES = {"datasets", "evaluate"}

IMPORTERS = ("import_module", "__import__", "spec_from_file_location")
"""Functions that import a module whose name is an argument; none may be imported under another name."""
COMPUTED = "(computed)"
"""Stands for a module whose name is computed before it is given to importlib."""
# build_shards finds the sources of corpora by file name; the package finds its public names in a table.
COMPUTES_NAMES = {"bridgetower", "data_prep.build_shards"}


def is_within(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def imported_modules(source: str) -> Iterator[str]:
    """Yield full names of everything that a file imports: ``from bridgetower import dist`` gives bridgetower.dist."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            prefix = "." * node.level + (node.module or "")
            if any(alias.name in IMPORTERS and alias.asname for alias in node.names):
                yield COMPUTED
            yield from (f"{prefix}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and _function_name(node.func) in IMPORTERS:
            arguments = [*node.args, *(keyword.value for keyword in node.keywords if keyword.arg == "name")]
            name = arguments[0].value if arguments and isinstance(arguments[0], ast.Constant) else COMPUTED
            yield str(name)


def _function_name(function: ast.expr) -> str:
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def find_room(name: str) -> str | None:
    """Return the room in MAY_IMPORT of a module, or of a name in a module; None if it is in none."""
    matches = [room for room in MAY_IMPORT if is_within(name, room)]
    return max(matches, key=len) if matches else None


def find_violations(module: str, source: str) -> list[str]:
    """List the rules that a module breaks, one sentence per import."""
    room, broken = find_room(module), []
    if room is None or (room == "bridgetower" and module != "bridgetower"):
        return [f"{module} is in no room of the table"]
    is_script = module.split(".")[0] in ENTRY_FOLDERS and '__name__ == "__main__"' in source
    for name in imported_modules(source):
        if name.startswith("."):
            broken.append(f"{module} imports {name} by a relative name")
            continue
        if name == COMPUTED:
            if module not in COMPUTES_NAMES:
                broken.append(f"{module} imports a module whose name is computed")
            continue
        imported_room = find_room(name)
        if imported_room is not None and imported_room != room and imported_room not in MAY_IMPORT[room]:
            broken.append(f"{module} imports {name}, but {room} may not import {imported_room}")
        owners = OWNERS.get(name.split(".")[0])
        is_owner = owners is None or any(is_script if one == "script" else is_within(module, one) for one in owners)
        if not is_owner:
            broken.append(f"{module} imports {name}, which belongs to {' and '.join(owners or ())}")
    return broken


@lru_cache
def modules() -> dict[str, Path]:
    """Return the path of every module of the repository except the tests."""
    paths = [path for top in ("bridgetower", *ENTRY_FOLDERS) for path in sorted((REPO / top).rglob("*.py"))]
    names = {path: ".".join(path.relative_to(REPO).with_suffix("").parts) for path in paths}
    return {name.removesuffix(".__init__"): path for path, name in names.items()}


def test_every_module_follows_the_rules():
    assert [broken for name, path in modules().items() for broken in find_violations(name, path.read_text())] == []


def test_every_room_of_the_table_exists():
    assert [room for room in MAY_IMPORT if room not in modules()] == []


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
        (
            "bridgetower.model.heads",
            "from importlib import import_module as load",
            "imports a module whose name is computed",
        ),
        ("bridgetower.model.heads", "spec_from_file_location(path)", "imports a module whose name is computed"),
        ("bridgetower.model.heads", "importlib.import_module(name)", "imports a module whose name is computed"),
        ("bridgetower.data.order", "from . import index", "by a relative name"),
        ("bridgetower.new.thing", "", "is in no room of the table"),
    ],
)
def test_a_broken_rule_is_reported(module, source, broken):
    (report,) = find_violations(module, source)
    assert broken in report


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
def test_an_allowed_import_is_not_reported(module, source):
    assert find_violations(module, source) == []


def find_paths_to_torch(sources: dict[str, str]) -> dict[str, tuple[str, ...]]:
    """Return a chain of imports from each module to torch, through the given modules.

    A module that does not import torch, directly or through others, has no entry.
    """
    imported = {name: sorted(set(imported_modules(source))) for name, source in sources.items()}
    paths: dict[str, tuple[str, ...]] = {
        name: (name, other)
        for name, names in imported.items()
        for other in names
        if other.split(".")[0] in ("torch", "torchvision")
    }
    is_growing = True
    while is_growing:
        is_growing = False
        for name in imported.keys() - paths.keys():
            # An imported name is a module or something in a module.
            targets = {target for other in imported[name] for target in (other, other.rpartition(".")[0])}
            step = min(targets & paths.keys(), default=None)
            if step is not None:
                paths[name] = (name, *paths[step])
                is_growing = True
    return paths


def find_cycles(imports: dict[str, set[str]]) -> list[list[str]]:
    """List the groups of modules that import each other, directly or through others."""
    reached: dict[str, set[str]] = {}
    for name in imports:
        seen: set[str] = set()
        waiting = [name]
        while waiting:
            for other in imports.get(waiting.pop(), set()) - seen:
                seen.add(other)
                waiting.append(other)
        reached[name] = seen
    cycles = {name: sorted(other for other in seen if name in reached[other]) for name, seen in reached.items()}
    return [cycle for name, cycle in cycles.items() if cycle and cycle[0] == name]  # each group once


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
    assert find_cycles(imports) == []
    assert find_cycles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == [["b", "c"]]


def test_data_prep_never_imports_torch_not_even_through_others():
    paths = find_paths_to_torch({name: path.read_text() for name, path in modules().items()})
    assert {name: path for name, path in paths.items() if is_within(name, "data_prep")} == {}
    assert "pretrain.train" in paths


def test_a_path_to_torch_is_found_through_other_modules():
    sources = {
        "a": "from b import c\nimport numpy",
        "b.c": "def f():\n    from d import thing",
        "d": "import a\nimport torch.nn",
        "e": "import numpy\nimport e",
    }
    paths = find_paths_to_torch(sources)
    assert paths["a"] == ("a", "b.c", "d", "torch.nn") and "e" not in paths


def test_no_script_has_the_name_of_a_module_of_python_or_of_a_library():
    # A script's folder is first on sys.path: `import report` in a library would import pretrain/report.py.
    taken = sys.stdlib_module_names | set(packages_distributions()) | OPTIONAL_LIBRARIES
    files = [path for top in ENTRY_FOLDERS for path in (REPO / top).glob("*.py") if path.stem != "__init__"]
    # No library that a script of these folders loads imports Python's trace or a data_prep.
    assert {path for path in files if path.stem in taken} == {
        REPO / "benchmarks/data_prep.py",
        REPO / "pretrain/trace.py",
    }
    # No other file in the same folder may import the hidden modules.
    for folder, name in (("benchmarks", "data_prep"), ("pretrain", "trace")):
        imported = {one for path in (REPO / folder).glob("*.py") for one in imported_modules(path.read_text())}
        assert not any(is_within(one, name) for one in imported)
    assert {"train", "presets", "build_shards"} <= {path.stem for path in files}, "the scripts were not found"


def test_init_files_import_nothing_so_that_a_module_costs_only_what_it_needs():
    files = [path for name, path in modules().items() if path.name == "__init__.py"]
    assert len(files) > 8
    imported = {path: set(imported_modules(path.read_text())) for path in files}
    # The package loads a public name when it is first used.
    assert imported.pop(REPO / "bridgetower/__init__.py") == {"importlib", "typing.Any", COMPUTED}
    assert imported == {path: set() for path in imported}
