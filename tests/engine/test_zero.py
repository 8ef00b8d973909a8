"""ZeRO over whole partitions beside DeepSpeed's own, in one process and in two; with recorded steps, too."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from bridgetower.config.deepspeed import merge_deepspeed_config, read_memory_config
from bridgetower.config.optim import OptimConfig
from bridgetower.engine import initialize
from bridgetower.engine.zero import PartitionedZero
from bridgetower.step.cuda_graphs import RecordedStep, Stages
from tests.conftest import REPO
from tests.ranks import run_on_ranks

KINDS = ("bf16", "fp32")
STEPS, MICRO_STEPS = 4, 2


class Net(nn.Module):
    """A small one whose tensors lie across the borders of partitions."""

    def __init__(self, *, records: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Sequential(nn.Linear(7, 33), nn.GELU())
        self.second = nn.Sequential(nn.LayerNorm(33), nn.Linear(33, 5))
        self.unused = nn.Parameter(torch.ones(3))
        self.step = RecordedStep(self, Stages(self.encode, self.finish)) if records else None

    def encode(self, inputs: tuple[Tensor]) -> list[Tensor]:
        return [self.first(inputs[0])]

    def finish(self, inputs: tuple[Tensor], states: Sequence[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        return self.second(states[0]).square().sum(), {"none": torch.zeros(2)}

    def forward(self, batch: Tensor) -> Tensor:
        inputs = (batch,)
        return (self.step(inputs) if self.step else self.finish(inputs, self.encode(inputs)))[0]


def steps_of(rank: int, kind: str, *, theirs: bool, records: bool = False) -> dict[str, Any]:
    """Train the net; a gradient of one rank is lost at last."""
    net = Net(records=records)
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
            loss = engine(torch.randn(3 + micro_step, 7, generator=generator).to(dtype))
            is_lost = step == STEPS and (rank, micro_step) == (0, 1)
            engine.backward(loss * float("nan") if is_lost else loss)
            engine.step()
        norms.append(float(engine.get_global_grad_norm()))
        weights.append([parameter.detach().clone() for parameter in net.parameters()])
    return {"norms": norms, "weights": weights, "skipped": engine.skipped_steps}


def train_all(rank: int, folder: Path) -> None:
    found = {}
    for kind in KINDS:
        theirs = steps_of(rank, kind, theirs=True)
        ours = [steps_of(rank, kind, theirs=False, records=records) for records in (False, True)]
        found[kind] = [(one, theirs) for one in ours]
    torch.save(found, folder / f"{rank}.pt")


@pytest.mark.parametrize("ranks", [1, 2])
def test_steps_are_deepspeeds_own(ranks, tmp_path):
    run_on_ranks(train_all, ranks, tmp_path)
    for rank in range(ranks):
        for ours, theirs in itertools.chain(*torch.load(tmp_path / f"{rank}.pt", weights_only=True).values()):
            assert ours["norms"] == pytest.approx(theirs["norms"], rel=1e-6)
            assert ours["norms"][0] > 0.5  # so that gradients are clipped
            for weights, others in zip(ours["weights"], theirs["weights"], strict=True):
                for one, other in zip(weights, others, strict=True):
                    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
            assert not torch.equal(ours["weights"][0][1], ours["weights"][-2][1])
            # The step whose gradient was lost on one rank is left out on all.
            assert ours["skipped"] == theirs["skipped"] == 1 and ours["norms"][-1] == float("inf")
            assert all(map(torch.equal, ours["weights"][-1], ours["weights"][-2]))
