"""Our ZeRO optimizer beside DeepSpeed's own, on one rank and two; and when DeepSpeed's own is used."""

from __future__ import annotations

import ast
import importlib.util
import itertools
import logging
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import deepspeed
import pytest
import torch
from deepspeed.runtime import engine as deepspeed_engine
from deepspeed.runtime.base_optimizer import BackwardHookStateManager
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer, IPGBucket
from torch import Tensor, nn

from bridgetower.config.deepspeed import merge_deepspeed_config, read_memory_config
from bridgetower.config.optim import OptimConfig
from bridgetower.engine import zero
from bridgetower.engine.initialize import build_engine
from bridgetower.step.cuda_graphs import RecordedStep, Stages
from tests.conftest import REPO
from tests.ranks import run_on_ranks

PRECISIONS = ("bf16", "fp32")
STEPS, MICRO_STEPS = 4, 2


class Net(nn.Module):
    """A small network whose tensors lie across the borders of partitions."""

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


def another_version() -> AbstractContextManager[Any]:
    return mock.patch.object(deepspeed, "__version__", "0.99.0")


def name_that_is_gone(owner: type) -> AbstractContextManager[Any]:
    return mock.patch.dict(zero._NEEDED_NAMES, {owner: f"{zero._NEEDED_NAMES[owner]} gone"})


def train_net(rank: int, precision: str, installed: AbstractContextManager[Any], *, records: bool = False) -> Any:
    """Train the network; in the last step the gradient of one rank is lost.

    Args:
        installed: what is wrong with the installed DeepSpeed, if anything.
    """
    net = Net(records=records)
    memory = read_memory_config(REPO / f"ds_configs/zero2_{precision}.json")
    memory["zero_optimization"] |= {"reduce_bucket_size": 200, "allgather_bucket_size": 200}
    settings = merge_deepspeed_config(memory, micro_batch_size=3, accumulation_steps=MICRO_STEPS, max_grad_norm=0.5)
    optim = OptimConfig(base_lr=1e-2, total_steps=100, implementation="torch")
    with installed:
        engine = build_engine(net, optim, settings, torch.device("cpu"))
    assert deepspeed_engine.DeepSpeedZeroOptimizer is DeepSpeedZeroOptimizer, "nothing stays replaced"
    dtype = next(net.parameters()).dtype
    generator = torch.Generator().manual_seed(rank)
    losses, norms, weights = [], [], []
    for step in range(STEPS + 1):
        for micro_step in range(MICRO_STEPS):
            loss = engine(torch.randn(3 + micro_step, 7, generator=generator).to(dtype))
            losses.append(float(loss))
            is_lost = step == STEPS and (rank, micro_step) == (0, 1)
            engine.backward(loss * float("nan") if is_lost else loss)
            engine.step()
        norms.append(float(engine.get_global_grad_norm()))
        weights.append([parameter.detach().clone() for parameter in net.parameters()])
    kind = type(engine.optimizer).__name__
    return {"losses": losses, "norms": norms, "weights": weights, "skipped": engine.skipped_steps, "optimizer": kind}


def train_all(rank: int, folder: Path) -> None:
    results = {}
    for precision in PRECISIONS:
        results[precision] = {
            "ours": [train_net(rank, precision, nullcontext(), records=records) for records in (False, True)],
            "theirs": [
                train_net(rank, precision, installed) for installed in (another_version(), name_that_is_gone(IPGBucket))
            ],
        }
    torch.save(results, folder / f"{rank}.pt")


