"""Starting a command imports what it uses and no more.

The tests state which modules are loaded, because times depend on the machine.
"""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.conftest import REPO, script_environment

# Runs a script as `python SCRIPT ...` does, and writes the names of all loaded modules at its end.
RUN_AND_LIST_MODULES = """
import atexit, json, runpy, sys
from pathlib import Path
list_file = sys.argv.pop(1)
atexit.register(lambda: Path(list_file).write_text(json.dumps(sorted(sys.modules))))
sys.argv.pop(0)
sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
runpy.run_path(sys.argv[0], run_name="__main__")
"""
# What takes a tenth of a second or more to import.
HEAVY = {
    *("torch", "torchvision", "transformers", "open_clip", "timm", "deepspeed", "triton"),
    *("matplotlib", "wandb", "wandb_workspaces", "webdataset", "huggingface_hub"),
}
SCRIPTS = sorted(
    str(path.relative_to(REPO))
    for folder in ("pretrain", "finetune", "data_prep")
    for path in (REPO / folder).glob("*.py")
    if '__name__ == "__main__"' in path.read_text()
)


def modules_of_script(list_file: Path, script: str, *arguments: str) -> set[str]:
    """Run a script, and return the modules that it has loaded when it ends."""
    subprocess.run(
        [sys.executable, "-c", RUN_AND_LIST_MODULES, str(list_file), str(REPO / script), *arguments],
        cwd=REPO,
        env=script_environment({}),
        capture_output=True,
        check=True,
        timeout=120,
    )
    return set(json.loads(list_file.read_text()))


def modules_of_program(program: str) -> set[str]:
    """Run a program that prints nothing itself, and return the modules that it has loaded when it ends."""
    printing = f"{program}\nimport sys\nprint(*sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", printing],
        cwd=REPO,
        env=script_environment({}),
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    return set(result.stdout.split())


def test_the_scripts_were_found():
    assert {"pretrain/train.py", "finetune/train.py", "data_prep/build_shards.py"} <= set(SCRIPTS)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_imports_no_heavy_library(script, tmp_path):
    assert modules_of_script(tmp_path / "modules", script, "--help") & HEAVY == set()


def test_importing_the_package_imports_only_the_package():
    added = modules_of_program("import bridgetower") - modules_of_program("pass")
    assert {name for name in added if name.split(".")[0] not in sys.stdlib_module_names} == {"bridgetower"}


def test_a_report_needs_no_torch():
    modules = modules_of_program("import pretrain.report, pretrain.report_charts")
    assert "matplotlib" in modules and "torch" not in modules


def test_trace_needs_torch_and_neither_deepspeed_nor_the_libraries_of_towers(emoji_shards, tmp_path):
    flags = [
        f"--data.{split}_shards={emoji_shards / name}" for split, name in (("train", "train"), ("eval", "concept"))
    ]
    loaded = modules_of_script(tmp_path / "modules", "pretrain/trace.py", "tiny", *flags)
    # torch.compile's front end costs as much as torch itself; torchvision and transformers' models import it.
    assert loaded & (HEAVY | {"torch._dynamo"}) == {"torch"}


def test_the_packages_that_training_imports_are_compiled_by_an_install():
    """`.ci/compile_imports.py` says how to write its list anew."""
    listed = set((REPO / ".ci/imported_packages.txt").read_text().split())
    program = "import finetune.assemble, pretrain.assemble, bridgetower.engine.run, torch._dynamo"
    packages = {name.rpartition(".")[0] for name in modules_of_program(program)} - {""}
    site_packages = Path(sysconfig.get_path("purelib"))
    installed = {name for name in packages if site_packages.joinpath(*name.split(".")).is_dir()}
    assert len(installed) > 100
    assert len(installed - listed) <= 0.05 * len(installed), sorted(installed - listed)
