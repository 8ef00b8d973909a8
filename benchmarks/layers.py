"""Time, kept bytes and moved bytes of operations of a base step on the CPU, beside the ways that were not chosen.

python benchmarks/layers.py [--parts=NAME,NAME] [--dtype=fp32] [--pairs=8] [--rounds=9] [--threads=0] [--out=FILE.json]

Forward and backward. Both ways of an operation have the same inputs and take turns in one process, so that other load
on the machine slows both of them.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fire
import numpy as np
import torch
from fire.decorators import SetParseFn
from open_clip.transformer import QuickGELU, ResidualAttentionBlock
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.step import DTYPES, describe_machine
from benchmarks.step_sides import MEAN_TOKENS, Side, caption_lengths, count_moved_bytes, kept_bytes
from bridgetower.config.cli import parse_whole, refuse_unknown, run_command
from bridgetower.config.named_models import base
from bridgetower.config.overrides import unknown_name
from bridgetower.engine.launch import prepare_process, read_launch
from bridgetower.errors import ConfigError
from bridgetower.kernels.cpu_ops import CpuOps, has_matrix_units
from bridgetower.kernels.layout import Grid
from bridgetower.kernels.torch_ops import TorchOps
from bridgetower.model.attention import Attention
from bridgetower.model.vision_tower import ClipBlock
from bridgetower.step.packing import Packing, group_similar
from bridgetower.step.plan import BUCKET_TOKENS

# Sizes of base. Two rows per pair go through the cross-modal layers.
_WIDTH, _HEADS, _POSITIONS, _DROPOUT = 768, 12, 325, 0.1
_FLAGS = {
    "parts": "names of the operations, separated by commas (default all)",
    "dtype": "data type of weights and states: fp32 or bf16 (default fp32)",
    "pairs": "number of pairs of the micro-batch (default 8)",
    "rounds": "number of turns of both ways (default 9)",
    "threads": "number of CPU threads (default: one per core)",
    "out": "JSON file for the results",
}
_USAGE = "Usage: python benchmarks/layers.py [flags]\n\nFlags:\n" + "\n".join(
    f"  --{name}  {meaning}" for name, meaning in _FLAGS.items()
)

Ways = tuple[Callable[[], Tensor], Callable[[], Tensor], list[Tensor]]
"""The way that was chosen, the other one, and the tensors that get gradients."""


def main(
    *unexpected: str,
    parts: str = "",
    dtype: str = "fp32",
    pairs: str = "8",
    rounds: str = "9",
    threads: str = "0",
    out: str = "",
    **unknown: str,
) -> None:
    """Measure and print a table."""
    refuse_unknown(unexpected, unknown, list(_FLAGS), _USAGE)
    if dtype not in DTYPES:
        raise ConfigError(f"--dtype={dtype} is not known. Use one of {', '.join(DTYPES)}.")
    names = [name for name in parts.split(",") if name] or list(PARTS)
    for name in names:
        if name not in PARTS:
            raise ConfigError(f"--parts: {unknown_name('part', name, list(PARTS))}")
    prepare_process(read_launch({}), parse_whole("threads", threads, 0))
    num_pairs, num_rounds = parse_whole("pairs", pairs, 1), parse_whole("rounds", rounds, 1)
    machine = describe_machine("cpu")  # before the measurement adds to the machine's load
    if out:  # a wrong path fails before the measurement
        Path(out).parent.mkdir(parents=True, exist_ok=True)
    results = {name: measure(PARTS[name](num_pairs, DTYPES[dtype]), num_rounds) for name in names}
    _print(results)
    if out:
        setting = {"dtype": dtype, "pairs": num_pairs, "threads": torch.get_num_threads()}
        content = {"setting": setting, "parts": results, "machine": machine}
        Path(out).write_text(json.dumps(content, indent=1) + "\n")


def measure(ways: Ways, rounds: int) -> dict[str, Any]:
    """Measure both ways in turns.

    Returns: figures of each way, and the ratios of the other way's seconds to the chosen way's in each round.
    """
    *runs, leaves = ways
    sides = {name: Side(run, leaves) for name, run in zip(("kept", "other"), runs, strict=True)}  # type: ignore[arg-type]
    results: dict[str, Any] = {}
    for name, side in sides.items():
        torch.manual_seed(0)
        loss = side.step()
        results[name] = {"loss": loss, "kept_mb": kept_bytes(side) / 1e6, "moved_gb": count_moved_bytes(side)[0] / 1e9}
        results[name]["seconds"] = []
    for _ in range(rounds):
        for name, side in sides.items():
            start = time.perf_counter()
            side.step()
            results[name]["seconds"].append(time.perf_counter() - start)
    ratios = [b / a for a, b in zip(results["kept"]["seconds"], results["other"]["seconds"], strict=True)]
    return {**results, "ratios": ratios, "ratio": statistics.median(ratios)}


def _draw_states(*shape: int, dtype: torch.dtype) -> Tensor:
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return drawn.to(dtype).requires_grad_()


def _draw_heads(rows: int, dtype: torch.dtype) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Return joint projections of images, and queries, keys and values head by head."""
    projections = _draw_states(rows, _POSITIONS, 3 * _WIDTH, dtype=dtype)
    query, key, value = (x.unflatten(-1, (_HEADS, -1)).transpose(1, 2) for x in projections.chunk(3, dim=-1))
    return projections, (query, key, value)


