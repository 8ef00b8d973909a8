"""What an installed package contains, and that it trains where there is no repository."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import sysconfig
from importlib.metadata import PathDistribution
from pathlib import Path

import pytest

from tests.conftest import REPO, script_environment

PACKAGES = ("bridgetower", "pretrain", "finetune", "data_prep", "ds_configs")


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy of the tracked files."""
    folder = tmp_path_factory.mktemp("source")
    listed = subprocess.run(["git", "ls-files"], cwd=REPO, capture_output=True, text=True, check=True).stdout
    for name in listed.splitlines():
        if (REPO / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPO / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def python(source, tmp_path_factory) -> Path:
    """The python of a new environment that has this project's wheel, and the libraries of the environment of the test.

    The libraries' folder is only put on the path: its .pth files are not read, so an editable install of the checkout
    is not found.
    """
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip"]
    build = ["wheel", "-qq", "--no-deps", "--no-build-isolation", "-w", str(folder), str(source)]
    subprocess.run([*pip, *build], check=True)
    (wheel,) = folder.glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "venv")], check=True)
    (site_packages,) = folder.glob("venv/lib/python*/site-packages")
    subprocess.run([*pip, "install", "-qq", "--no-deps", "--target", str(site_packages), str(wheel)], check=True)
    folders = sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
    (site_packages / "libraries.pth").write_text("\n".join(folders))
    return folder / "venv/bin/python"


def installed_files(python: Path) -> Path:
    (site_packages,) = python.parent.parent.glob("lib/python*/site-packages")
    return site_packages


def run(python: Path, cwd: Path, *arguments: str) -> str:
    """Run the environment's python where nothing leads to the checkout, and return what it prints."""
    env = {**script_environment({}), "HF_HUB_OFFLINE": "1"}
    env.pop("PYTHONPATH", None)
    done = subprocess.run([str(python), *arguments], cwd=cwd, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_wheel_has_the_code_the_vocabularies_the_template_and_the_deepspeed_files(source, python):
    names = {path.relative_to(source) for top in PACKAGES for path in (source / top).rglob("*") if path.is_file()}
    names -= {Path("ds_configs/README.md")}  # for readers of the repository
    assert {name for name in names if not (installed_files(python) / name).is_file()} == set()
    vocabularies = [name for name in names if name.match("bridgetower/data/assets/*/*")]
    assert len(vocabularies) == 6 and len(list(source.glob("ds_configs/*.json"))) == 2


def test_a_wheel_says_its_licence_and_has_the_notices_of_what_it_contains(python):
    (folder,) = installed_files(python).glob("bridgetower-*.dist-info")
    facts = PathDistribution(folder).metadata
    assert facts["License-Expression"] == "MIT" and facts["Author"] == "The BridgeTower contributors"
    files = facts.get_all("License-File") or []
    assert {Path(name).name for name in files} == {"LICENSE", "THIRD_PARTY.md", "NOTICE"} and len(files) == 4
    assert [name for name in files if not (folder / "licenses" / name).is_file()] == []


def test_every_module_comes_from_the_wheel_and_none_from_the_checkout(python, tmp_path):
    names = [name for name in PACKAGES if name != "ds_configs"]  # a folder without code
    code = (
        "import importlib.util, json, sys;"
        f"print(json.dumps([[importlib.util.find_spec(name).origin for name in {names}], sys.path]))"
    )
    origins, path = json.loads(run(python, tmp_path, "-c", code))
    assert origins == [str(installed_files(python) / name / "__init__.py") for name in names]
    assert str(REPO) not in path


def test_the_vocabularies_of_a_wheel_need_no_hub_and_no_repository(python, tmp_path):
    code = (
        "import bridgetower.data.text as t;"
        "print([t.Tokenizer(n).encode(['Hello world!'], 50)[0].tolist() for n in ('roberta', 'emoji')])"
    )
    assert run(python, tmp_path, "-c", code).startswith("[[0, 31414, 232, 328, 2], [0, ")


def test_a_wheel_trains_tiny_in_an_empty_folder(python, emoji_shards, tmp_path):
    (tmp_path / "shards").symlink_to(emoji_shards.parent)  # where the preset looks for the demo corpus
    steps = ("--optim.total_steps=2", "--tracker.every_steps=1", "--data.eval_shards=")
    run(python, tmp_path, "-m", "pretrain.train", "tiny", *steps)
    lines = [json.loads(line) for line in (tmp_path / "runs/tiny/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "train/loss/total" in line] == [1, 2]
