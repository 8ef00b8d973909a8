"""The pretraining step beside the plain one and transformers' BridgeTower: time, operations, bytes and memory.

python benchmarks/step.py [--preset=base] [--device=cpu] [--dtype=bf16] [--batch=8] [--against=plain,transformers]
    [--compile=false] [--dropout=0.1] [--rounds=3] [--threads=0] [--out=FILE.json]

A step is MLM and ITM of a micro-batch, forward and backward, of the same weights and pairs, whose captions have 12
tokens on average. Each side is a process of its own; they take turns, one at work at a time. The plain step is this
project's with no work saved: captions padded to 50, every image through the vision tower for each objective, logits at
all tokens. Other sides are ours with one saving left out (no_joint_pass, no_absorb_projections, ...) or with layers
recomputed (recompute_fusion, recompute_all, ...).
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
from benchmarks.step_sides import PUBLISHED_TOKENS
from bridgetower.batch import PretrainBatch
from bridgetower.config.cli import parse_bool, parse_whole, refuse_unknown, run_command
from bridgetower.config.compute import PLAIN, ComputeConfig
from bridgetower.config.model import ModelConfig
from bridgetower.config.named_models import MODELS
from bridgetower.config.snapshot import find_commit
from bridgetower.cost.captions import CaptionLengths
from bridgetower.cost.devices import peak_flops
from bridgetower.cost.micro_batch import count_micro_batch
from bridgetower.cost.published import count_published_step
from bridgetower.errors import ConfigError
from bridgetower.model.sizes import complete_model_config

_PARTS = ("vision", "text", "fusion")
_PADDED = ("plain", "transformers")
# A step that is recorded cannot be counted; benchmarks/gpu times it.
_EAGER = ComputeConfig(cuda_graphs=False)
SIDES = {
    "ours": _EAGER,
    "plain": PLAIN,
    "transformers": PLAIN,
    **{
        f"no_{name}": ComputeConfig(**{**vars(_EAGER), name: False})
        for name, value in vars(_EAGER).items()
        if value is True
    },
    **{f"recompute_{part}": ComputeConfig(recompute=(part,)) for part in _PARTS},
    "recompute_all": ComputeConfig(recompute=_PARTS),
}
"""What each side saves; transformers computes what the plain step does."""
_FLAGS = {
    "preset": f"{', '.join(MODELS)} (default base)",
    "device": "cpu or cuda (default: cuda where there is one)",
    "dtype": "bf16 or fp32 (default bf16): of weights and states",
    "batch": "pairs of the micro-batch (default 8)",
    "against": f"sides to compare with, of {', '.join(list(SIDES)[1:])} (default plain,transformers; of tiny, which "
    "transformers cannot hold, plain)",
    "compile": "true compiles every side, layer by layer (default false)",
    "dropout": "preset or a number (default preset); 0 is what a GPU's fused attention keeps least for",
    "rounds": "turns of each side (default 3)",
    "threads": "CPU threads (default: all cores)",
    "out": "JSON file for the results",
}
_USAGE = "Usage: python benchmarks/step.py [flags]\n\nFlags:\n" + "\n".join(
    f"  --{name}  {meaning}" for name, meaning in _FLAGS.items()
)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class Setting(NamedTuple):
    """What all sides share."""

    preset: str
    device: str
    dtype: str
    batch: int
    compiled: bool
    dropout: float | None
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
        raise ConfigError(f"--device={device} is not there. Use cpu, or cuda on a machine with a GPU.")
    others = [side for side in (against or ("plain" if preset == "tiny" else ",".join(_PADDED))).split(",") if side]
    for side in others:
        if side not in SIDES or side == "ours":
            raise ConfigError(f"--against={side} is no side. Use some of {','.join(list(SIDES)[1:])}.")
    if "transformers" in others and preset == "tiny":
        raise ConfigError("--against=transformers cannot hold the preset tiny. Use --against=plain, or --preset=base.")
    setting = Setting(
        preset,
        device,
        dtype,
        parse_whole("batch", batch, 1),
        parse_bool("compile", compile),
        None if dropout == "preset" else _parse_dropout(dropout),
        parse_whole("threads", threads, 0) or len(os.sched_getaffinity(0)),
    )
    if out:  # before the minutes that it takes
        Path(out).parent.mkdir(parents=True, exist_ok=True)
    machine = describe_machine(device)  # its load before ours
    results = measure(setting, ["ours", *dict.fromkeys(others)], parse_whole("rounds", rounds, 1))
    _print(setting, results)
    if out:
        content = {"setting": setting._asdict(), "sides": results, "machine": machine}
        Path(out).write_text(json.dumps(content, indent=1) + "\n")


def measure(setting: Setting, names: list[str], rounds: int) -> dict[str, dict[str, Any]]:
    """Figures of each side, which take turns.

    Returns: by side; ``seconds`` of each round, and the median of the rounds' ratios to the first side.
    """
    # One heap for the threads of forward and backward: each would keep what it freed for itself.
    os.environ["MALLOC_ARENA_MAX"] = "1"
    # The libraries are loaded once, in a process that never touches a device.
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
    """Compute the GFLOP per pair of a side's step from formulas, by component; what is recomputed is not work."""
    config = step_sides.with_dropout(complete_model_config(MODELS[setting.preset]()), setting.dropout)
    if name in _PADDED:
        return {part: flops / 1e9 for part, flops in count_published_step(config, step_sides.OBJECTIVES).items()}
    batch = _make_batch(name, config, setting, torch.device("cpu"))
    captions = CaptionLengths(batch.num_tokens, batch.num_masked)
    size = DTYPES[setting.dtype].itemsize
    cost = count_micro_batch(config, step_sides.OBJECTIVES, SIDES[name], captions, element_bytes=size)
    return {part: flops / setting.batch / 1e9 for part, flops in cost.pieces.items()}