def _cpu_ops() -> CpuOps:
    """Return the operations that a run on this CPU has."""
    return CpuOps(has_matrix_units=has_matrix_units())


class _SeparateProjections(CpuOps):
    """Projects queries, keys and values in three matmuls."""

    def attend_within_rows(
        self, states_RPD: Tensor, weight_ED: Tensor, bias_E: Tensor, num_heads: int, dropout: float
    ) -> tuple[Tensor, Tensor]:
        weights = zip(weight_ED.chunk(3), bias_E.chunk(3), strict=True)
        query, key, value = (F.linear(states_RPD, weight_DD, bias_D) for weight_DD, bias_D in weights)
        return states_RPD, self.attend(query, key, value, num_heads, dropout)


def joined_projections(pairs: int, dtype: torch.dtype) -> Ways:
    """Self-attention over images: queries, keys and values in one matmul, or in three."""
    config = base().fusion
    joined = Attention(config, _cpu_ops()).to(dtype).eval()
    separate = Attention(config, _SeparateProjections(has_matrix_units=has_matrix_units())).to(dtype).eval()
    separate.load_state_dict(joined.state_dict())
    states = _draw_states(2 * pairs, _POSITIONS, _WIDTH, dtype=dtype)
    leaves = [states, *joined.parameters(), *separate.parameters()]
    return lambda: joined(states, states).sum(), lambda: separate(states, states).sum(), leaves


def vision_block(pairs: int, dtype: torch.dtype) -> Ways:
    """A block of the vision tower: attention called directly, or by nn.MultiheadAttention as in open_clip."""
    theirs = ResidualAttentionBlock(_WIDTH, _HEADS, act_layer=nn.GELU)
    ours = ClipBlock(_WIDTH, _HEADS, nn.GELU(), _cpu_ops())
    ours.load_state_dict(theirs.state_dict())
    theirs, ours = theirs.to(dtype), ours.to(dtype)
    states = _draw_states(pairs, _POSITIONS, _WIDTH, dtype=dtype)
    leaves = [states, *ours.parameters(), *theirs.parameters()]
    return lambda: ours(states).sum(), lambda: theirs(states).sum(), leaves


def quick_gelu(pairs: int, dtype: torch.dtype) -> Ways:
    """The vision tower's first feed-forward matmul and activation: as a SiLU, or as open_clip writes QuickGELU."""
    states, ops, activation = _draw_states(pairs, _POSITIONS, _WIDTH, dtype=dtype), _cpu_ops(), QuickGELU()
    linear = nn.Linear(_WIDTH, 4 * _WIDTH).to(dtype)
    leaves = [states, *linear.parameters()]
    return (
        lambda: ops.activate(states, linear, quick=True)[1].sum(),
        lambda: activation(linear(states)).sum(),
        leaves,
    )


