"""A model as tables for the terminal: parameters by part, shapes of one pair, operations per pair."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from bridgetower.config.compute import ComputeConfig
from bridgetower.config.model import ModelConfig
from bridgetower.config.run import ObjectivesConfig
from bridgetower.cost.counted import count_forward, count_step
from bridgetower.model.bridgetower import BridgeTower
from bridgetower.model.init import shapes_alone

# Enough pairs for shares of a masked token to show.
_PAIRS = 20


def print_model(name: str, config: ModelConfig, heads: Sequence[str], *, text_tokens: int, lists_tensors: bool) -> None:
    """Print the tables; nothing is computed, all is on torch's meta device.

    Args:
        text_tokens: of the caption that shapes and operations are shown for.
        lists_tensors: also every tensor with its shape.
    """
    with shapes_alone():
        model = BridgeTower(config, heads)
    console = Console(width=None if sys.stdout.isatty() else 120)
    for table in (_parameters(name, model), _shapes(model, text_tokens), _operations(config, heads, text_tokens)):
        console.print(table)
    if lists_tensors:
        listing = _table("tensor", "shape")
        for tensor, value in model.state_dict().items():
            listing.add_row(tensor, _shape(value))
        console.print(listing)


def _table(*columns: str, title: str | None = None) -> Table:
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right")
    return table


def _shape(value: torch.Tensor) -> str:
    return " x ".join(map(str, value.shape)) or "scalar"


def _parameters(name: str, model: BridgeTower) -> Table:
    table = _table("part", "parameters", "tensors", title=name)
    parts: list[tuple[str, nn.Module]] = []
    for part, module in model.named_children():
        is_split = part in ("cross_modal", "heads")
        parts += (
            [(f"{part}.{name}", child) for name, child in module.named_children()] if is_split else [(part, module)]
        )
    for part, module in parts:
        sizes = [parameter.numel() for parameter in module.parameters()]
        if sizes:
            table.add_row(part, f"{sum(sizes):,}", str(len(sizes)))
    sizes = [parameter.numel() for parameter in model.parameters()]
    of_heads = [parameter.numel() for parameter in model.heads.parameters()]
    table.add_section()
    table.add_row("without heads", f"{sum(sizes) - sum(of_heads):,}", str(len(sizes) - len(of_heads)))
    table.add_row("total", f"{sum(sizes):,}", str(len(sizes)), style="bold")
    return table


def _shapes(model: BridgeTower, text_tokens: int) -> Table:
    side = model.config.image_size_px
    with shapes_alone():
        pixels = torch.empty(1, 3, side, side)
        ids, mask = torch.ones(1, text_tokens, dtype=torch.long), torch.ones(1, text_tokens, dtype=torch.bool)
    image, text = model.encode_image(pixels), model.encode_text(ids, mask)
    output = model.fuse(text.states_KBND, image.states_KBND, mask)
    table = _table("one pair, stop by stop", "shape")
    for stop, value in (
        ("pixel_values", pixels),
        ("input_ids", ids),
        ("encode_image: bridged layers x pairs x positions x width", image.states_KBND),
        ("encode_text: bridged layers x pairs x tokens x width", text.states_KBND),
        ("fuse: image_states", output.image_states),
        ("fuse: text_states", output.text_states),
        ("fuse: pooled, text half first", output.pooled),
    ):
        table.add_row(stop, _shape(value))
    return table


def _operations(config: ModelConfig, heads: Sequence[str], text_tokens: int) -> Table:
    forward = count_forward(config, heads, text_tokens)
    table = _table(f"operations of one pair of {text_tokens} tokens", "GFLOP")
    rows = [
        ("vision tower and transform, forward", forward.encode_image),
        ("text tower and transform, forward", forward.encode_text),
        ("bridges, cross-modal layers and poolers, forward", forward.fuse),
        *(
            (f"{head} head at every {'token' if head == 'mlm' else 'pair'}, forward", n)
            for head, n in forward.heads.items()
        ),
    ]
    for part, flops in rows:
        table.add_row(part, f"{flops / 1e9:,.2f}")
    if {"mlm", "itm"} & set(heads):
        objectives = ObjectivesConfig(mlm="mlm" in heads, itm="itm" in heads, itc="itc" in heads)
        masked_tokens = round(objectives.mlm_probability * (text_tokens - 2) * _PAIRS)
        shares = [masked_tokens // _PAIRS + (number < masked_tokens % _PAIRS) for number in range(_PAIRS)]
        step = count_step(config, objectives, ComputeConfig(), [text_tokens] * _PAIRS, shares)
        active = " + ".join(head.upper() for head in objectives.heads)
        table.add_row(f"pretraining step ({active}), forward and backward", f"{step / 1e9:,.2f}")
    return table
