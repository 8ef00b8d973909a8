"""A model as tables for the terminal: parameters by part, shapes of one pair, operations per pair."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from bridgetower.config.model import ModelConfig
from bridgetower.config.run import ObjectivesConfig
from bridgetower.cost.captions import CaptionLengths
from bridgetower.cost.micro_batch import count_operations
from bridgetower.cost.parameters import build_shapes
from bridgetower.cost.published import count_forward
from bridgetower.cost.sizes import has_formula, num_image_positions, num_read_states
from bridgetower.cost.towers import CountedVision
from bridgetower.model.sizes import complete_model_config

# Pairs of the micro-batch whose operations are shown: enough for fractions of a masked token per pair.
_NUM_PAIRS = 20


def print_model(name: str, config: ModelConfig, heads: Sequence[str], *, text_tokens: int, lists_tensors: bool) -> None:
    """Print the tables; no weight is allocated, and nothing is computed but shapes.

    Args:
        text_tokens: length of the caption that shapes and operations are shown for.
        lists_tensors: also print every tensor with its shape.
    """
    config = complete_model_config(config)
    model = build_shapes(config, heads)
    counted = None
    if not has_formula(config.vision):
        from bridgetower.cost.counted import count_vision_tower

        counted = count_vision_tower(config)
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(_parameters(name, model))
    console.print(_shapes(config, text_tokens, counted))
    console.print(_operations(config, heads, text_tokens, counted))
    if lists_tensors:
        listing = _table("tensor", "shape")
        for tensor, value in model.state_dict().items():
            listing.add_row(tensor, _shape(value))
        console.print(listing)


def _table(*columns: str, title: str | None = None) -> Table:
    table = Table(title=title, title_justify="left")
    for column_index, column in enumerate(columns):
        table.add_column(column, justify="left" if column_index == 0 else "right")
    return table


def _shape(tensor: Tensor) -> str:
    return _joined(*tensor.shape) or "scalar"


def _joined(*sizes: int) -> str:
    return " x ".join(map(str, sizes))


def _parameters(name: str, model: nn.Module) -> Table:
    table = _table("part", "parameters", "tensors", title=name)
    parts: dict[str, list[int]] = {}
    for parameter_name, parameter in model.named_parameters():
        levels = parameter_name.split(".")
        is_split = levels[0] in ("cross_modal", "heads")
        parts.setdefault(".".join(levels[: 2 if is_split else 1]), []).append(parameter.numel())
    for part, sizes in parts.items():
        table.add_row(part, f"{sum(sizes):,}", str(len(sizes)))
    in_model = [size for part, sizes in parts.items() if not part.startswith("heads.") for size in sizes]
    in_total = [size for sizes in parts.values() for size in sizes]
    table.add_section()
    table.add_row("without heads", f"{sum(in_model):,}", str(len(in_model)))
    table.add_row("total", f"{sum(in_total):,}", str(len(in_total)), style="bold")
    return table


def _shapes(config: ModelConfig, text_tokens: int, counted: CountedVision | None) -> Table:
    side, fusion = config.image_size_px, config.fusion
    positions = num_image_positions(config) if counted is None else counted.positions
    num_states = num_read_states(config, 1)  # METER's gate makes one of all layers
    table = _table("shapes of one pair", "shape")
    for name, sizes in (
        ("pixel_values", (1, 3, side, side)),
        ("input_ids", (1, text_tokens)),
        ("encode_image: bridged layers x pairs x positions x width", (num_states, 1, positions, fusion.width)),
        ("encode_text: bridged layers x pairs x tokens x width", (num_states, 1, text_tokens, fusion.width)),
        ("fuse: image_states", (1, positions, fusion.width)),
        ("fuse: text_states", (1, text_tokens, fusion.width)),
        ("fuse: pooled, text half first", (1, 2 * fusion.width)),
    ):
        table.add_row(name, _joined(*sizes))
    return table


def _operations(config: ModelConfig, heads: Sequence[str], text_tokens: int, counted: CountedVision | None) -> Table:
    forward = count_forward(config, tuple(heads), text_tokens, counted)
    table = _table(f"operations of one pair, caption of {text_tokens} tokens", "GFLOP")
    rows = [
        ("vision tower and transform, forward", forward.encode_image),
        ("text tower and transform, forward", forward.encode_text),
        ("bridges, cross-modal layers and poolers, forward", forward.fuse),
        *(
            (f"{head} head {'at every token' if head == 'mlm' else 'per pair'}, forward", flops)
            for head, flops in forward.heads.items()
        ),
    ]
    for name, flops in rows:
        table.add_row(name, f"{flops / 1e9:,.2f}")
    if {"mlm", "itm"} & set(heads):
        objectives = ObjectivesConfig(mlm="mlm" in heads, itm="itm" in heads, itc="itc" in heads)
        num_masked = round(objectives.mlm_probability * (text_tokens - 2) * _NUM_PAIRS)
        masked = tuple(num_masked // _NUM_PAIRS + (pair < num_masked % _NUM_PAIRS) for pair in range(_NUM_PAIRS))
        captions = CaptionLengths((text_tokens,) * _NUM_PAIRS, masked)
        step = count_operations(config, objectives, captions, counted) / _NUM_PAIRS
        active = " + ".join(head.upper() for head in objectives.heads)
        table.add_row(f"pretraining step ({active}), forward and backward", f"{step / 1e9:,.2f}")
    return table
