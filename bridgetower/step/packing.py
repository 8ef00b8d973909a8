"""Where tokens lie, planned on the host: texts of different lengths without padding.

Shapes: R texts (rows), L tokens of the longest, T tokens of all texts, Z row boundaries.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bridgetower.kernels.layout import Grid, Layout, Spans

I64 = npt.NDArray[np.int64]


class _GridPlan(NamedTuple):
    """A grid whose slots are still the number of a table."""

    rows: slice
    tokens: slice
    num_rows: int
    width: int
    slots: int | None


class _LayoutPlan(NamedTuple):
    """A layout before its tables are on the device."""

    grids: list[_GridPlan]
    """The whole grid, then the buckets."""
    starts: int
    """Number of the table of row boundaries."""
    longest: int
    covers: bool


class Packing:
    """Plans of where tokens lie, whose tables go to the device in one copy."""

    def __init__(self) -> None:
        """Start without tables."""
        self._tables: list[I64] = []
        self._layouts: list[_LayoutPlan] = []

    def add_table(self, values: I64) -> int:
        """Take a table along to the device. Returns: its number."""
        self._tables.append(values.ravel())
        return len(self._tables) - 1

    def add_layout(self, length_R: I64, bucket_ends: Sequence[int]) -> int:
        """Plan packed rows of these lengths, as grids and as spans.

        Args:
            bucket_ends: the row at which each bucket ends, the last one R; ``group_similar`` finds them.

        Returns: the number of the layout.
        """
        start_Z = np.concatenate([[0], np.cumsum(length_R)])
        grids = []
        for first, end in [(0, len(length_R)), *zip([0, *bucket_ends[:-1]], bucket_ends, strict=True)]:
            bucket_length_R = length_R[first:end]
            width = max(1, int(bucket_length_R.max(initial=0)))
            slots = None
            if (bucket_length_R != width).any():
                slot_RL = np.arange(len(bucket_length_R) * width).reshape(-1, width)
                slots = self.add_table(slot_RL[np.arange(width) < bucket_length_R[:, None]])
            tokens = slice(int(start_Z[first]), int(start_Z[end]))
            grids.append(_GridPlan(slice(first, end), tokens, end - first, width, slots))
        self._layouts.append(_LayoutPlan(grids, self.add_table(start_Z), grids[0].width, covers=True))
        return len(self._layouts) - 1

    def add_spans(self, length_R: I64, num_tokens: int, longest: int) -> int:
        """Plan rows of these lengths as the first of ``num_tokens``, for attention that needs no grid.

        Args:
            num_tokens: more than the rows have: the last ones belong to no row.
            longest: upper bound of a row's tokens.

        Returns: the number of the layout.
        """
        grid = _GridPlan(slice(0, len(length_R)), slice(0, num_tokens), len(length_R), longest, None)
        starts = self.add_table(np.concatenate([[0], np.cumsum(length_R)]))
        self._layouts.append(_LayoutPlan([grid], starts, longest, covers=False))
        return len(self._layouts) - 1

    def to_device(self, device: torch.device) -> tuple[list[Tensor], list[Layout]]:
        """Return all tables and layouts, on the device."""
        sizes = [len(table) for table in self._tables]
        joined = torch.from_numpy(np.concatenate([*self._tables, np.empty(0, np.int64)]).astype(np.int64))
        if device.type == "cuda":
            joined = joined.pin_memory()  # so that the host does not wait for the copy
        tables = list(joined.to(device, non_blocking=True).split(sizes))
        return tables, [_make_layout(plan, tables, device) for plan in self._layouts]


def _make_layout(plan: _LayoutPlan, tables: list[Tensor], device: torch.device) -> Layout:
    grids = []
    for rows, tokens, num_rows, width, slots in plan.grids:
        slot_T = mask_RL = None
        if slots is not None:
            slot_T = tables[slots]
            mask = torch.zeros(num_rows * width, dtype=torch.bool, device=device)
            mask_RL = mask.index_fill_(0, slot_T, True).unflatten(0, (num_rows, width))
        grids.append(Grid(rows, tokens, num_rows, width, slot_T, mask_RL))
    spans = Spans(tables[plan.starts].to(torch.int32), plan.longest, plan.covers)
    return Layout(grids[0], tuple(grids[1:]), spans)


def group_similar(length_R: I64, step: int) -> list[int]:
    """Return where each bucket of sorted rows ends, if the lengths of a bucket differ by less than ``step``."""
    level_R = -(-length_R // step)
    return [*(np.flatnonzero(np.diff(level_R)) + 1).tolist(), len(length_R)]


def repeat_ends(bucket_ends: Sequence[Sequence[int]], num_rows: int) -> list[int]:
    """Return where buckets end if sets of ``num_rows`` rows, each with its own buckets, follow each other."""
    return [num_rows * index + end for index, ends in enumerate(bucket_ends) for end in ends]


def count_up(length_R: I64) -> I64:
    """Return 0 to n - 1 for each length n, one after the other."""
    return np.arange(int(length_R.sum())) - np.repeat(np.cumsum(length_R) - length_R, length_R)
