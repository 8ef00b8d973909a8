"""benchmarks/step.py on the smallest model: what it counts, and what it refuses."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
import torch

from benchmarks import step
from benchmarks.step_sides import MEAN_TOKENS, caption_lengths, make_batch
from bridgetower.config.models import MODELS
from bridgetower.errors import ConfigError
from bridgetower.model.bridgetower import complete_model_config
from tests.conftest import REPO


def test_both_sides_compute_the_same_loss_and_ours_does_less_for_it(tmp_path):
    out = tmp_path / "step.json"
    flags = ["--preset=tiny", "--against=plain", "--dtype=fp32", "--rounds=1", f"--out={out}", "--threads=1"]
    command = [sys.executable, "benchmarks/step.py", *flags]
    result = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert "GFLOP a pair" in result.stdout and "plain" in result.stdout
    content = json.loads(out.read_text())
    ours, plain = content["sides"]["ours"], content["sides"]["plain"]
    assert ours["loss"] == pytest.approx(plain["loss"], abs=1e-5)
    for figure in ("gflop_per_pair", "kept_mb_per_pair", "moved_gb_per_pair", "peak_mb"):
        assert 0 < ours[figure] < plain[figure]
    assert len(ours["seconds"]) == 1 and content["machine"]["torch"] and content["setting"]["batch"] == 8


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"preset": "huge"}, "--preset=huge is not known. Use one of tiny"),
        ({"against": "apex"}, "--against=apex is no side"),
        ({"dropout": "2"}, "--dropout=2 is no share"),
        ({"device": "tpu"}, "--device=tpu is not there"),
        ({"batchsize": "2"}, "batch"),
        ({"preset": "tiny"}, "Use --against=plain, or --preset=base"),
    ],
)
def test_wrong_flags_are_refused(flags, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        step.main(**flags)


def test_captions_have_the_mean_length_that_figures_are_quoted_for():
    lengths = caption_lengths(64, MEAN_TOKENS, 50)
    assert sum(lengths) == 64 * MEAN_TOKENS and len(set(lengths)) > 8
    batch = make_batch(complete_model_config(MODELS["tiny"]()), 8, torch.device("cpu"), pad_to=20)
    assert batch.clean_ids_BL.shape == (8, 20) and batch.attention_mask_BL.sum().item() == sum(batch.num_tokens)
    assert len(batch.mlm_index_M) == sum(batch.num_masked) > 0
