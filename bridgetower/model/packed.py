"""Texts of different lengths without padding: all tokens stand in one row, and as a grid only where attention needs it.

Shapes: R texts (rows), L tokens of the longest, T tokens of all, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bridgetower.kernels.spans import Spans

I64 = npt.NDArray[np.int64]


class Grid(NamedTuple):
    """Some consecutive rows as attention reads them: equally long, the rest of each row empty."""

    rows: slice
    tokens: slice
    """Of the T tokens, those of these rows."""
    num_rows: int
    width: int
    place_T: Tensor | None
    """int64; where in the flattened grid each token stands. None: the tokens are the whole grid."""
    mask_RL: Tensor | None
    """bool; True for real tokens. None: all are."""

    def spread(self, states_TD: Tensor) -> Tensor:
        """The tokens as a grid of shape (R, L, D), zero where there is none."""
        part_TD = states_TD[self.tokens]
        if self.place_T is not None:
            empty = part_TD.new_zeros(self.num_rows * self.width, part_TD.shape[-1])
            part_TD = empty.index_copy(0, self.place_T, part_TD)
        grid_RLD: Tensor = part_TD.unflatten(0, (self.num_rows, self.width))
        return grid_RLD

    def collect(self, grid_RLD: Tensor) -> Tensor:
        """The tokens of a grid, shape (T, D)."""
        flat = grid_RLD.flatten(0, 1)
        return flat if self.place_T is None else flat.index_select(0, self.place_T)


class Layout(NamedTuple):
    """Where the tokens of all rows stand."""

    whole: Grid
    """All rows."""
    buckets: tuple[Grid, ...]
    """The same in parts whose rows are of similar length, for what costs much by token."""
    spans: Spans | None
    """Where each row's tokens stand; None where they are padded."""


def padded(mask_RL: Tensor) -> Layout:
    """Texts as they are, each padded to the longest: what is computed for padding is thrown away later.

    Args:
        mask_RL: True for real tokens.
    """
    rows, width = mask_RL.shape
    grid = Grid(slice(0, rows), slice(0, rows * width), rows, width, None, mask_RL)
    return Layout(grid, (grid,), None)


class _GridPlan(NamedTuple):
    """A grid whose places are yet the number of a table."""

    rows: slice
    tokens: slice
    num_rows: int
    width: int
    place: int | None


class _Plan(NamedTuple):
    """A layout, the whole grid first."""

    grids: list[_GridPlan]
    first: int
    """The table of where rows begin."""
    longest: int
    covers: bool


class Packing:
    """Plans of where tokens stand, made on the host, whose tables go to the device in one copy."""

    def __init__(self) -> None:
        """Begin with none."""
        self._tables: list[I64] = []
        self._layouts: list[_Plan] = []

    def table(self, values: I64) -> int:
        """Take a table along. Returns: its number."""
        self._tables.append(values.ravel())
        return len(self._tables) - 1

    def layout(self, length_R: I64, cuts: Sequence[int]) -> int:
        """Plan rows of these lengths.

        Args:
            cuts: rows at which a bucket ends, the last one R; ``similar`` gives them.

        Returns: the number of the layout.
        """
        first_R = np.concatenate([[0], np.cumsum(length_R)])
        grids = []
        for start, end in [(0, len(length_R)), *zip([0, *cuts[:-1]], cuts, strict=True)]:
            part_R = length_R[start:end]
            width = max(1, int(part_R.max(initial=0)))
            place = None
            if (part_R != width).any():
                place_RL = np.arange(len(part_R) * width).reshape(-1, width)
                place = self.table(place_RL[np.arange(width) < part_R[:, None]])
            tokens = slice(int(first_R[start]), int(first_R[end]))
            grids.append(_GridPlan(slice(start, end), tokens, end - start, width, place))
        self._layouts.append(_Plan(grids, self.table(first_R), grids[0].width, covers=True))
        return len(self._layouts) - 1

    def rows_in(self, length_R: I64, num_tokens: int, longest: int) -> int:
        """Plan rows of these lengths as the first of so many tokens, for attention that needs no grid.

        Args:
            longest: no row is longer.

        Returns: the number of the layout.
        """
        grid = _GridPlan(slice(0, len(length_R)), slice(0, num_tokens), len(length_R), longest, None)
        first = self.table(np.concatenate([[0], np.cumsum(length_R)]))
        self._layouts.append(_Plan([grid], first, longest, covers=False))
        return len(self._layouts) - 1

    def on(self, device: torch.device) -> tuple[list[Tensor], list[Layout]]:
        """Tables and layouts, with everything on the device."""
        sizes = [len(table) for table in self._tables]
        joined = torch.from_numpy(np.concatenate([*self._tables, np.empty(0, np.int64)]).astype(np.int64))
        if device.type == "cuda":
            joined = joined.pin_memory()  # so that the host does not wait for the copy
        tables = list(joined.to(device, non_blocking=True).split(sizes))
        return tables, [_on_device(plan, tables, device) for plan in self._layouts]


def _on_device(plan: _Plan, tables: list[Tensor], device: torch.device) -> Layout:
    found = []
    for rows, tokens, num_rows, width, number in plan.grids:
        place_T = mask_RL = None
        if number is not None:
            place_T = tables[number]
            mask = torch.zeros(num_rows * width, dtype=torch.bool, device=device)
            mask_RL = mask.index_fill_(0, place_T, True).unflatten(0, (num_rows, width))
        found.append(Grid(rows, tokens, num_rows, width, place_T, mask_RL))
    spans = Spans(tables[plan.first].to(torch.int32), plan.longest, plan.covers)
    return Layout(found[0], tuple(found[1:]), spans)


def similar(length_R: I64, step: int) -> list[int]:
    """Cut sorted rows into parts whose lengths differ by less than ``step``. Returns: where each part ends."""
    level_R = -(-length_R // step)
    return [*(np.flatnonzero(np.diff(level_R)) + 1).tolist(), len(length_R)]
