"""How the rows that attention works on lie in memory: padded, packed one after the other, or shared.

A row is one sequence: the tokens of a caption, or the positions of an image. Dense states have the shape (R, N, D).
Packed states have the shape (T, D): the tokens of all rows, one row after the other, nothing between them.

Shapes: R rows, N positions, L tokens of the longest row, T tokens of all rows, D width, Z row boundaries.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

_SMALLEST_TILE, _LARGEST_TILE = 16, 64


class Spans(NamedTuple):
    """Where each row begins and ends among packed tokens."""

    start_Z: Tensor
    """int32, R + 1 offsets: the first token of each row, and the end of the last row."""
    longest: int
    """Upper bound of a row's tokens."""
    covers: bool = True
    """True if every token belongs to a row. Other tokens stand at the end, attend to nothing, and get zeros."""


class Grid(NamedTuple):
    """Consecutive packed rows as a padded grid of shape (R, L, D)."""

    rows: slice
    tokens: slice
    """Tokens of these rows among the T tokens of all rows."""
    num_rows: int
    width: int
    """Slots of each row: the length of the longest one."""
    slot_T: Tensor | None
    """int64; slot of each token in the flattened grid. None: the rows are equally long, and the tokens are the grid."""
    mask_RL: Tensor | None
    """bool; True where a slot holds a token. None: every slot does."""

    def spread(self, states_TD: Tensor) -> Tensor:
        """Return the rows' tokens as a grid of shape (R, L, D), zero where a slot holds no token."""
        row_states = states_TD[self.tokens]
        if self.slot_T is not None:
            empty = row_states.new_zeros(self.num_rows * self.width, row_states.shape[-1])
            row_states = empty.index_copy(0, self.slot_T, row_states)
        grid_RLD: Tensor = row_states.unflatten(0, (self.num_rows, self.width))
        return grid_RLD

    def collect(self, grid_RLD: Tensor) -> Tensor:
        """Return the tokens of a grid, packed again, shape (T, D)."""
        flat = grid_RLD.flatten(0, 1)
        return flat if self.slot_T is None else flat.index_select(0, self.slot_T)


class Layout(NamedTuple):
    """Where the tokens of packed rows lie, in the two forms that attention kernels read."""

    whole: Grid
    """All rows as one grid, for torch's attention."""
    buckets: tuple[Grid, ...]
    """The same rows in grids of similar lengths, for operations whose cost grows with each padded slot."""
    spans: Spans | None
    """Offsets of the rows, for kernels that read rows of any length. None: the rows are padded."""


class SharedRows(NamedTuple):
    """Which of N dense rows each of R rows reads; several may read the same one, and its gradients are summed."""

    index_R: Tensor
    """int64; the row that is read."""
    order_R: Tensor | None
    """R rows, sorted by what they read, for kernels that sum gradients in one order. None: torch sums them."""
    start_Z: Tensor | None
    """N + 1 offsets into ``order_R``: the readers of each of the N rows."""


@cache  # a CUDA graph reads the tensor where it was when the step was captured
def even_spans(num_rows: int, length: int, device: torch.device) -> Spans:
    """Return the spans of rows of one length."""
    with torch.inference_mode(False):  # the cached tensor is used in training, too
        return Spans(torch.arange(num_rows + 1, dtype=torch.int32, device=device) * length, length)


def padded(mask_RL: Tensor) -> Layout:
    """Return the layout of rows that are padded to the longest; what is computed for padding is thrown away later.

    Args:
        mask_RL: True for real tokens.
    """
    rows, width = mask_RL.shape
    grid = Grid(slice(0, rows), slice(0, rows * width), rows, width, None, mask_RL)
    return Layout(grid, (grid,), None)


def tile_size(longest: int) -> int:
    """Return the tile in which the kernels for short rows read rows of so many tokens: a power of two from 16 to 64.

    Matrix units take no less than 16, and a program's memory holds no more than 64.
    """
    return min(_LARGEST_TILE, max(_SMALLEST_TILE, 1 << max(0, longest - 1).bit_length()))
