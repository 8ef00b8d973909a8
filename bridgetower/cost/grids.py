"""How rows of different lengths stand in memory: as tokens without padding, or as a grid that attention reads.

``bridgetower.step.packing.Packing.add_layout`` plans the same layouts for the model, with the tables for a device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Grid(NamedTuple):
    """Some rows as attention reads them: all as wide as the longest."""

    rows: int
    width: int
    tokens: int
    """Number of tokens that are computed; rows * width where nothing is packed."""
    has_mask: bool
    """True if some slots are padding, so that attention reads a mask."""
    is_copied: bool
    """True if tokens are scattered to the grid and gathered from it; False if they are the grid."""

    @property
    def size(self) -> int:
        """Slots of the grid, padding included."""
        return self.rows * self.width

    @property
    def copied(self) -> int:
        """Number of tokens that are kept beside the grid that they were scattered to."""
        return self.tokens if self.is_copied else 0


class RowLayout(NamedTuple):
    """All rows of a micro-batch as one grid, and the same rows as grids of similar lengths."""

    whole: Grid
    buckets: tuple[Grid, ...]


def dense(rows: int, width: int) -> Grid:
    """Return a grid without padding: images."""
    return Grid(rows, width, rows * width, has_mask=False, is_copied=False)


def pack_rows(lengths: Sequence[int], cuts: Sequence[int]) -> RowLayout:
    """Lay out rows without padding between them.

    Args:
        cuts: row at which each bucket ends, the last one the number of rows.
    """
    length_R = np.asarray(lengths, np.int64)
    grids = []
    for start, end in [(0, len(length_R)), *zip([0, *cuts[:-1]], cuts, strict=True)]:
        bucket_R = length_R[start:end]
        width = max(1, int(bucket_R.max(initial=0)))
        is_ragged = bool((bucket_R != width).any())
        grids.append(Grid(end - start, width, int(bucket_R.sum()), is_ragged, is_ragged))
    return RowLayout(grids[0], tuple(grids[1:]))


def pad_rows(rows: int, width: int) -> RowLayout:
    """Lay out rows that are all padded to one width, padding computed like tokens."""
    grid = Grid(rows, width, rows * width, has_mask=True, is_copied=False)
    return RowLayout(grid, (grid,))


def repeat_cuts(cuts: Sequence[Sequence[int]], num_pairs: int) -> list[int]:
    """Return where buckets end if groups of ``num_pairs`` rows follow each other.

    Args:
        cuts: rows at which the buckets of each group end, counted within the group.
    """
    return [num_pairs * group + cut for group, ends in enumerate(cuts) for cut in ends]
