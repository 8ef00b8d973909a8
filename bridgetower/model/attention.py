"""The two sublayers that cross-modal layers and some bridges are made of, each with its residual and post-norm.

States are dense, (R, N, D): all images have the same number of positions; or packed, (T, D) with a layout: captions.

Shapes: R rows, N positions, T tokens of all rows, L tokens of the longest row, D width, H heads, Q queries, K keys.
"""

from __future__ import annotations

import math

from torch import Tensor, nn

from bridgetower.config.model import FusionConfig
from bridgetower.kernels.layout import Layout, SharedRows
from bridgetower.kernels.ops import Ops
from bridgetower.kernels.torch_ops import joint_weights


class Attention(nn.Module):
    """Multi-head attention: LN(x + Dropout(W_o attention(x, context)))."""

    def __init__(self, config: FusionConfig, ops: Ops) -> None:
        """Build it for self-attention or cross-attention; the two differ only in their context."""
        super().__init__()
        self.num_heads, self.dropout, self.ops = config.num_heads, config.dropout, ops
        self.query = nn.Linear(config.width, config.width)
        self.key = nn.Linear(config.width, config.width)
        self.value = nn.Linear(config.width, config.width)
        self.output = nn.Linear(config.width, config.width)
        self.norm = nn.LayerNorm(config.width, eps=config.layer_norm_eps)

    def forward(
        self,
        states: Tensor,
        context: Tensor,
        layout: Layout | None = None,
        context_layout: Layout | None = None,
        *,
        state_rows: SharedRows | None = None,
        context_rows: SharedRows | None = None,
        sees_padding: bool = False,
    ) -> Tensor:
        """Attend from the states to the context.

        Args:
            layout: where packed states lie; None if they are dense.
            context_layout: where a packed context lies.
            state_rows: the dense row of states that each row of the result reads, so that what several rows share is
                projected once; None: its own.
            context_rows: the dense row of the context that each row reads.
            sees_padding: attend to padding, too.

        Returns: the states' shape, or as many rows as ``state_rows``.
        """
        is_dense = layout is None and context_layout is None
        if states is context and is_dense and state_rows is None and context_rows is None:
            joint = joint_weights((self.query, self.key, self.value))
            states, attended = self.ops.attend_within_rows(states, *joint, self.num_heads, self._dropout)
            return self._finish(attended, states)
        if states is context:
            states, query, key, value = self.ops.project(states, self.query, self.key, self.value)
        else:
            states, query = self.ops.project(states, self.query)
            _, key, value = self.ops.project(context, self.key, self.value)
        if state_rows is not None:
            query = self.ops.take_rows(query, state_rows)
        if context_rows is not None:
            key, value = self.ops.take_rows(key, context_rows), self.ops.take_rows(value, context_rows)
        attended = self.ops.attend(
            query,
            key,
            value,
            self.num_heads,
            self._dropout,
            query_layout=layout,
            key_layout=context_layout,
            sees_padding=sees_padding,
        )
        return self._finish(attended, states if state_rows is None else self.ops.take_rows(states, state_rows))

    def to_dense(
        self, states_TD: Tensor, context_NPD: Tensor, layout: Layout, context_rows: SharedRows | None, *, absorb: bool
    ) -> Tensor:
        """Attend from packed states to a dense context, shape (T, D).

        Args:
            context_rows: the row of the context that each row of states reads; None: its own.
            absorb: for the model's longest captions it is less work not to project the context.
        """
        layers = self.query, self.key, self.value
        states_TD, attended_TD = self.ops.attend_to_dense(
            states_TD,
            context_NPD,
            layers,
            self.num_heads,
            self._dropout,
            layout=layout,
            rows=context_rows,
            absorb=absorb,
        )
        return self._finish(attended_TD, states_TD)

    @property
    def _dropout(self) -> float:
        return self.dropout if self.training else 0.0

    def _finish(self, attended: Tensor, states: Tensor) -> Tensor:
        """Project what was attended to, and add it to the states."""
        return self.ops.project_add_norm(states, attended, self.output, self.norm, self._dropout)[1]

    def probabilities(
        self, states: Tensor, context: Tensor, layout: Layout | None, context_layout: Layout | None
    ) -> Tensor:
        """Return the attention probabilities of each query, float32, shape (R, H, Q, K), for figures."""
        query_RHQd = self._heads(self.query(states), layout)
        key_RHKd = self._heads(self.key(context), context_layout)
        scores_RHQK = query_RHQd @ key_RHKd.transpose(2, 3) / math.sqrt(query_RHQd.shape[-1])
        mask = None if context_layout is None else context_layout.whole.mask_RL
        if mask is not None:
            scores_RHQK = scores_RHQK.masked_fill(~mask[:, None, None, :], float("-inf"))
        return scores_RHQK.float().softmax(dim=-1)

    def _heads(self, states: Tensor, layout: Layout | None) -> Tensor:
        states_RND = states if layout is None else layout.whole.spread(states)
        heads_RHNd: Tensor = states_RND.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        return heads_RHNd


class FeedForward(nn.Module):
    """LN(x + Dropout(W_2 GELU(W_1 x)))."""

    def __init__(self, config: FusionConfig, ops: Ops) -> None:
        """Build it with four times the width inside."""
        super().__init__()
        self.dropout, self.ops = config.dropout, ops
        self.expand = nn.Linear(config.width, 4 * config.width)
        self.contract = nn.Linear(4 * config.width, config.width)
        self.norm = nn.LayerNorm(config.width, eps=config.layer_norm_eps)

    def forward(self, states: Tensor) -> Tensor:
        """Return the sublayer's output, of the states' shape."""
        dropout = self.dropout if self.training else 0.0
        states, inner = self.ops.activate(states, self.expand)
        return self.ops.project_add_norm(states, inner, self.contract, self.norm, dropout)[1]
