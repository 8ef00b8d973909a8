"""BridgeTower base at its published shapes: one optimizer step on a CPU."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import deepspeed
import pytest
import torch
from PIL import Image

from bridgetower.engine.checkpoint_files import load_file, load_weights
from tests.conftest import REPO, command_line, run_script, script_environment

# Published parameters of the backbone, less RoBERTa's unused pooler, which does not exist here; MLM head; ITM head.
BASE_PARAMETERS = 326_347_008 - (768 * 768 + 768) + 39_245_913 + 3_074

MEASURE = """
import os, sys
pid = os.spawnv(os.P_NOWAIT, sys.argv[1], sys.argv[1:])
_, status, usage = os.wait4(pid, 0)
print(usage.ru_maxrss)
sys.exit(os.waitstatus_to_exitcode(status))
"""


def build_long_captions(folder):
    """Build shards of two images, each with a caption of more tokens than the model reads."""
    (folder / "raw").mkdir()
    rows = ["image,caption"]
    for number in range(2):
        Image.new("RGB", (400, 300), (90 * number, 120, 60)).save(folder / f"raw/{number}.png")
        rows.append(f"{number}.png,{' '.join(['a photograph of two zebras beside the river'] * 10)}")
    (folder / "captions.csv").write_text("\n".join(rows))
    flags = [f"--raw={folder / 'raw'}", f"--captions={folder / 'captions.csv'}", f"--out={folder / 'shards'}"]
    run_script("data_prep/build_shards.py", "folder", *flags)
    return folder / "shards"


def write_quick_compiler(folder):
    """Write a compiler that takes a third of the time for DeepSpeed's two files, most of a minute on one core.

    It compiles the second file together with the first, reads only the torch headers that they need, which are the
    smaller part of all, and leaves out -O3 and debug information: the step is not faster with them.
    """
    (folder / "torch").mkdir()
    (folder / "torch/extension.h").write_text(
        "#pragma once\n#include <torch/types.h>\n#include <torch/csrc/utils/pybind.h>\n"
    )
    second = Path(deepspeed.__file__).parent / "ops/csrc/adam/cpu_adam_impl.cpp"
    compiler = folder / "c++"
    compiler.write_text(
        f"""#!/bin/sh
case "$*" in
*" -c {second} "*)
    while [ "$1" != -o ]; do shift; done
    exec c++ -x c++ -c /dev/null -o "$2" ;;
*" -c "*)
    exec c++ -I{folder} -include {second} "$@" -O1 -g0 ;;
esac
exec c++ "$@"
"""
    )
    compiler.chmod(0o755)
    return compiler


@pytest.mark.usefixtures("much_memory")
@pytest.mark.slow  # FusedAdam's CPU kernel is compiled, then 366 million parameters take a step
def test_one_step_of_base_with_fused_adam_stays_below_12_gb(tmp_path):
    arguments = [
        "base_4m",
        "--model.vision.weights=none",
        "--model.text.weights=none",
        f"--data.train_shards={build_long_captions(tmp_path)}",
        "--data.eval_shards=",
        "--data.global_batch_size=2",
        "--data.micro_batch_size=2",
        "--data.negative_group_size=2",
        "--data.workers=0",
        "--optim.total_steps=1",  # int(0.1 * 1) = 0 steps of warmup, so this step has the full rate
        "--optim.implementation=fused",
        # bf16 if the processor computes it. Otherwise a step of emulated matmuls would take ten minutes.
        "--engine.deepspeed=auto",
        "--tracker.wandb=off",
        f"--run_root={tmp_path}",
    ]
    environment = {
        "OMP_NUM_THREADS": "2",
        "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions"),
        "CXX": str(write_quick_compiler(tmp_path)),
    }
    process = subprocess.run(
        # With a process in between: the peak memory of a command includes the memory of the process that it was forked
        # from, and pytest may just have held a large model.
        [sys.executable, "-c", MEASURE, *command_line("pretrain/train.py", arguments, launcher="plain")],
        cwd=REPO,
        env=script_environment(environment),
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    assert 5e9 < int(process.stdout.splitlines()[-1]) * 1024 < 12e9
    run = tmp_path / "base_4m"
    assert list((tmp_path / "extensions").rglob("fused_adam*.so"))
    line = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    assert line["step"] == 1
    assert line["optim/lr/base"] == 1e-5 and line["optim/lr/fusion"] == 5e-5
    # Near ln(50,265) = 10.8 for MLM and ln(2) = 0.7 for ITM, give or take the random heads.
    assert 10.5 < line["train/loss/mlm"] < 12 and 0.3 < line["train/loss/itm"] < 1.5
    checkpoint = run / "checkpoints/step0000001"
    weights = load_weights(checkpoint)
    assert sum(tensor.numel() for tensor in weights.values()) == BASE_PARAMETERS
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())
    states = load_file(next(checkpoint.glob("*optim_states.pt")))["optimizer_state_dict"]["base_optimizer_state"][
        "state"
    ]
    assert sum(state["exp_avg"].numel() for state in states.values()) >= BASE_PARAMETERS
    assert all(state["exp_avg_sq"].count_nonzero() > 0 for state in states.values())
    shutil.rmtree(run / "checkpoints")  # 5 GB
