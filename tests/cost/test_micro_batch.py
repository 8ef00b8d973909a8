"""Bytes and operations that are predicted from shapes, against those of a real step on the CPU."""

from __future__ import annotations

import dataclasses
import weakref
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import step_sides
from bridgetower.config.compute import ComputeConfig
from bridgetower.config.model import BridgeForm, ModelConfig
from bridgetower.config.named_models import MODELS
from bridgetower.config.run import ObjectivesConfig
from bridgetower.cost.captions import CaptionLengths
from bridgetower.cost.micro_batch import count_micro_batch
from bridgetower.cost.work import CPU, PARTS, StepCost
from bridgetower.kernels.cpu_ops import CpuOps
from bridgetower.kernels.torch_ops import TorchOps
from bridgetower.model.bridgetower import BridgeTower
from bridgetower.model.freeze import freeze_layers
from bridgetower.model.sizes import complete_model_config
from bridgetower.tasks.pretraining import PretrainTask

RECOMPUTED = [(), *((part,) for part in PARTS), PARTS]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BOTH = ObjectivesConfig()
# Bytes of index tables, which the formulas leave out.
TABLES = 30_000


def sized(name: str = "tiny", dropout: float = 0.0, **fusion: Any) -> ModelConfig:
    """A model with this dropout; tiny with four text layers, so that four can be bridged."""
    model = MODELS[name]()
    if name == "tiny":
        model = dataclasses.replace(model, text=dataclasses.replace(model.text, num_layers=4))
    changes: dict[str, Any] = {"dropout": dropout, **fusion}
    return complete_model_config(
        dataclasses.replace(
            model,
            text=dataclasses.replace(model.text, dropout=dropout),
            fusion=dataclasses.replace(model.fusion, **changes),
        )
    )


class FusedOps(CpuOps):
    """Fused attention in every type, which the formulas describe.

    Without matrix units, a CPU computes attention in bfloat16 to few keys by matmuls, and keeps its probabilities.
    """

    def attend_heads(self, query, key, value, mask, dropout):
        return (CpuOps if dropout else TorchOps).attend_heads(self, query, key, value, mask, dropout)


