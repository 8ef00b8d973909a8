"""Ways to compute parts of base's step beside those that were not kept: time, bytes kept and bytes moved.

python benchmarks/layers.py [--parts=NAME,NAME] [--dtype=fp32] [--pairs=8] [--rounds=9] [--threads=0] [--out=FILE.json]

Forward and backward on the CPU. Both ways of a part are of the same inputs and take turns in one process, so that what
else the machine does meets both.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import fire
import numpy as np
import torch
from bridgetower.kernels.cpu import attend
from fire.decorators import SetParseFn
from open_clip.transformer import QuickGELU, ResidualAttentionBlock
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.step import DTYPES, describe_machine
from benchmarks.step_sides import MEAN_TOKENS, Side, caption_lengths, kept_bytes, moved
from bridgetower.config.cli import parse_whole, refuse_unknown, run_command
from bridgetower.config.named_models import base
from bridgetower.config.overrides import unknown_name
from bridgetower.errors import ConfigError
from bridgetower.kernels.dropout import drop
from bridgetower.kernels.layout import Grid
from bridgetower.model.attention import Attention
from bridgetower.model.vision_tower import efficient_block
from bridgetower.step.packing import Packing, similar
from bridgetower.step.plan import BUCKET_TOKENS

# Of base; two rows a pair go through the cross-modal layers.
_WIDTH, _HEADS, _POSITIONS, _DROPOUT = 768, 12, 325, 0.1
_FLAGS = {
    "parts": "which, separated by commas (default all)",
    "dtype": "fp32 or bf16 (default fp32)",
    "pairs": "of the micro-batch (default 8)",
    "rounds": "turns of both ways (default 9)",
    "threads": "CPU threads (default: all cores)",
    "out": "JSON file for the results",
}
_USAGE = "Usage: python benchmarks/layers.py [flags]\n\nFlags:\n" + "\n".join(
    f"  --{name}  {meaning}" for name, meaning in _FLAGS.items()
)

Ways = tuple[Callable[[], Tensor], Callable[[], Tensor], list[Tensor]]
"""The way that was kept, the other one, and what gets gradients."""


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
    torch.set_num_threads(parse_whole("threads", threads, 0) or len(os.sched_getaffinity(0)))
    num_pairs, num_rounds = parse_whole("pairs", pairs, 1), parse_whole("rounds", rounds, 1)
    machine = describe_machine("cpu")  # its load before ours
    if out:  # before the minutes that it takes
        Path(out).parent.mkdir(parents=True, exist_ok=True)
    results = {name: measure(PARTS[name](num_pairs, DTYPES[dtype]), num_rounds) for name in names}
    _print(results)
    if out:
        setting = {"dtype": dtype, "pairs": num_pairs, "threads": torch.get_num_threads()}
        content = {"setting": setting, "parts": results, "machine": machine}
        Path(out).write_text(json.dumps(content, indent=1) + "\n")


def measure(ways: Ways, rounds: int) -> dict[str, Any]:
    """Both ways in turns. Returns: figures of each, and the rounds' ratios of the other way's seconds to the kept's."""
    *runs, leaves = ways
    sides = {name: Side(name, run, leaves) for name, run in zip(("kept", "other"), runs, strict=True)}  # type: ignore[arg-type]
    results: dict[str, Any] = {}
    for name, side in sides.items():
        torch.manual_seed(0)
        loss = side.step()
        results[name] = {"loss": loss, "kept_mb": kept_bytes(side) / 1e6, "moved_gb": moved(side)[0] / 1e9}
        results[name]["seconds"] = []
    for _ in range(rounds):
        for name, side in sides.items():
            start = time.perf_counter()
            side.step()
            results[name]["seconds"].append(time.perf_counter() - start)
    ratios = [b / a for a, b in zip(results["kept"]["seconds"], results["other"]["seconds"], strict=True)]
    return {**results, "ratios": ratios, "ratio": statistics.median(ratios)}


def _states(*shape: int, dtype: torch.dtype) -> Tensor:
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return drawn.to(dtype).requires_grad_()


def joined_projections(pairs: int, dtype: torch.dtype) -> Ways:
    """Self-attention over images: queries, keys and values in one product, or in three."""
    config = base().fusion
    attention, apart = (Attention(config).to(dtype).eval() for _ in range(2))
    apart.load_state_dict(attention.state_dict())
    apart.project = lambda states, *parts: (states, *(part(states) for part in parts))  # type: ignore[method-assign]
    states = _states(2 * pairs, _POSITIONS, _WIDTH, dtype=dtype)
    leaves = [states, *attention.parameters(), *apart.parameters()]
    return lambda: attention(states, states).sum(), lambda: apart(states, states).sum(), leaves


