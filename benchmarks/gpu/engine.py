"""The section of benchmarks/gpu that times DeepSpeed's engine, stepped as the training loop does."""

from __future__ import annotations

import dataclasses
import time
import traceback
from collections.abc import Callable

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity

from benchmarks import step_sides
from benchmarks.gpu.models import build_task, find_config
from benchmarks.gpu.plan import Request
from benchmarks.gpu.timing import (
    Note,
    Row,
    clock,
    describe_rate,
    describe_work,
    first_line,
    or_out_of_memory,
    time_calls,
)
from bridgetower import rng
from bridgetower.config.deepspeed import is_bf16, merge_deepspeed_config, read_memory_config
from bridgetower.config.optim import OptimConfig
from bridgetower.engine import launch
from pretrain.presets import DS_CONFIGS

_KERNELS = 40  # of a profile


def measure_engine(request: Request, note: Note) -> None:
    """Time DeepSpeed's ZeRO-2 engine at world size 1: forward, backward and the optimizer's step."""
    ranks = launch.read_launch()
    launch.start(ranks, 1 if request.small else 0)
    # Imports DeepSpeed, which reads the environment that read_launch has completed.
    from bridgetower.engine.initialize import build_engine
    from bridgetower.engine.optim import choose_implementation

    device, config, pairs = ranks.device, find_config(request.model), request.runs[0].micro_batch
    memory = read_memory_config(DS_CONFIGS / f"zero2_{'bf16' if launch.computes_bf16(device) else 'fp32'}.json")
    run = request.runs[0]
    settings = merge_deepspeed_config(memory, micro_batch_size=pairs, accumulation_steps=1, max_grad_norm=0.0)
    optim = OptimConfig(base_lr=1e-5, total_steps=10_000)
    optim = dataclasses.replace(optim, implementation=request.optimizer)
    # DeepSpeed rounds the weights to bfloat16 itself, and keeps them in float32 for its optimizer.
    task = build_task(config, run.compute, device, dtype=torch.float32)
    fallback, start = "", time.perf_counter()
    try:
        engine = build_engine(task, optim, settings, device)
    except Exception as error:  # DeepSpeed has an exception for each thing that a build needs
        if choose_implementation(optim, device) != "fused":
            raise
        traceback.print_exc()
        fallback = f"torch's AdamW, as FusedAdam cannot be built: {type(error).__name__}: {first_line(error)}"
        optim = dataclasses.replace(optim, implementation="torch")
        engine = build_engine(task, optim, settings, device)
    row: Row = {
        "what": f"ZeRO-2, {'bf16' if is_bf16(memory) else 'fp32'}, {run.describe()}",
        "model": request.model,
        "micro_batch": pairs,
        "optimizer": choose_implementation(optim, device),
        "build_seconds": time.perf_counter() - start,
        "note": fallback,
    }
    batch = step_sides.make_batch(config, pairs, device)
    num_steps = 0

    def step() -> Tensor:
        nonlocal num_steps
        torch.manual_seed(rng.key(0, "dropout", num_steps, 0, 0) >> 1)
        loss: Tensor = engine(batch)[0]
        engine.backward(loss)
        engine.step()
        num_steps += 1
        return loss.detach()

    def measure() -> Row:
        rate = describe_rate(clock(step, device, request), pairs, device)
        return rate | describe_work(config, run.compute, batch, rate, device)

    measured = or_out_of_memory(measure)
    note({**row, **measured, "profile": [] if "error" in measured else _profile(step, device)})
    launch.finish()


def _profile(step: Callable[[], Tensor], device: torch.device) -> list[Row]:
    """Return the time of all work of a step on the device, then of its slowest kernels (on a CPU: operators)."""
    on_gpu = device.type == "cuda"
    with torch.profiler.profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * on_gpu]) as profiler:
        time_calls(step, 1, device)
    work = [
        (event.self_device_time_total if on_gpu else event.self_cpu_time_total, event.count, event.key)
        for event in profiler.key_averages()
        if (event.device_type.name == "CUDA") == on_gpu and not event.is_user_annotation
    ]
    work.sort(reverse=True)
    everything = (sum(microseconds for microseconds, _, _ in work), sum(calls for _, calls, _ in work), "all work")
    return [
        {"kernel": name[:200], "ms": microseconds / 1e3, "calls": calls}
        for microseconds, calls, name in (everything, *work[:_KERNELS])
    ]
