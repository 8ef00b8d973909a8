"""The two sublayers that cross-modal layers and some bridges are made of, each with its residual and post-norm.

States are dense, (R, N, D): an image has as many positions as another; or packed, (T, D) with a layout: texts. Shapes:
R rows, N positions, T tokens of all rows, L of the longest, P image positions, D width, H heads, d width of a head.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from bridgetower.config.model import FusionConfig
from bridgetower.kernels import ops as fused
from bridgetower.kernels.cpu import attend
from bridgetower.kernels.dropout import drop
from bridgetower.kernels.ops import Shared, expand, project, project_add_norm
from bridgetower.kernels.spans import Spans, attend_spans, attend_within_rows, even_spans, fits, takes_rows
from bridgetower.model.packed import Layout


class Attention(nn.Module):
    """Multi-head attention: LN(x + Dropout(W_o attention(x, context)))."""

    uses_kernels = True

    def __init__(self, config: FusionConfig) -> None:
        """Build it for self-attention or cross-attention; the two differ only in their context."""
        super().__init__()
        self.num_heads, self.dropout = config.num_heads, config.dropout
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
        state_rows: Shared | None = None,
        context_rows: Shared | None = None,
        absorb: bool = False,
        sees_padding: bool = False,
    ) -> Tensor:
        """Attend from the states to the context.

        Args:
            layout: of packed states; None if they are dense.
            context_layout: that of the context.
            state_rows: the row of dense states that each row of the result reads, so that what is the same for some
                of them is projected once; None: each its own.
            context_rows: those of a dense context.
            absorb: move the projections of a dense context to the packed queries, where there is no kernel for these.
            sees_padding: attend to padding too.

        Returns: the states' shape, or as many rows as ``state_rows``.
        """
        spans = None
        layouts = [part for part in (layout, context_layout) if part is not None]
        if layouts and all(part.spans for part in layouts) and fits(states, self.num_heads):
            spans = _spans(states, layout, state_rows), _spans(context, context_layout, context_rows)
        if absorb and layout is not None and not spans:
            query = self.query(states)
            attended = self._absorbed(query, _pick(context, context_rows), layout)
            return self.finish(attended, _pick(states, state_rows))
        dropout = self.dropout if self.training else 0.0
        is_within_rows = states is context and not layouts and state_rows is None and context_rows is None
        if is_within_rows and takes_rows(states, self.num_heads, dropout, kernels=self.uses_kernels):
            joined = _joint_weights(self.query, self.key, self.value)
            states, attended = attend_within_rows(states, *joined, self.num_heads, dropout, kernels=True)
            return self.finish(attended, states)
        if states is context:
            states, query, key, value = self.project(states, self.query, self.key, self.value)
        else:
            states, query = self.project(states, self.query)
            _, key, value = self.project(context, self.key, self.value)
        if spans:
            query, key, value = _pick(query, state_rows), _pick(key, context_rows), _pick(value, context_rows)
            query_THd, key_SHd, value_SHd = (self._tokens(part) for part in (query, key, value))
            kernels = self.uses_kernels
            attended_THd = attend_spans(query_THd, key_SHd, value_SHd, *spans, dropout, kernels=kernels)
            attended = attended_THd.view(query.shape)
        else:
            mask = None if context_layout is None or sees_padding else context_layout.whole.mask_RL
            attended_RHND = attend(
                self._heads(query, layout, state_rows),
                self._heads(key, context_layout, context_rows),
                self._heads(value, context_layout, context_rows),
                mask,
                dropout,
            )
            attended = attended_RHND.transpose(1, 2).flatten(2)
            if layout is not None:
                attended = layout.whole.collect(attended)
        return self.finish(attended, _pick(states, state_rows))

    def project(self, states: Tensor, *layers: nn.Linear) -> tuple[Tensor, ...]:
        """The states, and some projections of them; where it is worth the copy of the weights, in one product."""
        if len(layers) == 1:
            return project(states, layers[0].weight, layers[0].bias, kernels=self.uses_kernels)
        if states.dim() == 2 and not (self.uses_kernels and fused.fits(states)):  # a few tokens
            return states, *(layer(states) for layer in layers)
        return project(states, *_joint_weights(*layers), len(layers), kernels=self.uses_kernels)

    def finish(self, attended: Tensor, states: Tensor) -> Tensor:
        """Project what was attended to, and add it to the states."""
        dropout = self.dropout if self.training else 0.0
        return project_add_norm(states, attended, self.output, self.norm, dropout, kernels=self.uses_kernels)[1]

    def shares(
        self, states_TD: Tensor, context: Tensor, layout: Layout | None, context_layout: Layout | None
    ) -> Tensor:
        """How much each query looks at each position, shape (R, H, Q, N), rows summing to 1; for figures."""
        query_RHQD = self._heads(self.query(states_TD), layout)
        key_RHND = self._heads(self.key(context), context_layout)
        scores_RHQN = query_RHQD @ key_RHND.transpose(2, 3) / math.sqrt(query_RHQD.shape[-1])
        mask = None if context_layout is None else context_layout.whole.mask_RL
        if mask is not None:
            scores_RHQN = scores_RHQN.masked_fill(~mask[:, None, None, :], float("-inf"))
        return scores_RHQN.float().softmax(dim=-1)

    def _heads(self, states: Tensor, layout: Layout | None, rows: Shared | None = None) -> Tensor:
        states_RND = _pick(states, rows) if layout is None else layout.whole.spread(states)
        heads_RHNd: Tensor = states_RND.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        return heads_RHNd

    def _tokens(self, states: Tensor) -> Tensor:
        """Of all rows one after the other, shape (T, H, d)."""
        tokens_TD = states if states.dim() == 2 else states.flatten(0, 1)
        tokens_THd: Tensor = tokens_TD.unflatten(-1, (self.num_heads, -1))
        return tokens_THd

    def _absorbed(self, query_TD: Tensor, context_RPD: Tensor, layout: Layout) -> Tensor:
        """Attention that never projects the context: q (W_k x) = (q W_k) x, and sum p (W_v x) = W_v (sum p x).

        The bias of the keys adds the same to all scores of a query, which a softmax does not see; that of the values
        counts as much as the shares that dropout leaves.
        """
        heads = (self.num_heads, -1)
        key_HdD = self.key.weight.unflatten(0, heads)
        value_HdD, value_bias_Hd = self.value.weight.unflatten(0, heads), self.value.bias.unflatten(0, heads)
        # The bias of the keys has no effect, and so its gradient is zero; but it is there, as for all that is trained.
        query_HTd = (query_TD + 0.0 * self.key.bias).unflatten(-1, heads).transpose(0, 1)
        scale = 1.0 / math.sqrt(query_HTd.shape[-1])
        query_TE = torch.bmm(query_HTd * scale, key_HdD).transpose(0, 1).flatten(1)
        sums, lefts = [], []
        for grid in layout.buckets:
            context_rPD = context_RPD[grid.rows]
            query_rMD = grid.spread(query_TE).unflatten(-1, heads).flatten(1, 2)  # M = L x H
            share_rMP = torch.bmm(query_rMD, context_rPD.transpose(1, 2)).softmax(dim=-1)
            if self.training and self.dropout:
                share_rMP = drop(share_rMP, self.dropout, self.training)
                lefts.append(grid.collect(share_rMP.sum(dim=-1).unflatten(1, (-1, self.num_heads))))
            sum_rMD = torch.bmm(share_rMP, context_rPD)
            sums.append(grid.collect(sum_rMD.unflatten(1, (-1, self.num_heads)).flatten(2)))
        sum_HTD = _joined(sums).unflatten(-1, heads).transpose(0, 1)
        attended_HTd = torch.bmm(sum_HTD, value_HdD.transpose(1, 2))
        bias_HTd = value_bias_Hd[:, None] * _joined(lefts).t()[..., None] if lefts else value_bias_Hd[:, None]
        attended_TD: Tensor = (attended_HTd + bias_HTd).transpose(0, 1).flatten(1)
        return attended_TD


class FeedForward(nn.Module):
    """LN(x + Dropout(W_2 GELU(W_1 x)))."""

    uses_kernels = True

    def __init__(self, config: FusionConfig) -> None:
        """Build it with four times the width inside."""
        super().__init__()
        self.dropout = config.dropout
        self.expand = nn.Linear(config.width, 4 * config.width)
        self.contract = nn.Linear(4 * config.width, config.width)
        self.norm = nn.LayerNorm(config.width, eps=config.layer_norm_eps)

    def forward(self, states: Tensor) -> Tensor:
        """Shape (..., D) to the same."""
        dropout = self.dropout if self.training else 0.0
        states, inner = expand(states, self.expand, kernels=self.uses_kernels)
        return project_add_norm(states, inner, self.contract, self.norm, dropout, kernels=self.uses_kernels)[1]


def _joint_weights(*layers: nn.Linear) -> tuple[Tensor, Tensor]:
    return torch.cat([layer.weight for layer in layers]), torch.cat([layer.bias for layer in layers])


def _pick(states: Tensor, rows: Shared | None) -> Tensor:
    return states if rows is None else rows.take(states)


def _spans(states: Tensor, layout: Layout | None, rows: Shared | None) -> Spans:
    if layout is not None:
        assert layout.spans is not None
        return layout.spans
    return even_spans(len(states) if rows is None else len(rows.index_R), states.shape[1], states.device)


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
