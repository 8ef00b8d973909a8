"""benchmarks/step.py on the smallest model: its figures, and the flags that it refuses."""

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
from tests.conftest import run_script


def test_both_sides_compute_the_same_loss_and_ours_does_less_for_it(tmp_path):
    out = tmp_path / "results/step.json"
    flags = [
        "--preset=tiny",
        "--against=plain,recompute_all",
        "--dtype=fp32",
        "--rounds=1",
        f"--out={out}",
        "--threads=1",
    ]
    result = run_script("benchmarks/step.py", *flags, launcher="preloaded")
    assert "GFLOP a pair" in result.stdout and "plain" in result.stdout
    content = json.loads(out.read_text())
    ours, plain = content["sides"]["ours"], content["sides"]["plain"]
    assert ours["loss"] == pytest.approx(plain["loss"], abs=1e-5)
    for figure in ("gflop_per_pair", "kept_mb_per_pair", "moved_gb_per_pair", "peak_mb"):
        assert 0 < ours[figure] < plain[figure]
    recomputed = content["sides"]["recompute_all"]
    assert recomputed["kept_mb_per_pair"] < 0.5 * ours["kept_mb_per_pair"]
    assert recomputed["gflop_per_pair"] > ours["gflop_per_pair"]
    assert recomputed["loss"] == pytest.approx(ours["loss"], abs=1e-5)
    for side in (ours, plain):
        assert side["closed_form_gflop_per_pair"] == pytest.approx(side["gflop_per_pair"], rel=1e-9)
        assert sum(side["closed_form_gflop_of_parts"].values()) == pytest.approx(side["closed_form_gflop_per_pair"])
    # Recomputing is not counted as work.
    assert recomputed["closed_form_gflop_per_pair"] == ours["closed_form_gflop_per_pair"]
    assert len(ours["seconds"]) == 1 and content["setting"]["batch"] == 8
    machine = content["machine"]
    assert machine["torch"] == torch.__version__ and machine["cpu"] == machine["device"] == cpu_model()
    assert machine["cpu_features"] == cpu_features() and machine["commit"] == find_commit()
    assert machine["cores"] >= 1 and machine["load_average"] >= 0


@pytest.mark.skipif(platform.machine() != "x86_64", reason="other processors name their features otherwise")
def test_features_of_the_cpu_include_those_that_torch_uses():
    needed = {"AVX512": {"avx2", "avx512f"}, "AVX2": {"avx2"}}
    assert needed.get(torch.backends.cpu.get_cpu_capability(), set()) <= set(cpu_features())


def test_sides_that_leave_out_one_saving_are_all_of_them():
    left_out = {name: compute for name, compute in step.SIDES.items() if name.startswith("no_")}
    assert len(left_out) == 8 and len(set(map(str, left_out.values()))) == 8
    assert not left_out["no_joint_pass"].joint_pass and left_out["no_joint_pass"].share_images


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"preset": "huge"}, "--preset=huge is not known. Use one of tiny"),
        ({"against": "apex"}, "--against=apex is no side"),
        ({"against": "ours"}, "--against=ours is no side. Use some of plain,transformers,no_share_images"),
        ({"dropout": "2"}, "--dropout=2 is no share"),
        ({"device": "tpu"}, "--device=tpu is not there"),
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
