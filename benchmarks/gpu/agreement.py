"""The section of benchmarks/gpu that checks our step's loss, gradients and dropout against the plain model."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks import step_sides
from benchmarks.gpu.models import build_task, change_graphs, find_config
from benchmarks.gpu.plan import EVERYTHING, Request
from benchmarks.gpu.timing import Note, Row, release_memory
from bridgetower.batch import PretrainBatch
from bridgetower.config.compute import ComputeConfig
from bridgetower.config.model import ModelConfig
from bridgetower.tasks.pretraining import PretrainTask

_DRAWS = 16  # seeds of dropout that are tried
# Limits of the relative difference of all gradients together. Beyond this in float32, or beyond so many times the plain
# model's own rounding in bfloat16, a kernel is wrong.
_FP32_LIMIT, _BF16_LIMIT = 1e-3, 1.5
_LOSS_LIMIT = 0.02
_EAGER = ComputeConfig(cuda_graphs=False)
_OUR_SIDES = {
    "ours": _EAGER,
    "ours, recorded": ComputeConfig(),
    "ours, all recomputed": ComputeConfig(recompute=EVERYTHING),
}
_COMPILED_SIDES = {"ours, compiled": ComputeConfig(cuda_graphs=False, compile=True)}
# Compiling takes long, and bfloat16 is what trains and what CUDA graphs record.
_ONLY_BF16 = ("ours, compiled", "ours, recorded")

Gradients = dict[str, Tensor]


class _Turn(NamedTuple):
    """One side in one precision."""

    name: str
    dtype: torch.dtype
    compute: ComputeConfig | None
    """Settings of our step; None is the plain model."""


def measure_agreement(request: Request, note: Note) -> None:
    """Compare loss and gradients, with dropout 0, with those of the plain model in float32.

    Raises:
        RuntimeError: they differ by more than rounding, as with a wrong kernel.
    """
    torch.backends.cudnn.allow_tf32 = False
    device, run = torch.device(request.device), request.runs[0]
    config = find_config(request.model)
    batch = step_sides.make_batch(config, run.micro_batch, device)
    reference = _compute_gradients(_Turn("plain", torch.float32, None), config, batch, device)
    rounding, failures = dict[torch.dtype, float](), list[str]()
    for turn in _list_turns(compiled=run.compiled):
        release_memory()
        loss, gradients = _compute_gradients(turn, config, batch, device)
        difference, worst = gradient_difference(reference[1], gradients)
        if turn.name == "plain":
            rounding[turn.dtype] = difference  # the reference rounding: what this precision alone changes
        limit = max(_FP32_LIMIT, _BF16_LIMIT * rounding[turn.dtype])
        agrees = difference <= limit and abs(loss - reference[0]) <= _LOSS_LIMIT * abs(reference[0])
        summary = f"loss {loss:.5f}, gradients differ by {difference:.1e}"
        row = {
            "what": f"{turn.name}, {str(turn.dtype).removeprefix('torch.')}",
            "model": request.model,
            "micro_batch": run.micro_batch,
            "loss": loss,
            "gradient_difference": difference,
            "worst_gradient": worst,
            "agrees": agrees,
            "note": summary,
        }
        note(row)
        if not agrees:
            failures.append(f"{row['what']}: {summary}, mostly that of {worst}")
    if not run.compiled:
        failures += _check_draws(request, note)
    if failures:
        raise RuntimeError(
            f"more than rounding away from the plain model (loss {reference[0]:.5f}): {'; '.join(failures)}"
        )


def _list_turns(*, compiled: bool) -> list[_Turn]:
    """List the sides in both precisions; the plain model comes first, because it gives the limits of the others."""
    dtypes = (torch.float32, torch.bfloat16)
    turns = [_Turn("plain", dtype, None) for dtype in dtypes]
    for name, compute in (_COMPILED_SIDES if compiled else _OUR_SIDES).items():
        turns += [_Turn(name, dtype, compute) for dtype in dtypes if dtype is torch.bfloat16 or name not in _ONLY_BF16]
    return turns


def _compute_gradients(
    turn: _Turn, config: ModelConfig, batch: PretrainBatch, device: torch.device
) -> tuple[float, Gradients]:
    """Return the loss and the gradients of the model's parameters, in float32."""
    compute = turn.compute or _EAGER
    # Drawn and rounded to bfloat16 first, so that both precisions hold exactly the same weights.
    task = build_task(config, compute, device, dtype=torch.bfloat16, dropout=0.0).to(turn.dtype)
    if turn.compute is None:
        plain = step_sides.copy_to_plain(task.model)
        losses = plain.losses(task.model.normalize(batch.pixels_N3SS), batch)
        named_parameters, loss = plain.named_parameters(), torch.stack(list(losses.values())).sum()
    else:
        named_parameters, loss = task.model.named_parameters(), task(batch)[0]
    loss.backward()
    gradients = {name: parameter.grad.float() for name, parameter in named_parameters if parameter.grad is not None}
    return float(loss.detach()), gradients


def gradient_difference(expected: Mapping[str, Tensor], measured: Mapping[str, Tensor]) -> tuple[float, str]:
    """Return the relative L2 difference of all gradients together, and the parameter that has most of it."""
    squares = {
        name: float((measured[name] - gradient).square().sum()) if name in measured else math.inf
        for name, gradient in expected.items()
    }
    norm = sum(float(gradient.square().sum()) for gradient in expected.values())
    return math.sqrt(sum(squares.values()) / norm), max(squares, key=squares.__getitem__)


def _check_draws(request: Request, note: Note) -> list[str]:
    """Check that CUDA graphs draw new dropout in each step, from torch's seed alone, and drop as much as kernels do.

    Returns: what is wrong.
    """
    device, run = torch.device(request.device), request.runs[0]
    task = build_task(find_config(request.model), _EAGER, device, dropout=0.1)
    batch = step_sides.make_batch(task.model.config, run.micro_batch, device)
    losses_of = {
        "eager": _draw_losses(task, batch),
        "recorded": _draw_losses(change_graphs(task, cuda_graphs=True), batch),
    }
    mean, deviation = ([f(losses[:-1]) for losses in losses_of.values()] for f in (statistics.mean, statistics.pstdev))
    summary = f"losses {mean[1]:.4f} +- {deviation[1]:.4f}, eager {mean[0]:.4f} +- {deviation[0]:.4f}"
    failures = []
    if any(losses[0] != losses[-1] for losses in losses_of.values()):
        failures.append("the same seed has another loss")
    if any(len(set(losses[:-1])) < _DRAWS // 2 for losses in losses_of.values()):
        failures.append("other seeds have the same loss")
    if abs(mean[1] - mean[0]) > 5 * max(deviation) * (2 / _DRAWS) ** 0.5 + 1e-3:
        failures.append(f"CUDA graphs drop another fraction: {summary}")
    row: Row = {"what": "draws, recorded", "model": request.model, "micro_batch": run.micro_batch, "losses": losses_of}
    note({**row, "agrees": not failures, "note": summary})
    return failures


def _draw_losses(task: PretrainTask, batch: PretrainBatch) -> list[float]:
    """Return the loss of one batch for each seed; the last one has the first one's seed again."""
    losses = []
    for seed in (*range(_DRAWS), 0):
        torch.manual_seed(seed)
        loss, _ = task(batch)
        loss.backward()
        task.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
    return losses
