"""The sections of benchmarks/gpu that time a step: ours at several micro-batches, and ours beside other sides."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from benchmarks import step_sides
from benchmarks.gpu.models import build_task, change_graphs, find_config
from benchmarks.gpu.plan import Request, Run
from benchmarks.gpu.timing import (
    Note,
    Row,
    describe_work,
    find_utilisation,
    or_out_of_memory,
    release_memory,
    time_side,
)
from bridgetower.config.compute import ComputeConfig
from bridgetower.config.model import ModelConfig


def measure_steps(request: Request, note: Note) -> None:
    """Time forward and backward in bfloat16; a step that does not fit is a row that says so."""
    device, config = torch.device(request.device), find_config(request.model)
    for run in request.runs:
        measured = or_out_of_memory(partial(_measure_run, config, run, device, request))
        note({"what": run.describe(), "model": request.model, "micro_batch": run.micro_batch, **measured})


def _measure_run(config: ModelConfig, run: Run, device: torch.device, request: Request) -> Row:
    release_memory()  # what the step before and its CUDA graphs held
    task = build_task(config, run.compute, device)
    batch = step_sides.make_batch(config, run.micro_batch, device)
    row = {}
    if not run.compiled:  # autograd keeps the same bytes in a CUDA graph, but does not show them there
        shown = step_sides.our_side(change_graphs(task, cuda_graphs=False), batch)
        row = {"kept_mb_per_pair": step_sides.kept_bytes(shown) / run.micro_batch / 1e6}
        release_memory()
    row |= time_side(step_sides.our_side(task, batch), run.micro_batch, device, request)
    return row | describe_work(config, run.compute, batch, row, device)


def measure_sides(request: Request, note: Note) -> None:
    """Time our step, the plain one and transformers', with the same weights and pairs."""
    device, config, pairs = torch.device(request.device), find_config(request.model), request.runs[0].micro_batch
    packed = step_sides.make_batch(config, pairs, device)
    padded = step_sides.make_padded_batch(config, pairs, device)
    task = build_task(config, ComputeConfig(cuda_graphs=False), device)
    # Built when it is its turn and freed after it, so that no side's peak memory contains another's.
    sides: dict[str, Callable[[], step_sides.Side]] = {
        "ours": lambda: step_sides.our_side(task, packed),
        "ours, recorded": lambda: step_sides.our_side(change_graphs(task, cuda_graphs=True), packed),
        "plain": lambda: step_sides.plain_side(task.model, padded),
        "transformers": lambda: step_sides.transformers_side(task.model, padded),
    }

    def measure(name: str) -> Row:
        release_memory()
        side = sides[name]()
        row = time_side(side, pairs, device, request)
        counted = sides["ours"]() if name == "ours, recorded" else side  # a CUDA graph cannot be counted
        gflop = step_sides.count_step_flops(counted) / pairs / 1e9
        return {**row, "gflop_per_pair": gflop, "mfu": find_utilisation(gflop, row, device)}

    for name in sides:
        measured = or_out_of_memory(partial(measure, name))
        note({"what": name, "model": request.model, "micro_batch": pairs, **measured})
