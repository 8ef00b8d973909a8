"""How a section of benchmarks/gpu times a step, and what a row says about it."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks import step_sides
from benchmarks.gpu.plan import Request
from bridgetower.batch import PretrainBatch
from bridgetower.config.compute import ComputeConfig
from bridgetower.config.model import ModelConfig
from bridgetower.cost.captions import CaptionLengths
from bridgetower.cost.devices import peak_flops
from bridgetower.cost.micro_batch import count_micro_batch

_ROUNDS, _ROUND_SECONDS = 3, 0.5

Row = dict[str, Any]
"""One measurement, as the results file has it."""
Note = Callable[[Row], None]
"""Writes a row to the results file at once."""


def clock(work: Callable[[], Tensor], device: torch.device, request: Request) -> dict[str, Any]:
    """Time work of the device, while the host already prepares the next call, as in training.

    Returns: ``seconds`` per call (median of the rounds), per call of each of the ``rounds``, and of the ``first`` call;
    and the ``result`` of the last call.
    """
    # The first call compiles and the second one still warms up. With small shapes, nobody reads the time.
    seconds = [time_calls(work, 1, device)[0] for _ in range(1 if request.small else 3)]
    num_calls = 1 if request.small else min(50, max(3, round(_ROUND_SECONDS / seconds[-1])))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    rounds, results = zip(*(time_calls(work, num_calls, device) for _ in range(_ROUNDS)), strict=True)
    return {"seconds": statistics.median(rounds), "rounds": rounds, "first": seconds[0], "result": results[-1]}


def time_calls(work: Callable[[], Tensor], num_calls: int, device: torch.device) -> tuple[float, Tensor]:
    """Return the seconds per call, until the device is done, and the result of the last call."""
    start = time.perf_counter()
    for _ in range(num_calls):
        result = work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / num_calls, result


def time_side(side: step_sides.Side, pairs: int, device: torch.device, request: Request) -> Row:
    """Time forward and backward of a side."""

    def step() -> Tensor:
        loss = side.loss()
        loss.backward()
        for parameter in side.parameters:
            parameter.grad = None
        return loss.detach()

    torch.manual_seed(0)
    return describe_rate(clock(step, device, request), pairs, device)


def describe_rate(clocked: Mapping[str, Any], pairs: int, device: torch.device) -> Row:
    """Return the speed, peak memory and loss of a step that ``clock`` has timed.

    Raises:
        RuntimeError: the loss is not finite.
    """
    loss = float(clocked["result"])
    if not math.isfinite(loss):
        raise RuntimeError(f"the loss of {pairs} pairs is {loss}")
    return {
        "pairs_per_second": pairs / clocked["seconds"],
        "step_ms": 1e3 * clocked["seconds"],
        "step_ms_of_rounds": [1e3 * seconds for seconds in clocked["rounds"]],
        "first_step_seconds": clocked["first"],
        # CUDA graphs hide what is in use; torch knows only what it reserved for them.
        "peak_gb": torch.cuda.max_memory_reserved(device) / 1e9 if device.type == "cuda" else None,
        "loss": loss,
    }


def describe_work(
    config: ModelConfig, compute: ComputeConfig, batch: PretrainBatch, rate: Mapping[str, Any], device: torch.device
) -> Row:
    """Return the operations per pair from formulas, and the fraction of the device's peak; recomputing is no work."""
    captions, pairs_e9 = CaptionLengths(batch.num_tokens, batch.num_masked), 1e9 * len(batch.num_tokens)
    cost = count_micro_batch(config, step_sides.OBJECTIVES, compute, captions, element_bytes=2)
    gflop, recomputing = cost.work / pairs_e9, (cost.work + cost.repeated) / pairs_e9
    recomputed = {"gflop_per_pair_with_recomputing": recomputing} if compute.recompute else {}
    return {"gflop_per_pair": gflop, **recomputed, "mfu": find_utilisation(gflop, rate, device)}


def find_utilisation(gflop_per_pair: float, rate: Mapping[str, Any], device: torch.device) -> float | None:
    """Return the fraction of the device's peak operations per second; None if the peak is unknown."""
    peak = peak_flops(device.type)
    return gflop_per_pair * 1e9 * float(rate["pairs_per_second"]) / peak if peak else None


def or_out_of_memory(measure: Callable[[], Row]) -> Row:
    """Return the measured row, or a row that says that the step does not fit into the device's memory."""
    try:
        return measure()
    except torch.OutOfMemoryError as error:
        message = f"does not fit: {first_line(error)}"
    release_memory()  # only here, because the error's traceback held what was in memory
    return {"error": message}


def release_memory() -> None:
    """Return freed memory to the device; without a GPU only collect garbage."""
    gc.collect()
    torch.cuda.empty_cache()


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, at most 200 characters."""
    return (str(error).strip().splitlines() or [""])[0][:200]
