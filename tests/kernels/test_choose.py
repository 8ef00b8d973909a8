"""Which operations a model gets, by its device and by what a person chose."""

from __future__ import annotations

import json

import pytest
import torch

from bridgetower.kernels import choose
from bridgetower.kernels.choose import choose_ops
from bridgetower.kernels.cpu_ops import CpuOps
from bridgetower.kernels.flash_ops import FlashOps
from bridgetower.kernels.torch_ops import TorchOps
from bridgetower.model.attention import Attention, FeedForward
from bridgetower.model.bridge import NormedBridge
from bridgetower.model.vision_tower import ClipBlock
from tests.conftest import run_script
from tests.small_models import small_model

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def test_a_cpu_gets_its_own_operations_with_and_without_matrix_units(monkeypatch):
    for has_units, name in ((True, "cpu with matrix units"), (False, "cpu")):
        monkeypatch.setattr(choose, "has_matrix_units", lambda has_units=has_units: has_units)
        ops = choose_ops(CPU)
        assert type(ops) is CpuOps and ops.name == name
    assert choose_ops(CPU, compiled=True).name == "torch.compile, cpu"


@pytest.fixture
def gpu(monkeypatch):
    """A GPU on which nothing is launched."""
    monkeypatch.setattr(choose, "is_ampere_or_later", lambda device: True)
    monkeypatch.setattr(choose, "_builds_triton_kernels", lambda device: True)
    return monkeypatch


def test_a_gpu_gets_triton_where_its_kernels_build_and_are_wanted(gpu):
    pytest.importorskip("triton", reason="this build of torch has no Triton")
    assert choose_ops(GPU).name == "triton"
    assert type(choose_ops(GPU, fuse_kernels=False)) is FlashOps
    assert choose_ops(GPU, compiled=True).name == "torch.compile, flash attention"
    gpu.setattr(choose, "_builds_triton_kernels", lambda device: False)
    assert type(choose_ops(GPU)) is FlashOps


def test_older_gpus_and_other_devices_get_plain_torch(gpu):
    gpu.setattr(choose, "is_ampere_or_later", lambda device: False)
    assert type(choose_ops(GPU)) is TorchOps
    assert type(choose_ops(torch.device("meta"))) is TorchOps


def test_every_part_of_a_model_has_the_same_operations():
    model = small_model()
    parts = [part for part in model.modules() if isinstance(part, (Attention, FeedForward, NormedBridge, ClipBlock))]
    assert len(parts) > 20
    assert all(part.ops is model.ops for part in (*parts, model.vision_tower, model.text_tower, model.cross_modal))


def test_a_run_prints_its_choice_and_keeps_it_in_run_json(emoji_shards, tmp_path):
    done = run_script(
        "pretrain/train.py",
        "tiny",
        "--name=chosen",
        f"--run_root={tmp_path}",
        f"--data.train_shards={emoji_shards}/train",
        f"--data.eval_shards={emoji_shards}/combination",
        "--optim.total_steps=1",
        "--evaluation.max_images=2",
    )
    name = choose_ops(CPU if not torch.cuda.is_available() else None).name
    assert json.loads((tmp_path / "chosen/run.json").read_text())["kernels"] == name
    assert f"kernels: {name}" in done.stderr.splitlines()[0]