@pytest.mark.parametrize("ranks", [1, 2])
def test_steps_are_those_of_deepspeeds_own_optimizer_which_is_used_where_names_do_not_match(ranks, tmp_path):
    run_on_ranks(train_all, ranks, tmp_path)
    for rank, precision in itertools.product(range(ranks), PRECISIONS):
        results = torch.load(tmp_path / f"{rank}.pt", weights_only=True)[precision]
        theirs, other = results["theirs"]
        assert theirs["optimizer"] == other["optimizer"] == "DeepSpeedZeroOptimizer"
        assert theirs["losses"][:-1] == other["losses"][:-1] and theirs["norms"] == other["norms"]
        for ours in results["ours"]:
            assert ours["optimizer"] == "PartitionedZero"
            assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-6)
            assert ours["norms"] == pytest.approx(theirs["norms"], rel=1e-6)
            assert ours["norms"][0] > 0.5  # so that gradients are clipped
            for weights, others in zip(ours["weights"], theirs["weights"], strict=True):
                for one, other_one in zip(weights, others, strict=True):
                    torch.testing.assert_close(one, other_one, rtol=1e-5, atol=1e-7)
            assert not torch.equal(ours["weights"][0][1], ours["weights"][-2][1])
            # The step whose gradient was lost on one rank is left out on all.
            assert ours["skipped"] == theirs["skipped"] == 1 and ours["norms"][-1] == float("inf")
            assert all(map(torch.equal, ours["weights"][-1], ours["weights"][-2]))


def test_the_installed_deepspeed_is_the_tried_one():
    assert zero.find_mismatch() == ""
    with mock.patch.object(deepspeed, "__version__", f"{zero.TRIED_VERSION}+cu130"):  # a build of the same release
        assert zero.find_mismatch() == ""


def test_another_version_is_said_in_one_line_and_nothing_is_replaced(caplog):
    logging.getLogger("bridgetower").propagate = True
    with another_version(), caplog.at_level(logging.WARNING, "bridgetower"), zero.partitioned_zero():
        assert deepspeed_engine.DeepSpeedZeroOptimizer is DeepSpeedZeroOptimizer
    (record,) = caplog.records
    assert "the installed version is 0.99.0" in record.getMessage()
    assert f"pip install deepspeed=={zero.TRIED_VERSION}" in record.getMessage()


@pytest.mark.parametrize("owner", zero._NEEDED_NAMES, ids=lambda owner: owner.__name__)
def test_a_missing_name_is_a_mismatch(owner):
    with name_that_is_gone(owner):
        assert zero.find_mismatch() == f"the installed {owner.__name__} has no gone"


def test_an_engine_that_constructs_another_optimizer_is_a_mismatch():
    with mock.patch.object(deepspeed_engine, "DeepSpeedZeroOptimizer", object):
        assert "does not construct DeepSpeedZeroOptimizer" in zero.find_mismatch()


def test_a_module_that_is_gone_is_a_mismatch_and_no_error():
    spec = importlib.util.spec_from_file_location("zero_of_another_deepspeed", zero.__file__)
    assert spec is not None and spec.loader is not None
    other = importlib.util.module_from_spec(spec)
    with mock.patch.dict(sys.modules, {"deepspeed.runtime.zero.stage_1_and_2": None}):
        spec.loader.exec_module(other)
    assert "stage_1_and_2" in other.find_mismatch()


def test_the_engines_name_is_restored_after_an_error():
    with pytest.raises(ZeroDivisionError), zero.partitioned_zero():
        assert deepspeed_engine.DeepSpeedZeroOptimizer is zero.PartitionedZero
        raise ZeroDivisionError
    assert deepspeed_engine.DeepSpeedZeroOptimizer is DeepSpeedZeroOptimizer


def test_every_private_name_that_is_used_is_checked():
    (ours,) = (
        node
        for node in ast.parse(Path(zero.__file__).read_text()).body
        if isinstance(node, ast.ClassDef) and node.name == "PartitionedZero"
    )

    def attributes(variable: str) -> set[str]:
        nodes = [node for node in ast.walk(ours) if isinstance(node, ast.Attribute)]
        return {node.attr for node in nodes if isinstance(node.value, ast.Name) and node.value.id == variable}

    defined = {node.name for node in ours.body if isinstance(node, ast.FunctionDef)}
    replaced = {name for name in defined if hasattr(DeepSpeedZeroOptimizer, name)} - {"__init__"}
    used = (attributes("self") - {"__dict__"} - (defined - replaced)) | replaced
    listed = {owner: set(names.split()) for owner, names in zero._NEEDED_NAMES.items()}
    assert listed[DeepSpeedZeroOptimizer] == used | {"param_idx_in_group", "_zero_padding"}
    assert listed[IPGBucket] == attributes("bucket")
    assert listed[BackwardHookStateManager] == attributes("state")
