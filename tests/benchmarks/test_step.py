"""benchmarks/step.py on the smallest model: its figures, the path that its own side takes, and the flags it refuses."""

from __future__ import annotations

import json
import platform
import re

import pytest
import torch

from benchmarks import step
from benchmarks.machine import cpu_features, cpu_model
from benchmarks.step_sides import MEAN_TOKENS, caption_lengths, make_batch
from bridgetower.config.named_models import MODELS
from bridgetower.config.snapshot import find_commit
from bridgetower.errors import ConfigError
from bridgetower.model.sizes import complete_model_config
from tests.conftest import REPO, run_script

# Runs one step of pretrain/train.py or of our side, in a process that each of them prepares itself, and writes the
# names of the attention operators of its last forward pass.
PROFILE = """
import json, runpy, sys, threading
from multiprocessing import Pipe
from torch.profiler import ProfilerActivity, profile
from bridgetower.tasks.pretraining import PretrainTask

out, program, *words = sys.argv[1:]
names, forward = [], PretrainTask.forward

def profiled_forward(task, batch):
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        result = forward(task, batch)
    keys = (event.key for event in profiler.key_averages())
    names[:] = sorted(key for key in keys if "attention" in key.lower() or "attend" in key)
    return result

PretrainTask.forward = profiled_forward
if program.endswith("train.py"):
    sys.argv = [program, *words]
    runpy.run_path(program, run_name="__main__")
else:
    from benchmarks import step
    ours, theirs = Pipe()
    setting = step.Setting(**json.loads(words[0]))
    threading.Thread(target=step._serve, args=("ours", setting, theirs), daemon=True).start()
    for request in ("measure", "step"):
        ours.send(request)
        answer = ours.recv()
        assert not isinstance(answer, Exception), answer
json.dump(names, open(out, "w"))
"""


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """Return what the command prints for the smallest model, and the content of its file."""
    out = tmp_path_factory.mktemp("step") / "results/step.json"
    flags = ["--preset=tiny", "--against=plain,recompute_all", "--dtype=fp32", "--rounds=1", "--threads=1"]
    result = run_script("benchmarks/step.py", *flags, f"--out={out}", launcher="preloaded")
    return result.stdout, json.loads(out.read_text())


def test_all_sides_compute_the_same_loss_and_ours_does_less_for_it(compared):
    printed, content = compared
    assert "GFLOP per pair, counted" in printed and "plain" in printed
    ours, plain, recomputed = (content["sides"][name] for name in ("ours", "plain", "recompute_all"))
    assert ours["loss"] == pytest.approx(plain["loss"], abs=1e-5)
    for figure in ("gflop_per_pair", "kept_mb_per_pair", "moved_gb_per_pair", "peak_mb"):
        assert 0 < ours[figure] < plain[figure]
    assert recomputed["kept_mb_per_pair"] < 0.5 * ours["kept_mb_per_pair"]
    assert recomputed["gflop_per_pair"] > ours["gflop_per_pair"]
    assert recomputed["loss"] == pytest.approx(ours["loss"], abs=1e-5)
    assert len(ours["seconds"]) == 1 and content["setting"]["batch"] == 8


def test_the_closed_form_is_what_is_counted(compared):
    ours, plain, recomputed = (compared[1]["sides"][name] for name in ("ours", "plain", "recompute_all"))
    assert ours["closed_form_gflop_per_pair"] == pytest.approx(ours["gflop_per_pair"], rel=1e-9)
    # The plain model also pools MLM's states, which nothing reads.
    poolers = 2 * 2 * complete_model_config(MODELS["tiny"]()).fusion.width ** 2 / 1e9
    assert plain["closed_form_gflop_per_pair"] == pytest.approx(plain["gflop_per_pair"] - poolers, rel=1e-9)
    for side in (ours, plain):
        assert sum(side["closed_form_gflop_of_parts"].values()) == pytest.approx(side["closed_form_gflop_per_pair"])
    # Recomputing is not counted as work.
    assert recomputed["closed_form_gflop_per_pair"] == ours["closed_form_gflop_per_pair"]


def test_results_name_the_machine_and_the_versions(compared):
    machine = compared[1]["machine"]
    assert machine["torch"] == torch.__version__ and machine["cpu"] == machine["device"] == cpu_model()
    assert machine["cpu_features"] == cpu_features() and machine["commit"] == find_commit()
    assert machine["cores"] >= 1 and machine["load_average"] >= 0


@pytest.mark.parametrize("dtype", step.DTYPES)
def test_our_side_takes_the_path_of_a_real_training_run(dtype, compared, emoji_shards, tmp_path):
    script, train_out, side_out = tmp_path / "profile.py", tmp_path / "train.json", tmp_path / "side.json"
    script.write_text(PROFILE)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    flags = [
        "--name=one",
        f"--run_root={tmp_path / 'runs'}",
        f"--data.train_shards={emoji_shards / 'train'}",
        "--data.eval_shards=",
        "--optim.total_steps=1",
        "--evaluation.every_steps=0",
        "--objectives.itc=false",
        "--compute.cuda_graphs=false",
        f"--engine.deepspeed=zero2_{dtype}",
    ]
    run_script(str(script), str(train_out), str(REPO / "pretrain/train.py"), "tiny", *flags, launcher="preloaded")
    kernels = json.loads((tmp_path / "runs/one/run.json").read_text())["kernels"]
    sides = compared[1]["sides"]
    assert kernels and sides["ours"]["kernels"] == kernels and sides["plain"]["kernels"] == ""
    setting = step.Setting("tiny", device, dtype, batch=8, compiled=False, dropout=None, threads=1)
    run_script(str(script), str(side_out), "step", json.dumps(setting._asdict()), launcher="preloaded")
    operators = json.loads(train_out.read_text())
    assert operators and json.loads(side_out.read_text()) == operators


@pytest.mark.skipif(platform.machine() != "x86_64", reason="other processors name their features otherwise")
def test_features_of_the_cpu_include_those_that_torch_uses():
    needed = {"AVX512": {"avx2", "avx512f"}, "AVX2": {"avx2"}}
    assert needed.get(torch.backends.cpu.get_cpu_capability(), set()) <= set(cpu_features())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"preset": "huge"}, "--preset=huge is not known. Use one of tiny"),
        ({"against": "apex"}, "--against=apex is not a side"),
        ({"against": "ours"}, "--against=ours is not a side. Use some of plain,transformers,recompute_vision"),
        ({"against": "no_fuse_kernels", "device": "cpu"}, "Triton kernels run only on a GPU. Use --device=cuda"),
        ({"dropout": "2"}, "--dropout=2 is not in [0, 1)"),
        ({"device": "tpu"}, "--device=tpu is not available"),
        ({"batchsize": "2"}, "batch"),
        ({"preset": "tiny", "against": "transformers"}, "Use --against=plain, or --preset=base"),
    ],
)
def test_wrong_flags_are_refused(flags, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        step.main(**flags)


def test_captions_have_the_mean_length_that_figures_are_given_for():
    lengths = caption_lengths(64, MEAN_TOKENS, 50)
    assert sum(lengths) == 64 * MEAN_TOKENS and len(set(lengths)) > 8
    batch = make_batch(complete_model_config(MODELS["tiny"]()), 8, torch.device("cpu"), pad_to=20)
    assert batch.clean_ids_BL.shape == (8, 20) and batch.attention_mask_BL.sum().item() == sum(batch.num_tokens)
    assert len(batch.mlm_index_M) == sum(batch.num_masked) > 0
