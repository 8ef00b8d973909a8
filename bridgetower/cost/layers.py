"""Formulas of the layers that every part of the model is made of: linear layers, norms, attention, feed-forward."""

from __future__ import annotations

from dataclasses import dataclass

from bridgetower.cost.grids import Grid
from bridgetower.cost.work import OperatorMemory, Work


@dataclass(frozen=True)
class LayerCosts:
    """Cost formulas, for states of one type and one dropout probability.

    Each formula counts what it reads, unless the layer before keeps it anyway.
    """

    element: int
    """Bytes of an element of the states."""
    memory: OperatorMemory
    dropout: float
    mask_bytes: int = 1
    """Bytes per element of a dropout mask; 0 where none is kept."""

    def states(self, rows: int, width: int) -> Work:
        """Cost of states that the backward pass reads."""
        return Work(kept=rows * width * self.element)

    def linear(self, rows: int, inputs: int, outputs: int) -> Work:
        """Cost of a linear layer without its input, which is counted where it is made."""
        forward = 2 * rows * inputs * outputs
        return Work(0, forward, 2 * forward)

    def statistics(self, rows: int) -> Work:
        """Cost of a norm whose input is kept anyway: two statistics per row."""
        return Work(kept=rows * 2 * (self.memory.statistic_bytes or self.element))

    def norm(self, rows: int, width: int) -> Work:
        """Cost of a norm: its input, and two statistics per row."""
        return self.states(rows, width) + self.statistics(rows)

    def mask(self, rows: int, width: int) -> Work:
        """Cost of a dropout mask."""
        return Work(kept=rows * width * self.mask_bytes if self.dropout else 0)

    def attention(
        self,
        queries: Grid,
        rows: int,
        num_keys: int,
        width: int,
        num_heads: int,
        *,
        held: int,
        copied: int = 0,
        has_mask: bool = False,
    ) -> Work:
        """Cost of the attention kernel: what it reads, and what it returns.

        Args:
            queries: the grid of queries.
            rows: rows of queries and keys.
            num_keys: keys per row.
            held: elements of the memory that queries, keys and values lie in.
            copied: elements that were scattered to that memory, and are kept beside it.
            has_mask: some keys are padding.
        """
        num_probabilities = rows * num_heads * queries.width * num_keys
        forward = 4 * rows * queries.width * num_keys * width  # two matmuls
        result = rows * queries.width * width * self.element
        gathered = queries.copied * width * self.element
        sources = copied * self.element
        if self.dropout and not self.memory.drops_inside:  # bridgetower/kernels/cpu_ops.py
            kept = held * self.element + num_probabilities * (self.element + 1) + sources + (gathered or result)
            return Work(kept, forward, 2 * forward)
        # The kernel keeps a float32 log-sum of each query and head.
        kept = held * self.element + result + sources + gathered + 4 * rows * num_heads * queries.width
        return Work(kept + (rows * num_keys * self.element if has_mask else 0), forward, 2 * forward)

    def finish(self, rows: int, width: int) -> Work:
        """Cost of what ends an attention sublayer: output projection, dropout, and the norm of the residual sum."""
        return self.linear(rows, width, width) + self.mask(rows, width) + self.norm(rows, width)

    def feed_forward(self, rows: int, width: int, mlp_width: int) -> Work:
        """Cost of a feed-forward sublayer: its input, GELU's input and output, dropout, and the norm of the sum."""
        kept = self.states(rows, width + 2 * mlp_width) + self.mask(rows, width) + self.norm(rows, width)
        return kept + self.linear(rows, width, mlp_width) + self.linear(rows, mlp_width, width)
