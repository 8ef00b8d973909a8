"""Time, operations, bytes and memory of the pretraining step, beside plain torch and transformers' BridgeTower.

python benchmarks/step.py [--preset=base] [--device=cpu] [--dtype=bf16] [--batch=8] [--against=plain,transformers]
    [--compile=false] [--dropout=0.1] [--rounds=3] [--threads=0] [--out=FILE.json]

A step is forward and backward of MLM and ITM on one micro-batch. All sides have the same weights and pairs, whose
captions have 12 tokens on average. Each side is a process of its own; they take turns, and only one works at a time.

ours            the step of pretrain/train.py, built and started by the program's own functions; on a GPU without CUDA
                graphs, whose operations cannot be counted (benchmarks/gpu times them)
plain           bridgetower/model/plain.py: captions padded to 50, every image through the vision tower for each
                objective, logits at all tokens
transformers    transformers' BridgeTower, which computes the same work as plain
recompute_PART  ours with the layers of a part recomputed: vision, text, fusion or all
no_fuse_kernels ours without the Triton kernels, on a GPU
"""

from __future__ import annotations

import dataclasses
import json
import math
import multiprocessing
import os
import platform
import statistics
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import fire
import open_clip
import torch
import transformers
from fire.decorators import SetParseFn
from rich.console import Console
from rich.table import Table

from benchmarks import step_sides
from benchmarks.machine import cpu_features, cpu_model
from bridgetower.batch import PretrainBatch
from bridgetower.config.cli import parse_bool, parse_whole, refuse_unknown, run_command
from bridgetower.config.compute import PARTS, ComputeConfig
from bridgetower.config.model import ModelConfig
from bridgetower.config.named_models import MODELS
from bridgetower.config.snapshot import find_commit
from bridgetower.cost.captions import CaptionLengths
from bridgetower.cost.devices import peak_flops
from bridgetower.cost.micro_batch import count_micro_batch
from bridgetower.cost.published import count_published_step
from bridgetower.engine.launch import prepare_process, read_launch
from bridgetower.errors import ConfigError
from bridgetower.model.sizes import complete_model_config

_PADDED = ("plain", "transformers")
OUR_SIDES = {
    "ours": ComputeConfig(cuda_graphs=False),
    **{f"recompute_{part}": ComputeConfig(cuda_graphs=False, recompute=(part,)) for part in PARTS},
    "recompute_all": ComputeConfig(cuda_graphs=False, recompute=PARTS),
    "no_fuse_kernels": ComputeConfig(cuda_graphs=False, fuse_kernels=False),
}
"""Settings of each side that is this project's step."""
SIDES = ("ours", *_PADDED, *list(OUR_SIDES)[1:])
_FLAGS = {
    "preset": f"{', '.join(MODELS)} (default base)",
    "device": "cpu or cuda (default: cuda where there is one)",
    "dtype": "data type of weights and states: bf16 or fp32 (default bf16)",
    "batch": "number of pairs of the micro-batch (default 8)",
    "against": f"sides to compare with, some of {', '.join(SIDES[1:])} (default plain,transformers; for tiny, which "
    "transformers cannot hold, plain)",
    "compile": "true times every side compiled, layer by layer (default false)",
    "dropout": "preset, or a number from 0 to below 1 for the whole model (default preset)",
    "rounds": "number of turns of each side (default 3)",
    "threads": "number of CPU threads (default: one per core)",
    "out": "JSON file for the results",
}
_USAGE = "Usage: python benchmarks/step.py [flags]\n\nFlags:\n" + "\n".join(
    f"  --{name}  {meaning}" for name, meaning in _FLAGS.items()
)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class Setting(NamedTuple):
    """The flags that all sides share."""

    preset: str
    device: str
    dtype: str
    batch: int
    compiled: bool
    dropout: float | None
    """None is the preset's."""
    threads: int


def main(
    *unexpected: str,
    preset: str = "base",
    device: str = "",
    dtype: str = "bf16",
    batch: str = "8",
    against: str = "",
    compile: str = "false",
    dropout: str = "preset",
    rounds: str = "3",
    threads: str = "0",
    out: str = "",
    **unknown: str,
) -> None:
    """Measure and print a table."""
    refuse_unknown(unexpected, unknown, list(_FLAGS), _USAGE)
    for name, value, known in (("preset", preset, MODELS), ("dtype", dtype, DTYPES)):
        if value not in known:
            raise ConfigError(f"--{name}={value} is not known. Use one of {', '.join(known)}.")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise ConfigError(f"--device={device} is not available. Use cpu, or cuda on a machine with a GPU.")
    others = _parse_sides(against, preset, device)
    setting = Setting(
        preset,
        device,
        dtype,
        parse_whole("batch", batch, 1),
        parse_bool("compile", compile),
        None if dropout == "preset" else _parse_dropout(dropout),
        parse_whole("threads", threads, 0) or len(os.sched_getaffinity(0)),
    )
    if out:  # a wrong path fails before the measurement
        Path(out).parent.mkdir(parents=True, exist_ok=True)
    machine = describe_machine(device)  # before the measurement adds to the machine's load
    results = measure(setting, ["ours", *others], parse_whole("rounds", rounds, 1))
    _print(setting, results)
    if out:
        content = {"setting": setting._asdict(), "sides": results, "machine": machine}
        Path(out).write_text(json.dumps(content, indent=1) + "\n")


