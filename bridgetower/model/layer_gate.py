"""METER's multi-layer fusion: a gated sum of all layers of a tower replaces its last layer.

Shapes: K layers, B pairs, N positions, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class LayerGate(nn.Module):
    """f_K + sum over k < K of g_k * f_k. The gates g are softmax(W f_k) over k < K, per token and channel."""

    def __init__(self, width: int) -> None:
        """Build the linear layer that computes the gates."""
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, states: Sequence[Tensor]) -> Tensor:
        """Return the fused layers of a tower, shape (B, N, D).

        Args:
            states: states of all layers, lowest first, each of shape (B, N, D).

        Source: METER, arXiv 2111.02387, as the BridgeTower authors re-implemented it.
        """
        if len(states) == 1:
            return states[0]
        lower_KBND = torch.stack(list(states[:-1]))
        gates_KBND = self.linear(lower_KBND).softmax(dim=0)
        fused: Tensor = states[-1] + (gates_KBND * lower_KBND).sum(dim=0)
        return fused
