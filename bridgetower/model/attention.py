"""The two sublayers that cross-modal layers and some bridges are made of, each with its residual and post-norm.

Shapes: B pairs, Q queries, N positions attended to, D width, H heads.
"""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.nn import functional as F

from bridgetower.config.schema import FusionConfig


class Attention(nn.Module):
    """Multi-head attention: LN(x + Dropout(W_o attention(x, context)))."""

    def __init__(self, config: FusionConfig) -> None:
        """Build it for self-attention or cross-attention; the two differ only in their context."""
        super().__init__()
        self.num_heads, self.dropout = config.num_heads, config.dropout
        self.query = nn.Linear(config.width, config.width)
        self.key = nn.Linear(config.width, config.width)
        self.value = nn.Linear(config.width, config.width)
        self.output = nn.Linear(config.width, config.width)
        self.norm = nn.LayerNorm(config.width, eps=config.layer_norm_eps)

    def forward(self, states_BQD: Tensor, context_BND: Tensor, mask_BN: Tensor | None) -> Tensor:
        """Attend from the states to the context.

        Args:
            mask_BN: True where the context may be attended to; None where all of it may.

        Returns: shape (B, Q, D).
        """
        attended_BHQD = F.scaled_dot_product_attention(
            self._split(self.query(states_BQD)),
            self._split(self.key(context_BND)),
            self._split(self.value(context_BND)),
            attn_mask=None if mask_BN is None else mask_BN[:, None, None, :],
            dropout_p=self.dropout if self.training else 0.0,
        )
        attended_BQD = attended_BHQD.transpose(1, 2).flatten(2)
        update_BQD = F.dropout(self.output(attended_BQD), self.dropout, self.training)
        result: Tensor = self.norm(states_BQD + update_BQD)
        return result

    def shares(self, states_BQD: Tensor, context_BND: Tensor, mask_BN: Tensor | None) -> Tensor:
        """How much each query looks at each position, shape (B, H, Q, N), rows summing to 1; for figures."""
        query_BHQD, key_BHND = self._split(self.query(states_BQD)), self._split(self.key(context_BND))
        scores_BHQN = query_BHQD @ key_BHND.transpose(2, 3) / math.sqrt(query_BHQD.shape[-1])
        if mask_BN is not None:
            scores_BHQN = scores_BHQN.masked_fill(~mask_BN[:, None, None, :], float("-inf"))
        return scores_BHQN.float().softmax(dim=-1)

    def _split(self, states_BND: Tensor) -> Tensor:
        batch, positions, width = states_BND.shape
        return states_BND.view(batch, positions, self.num_heads, width // self.num_heads).transpose(1, 2)


class FeedForward(nn.Module):
    """LN(x + Dropout(W_2 GELU(W_1 x)))."""

    def __init__(self, config: FusionConfig) -> None:
        """Build it with four times the width inside."""
        super().__init__()
        self.dropout = config.dropout
        self.expand = nn.Linear(config.width, 4 * config.width)
        self.contract = nn.Linear(4 * config.width, config.width)
        self.norm = nn.LayerNorm(config.width, eps=config.layer_norm_eps)

    def forward(self, states_BND: Tensor) -> Tensor:
        """Shape (B, N, D) to (B, N, D)."""
        update_BND = self.contract(F.gelu(self.expand(states_BND)))
        result: Tensor = self.norm(states_BND + F.dropout(update_BND, self.dropout, self.training))
        return result