def _parse_sides(against: str, preset: str, device: str) -> list[str]:
    others = [side for side in (against or ("plain" if preset == "tiny" else ",".join(_PADDED))).split(",") if side]
    for side in others:
        if side not in SIDES[1:]:
            raise ConfigError(f"--against={side} is not a side. Use some of {','.join(SIDES[1:])}.")
    if "transformers" in others and preset == "tiny":
        raise ConfigError("--against=transformers cannot hold the preset tiny. Use --against=plain, or --preset=base.")
    if "no_fuse_kernels" in others and device == "cpu":
        raise ConfigError(
            "--against=no_fuse_kernels is the same as ours with --device=cpu, because Triton kernels run only on a "
            "GPU. Use --device=cuda on a machine with a GPU, or leave this side out."
        )
    return list(dict.fromkeys(others))


def measure(setting: Setting, names: list[str], rounds: int) -> dict[str, dict[str, Any]]:
    """Measure sides that take turns.

    Returns: figures by side, with ``seconds`` of each round, and the median of the rounds' ratios to the first side.
    """
    # One heap for the threads of forward and backward; each would keep the memory that it freed for itself.
    os.environ["MALLOC_ARENA_MAX"] = "1"
    # The libraries are imported once, in a process that never touches a device.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.step_sides"])
    sides: dict[str, tuple[Any, Connection]] = {}
    try:
        for name in names:
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(name, setting, theirs), daemon=True)
            process.start()
            theirs.close()
            sides[name] = (process, ours)
        results = {name: dict(_ask(name, sides, "measure")) for name in names}
        for name in names:
            results[name]["seconds"] = []
        for _ in range(rounds):
            for name in names:
                results[name]["seconds"].append(_ask(name, sides, "step"))
    finally:
        for process, _ in sides.values():
            process.kill()
            process.join()
    first = results[names[0]]["seconds"]
    peak = peak_flops(setting.device) if setting.dtype == "bf16" else None
    for name, result in results.items():
        result["pairs_per_second"] = setting.batch / statistics.median(result["seconds"])
        gflop = result["closed_form_gflop_of_parts"] = closed_form(name, setting)
        work = result["closed_form_gflop_per_pair"] = sum(gflop.values())
        result["mfu"] = work * 1e9 * result["pairs_per_second"] / peak if peak else None
        result["seconds_per_ours"] = statistics.median(b / a for a, b in zip(first, result["seconds"], strict=True))
    return results


def closed_form(name: str, setting: Setting) -> dict[str, float]:
    """Return the GFLOP per pair of a side's step from formulas, by component; recomputed layers are not counted."""
    config = step_sides.with_dropout(complete_model_config(MODELS[setting.preset]()), setting.dropout)
    if name in _PADDED:
        return {part: flops / 1e9 for part, flops in count_published_step(config, step_sides.OBJECTIVES).items()}
    batch = _make_batch(name, config, setting, torch.device("cpu"))
    captions = CaptionLengths(batch.num_tokens, batch.num_masked)
    size = DTYPES[setting.dtype].itemsize
    cost = count_micro_batch(config, step_sides.OBJECTIVES, OUR_SIDES[name], captions, element_bytes=size)
    return {part: flops / setting.batch / 1e9 for part, flops in cost.pieces.items()}


def _ask(name: str, sides: dict[str, tuple[Any, Connection]], request: str) -> Any:
    """Send a request to a side's process, and return its answer."""
    process, pipe = sides[name]
    try:
        pipe.send(request)
        answer = pipe.recv()
    except (EOFError, ConnectionError) as error:
        process.join()
        raise ConfigError(
            f"The process of the side {name} died with exit code {process.exitcode} (-9: it ran out of memory). Use a "
            "smaller --batch or fewer sides."
        ) from error
    if isinstance(answer, Exception):
        raise answer
    return answer


