"""pretrain/describe.py: the tables it prints, and that it imports no library it does not need."""

from __future__ import annotations

import subprocess
import sys

import pytest

from pretrain import describe
from tests.conftest import REPO, script_environment

HEAVY = ("open_clip", "timm", "torchvision", "transformers", "deepspeed")
RUN_AND_LIST = """
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print("IMPORTED", *sorted(set(sys.modules) & set({heavy!r})))
"""


def test_tables_of_base_have_the_published_sizes(capsys):
    describe.main("base")
    shown = " ".join(capsys.readouterr().out.split())
    for row in (
        "vision_tower │ 85,897,728 │ 151",
        "cross_modal.image_layers │ 56,710,656 │ 156",
        "without heads │ 325,756,416 │ 693",
        "total │ 365,005,403 │ 701",
        "encode_image: bridged layers x pairs x positions x width │ 6 x 1 x 325 x 768",
        "fuse: pooled, text half first │ 1 x 1536",
        "vision tower and transform, forward │ 61.78",
        "bridges, cross-modal layers and poolers, forward │ 40.39",
        "mlm head at every token, forward │ 1.02",
        "pretraining step (MLM + ITM), forward and backward │ 382.73",
    ):
        assert row in shown


def test_a_tower_of_timm_is_described_by_running_it(capsys):
    describe.main("base", **{"model.vision.name": "ViT-B-16-SigLIP", "model.image_size_px": "224"})
    shown = " ".join(capsys.readouterr().out.split())
    assert "6 x 1 x 197 x 768" in shown  # 196 patches, and their mean in place of a class token


@pytest.mark.parametrize("command", [["pretrain/describe.py", "base"], ["pretrain/plan.py", "base_4m", "--gpus=64"]])
def test_sizes_and_costs_need_neither_deepspeed_nor_the_libraries_of_towers(command):
    result = subprocess.run(
        [sys.executable, "-c", RUN_AND_LIST.format(heavy=HEAVY), *command],
        cwd=REPO,
        env=script_environment({}),
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.splitlines()[-1].split() == ["IMPORTED"]
