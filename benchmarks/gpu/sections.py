"""The measurements of benchmarks/gpu/measure.py, each section in a process of its own.

python -m benchmarks.gpu.sections REQUEST.json RESULT.json

What it finds it writes as it finds it, so that nothing is lost if the process dies. Importing this module leaves CUDA
alone: the processes are forked from one that has imported it.
"""

from __future__ import annotations

import dataclasses
import gc
import importlib.metadata
import json
import math
import os
import shutil
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bridgetower.kernels.compiled import compile_parts
from torch import Tensor
from torch.profiler import ProfilerActivity

from benchmarks import step_sides
from benchmarks.gpu import pipeline
from benchmarks.gpu.plan import EVERYTHING, Request, Run, read_request
from benchmarks.step import describe_machine
from bridgetower import rng
from bridgetower.batch import PretrainBatch
from bridgetower.config.compute import PLAIN, ComputeConfig
from bridgetower.config.deepspeed import is_bf16, merge_deepspeed_config, read_memory_config
from bridgetower.config.model import ModelConfig
from bridgetower.config.named_models import MODELS
from bridgetower.config.optim import OptimConfig
from bridgetower.cost.captions import CaptionLengths
from bridgetower.cost.devices import peak_flops
from bridgetower.cost.micro_batch import count_micro_batch
from bridgetower.io.files import write_atomically
from bridgetower.model.bridgetower import BridgeTower
from bridgetower.model.sizes import complete_model_config
from bridgetower.tasks.pretraining import PretrainTask

_DS_CONFIGS = Path(__file__).resolve().parent.parent.parent / "ds_configs"
_PACKAGES = ("torch", "torchvision", "triton", "deepspeed", "transformers", "timm", "open_clip_torch", "webdataset")
_ROUNDS, _ROUND_SECONDS = 3, 0.5
_KERNELS = 40  # of a profile
_DRAWS = 16  # of dropout
# Relative differences of all gradients: more than this in float32, or more than so many times the plain step's own
# rounding in bfloat16, is a wrong kernel.
_FP32_LIMIT, _BF16_LIMIT = 1e-3, 1.5

Row = dict[str, Any]
Note = Callable[[Row], None]


def serve(request_path: Path, result_path: Path) -> None:
    """Measure a section, and write its rows and its error, if there is one, to ``result_path``."""
    request = read_request(request_path)
    if request.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif torch.cuda._is_in_bad_fork():
        # A library has looked for GPUs when it was imported, so that a fork cannot use them: begin from nothing.
        os.execv(sys.executable, [sys.executable, "-m", "benchmarks.gpu.sections", str(request_path), str(result_path)])
    result: dict[str, Any] = {"rows": [], "error": ""}

    def note(row: Row) -> None:
        result["rows"].append(row)
        write_atomically(result_path, json.dumps(result).encode())

    try:
        MEASURES[request.measure](request, note)
    except Exception as error:
        traceback.print_exc()
        result["error"] = f"{type(error).__name__}: {error}"
    write_atomically(result_path, json.dumps(result).encode())