def _serve(name: str, setting: Setting, pipe: Connection) -> None:
    """Run a side's process, which measures or steps at each request."""
    if setting.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a run takes a GPU wherever it sees one
    prepare_process(read_launch({}), setting.threads)
    side: step_sides.Side | None = None
    while True:
        request = pipe.recv()
        try:
            if request == "measure":
                side = build_side(name, setting, compiles=False)
                answer: Any = _measure_step(side, setting)
                if setting.compiled:
                    side = None  # its memory is free before the compiled side is built
                    side = build_side(name, setting, compiles=True)
                side.step()  # compiles
            else:
                assert side is not None
                start = time.perf_counter()
                side.step()  # reads the loss, which waits for the device
                answer = time.perf_counter() - start
        except Exception as error:
            answer = ConfigError(f"The side {name} does not run: {type(error).__name__}: {error}")
        step_sides.release_memory()
        pipe.send(answer)


def build_side(name: str, setting: Setting, *, compiles: bool) -> step_sides.Side:
    """Build one of ``SIDES``.

    Args:
        compiles: compile the layers. Compiled code can be timed, but its operations cannot be counted.
    """
    device = torch.device(setting.device)
    config = complete_model_config(MODELS[setting.preset]())
    batch = _make_batch(name, config, setting, device)
    is_padded = name in _PADDED
    compute = OUR_SIDES["ours" if is_padded else name]
    if not is_padded:
        compute = dataclasses.replace(compute, compile=compiles)
    task = step_sides.build_our_task(config, compute, device, DTYPES[setting.dtype], dropout=setting.dropout)
    if name == "plain":
        return step_sides.plain_side(task.model, batch, compiled=compiles)
    if name == "transformers":
        return step_sides.transformers_side(task.model, batch, compiled=compiles)
    return step_sides.our_side(task, batch)


def _make_batch(name: str, config: ModelConfig, setting: Setting, device: torch.device) -> PretrainBatch:
    if name in _PADDED:
        return step_sides.make_padded_batch(config, setting.batch, device)
    return step_sides.make_batch(config, setting.batch, device)


def _measure_step(side: step_sides.Side, setting: Setting) -> dict[str, Any]:
    """Return everything about a step except its seconds."""
    device, pairs = torch.device(setting.device), setting.batch
    first_loss = side.step()
    num_bytes, num_operators = step_sides.count_moved_bytes(side)
    kept = step_sides.kept_bytes(side)
    with step_sides.peak_memory(device) as peak:
        side.step()
    return {
        "kernels": side.kernels,
        "loss": first_loss,
        "gflop_per_pair": step_sides.count_step_flops(side) / pairs / 1e9,
        "kept_mb_per_pair": kept / pairs / 1e6,
        "moved_gb_per_pair": num_bytes / pairs / 1e9,
        "operators": num_operators,
        "peak_mb": peak() / 1e6,
    }


def _parse_dropout(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < 1:
        raise ConfigError(f"--dropout={text} is not in [0, 1). Use preset, or a number from 0 to below 1.")
    return value


def describe_machine(device: str) -> dict[str, Any]:
    """Return the machine and the versions that the figures belong to."""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else cpu_model(),
        "cpu": cpu_model(),
        "cpu_features": cpu_features(),
        "cores": len(os.sched_getaffinity(0)),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "open_clip": open_clip.__version__,
        "commit": find_commit(),
    }


def _print(setting: Setting, results: dict[str, dict[str, Any]]) -> None:
    mode = "compiled" if setting.compiled else "eager"
    title = f"{setting.preset}, {setting.batch} pairs, {setting.dtype}, {setting.device}, {mode}"
    table = Table(title=f"One pretraining step of {title}", title_justify="left")
    rows = {
        "pairs/s": ("pairs_per_second", "{:.2f}"),
        "seconds, relative to ours": ("seconds_per_ours", "{:.2f}"),
        "GFLOP per pair, counted": ("gflop_per_pair", "{:,.1f}"),
        "GFLOP per pair, closed form": ("closed_form_gflop_per_pair", "{:,.1f}"),
        "kept for backward, MB per pair": ("kept_mb_per_pair", "{:,.0f}"),
        "moved by operators (eager), GB per pair": ("moved_gb_per_pair", "{:.2f}"),
        "operators (eager)": ("operators", "{:,}"),
        "peak memory over weights (eager), MB": ("peak_mb", "{:,.0f}"),
        "loss": ("loss", "{:.5f}"),
    }
    table.add_column("")
    for name in results:
        table.add_column(name, justify="right")
    for title, (key, form) in rows.items():
        table.add_row(title, *(form.format(result[key]) for result in results.values()))
    if all(result["mfu"] for result in results.values()):
        table.add_row("model FLOPs utilisation", *(f"{result['mfu']:.1%}" for result in results.values()))
    Console().print(table)


if __name__ == "__main__":
    run_command(lambda: fire.Fire(SetParseFn(str)(main)))