def _ask(name: str, sides: dict[str, tuple[Any, Connection]], request: str) -> Any:
    process, pipe = sides[name]
    try:
        pipe.send(request)
        answer = pipe.recv()
    except (EOFError, ConnectionError) as error:
        process.join()
        raise ConfigError(
            f"The process of the side {name} died (exit code {process.exitcode}; -9 is want of memory). Use a smaller "
            "--batch or fewer sides."
        ) from error
    if isinstance(answer, Exception):
        raise answer
    return answer


def _serve(name: str, setting: Setting, pipe: Connection) -> None:
    """A side's process: measures or steps when it is asked to."""
    torch.set_num_threads(setting.threads)
    side: step_sides.Side | None = None
    while True:
        request = pipe.recv()
        try:
            if request == "measure":
                side = _build(name, setting, compiles=False)
                answer: Any = _figures(side, setting)
                if setting.compiled:
                    side = None
                    side = _build(name, setting, compiles=True)
                side.step()  # compiles
            else:
                assert side is not None
                start = time.perf_counter()
                side.step()  # reads the loss, so that the device has done its work
                answer = time.perf_counter() - start
        except Exception as error:
            answer = ConfigError(f"The side {name} does not run: {type(error).__name__}: {error}")
        step_sides.give_memory_back()
        pipe.send(answer)


def _build(name: str, setting: Setting, *, compiles: bool) -> step_sides.Side:
    device = torch.device(setting.device)
    config = complete_model_config(MODELS[setting.preset]())
    model = step_sides.build_model(config, device, DTYPES[setting.dtype], setting.dropout)
    batch = _make_batch(name, config, setting, device)
    if name == "transformers":
        return step_sides.transformers_side(model, batch, compiled=compiles)
    return step_sides.our_side(name, model, batch, dataclasses.replace(SIDES[name], compile=compiles))


def _make_batch(name: str, config: ModelConfig, setting: Setting, device: torch.device) -> PretrainBatch:
    pad_to = min(PUBLISHED_TOKENS, config.text.max_tokens) if name in _PADDED else 0
    return step_sides.make_batch(config, setting.batch, device, pad_to=pad_to)


def _figures(side: step_sides.Side, setting: Setting) -> dict[str, Any]:
    device, pairs = torch.device(setting.device), setting.batch
    first_loss = side.step()
    num_bytes, operators = step_sides.moved(side)
    kept = step_sides.kept_bytes(side)
    with step_sides.peak_memory(device) as peak:
        side.step()
    return {
        "loss": first_loss,
        "gflop_per_pair": step_sides.flops(side) / pairs / 1e9,
        "kept_mb_per_pair": kept / pairs / 1e6,
        "moved_gb_per_pair": num_bytes / pairs / 1e9,
        "operators": operators,
        "peak_mb": peak() / 1e6,
    }


def _parse_dropout(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < 1:
        raise ConfigError(f"--dropout={text} is no share. Use preset, or a number from 0 to below 1.")
    return value


def describe_machine(device: str) -> dict[str, Any]:
    """What the figures were measured on and with."""
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
    kind = "compiled" if setting.compiled else "eager"
    title = f"{setting.preset}, {setting.batch} pairs, {setting.dtype}, {setting.device}, {kind}"
    table = Table(title=f"One pretraining step of {title}", title_justify="left")
    rows = {
        "pairs/s": ("pairs_per_second", "{:.2f}"),
        "seconds, times ours": ("seconds_per_ours", "{:.2f}"),
        "GFLOP a pair, counted": ("gflop_per_pair", "{:,.1f}"),
        "GFLOP a pair, closed form": ("closed_form_gflop_per_pair", "{:,.1f}"),
        "kept for backward, MB a pair": ("kept_mb_per_pair", "{:,.0f}"),
        "moved by operators (eager), GB a pair": ("moved_gb_per_pair", "{:.2f}"),
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