def vision_block(pairs: int, dtype: torch.dtype) -> Ways:
    """A block of the vision tower: with attention called directly, or as open_clip does by nn.MultiheadAttention."""
    theirs = ResidualAttentionBlock(_WIDTH, _HEADS, act_layer=nn.GELU)
    ours = ResidualAttentionBlock(_WIDTH, _HEADS, act_layer=nn.GELU)
    ours.load_state_dict(theirs.state_dict())
    efficient_block(ours)
    theirs, ours = theirs.to(dtype), ours.to(dtype)
    states = _states(pairs, _POSITIONS, _WIDTH, dtype=dtype)
    leaves = [states, *ours.parameters(), *theirs.parameters()]
    return lambda: ours(states).sum(), lambda: theirs(states).sum(), leaves


def quick_gelu(pairs: int, dtype: torch.dtype) -> Ways:
    """The vision tower's activation: as a SiLU, which keeps what it reads, or as open_clip writes it."""
    states, plain = _states(pairs, _POSITIONS, 4 * _WIDTH, dtype=dtype), QuickGELU()

    def inner() -> Tensor:
        return states + 0.0  # of an operator, so that it is kept where it is read again

    return lambda: (F.silu(1.702 * inner()) / 1.702).sum(), lambda: plain(inner()).sum(), [states]


def attention_dropout(pairs: int, dtype: torch.dtype) -> Ways:
    """Attention of images to themselves with dropout: ours, or what torch takes where its fused kernels cannot."""
    projections = _states(2 * pairs, _POSITIONS, 3 * _WIDTH, dtype=dtype)
    query, key, value = (part.unflatten(-1, (_HEADS, -1)).transpose(1, 2) for part in projections.chunk(3, dim=-1))
    fused = partial(F.scaled_dot_product_attention, dropout_p=_DROPOUT)
    return (
        lambda: attend(query, key, value, None, _DROPOUT).sum(),
        lambda: fused(query, key, value).sum(),
        [projections],
    )


def attention_on_matrix_units(pairs: int, dtype: torch.dtype) -> Ways:
    """Attention of images to themselves: ours, with products for its backward pass in bfloat16 with AMX, or torch's."""
    projections = _states(pairs, _POSITIONS, 3 * _WIDTH, dtype=dtype)
    query, key, value = (part.unflatten(-1, (_HEADS, -1)).transpose(1, 2) for part in projections.chunk(3, dim=-1))
    return (
        lambda: attend(query, key, value, None, 0.0).sum(),
        lambda: F.scaled_dot_product_attention(query, key, value).sum(),
        [projections],
    )


def states_dropout(pairs: int, dtype: torch.dtype) -> Ways:
    """Dropout of the images' states: ours, or torch's."""
    states = _states(2 * pairs, _POSITIONS, _WIDTH, dtype=dtype)
    return lambda: drop(states, _DROPOUT, True).sum(), lambda: F.dropout(states, _DROPOUT, True).sum(), [states]


def text_grid(pairs: int, dtype: torch.dtype) -> Ways:
    """Attention of captions to themselves: all in one grid as wide as the longest, or a grid for each bucket."""
    lengths = np.sort(caption_lengths(2 * pairs, MEAN_TOKENS, base().text.max_tokens))
    packing = Packing()
    packing.layout(lengths, similar(lengths, BUCKET_TOKENS))
    layout = packing.on(torch.device("cpu"))[1][0]
    states = _states(int(lengths.sum()), _WIDTH, dtype=dtype)

    def attended(grids: tuple[Grid, ...]) -> Tensor:
        total = states.new_zeros(())
        for grid in grids:
            heads = grid.spread(states).unflatten(-1, (_HEADS, -1)).transpose(1, 2)
            result = attend(heads, heads, heads, grid.mask_RL, 0.0)
            total = total + grid.collect(result.transpose(1, 2).flatten(2)).sum()
        return total

    return lambda: attended((layout.whole,)), lambda: attended(layout.buckets), [states]


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
    table = Table(title="Forward and backward: the way that was kept, and the other", title_justify="left")
    for column in ("part", "ms", "other, ms", "times, median", "from", "to", "kept, MB", "other", "moved, GB", "other"):
        table.add_column(column, justify="left" if column == "part" else "right")
    for name, found in results.items():
        kept, other, ratios = found["kept"], found["other"], found["ratios"]
        seconds = [f"{1e3 * statistics.median(way['seconds']):,.1f}" for way in (kept, other)]
        times = [f"{value:.2f}" for value in (found["ratio"], min(ratios), max(ratios))]
        memory = [f"{way['kept_mb']:,.1f}" for way in (kept, other)]
        table.add_row(name, *seconds, *times, *memory, *(f"{way['moved_gb']:.2f}" for way in (kept, other)))
    console = Console()
    # In a log nothing is cut off.
    (console if console.is_terminal else Console(width=120)).print(table)


if __name__ == "__main__":
    run_command(lambda: fire.Fire(SetParseFn(str)(main)))