def attention_dropout(pairs: int, dtype: torch.dtype) -> Ways:
    """Self-attention of images with dropout: ours, or torch's for cases that its fused kernels do not support."""
    projections, heads = _draw_heads(2 * pairs, dtype)
    ours, torchs = _cpu_ops(), TorchOps()
    return (
        lambda: ours.attend_heads(*heads, None, _DROPOUT).sum(),
        lambda: torchs.attend_heads(*heads, None, _DROPOUT).sum(),
        [projections],
    )


def attention_on_matrix_units(pairs: int, dtype: torch.dtype) -> Ways:
    """Self-attention of images: ours, which on AMX in bfloat16 has a backward pass of matmuls, or torch's."""
    projections, heads = _draw_heads(pairs, dtype)
    ours, torchs = _cpu_ops(), TorchOps()
    return (
        lambda: ours.attend_heads(*heads, None, 0.0).sum(),
        lambda: torchs.attend_heads(*heads, None, 0.0).sum(),
        [projections],
    )


def states_dropout(pairs: int, dtype: torch.dtype) -> Ways:
    """Dropout of the images' states: ours, or torch's."""
    states = _draw_states(2 * pairs, _POSITIONS, _WIDTH, dtype=dtype)
    ours, torchs = _cpu_ops(), TorchOps()
    return lambda: ours.drop(states, _DROPOUT).sum(), lambda: torchs.drop(states, _DROPOUT).sum(), [states]


def text_grid(pairs: int, dtype: torch.dtype) -> Ways:
    """Self-attention of captions: in one grid as wide as the longest caption, or in a grid per bucket of lengths."""
    lengths = np.sort(caption_lengths(2 * pairs, MEAN_TOKENS, base().text.max_tokens))
    packing = Packing()
    packing.add_layout(lengths, group_similar(lengths, BUCKET_TOKENS))
    layout = packing.to_device(torch.device("cpu"))[1][0]
    states, ops = _draw_states(int(lengths.sum()), _WIDTH, dtype=dtype), _cpu_ops()

    def attend(grids: tuple[Grid, ...]) -> Tensor:
        total = states.new_zeros(())
        for grid in grids:
            heads = grid.spread(states).unflatten(-1, (_HEADS, -1)).transpose(1, 2)
            attended = ops.attend_heads(heads, heads, heads, grid.mask_RL, 0.0)
            total = total + grid.collect(attended.transpose(1, 2).flatten(2)).sum()
        return total

    return lambda: attend((layout.whole,)), lambda: attend(layout.buckets), [states]


PARTS: dict[str, Callable[[int, torch.dtype], Ways]] = {
    "joined_projections": joined_projections,
    "vision_block": vision_block,
    "quick_gelu": quick_gelu,
    "attention_dropout": attention_dropout,
    "attention_on_matrix_units": attention_on_matrix_units,
    "states_dropout": states_dropout,
    "text_grid": text_grid,
}


def _print(results: dict[str, dict[str, Any]]) -> None:
    table = Table(title="Forward and backward: the way that was chosen, and the other way", title_justify="left")
    for column in (
        "operation",
        "ms",
        "other, ms",
        "ratio, median",
        "min",
        "max",
        "kept, MB",
        "other, MB",
        "moved, GB",
        "other, GB",
    ):
        table.add_column(column, justify="left" if column == "operation" else "right")
    for name, result in results.items():
        chosen, other, ratios = result["kept"], result["other"], result["ratios"]
        seconds = [f"{1e3 * statistics.median(way['seconds']):,.1f}" for way in (chosen, other)]
        spread = [f"{value:.2f}" for value in (result["ratio"], min(ratios), max(ratios))]
        memory = [f"{way['kept_mb']:,.1f}" for way in (chosen, other)]
        table.add_row(name, *seconds, *spread, *memory, *(f"{way['moved_gb']:.2f}" for way in (chosen, other)))
    console = Console()
    # A log is not as wide as a terminal, and must not be cut off.
    (console if console.is_terminal else Console(width=120)).print(table)


if __name__ == "__main__":
    run_command(lambda: fire.Fire(SetParseFn(str)(main)))