class Real:
    """A step with real weights on the CPU, and the cost that is predicted for it."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        pairs: int = 4,
        dtype: torch.dtype = torch.float32,
        compute: ComputeConfig | None = None,
        objectives: ObjectivesConfig = BOTH,
        frozen: tuple[int, int] = (0, 0),
        seed: int = 0,
    ) -> None:
        compute = compute or ComputeConfig()
        model = BridgeTower(config, objectives.heads, ops=FusedOps(has_matrix_units=False), recompute=compute.recompute)
        model.to(dtype).train()
        freeze_layers(model, vision=frozen[0], text=frozen[1])
        self.batch = step_sides.make_batch(config, pairs, torch.device("cpu"), seed=seed)
        self.task = PretrainTask(model, objectives, compute)
        self.side = step_sides.Side(lambda: self.task(self.batch)[0], list(self.task.parameters()))
        captions = CaptionLengths(self.batch.num_tokens, self.batch.num_masked)
        self.predicted: StepCost = count_micro_batch(
            config, objectives, compute, captions, element_bytes=dtype.itemsize, memory=CPU, num_frozen=frozen
        )

    def kept(self) -> int:
        return step_sides.kept_bytes(self.side)

    def flops(self) -> int:
        return step_sides.count_step_flops(self.side)

    def peak(self) -> int:
        """Most bytes in use at once beside weights and batch; gradients of weights are freed, as DeepSpeed does."""
        for parameter in self.task.parameters():
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        there = [tensor for tensor in (*self.task.parameters(), *self.batch) if isinstance(tensor, Tensor)]
        with _Living(there) as mode:
            self.side.loss().backward()
        return mode.peak


class _Living(TorchDispatchMode):
    """Follows the memory that operators allocate until it is freed."""

    def __init__(self, there: list[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in there}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor) and value.untyped_storage()._cdata not in self._known:
                storage = value.untyped_storage()
                self._known.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("recompute", RECOMPUTED, ids="+".join)
def test_kept_bytes_are_those_of_a_real_step(dropout, dtype, recompute):
    real = Real(sized(dropout=dropout), dtype=DTYPES[dtype], compute=ComputeConfig(recompute=recompute))
    assert real.predicted.kept == pytest.approx(real.kept(), rel=0.005, abs=TABLES)


@pytest.mark.parametrize(("pairs", "seed"), [(1, 1), (3, 2), (17, 3), (40, 4)])
def test_kept_bytes_hold_for_other_batches_and_captions(pairs, seed):
    real = Real(sized(dropout=0.1), pairs=pairs, seed=seed)
    assert real.predicted.kept == pytest.approx(real.kept(), rel=0.005, abs=TABLES)


VARIANTS: dict[str, dict[str, Any]] = {
    **{f"bridge {form}": {"bridge": form, "num_layers": 4} for form in get_args(BridgeForm)},
    "bridge sees padding": {"bridge": "cross_attention", "num_layers": 4, "bridge_masks_padding": False},
    "external": {"num_layers": 4, "num_external_layers": 2},
    "METER": {"num_layers": 4, "num_external_layers": 4},
    "METER's fusion": {"num_layers": 4, "num_external_layers": 4, "multi_layer_fusion": True},
    "no fusion": {"num_layers": 0},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_of_the_model_is_predicted(variant):
    real = Real(sized(dropout=0.1, **VARIANTS[variant]))
    assert real.predicted.kept == pytest.approx(real.kept(), rel=0.02)
    assert real.predicted.work == pytest.approx(real.flops(), rel=1e-9)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_step_without_fused_kernels_is_predicted(dropout):
    real = Real(sized(dropout=dropout), compute=ComputeConfig(fuse_kernels=False))
    assert real.predicted.kept == pytest.approx(real.kept(), rel=0.01)
    assert real.predicted.work == pytest.approx(real.flops(), rel=1e-9)


@pytest.mark.parametrize(
    "objectives",
    [
        ObjectivesConfig(itc=True),
        ObjectivesConfig(itm=False),
        ObjectivesConfig(mlm=False),
        ObjectivesConfig(itm=False, itc=True),
    ],
    ids=lambda objectives: "+".join(objectives.heads),
)
def test_objectives_are_predicted(objectives):
    real = Real(sized(), objectives=objectives)
    assert real.predicted.kept == pytest.approx(real.kept(), rel=0.005, abs=TABLES)
    assert real.predicted.work == pytest.approx(real.flops(), rel=1e-9)


@pytest.mark.parametrize("frozen", [(2, 0), (0, 2), (-1, -1)])
def test_frozen_layers_keep_and_work_less(frozen):
    real = Real(sized(), frozen=frozen)
    assert real.predicted.kept == pytest.approx(real.kept(), rel=0.05)
    assert real.predicted.work == pytest.approx(real.flops(), rel=0.05)
    assert real.predicted.kept < 0.9 * Real(sized()).predicted.kept


@pytest.mark.parametrize("recompute", RECOMPUTED, ids="+".join)
def test_operations_are_those_of_a_real_step_with_recomputed_layers(recompute):
    real = Real(sized(dropout=0.1), compute=ComputeConfig(recompute=recompute))
    assert real.predicted.work + real.predicted.repeated == pytest.approx(real.flops(), rel=1e-9)


@pytest.mark.parametrize("recompute", RECOMPUTED, ids="+".join)
def test_most_memory_in_use_is_what_is_kept_and_the_workspace(recompute):
    real = Real(sized(dropout=0.1), pairs=32, compute=ComputeConfig(recompute=recompute))
    assert real.predicted.kept + real.predicted.workspace == pytest.approx(real.peak(), rel=0.05)


@pytest.mark.slow
def test_base_keeps_what_is_predicted(much_memory):
    real = Real(sized("base"), pairs=2, seed=2)  # in float32, which every CPU computes
    assert real.predicted.kept == pytest.approx(real.kept(), rel=0.005, abs=TABLES)
