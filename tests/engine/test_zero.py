"""ZeRO over whole partitions beside DeepSpeed's own, in one process and in two."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

from bridgetower.config.deepspeed import merge_deepspeed_config, read_memory_config
from bridgetower.config.schema import OptimConfig
from bridgetower.engine import initialize
from bridgetower.engine.zero import PartitionedZero
from tests.conftest import REPO
from tests.ranks import run_on_ranks

KINDS = ("bf16", "fp32")
STEPS, MICRO_STEPS = 4, 2


def steps_of(rank: int, kind: str, *, theirs: bool) -> dict[str, Any]:
    """Train a small net, whose tensors lie across the borders of partitions; a gradient of one rank is lost at last."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(7, 33), nn.GELU(), nn.LayerNorm(33), nn.Linear(33, 5))
    net.register_parameter("unused", nn.Parameter(torch.ones(3)))
    memory = read_memory_config(REPO / f"ds_configs/zero2_{kind}.json")
    memory["zero_optimization"] |= {"reduce_bucket_size": 200, "allgather_bucket_size": 200}
    settings = merge_deepspeed_config(memory, micro_batch_size=3, accumulation_steps=MICRO_STEPS, max_grad_norm=0.5)
    optim = OptimConfig(base_lr=1e-2, total_steps=100, implementation="torch")
    own = mock.patch.object(initialize, "look_at_partitions") if theirs else mock.MagicMock()
    with own:
        engine = initialize.build_engine(net, optim, settings, torch.device("cpu"))
    assert isinstance(engine.optimizer, PartitionedZero) != theirs
    dtype = next(net.parameters()).dtype
    generator = torch.Generator().manual_seed(rank)
    norms, weights = [], []
    for step in range(STEPS + 1):
        for micro_step in range(MICRO_STEPS):
            loss = engine(torch.randn(3, 7, generator=generator).to(dtype)).square().sum()
            is_lost = step == STEPS and (rank, micro_step) == (0, 1)
            engine.backward(loss * float("nan") if is_lost else loss)
            engine.step()
        norms.append(float(engine.get_global_grad_norm()))
        weights.append([parameter.detach().clone() for parameter in net.parameters()])
    return {"norms": norms, "weights": weights, "skipped": engine.skipped_steps}


def train_all(rank: int, folder: Path) -> None:
    found = {kind: [steps_of(rank, kind, theirs=theirs) for theirs in (False, True)] for kind in KINDS}
    torch.save(found, folder / f"{rank}.pt")


@pytest.mark.parametrize("ranks", [1, 2])
def test_steps_are_deepspeeds_own(ranks, tmp_path):
    run_on_ranks(train_all, ranks, tmp_path)
    for rank in range(ranks):
        for ours, theirs in torch.load(tmp_path / f"{rank}.pt", weights_only=True).values():
            assert ours["norms"] == pytest.approx(theirs["norms"], rel=1e-6)
            assert ours["norms"][0] > 0.5  # so that gradients are clipped
            for weights, others in zip(ours["weights"], theirs["weights"], strict=True):
                for one, other in zip(weights, others, strict=True):
                    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
            assert not torch.equal(ours["weights"][0][1], ours["weights"][-2][1])
            # The step whose gradient was lost on one rank is left out on all.
            assert ours["skipped"] == theirs["skipped"] == 1 and ours["norms"][-1] == float("inf")
            assert all(map(torch.equal, ours["weights"][-1], ours["weights"][-2]))