def measure_machine(request: Request, note: Note) -> None:
    """What the figures are measured on and with, and what its matrix units and its memory do at best."""
    device, size = torch.device(request.device), 256 if request.small else 8192
    torch.manual_seed(0)
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    product = 2 * size**3 / _clock(lambda: left @ right, device, request)["seconds"]
    source = torch.empty(size * size * 16, device=device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / _clock(lambda: target.copy_(source), device, request)["seconds"]
    peak, machine = peak_flops(request.device), describe_machine(request.device)
    note(
        {
            "what": machine["device"],
            **machine,
            "versions": {name: _version(name) for name in _PACKAGES},
            "has_nvcc": shutil.which("nvcc") is not None,
            "memory_gb": torch.cuda.get_device_properties(device).total_memory / 1e9 if device.type == "cuda" else None,
            "peak_tflops": peak / 1e12 if peak else None,
            "product_tflops": product / 1e12,
            "copy_gb_per_second": copy / 1e9,
            "note": f"bf16 products {product / 1e12:,.0f} TFLOP/s, copies {copy / 1e9:,.0f} GB/s",
        }
    )


def measure_steps(request: Request, note: Note) -> None:
    """The step, forward and backward, in bfloat16; one that does not fit is a row that says so."""
    device = torch.device(request.device)
    model = _build(_config(request.model), device, None)
    is_compiled = False
    for run in request.runs:
        if run.compiled and not is_compiled:
            _compile(model, device)
            is_compiled = True
        measured = or_out_of_memory(partial(_measure_run, model, run, device, request))
        note({"what": run.describe(), "model": request.model, "micro_batch": run.micro_batch, **measured})


def _measure_run(model: BridgeTower, run: Run, device: torch.device, request: Request) -> Row:
    model.zero_grad(set_to_none=True)  # of a step before that did not fit
    _give_memory_back()  # that of recorded steps before
    batch = step_sides.make_batch(model.config, run.micro_batch, device)
    row = {}
    if not run.compiled:  # autograd keeps the same for a step that is recorded, but shows it when it is not
        shown = step_sides.our_side("ours", model, batch, dataclasses.replace(run.compute, cuda_graphs=False))
        row = {"kept_mb_per_pair": step_sides.kept_bytes(shown) / run.micro_batch / 1e6}
        _give_memory_back()
    row |= _measure_side(step_sides.our_side("ours", model, batch, run.compute), run.micro_batch, device, request)
    return row | _work(model.config, run.compute, batch, row, device)


def measure_sides(request: Request, note: Note) -> None:
    """Our step, in one pass and in two, the plain one and transformers', of the same weights and pairs."""
    device, config, pairs = torch.device(request.device), _config(request.model), request.runs[0].micro_batch
    model = _build(config, device, None)
    padded = min(step_sides.PUBLISHED_TOKENS, config.text.max_tokens)
    own, whole = (step_sides.make_batch(config, pairs, device, pad_to=pad_to) for pad_to in (0, padded))
    eager = ComputeConfig(cuda_graphs=False)  # as what is recorded cannot be counted
    two_passes = dataclasses.replace(eager, joint_pass=False)
    sides: dict[str, Callable[[], step_sides.Side]] = {
        "ours": lambda: step_sides.our_side("ours", model, own, eager),
        "ours, recorded": lambda: step_sides.our_side("recorded", model, own, ComputeConfig()),
        "ours, two passes": lambda: step_sides.our_side("two passes", model, own, two_passes),
        "plain": lambda: step_sides.our_side("plain", model, whole, PLAIN),
        "transformers": lambda: step_sides.transformers_side(model, whole, compiled=False),
    }

    def measure(name: str) -> Row:
        side = sides[name]()
        row = _measure_side(side, pairs, device, request)
        counted = sides["ours"]() if name == "ours, recorded" else side
        gflop = step_sides.flops(counted) / pairs / 1e9
        return {**row, "gflop_per_pair": gflop, "mfu": _utilisation(gflop, row, device)}

    for name in sides:
        measured = or_out_of_memory(partial(measure, name))
        note({"what": name, "model": request.model, "micro_batch": pairs, **measured})


def measure_agreement(request: Request, note: Note) -> None:
    """Loss and gradients, with dropout 0, against the plain step in float32.

    Raises:
        RuntimeError: they differ by more than rounding, as with a wrong kernel.
    """
    torch.backends.cudnn.allow_tf32 = False
    device, run = torch.device(request.device), request.runs[0]
    model = _build(_config(request.model), device, 0.0)  # with weights that bfloat16 holds exactly
    batch = step_sides.make_batch(model.config, run.micro_batch, device)
    eager = ComputeConfig(cuda_graphs=False)
    ours = {
        "ours": eager,
        "ours, recorded": ComputeConfig(),
        "ours, all recomputed": ComputeConfig(recompute=EVERYTHING),
    }
    sides = {"plain": PLAIN, **({"ours, compiled": eager} if run.compiled else ours)}
    dtypes = (torch.float32, torch.bfloat16)
    # Compiling takes long, and bfloat16 is what trains and is recorded.
    halves = ("ours, compiled", "ours, recorded")
    turns = [(dtype, name) for name in sides for dtype in dtypes if dtype is torch.bfloat16 or name not in halves]
    loss, gradients = _gradients(model.float(), batch, PLAIN)
    rounding, wrong = dict.fromkeys(dtypes, 0.0), list[str]()
    for dtype, name in turns:
        if name == "ours, compiled":
            _compile(model, device)
        found, others = _gradients(model.to(dtype), batch, sides[name])
        difference, worst = gradient_difference(gradients, others)
        if name == "plain":
            rounding[dtype] = difference
        limit = max(_FP32_LIMIT, _BF16_LIMIT * rounding[dtype])
        agrees = difference <= limit and abs(found - loss) <= 0.02 * abs(loss)
        said = f"loss {found:.5f}, gradients differ by {difference:.1e}"
        row = {
            "what": f"{name}, {str(dtype).removeprefix('torch.')}",
            "model": request.model,
            "micro_batch": run.micro_batch,
            "loss": found,
            "gradient_difference": difference,
            "worst_gradient": worst,
            "agrees": agrees,
            "note": said,
        }
        note(row)
        if not agrees:
            wrong.append(f"{row['what']}: {said}, mostly that of {worst}")
    if not run.compiled:
        wrong += _look_at_draws(request, note)
    if wrong:
        raise RuntimeError(f"more than rounding away from the plain step (loss {loss:.5f}): {'; '.join(wrong)}")


def _look_at_draws(request: Request, note: Note) -> list[str]:
    """Whether a recorded step draws its dropout anew, from torch's seed alone, and as much. Returns: what is not so."""
    device, run = torch.device(request.device), request.runs[0]
    model = _build(_config(request.model), device, 0.1)
    batch = step_sides.make_batch(model.config, run.micro_batch, device)
    found = {}
    for name, compute in (("eager", ComputeConfig(cuda_graphs=False)), ("recorded", ComputeConfig())):
        task, losses = PretrainTask(model, step_sides.OBJECTIVES, compute), []
        for seed in (*range(_DRAWS), 0):
            torch.manual_seed(seed)
            loss, _ = task(batch)
            loss.backward()
            task.zero_grad(set_to_none=True)
            losses.append(float(loss.detach()))
        found[name] = losses
    mean, deviation = ([f(losses[:-1]) for losses in found.values()] for f in (statistics.mean, statistics.pstdev))
    said = f"losses {mean[1]:.4f} +- {deviation[1]:.4f}, eager {mean[0]:.4f} +- {deviation[0]:.4f}"
    wrong = []
    if any(losses[0] != losses[-1] for losses in found.values()):
        wrong.append("the same seed has another loss")
    if any(len(set(losses[:-1])) < _DRAWS // 2 for losses in found.values()):
        wrong.append("other seeds have the same loss")
    if abs(mean[1] - mean[0]) > 5 * max(deviation) * (2 / _DRAWS) ** 0.5 + 1e-3:
        wrong.append(f"dropout is not as much: {said}")
    row = {"what": "draws, recorded", "model": request.model, "micro_batch": run.micro_batch, "losses": found}
    note({**row, "agrees": not wrong, "note": said})
    return wrong


def _gradients(model: BridgeTower, batch: PretrainBatch, compute: ComputeConfig) -> tuple[float, dict[str, Tensor]]:
    task = PretrainTask(model, step_sides.OBJECTIVES, compute)
    task.zero_grad(set_to_none=True)
    loss, _ = task(batch)
    loss.backward()
    found = {name: p.grad.float() for name, p in task.named_parameters() if p.grad is not None}
    task.zero_grad(set_to_none=True)
    return float(loss.detach()), found


def gradient_difference(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> tuple[float, str]:
    """Relative L2 difference of all gradients together, and the parameter that has most of it."""
    squares = {
        name: float((found[name] - gradient).square().sum()) if name in found else math.inf
        for name, gradient in expected.items()
    }
    norm = sum(float(gradient.square().sum()) for gradient in expected.values())
    return math.sqrt(sum(squares.values()) / norm), max(squares, key=squares.__getitem__)


def measure_engine(request: Request, note: Note) -> None:
    """DeepSpeed's ZeRO-2 engine at world size 1, stepped as the training loop does, with the optimiser's step."""
    from bridgetower.engine import launch

    place = launch.read_launch()
    launch.start(place, 1 if request.small else 0)
    # imports DeepSpeed, which reads what read_launch has completed
    from bridgetower.engine.initialize import build_engine
    from bridgetower.engine.optim import choose_implementation

    device, config, pairs = place.device, _config(request.model), request.runs[0].micro_batch
    memory = read_memory_config(_DS_CONFIGS / f"zero2_{'bf16' if launch.computes_bf16(device) else 'fp32'}.json")
    run = request.runs[0]
    settings = merge_deepspeed_config(memory, micro_batch_size=pairs, accumulation_steps=1, max_grad_norm=0.0)
    optim = OptimConfig(base_lr=1e-5, total_steps=10_000)
    optim = dataclasses.replace(optim, implementation=request.optimizer)
    with device:
        torch.manual_seed(0)
        model = BridgeTower(config, step_sides.OBJECTIVES.heads)
        task = PretrainTask(model, step_sides.OBJECTIVES, run.compute).train()
    if run.compiled:
        _compile(task.model, device)
    said, start = "", time.perf_counter()
    try:
        engine = build_engine(task, optim, settings, device)
    except Exception as error:  # DeepSpeed has one for each thing that a build needs
        if choose_implementation(optim, device) != "fused":
            raise
        traceback.print_exc()
        said = f"torch's AdamW, as FusedAdam cannot be built: {type(error).__name__}: {first_line(error)}"
        optim = dataclasses.replace(optim, implementation="torch")
        engine = build_engine(task, optim, settings, device)
    row: Row = {
        "what": f"ZeRO-2, {'bf16' if is_bf16(memory) else 'fp32'}, {run.describe()}",
        "model": request.model,
        "micro_batch": pairs,
        "optimizer": choose_implementation(optim, device),
        "build_seconds": time.perf_counter() - start,
        "note": said,
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
        rate = _rate(_clock(step, device, request), pairs, device)
        return rate | _work(config, run.compute, batch, rate, device)

    measured = or_out_of_memory(measure)
    note({**row, **measured, "profile": [] if "error" in measured else _profile(step, device)})
    launch.finish()


def _profile(step: Callable[[], Tensor], device: torch.device) -> list[Row]:
    """Where the time of a step goes: all work of the device, then the kernels (on a CPU operators) with most of it."""
    on_gpu = device.type == "cuda"
    with torch.profiler.profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * on_gpu]) as profiler:
        _timed(step, 1, device)
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


def measure_pipeline(request: Request, note: Note) -> None:
    """Training runs over photographs that are decoded as they go: pairs a second, and how long steps wait for data."""
    pipeline.measure(request, note)


MEASURES: Mapping[str, Callable[[Request, Note], None]] = {
    "machine": measure_machine,
    "agreement": measure_agreement,
    "steps": measure_steps,
    "sides": measure_sides,
    "engine": measure_engine,
    "pipeline": measure_pipeline,
}


def _config(name: str) -> ModelConfig:
    """A model by name; small is the preset tiny, with dropout and two layers, as transformers can hold it."""
    if name != "small":
        return complete_model_config(MODELS[name]())
    tiny = MODELS["tiny"]()
    return complete_model_config(
        dataclasses.replace(
            tiny,
            vision=dataclasses.replace(tiny.vision, num_layers=2, num_heads=tiny.vision.width // 64),
            text=dataclasses.replace(tiny.text, num_layers=2, dropout=0.1),
            fusion=dataclasses.replace(tiny.fusion, dropout=0.1),
        )
    )


def _build(config: ModelConfig, device: torch.device, dropout: float | None) -> BridgeTower:
    with device:  # a CPU takes long to draw 900 million weights
        return step_sides.build_model(config, device, torch.bfloat16, dropout)


def _compile(model: BridgeTower, device: torch.device) -> None:
    """For good; where small shapes are tried on a CPU, traced alone, as generating code there takes a minute."""
    compile_parts(model, "inductor" if device.type == "cuda" else "eager")


def _measure_side(side: step_sides.Side, pairs: int, device: torch.device, request: Request) -> Row:
    def step() -> Tensor:
        loss = side.loss()
        loss.backward()
        for parameter in side.parameters:
            parameter.grad = None
        return loss.detach()

    torch.manual_seed(0)
    return _rate(_clock(step, device, request), pairs, device)


def _clock(work: Callable[[], Tensor], device: torch.device, request: Request) -> dict[str, Any]:
    """Time work of the device, while the host already prepares what follows, as in training.

    Returns: seconds of one (the median of the rounds), of each round's, and of the first; and what the last one gave.
    """
    # The first compiles, the second still warms up; where small shapes are tried, nobody reads the time.
    seconds = [_timed(work, 1, device)[0] for _ in range(1 if request.small else 3)]
    count = 1 if request.small else min(50, max(3, round(_ROUND_SECONDS / seconds[-1])))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    rounds, results = zip(*(_timed(work, count, device) for _ in range(_ROUNDS)), strict=True)
    return {"seconds": statistics.median(rounds), "rounds": rounds, "first": seconds[0], "result": results[-1]}


def _timed(work: Callable[[], Tensor], count: int, device: torch.device) -> tuple[float, Tensor]:
    start = time.perf_counter()
    for _ in range(count):
        result = work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / count, result


def _rate(clock: Mapping[str, Any], pairs: int, device: torch.device) -> Row:
    """What ``_clock`` says of a step."""
    loss = float(clock["result"])
    if not math.isfinite(loss):
        raise RuntimeError(f"the loss of {pairs} pairs is {loss}")
    return {
        "pairs_per_second": pairs / clock["seconds"],
        "step_ms": 1e3 * clock["seconds"],
        "step_ms_of_rounds": [1e3 * seconds for seconds in clock["rounds"]],
        "first_step_seconds": clock["first"],
        # Of recorded steps it is not known what is in use, but what was taken for them.
        "peak_gb": torch.cuda.max_memory_reserved(device) / 1e9 if device.type == "cuda" else None,
        "loss": loss,
    }


def _work(
    config: ModelConfig, compute: ComputeConfig, batch: PretrainBatch, rate: Mapping[str, Any], device: torch.device
) -> Row:
    """Operations for captions of these lengths, and their share of the device's peak; recomputing does not count."""
    captions, pairs_e9 = CaptionLengths(batch.num_tokens, batch.num_masked), 1e9 * len(batch.num_tokens)
    cost = count_micro_batch(config, step_sides.OBJECTIVES, compute, captions, element_bytes=2)
    gflop, recomputing = cost.work / pairs_e9, (cost.work + cost.repeated) / pairs_e9
    recomputed = {"gflop_per_pair_with_recomputing": recomputing} if compute.recompute else {}
    return {"gflop_per_pair": gflop, **recomputed, "mfu": _utilisation(gflop, rate, device)}


def _utilisation(gflop_per_pair: float, rate: Mapping[str, Any], device: torch.device) -> float | None:
    peak = peak_flops(device.type)
    return gflop_per_pair * 1e9 * float(rate["pairs_per_second"]) / peak if peak else None


def or_out_of_memory(measure: Callable[[], Row]) -> Row:
    """What is measured, or that it does not fit into the device's memory."""
    try:
        return measure()
    except torch.OutOfMemoryError as error:
        said = f"does not fit: {first_line(error)}"
    _give_memory_back()  # only now, as the error's traceback held what was in memory
    return {"error": said}


def _give_memory_back() -> None:
    gc.collect()
    torch.cuda.empty_cache()  # does nothing without a GPU


def first_line(error: Exception) -> str:
    """Of its text, at most 200 characters."""
    return (str(error).strip().splitlines() or [""])[0][:200]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    serve(Path(sys.argv[1]), Path(sys.argv[2]))
