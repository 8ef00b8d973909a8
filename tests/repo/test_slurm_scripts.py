"""The job scripts without Slurm: what they print and refuse. tests/slurm runs them on a real Slurm."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from finetune.presets import PRESETS as FINETUNE_PRESETS
from tests.conftest import REPO

SCRIPTS = sorted((REPO / "slurm").glob("*.sh"))


@pytest.fixture
def site(tmp_path) -> Path:
    """Return a repository with the scripts alone. A test may write its slurm/site.env."""
    shutil.copytree(REPO / "slurm", tmp_path / "slurm")
    for program in ("pretrain/train.py", "finetune/train.py", "data_prep/build_shards.py"):
        (tmp_path / program).parent.mkdir()
        (tmp_path / program).touch()
    (tmp_path / "slurm/site.env").unlink(missing_ok=True)
    return tmp_path


def run(folder: Path, *words: str, code: int = 0, **env: str) -> str:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
    done = subprocess.run(
        [str(shutil.which("bash")), *words], cwd=folder, capture_output=True, text=True, env={**clean, **env}
    )
    assert done.returncode == code, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout if code == 0 else done.stderr


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_bash_parses_every_script(script):
    subprocess.run(["bash", "-n", script], check=True)


def test_a_dry_run_shows_the_command_of_the_published_run(site):
    command = run(site, "slurm/pretrain_base.sh", "--dry-run", "--name=first run")
    expected = (
        "srun --nodes=8 --ntasks=64 --label --kill-on-bad-exit=0 --cpu-bind=cores --cpus-per-task=10 "
        r"bash slurm/_task.sh 1 .venv/bin/python -- pretrain/train.py base_4m --name=first\ run"
    )
    assert command.strip() == expected


@pytest.mark.parametrize("script", sorted((REPO / "slurm").glob("finetune_*.sh")), ids=lambda path: path.name)
def test_a_dry_run_of_fine_tuning_shows_its_preset_on_one_node(site, script):
    name = script.stem.removeprefix("finetune_")
    command = run(site, f"slurm/{script.name}", "--dry-run", "--init=runs/base_4m")
    assert command.startswith("srun --nodes=1 --ntasks=8 ")
    assert command.strip().endswith(f"-- finetune/train.py {name}_base --init=runs/base_4m")
    assert f"{name}_base" in FINETUNE_PRESETS and f"{name}_large" in FINETUNE_PRESETS


def test_every_published_fine_tuning_has_a_script():
    scripts = {path.stem.removeprefix("finetune_") for path in (REPO / "slurm").glob("finetune_*.sh")}
    assert scripts == {name.removesuffix("_base") for name in FINETUNE_PRESETS if name.endswith("_base")}


def test_a_dry_run_of_submit_shows_both_commands(site):
    (site / "slurm/site.env").write_text("SBATCH_ACCOUNT=vision\n\n# PYTHON=no\nPYTHON='/envs/my own/bin/python'\r\n")
    options = ["--nodes=4", "--ntasks-per-node=1", "-p", "gpu"]
    lines = run(site, "slurm/submit.sh", *options, "slurm/pretrain_large.sh", "large_288", "--dry-run").splitlines()
    assert lines[0] == "# SBATCH_ACCOUNT=vision"
    assert lines[1].split() == ["sbatch", *options, "slurm/pretrain_large.sh", "large_288"]
    assert "--nodes=4 --ntasks=4 " in lines[3]
    assert lines[3].rstrip().endswith(r"bash slurm/_task.sh 8 /envs/my\ own/bin/python -- pretrain/train.py large_288")


def test_submit_passes_the_settings_of_the_site_file_to_sbatch(site):
    (site / "slurm/site.env").write_text("SBATCH_ACCOUNT=vision\nSBATCH_PARTITION=gpu\n")
    fake = site / "bin/sbatch"
    fake.parent.mkdir()
    fake.write_text('#!/bin/sh\necho "$SBATCH_ACCOUNT $SBATCH_PARTITION $PWD $@"\n')
    fake.chmod(0o755)
    path = f"{fake.parent}:{os.environ['PATH']}"
    script = str(site / "slurm/submit.sh")
    output = run(
        Path("/"), script, "--nodes=2", "slurm/pretrain_base.sh", "--seed=2", PATH=path, SBATCH_PARTITION="test"
    )
    # The environment of one job overrides the site's file.
    assert output == f"vision test {site} --nodes=2 slurm/pretrain_base.sh --seed=2\n"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("PYTON=/x", "line 2: PYTON is unknown. slurm/site.env.example lists every name."),
        ("PYTHON = /x", "line 2: 'PYTHON = /x' is not NAME=value"),
        ("export PYTHON=/x", "is not NAME=value"),
    ],
)
def test_a_wrong_line_in_the_site_file_is_refused(site, line, message):
    (site / "slurm/site.env").write_text(f"NCCL_DEBUG=INFO\n{line}\n")
    assert message in run(site, "slurm/pretrain_base.sh", "--dry-run", code=2)


def test_the_site_file_is_not_executed(site):
    (site / "slurm/site.env").write_text("SCRATCH=$(touch hacked)\nPYTHON=`touch hacked`\n")
    run(site, "slurm/pretrain_base.sh", "--dry-run")
    assert not (site / "hacked").exists()


def test_the_example_is_accepted_with_every_setting_in_use(site):
    lines = (REPO / "slurm/site.env.example").read_text().splitlines()
    used = [line[1:] for line in lines if line.startswith("#") and "=" in line.split(" ")[0]]
    assert len(used) > 10
    (site / "slurm/site.env").write_text("\n".join(line for line in used if not line.startswith("CONTAINER=")))
    assert "/projects/envs/bridgetower/bin/python" in run(
        site, "slurm/pretrain_base.sh", "--dry-run", RANKS_PER_NODE=""
    )


def test_a_container_image_is_run_by_apptainer(site):
    fake = site / "bin/apptainer"
    fake.parent.mkdir()
    fake.write_text("#!/bin/sh\n")
    fake.chmod(0o755)
    (site / "slurm/site.env").write_text("CONTAINER=/images/bt.sif\nCONTAINER_MOUNTS=/data\nPYTHON=python3\n")
    path = f"{fake.parent}:{os.environ['PATH']}"
    command = run(site, "slurm/pretrain_base.sh", "--dry-run", PATH=path)
    wrapped = f"{fake} exec --nv --bind {site},/data --pwd {site} /images/bt.sif python3 -- pretrain/train.py base_4m"
    assert wrapped in command.replace("\\", "")


def test_a_container_image_without_a_runtime_is_an_error(site):
    (site / "slurm/site.env").write_text("CONTAINER=/images/bt.sif\n")
    assert "neither pyxis" in run(site, "slurm/pretrain_base.sh", "--dry-run", code=2, PATH="/usr/bin:/bin")


@pytest.mark.parametrize(
    ("folder", "words", "env", "message"),
    [
        (".", ["slurm/pretrain_base.sh"], {}, "this runs inside a job: submit it with `slurm/submit.sh"),
        ("slurm", ["pretrain_base.sh"], {"SLURM_JOB_ID": "1"}, "submit from the root of the repository"),
        (".", ["slurm/pretrain_base.sh"], {"SLURM_JOB_ID": "1"}, "cannot import bridgetower"),
        (".", ["slurm/pretrain_base.sh"], {"SLURM_JOB_ID": "1", "MODULES": "cuda"}, "no command 'module'"),
        (".", ["slurm/pretrain_base.sh", "--dry-run"], {"SITE_ENV": "none.env"}, "SITE_ENV=none.env is not a file"),
        (".", ["slurm/pretrain_base.sh", "--dry-run"], {"RANKS_PER_NODE": "4"}, "but the job has 64 tasks on 8 nodes"),
        (".", ["slurm/build_shards.sh", "cc3m"], {"SLURM_JOB_ID": "1"}, "runs as a job array: sbatch --array"),
        (".", ["slurm/submit.sh", "--nodes=3"], {}, "which script?"),
        (".", ["slurm/submit.sh", "slurm/pretrain_base.sh"], {"PATH": "tools"}, "no sbatch"),
    ],
)
def test_wrong_use_is_refused_with_what_to_do(site, folder, words, env, message):
    (site / "tools").mkdir()  # the commands that submit.sh needs before it calls sbatch
    (site / "tools/dirname").symlink_to(str(shutil.which("dirname")))
    assert message in run(site / folder, *words, code=2, **env)
