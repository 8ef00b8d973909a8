"""The command line of train.py: a mistake stops it before anything is written, and the error says what to do."""

from __future__ import annotations

import shutil
import subprocess
import tarfile

import numpy as np
import pytest

from bridgetower.config.overrides import walk_fields
from bridgetower.data.corpora import Corpora
from bridgetower.data.order import Order
from pretrain.presets import PRESETS, base_4m, tiny
from tests.conftest import command_line, run_script, script_environment
from tests.integration.runs import SMALL_MODEL


def test_help_of_base_prints_every_setting():
    printed = run_script("pretrain/train.py", "base_4m", "--help").stdout
    for name, _, _, _ in walk_fields(base_4m()):
        assert f"\n  --{name}=" in printed
    assert "--optim.base_lr=1e-05  (number)\n      Peak learning rate of both towers." in printed


def test_help_alone_lists_the_presets():
    printed = run_script("pretrain/train.py", "--help").stdout
    assert "Usage: python pretrain/train.py PRESET" in printed and all(f"\n  {name} " in printed for name in PRESETS)


# The words of a command line (SHARDS stands for a corpus that exists), and what the error must say: what is wrong and
# what to do. The mistakes of the second list are found after libraries are imported, which takes seconds.
AT_ONCE = {
    "misspelt flag": (
        ["tiny", "--optim.base_lrr=1"],
        "Unknown setting --optim.base_lrr",
        "Did you mean --optim.base_lr",
    ),
    "unknown preset": (["base_4n"], "Unknown preset base_4n", "Did you mean base_4m"),
    "no preset": ([], "Which preset?", "large_4m"),
    "missing shard folder": (["tiny", "--data.train_shards=nowhere"], "nowhere does not exist", "build_shards.py"),
    "wrong type": (["tiny", "--optim.total_steps=many"], "optim.total_steps=many", "e.g. --optim.total_steps=1000"),
    "wrong choice": (["tiny", "--optim.implementation=apex"], "optim.implementation=apex", "auto, fused, torch"),
    "unexpected word": (["tiny", "optim.base_lr=1"], "Unexpected word", "--section.field=value"),
    "contradiction": (["tiny", "--model.image_size_px=100"], "100 is not a multiple", "Use 90 or 108"),
    "lone dashes": (["tiny", "--", "--seed=1"], "A lone -- would hide", "Leave it out"),
    "missing run.json": (["runs/none/run.json"], "There is no runs/none/run.json", "run folder"),
}
BEFORE_STARTING = {
    "batch that does not divide": (
        ["tiny", "--data.train_shards=SHARDS", "--data.eval_shards=", "--data.global_batch_size=80"],
        "global_batch_size=80 does not divide into micro-batches of 32 on 1 rank(s)",
        "The next global batch that divides is 96",
    ),
    "missing DeepSpeed file": (
        ["tiny", "--data.train_shards=SHARDS", "--data.eval_shards=", "--engine.deepspeed=zero2_bf61"],
        "ds_configs/zero2_bf61.json",
        "offers: zero2_bf16, zero2_fp32",
    ),
    "unknown tower weights": (
        ["base_4m", "--data.train_shards=SHARDS", "--data.eval_shards=", "--model.vision.weights=opnai"],
        "model.vision.weights=opnai",
        "openai, ",
    ),
}


def refused(tmp_path, words, wrong, suggestion):
    result = run_script("pretrain/train.py", *words, *([f"--run_root={tmp_path / 'runs'}"] if words else []), code=2)
    assert result.stderr.startswith("error: ") and wrong in result.stderr and suggestion in result.stderr
    assert "Traceback" not in result.stderr and result.stdout == ""
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("case", AT_ONCE)
def test_wrong_command_exits_2_with_a_suggestion(tmp_path, case):
    refused(tmp_path, *AT_ONCE[case])


@pytest.mark.parametrize("case", BEFORE_STARTING)
def test_wrong_setting_exits_2_before_anything_is_started(tmp_path, emoji_shards, case):
    words, wrong, suggestion = BEFORE_STARTING[case]
    refused(tmp_path, [word.replace("SHARDS", str(emoji_shards / "concept")) for word in words], wrong, suggestion)


def overwrite_an_image_that_only_the_second_rank_reads(folder, config):
    """Damage an image of the first step of two ranks; all sizes stay, so that only decoding it fails."""
    corpora = Corpora([folder])
    order = Order(corpora.pairs_per_shard, corpora.corpus_of_shard, seed=config.seed, shards_per_window=64)
    size = config.data.micro_batch_size
    first, second = (order.locate(rank * size + np.arange(size)).pair for rank in (0, 1))
    reader = corpora.reader(0)
    samples = [{reader.locate(pair)[0] for pair in pairs.tolist()} for pairs in (first, second)]
    unread = sorted(samples[1] - samples[0])
    path = corpora.shard_paths[0]
    with tarfile.open(path) as tar:
        images = [member for member in tar.getmembers() if not member.name.endswith((".txt", ".json"))]
    image = images[unread[0]]
    with path.open("r+b") as file:
        file.seek(image.offset_data)
        file.write(b"x" * image.size)


def test_error_on_one_rank_alone_is_printed_by_that_rank(tmp_path, emoji_shards):
    damaged = tmp_path / "damaged"
    shutil.copytree(emoji_shards / "concept", damaged)
    overwrite_an_image_that_only_the_second_rank_reads(damaged, tiny())
    words = ["tiny", f"--data.train_shards={damaged}", "--data.eval_shards=", f"--run_root={tmp_path}", *SMALL_MODEL]
    command = command_line("pretrain/train.py", words, ranks=2)
    result = subprocess.run(command, env=script_environment({}), capture_output=True, text=True, timeout=300)
    # 2; or 1, if the first rank lost its neighbour before the launcher saw the error.
    assert result.returncode in (1, 2)
    assert f"[rank 1] error: The image of {damaged}/00000.tar, sample" in result.stderr
