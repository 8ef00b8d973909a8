"""Bridges: how the state of a tower layer joins the state of the cross-modal layer before.

Shapes: B pairs, N positions (text tokens or image patches), D width.
"""

from __future__ import annotations

from torch import Tensor, nn

# Of all bridges and of the norms before the first cross-modal layer (not fusion.layer_norm_eps).
BRIDGE_EPS = 1e-5


class AddNormBridge(nn.Module):
    """LN(tower + cross): form (a) of Table 1, the published one."""

    def __init__(self, width: int) -> None:
        """Build one bridge for one modality and one layer."""
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=BRIDGE_EPS)

    def forward(self, tower_BND: Tensor, cross_BND: Tensor) -> Tensor:
        """Join the two states. Source: arXiv 2206.08657, equation 8 and Table 1."""
        joined: Tensor = self.norm(tower_BND + cross_BND)
        return joined
