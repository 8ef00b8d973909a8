"""The operations by torch's own operators, on any device.

Shapes: D width, E joint width of several projections, R rows, N positions, P positions of an image, T packed tokens,
H heads, d width of a head, Q queries of a head, K keys of a row, M queries of all heads of a row.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bridgetower.kernels.layout import Layout, SharedRows
from bridgetower.kernels.ops import Ops


class TorchOps(Ops):
    """Plain torch."""

    name = "torch"

    def norm(self, states: Tensor, layer: nn.Module) -> tuple[Tensor, Tensor]:
        """Return x and LN(x)."""
        return states, layer(states)

    def add_norm(self, states: Tensor, update: Tensor, layer: nn.LayerNorm) -> Tensor:
        """Return LN(x + u)."""
        normed: Tensor = layer(states + update)
        return normed

    def project_add_norm(
        self, states: Tensor, inner: Tensor, linear: nn.Linear, layer: nn.Module, dropout: float
    ) -> tuple[Tensor, Tensor]:
        """Return s = x + Dropout(W h + b), and LN(s)."""
        total = states + self.drop(linear(inner), dropout)
        return total, layer(total)

    def project(self, states: Tensor, *layers: nn.Linear) -> tuple[Tensor, ...]:
        """Return x and its projections."""
        if states.dim() == 2 or len(layers) == 1:  # for a few tokens one matmul is not worth the copy of the weights
            return states, *(layer(states) for layer in layers)
        weight_ED, bias_E = joint_weights(layers)
        return states, *F.linear(states, weight_ED, bias_E).chunk(len(layers), dim=-1)

    def activate(self, states: Tensor, linear: nn.Linear, *, quick: bool = False) -> tuple[Tensor, Tensor]:
        """Return x and its activation."""
        inner = linear(states)
        # silu keeps one tensor for the backward pass where x * sigmoid(1.702 x) keeps three.
        return states, F.silu(1.702 * inner) / 1.702 if quick else F.gelu(inner)

    def drop(self, states: Tensor, dropout: float) -> Tensor:
        """Return the states after torch's dropout."""
        return F.dropout(states, dropout)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        num_heads: int,
        dropout: float,
        *,
        query_layout: Layout | None = None,
        key_layout: Layout | None = None,
        sees_padding: bool = False,
    ) -> Tensor:
        """Attend on padded grids: torch's attention reads rows of one length."""
        mask_RK = None if key_layout is None or sees_padding else key_layout.whole.mask_RL
        attended_RHQd = self.attend_heads(
            _heads(query, query_layout, num_heads),
            _heads(key, key_layout, num_heads),
            _heads(value, key_layout, num_heads),
            mask_RK,
            dropout,
        )
        attended_RND = attended_RHQd.transpose(1, 2).flatten(2)
        return attended_RND if query_layout is None else query_layout.whole.collect(attended_RND)

    def attend_heads(
        self, query_RHQd: Tensor, key_RHKd: Tensor, value_RHKd: Tensor, mask_RK: Tensor | None, dropout: float
    ) -> Tensor:
        """Return scaled dot-product attention with dropout of the attention probabilities, shape (R, H, Q, d).

        Args:
            mask_RK: True for keys that are seen; None: all are.
        """
        mask_R11K = None if mask_RK is None else mask_RK[:, None, None, :]
        return F.scaled_dot_product_attention(query_RHQd, key_RHKd, value_RHKd, attn_mask=mask_R11K, dropout_p=dropout)

    def attend_within_rows(
        self, states_RPD: Tensor, weight_ED: Tensor, bias_E: Tensor, num_heads: int, dropout: float
    ) -> tuple[Tensor, Tensor]:
        """Project in one matmul, then attend."""
        query, key, value = F.linear(states_RPD, weight_ED, bias_E).chunk(3, dim=-1)
        return states_RPD, self.attend(query, key, value, num_heads, dropout)

    def attend_to_dense(
        self,
        states_TD: Tensor,
        context_NPD: Tensor,
        layers: tuple[nn.Linear, nn.Linear, nn.Linear],
        num_heads: int,
        dropout: float,
        *,
        layout: Layout,
        rows: SharedRows | None,
        absorb: bool,
    ) -> tuple[Tensor, Tensor]:
        """Attend to the context, projected or as it is."""
        query_layer, key_layer, value_layer = layers
        if not absorb:
            states_TD, query = self.project(states_TD, query_layer)
            _, key, value = self.project(context_NPD, key_layer, value_layer)
            if rows is not None:
                key, value = self.take_rows(key, rows), self.take_rows(value, rows)
            return states_TD, self.attend(query, key, value, num_heads, dropout, query_layout=layout)
        query_TD = query_layer(states_TD)
        context_RPD = context_NPD if rows is None else self.take_rows(context_NPD, rows)
        return states_TD, self._absorbed(query_TD, context_RPD, key_layer, value_layer, num_heads, dropout, layout)

    def _absorbed(
        self,
        query_TD: Tensor,
        context_RPD: Tensor,
        key_layer: nn.Linear,
        value_layer: nn.Linear,
        num_heads: int,
        dropout: float,
        layout: Layout,
    ) -> Tensor:
        """Return attention that never projects the context: q (W_k x) = (q W_k) x, sum p (W_v x) = W_v (sum p x).

        The key bias adds the same to all scores of a query, and cancels in the softmax. The value bias is weighted by
        the attention probabilities that survive dropout.
        """
        heads = (num_heads, -1)
        key_HdD = key_layer.weight.unflatten(0, heads)
        value_HdD, value_bias_Hd = value_layer.weight.unflatten(0, heads), value_layer.bias.unflatten(0, heads)
        # The key bias has no effect and a gradient of zero, but every trained parameter needs one.
        query_HTd = (query_TD + 0.0 * key_layer.bias).unflatten(-1, heads).transpose(0, 1)
        scale = query_HTd.shape[-1] ** -0.5
        query_TE = torch.bmm(query_HTd * scale, key_HdD).transpose(0, 1).flatten(1)
        sums, survivors = [], []
        for grid in layout.buckets:  # scores are padded to the longest row: buckets of similar lengths waste few
            context_RPD_of_grid = context_RPD[grid.rows]
            query_RMD = grid.spread(query_TE).unflatten(-1, heads).flatten(1, 2)
            probability_RMP = torch.bmm(query_RMD, context_RPD_of_grid.transpose(1, 2)).softmax(dim=-1)
            if dropout:
                probability_RMP = self.drop(probability_RMP, dropout)
                survivors.append(grid.collect(probability_RMP.sum(dim=-1).unflatten(1, (-1, num_heads))))
            sum_RMD = torch.bmm(probability_RMP, context_RPD_of_grid)
            sums.append(grid.collect(sum_RMD.unflatten(1, (-1, num_heads)).flatten(2)))
        sum_HTD = _joined(sums).unflatten(-1, heads).transpose(0, 1)
        attended_HTd = torch.bmm(sum_HTD, value_HdD.transpose(1, 2))
        bias_HTd = value_bias_Hd[:, None]
        if survivors:
            bias_HTd = bias_HTd * _joined(survivors).t()[..., None]
        attended_TD: Tensor = (attended_HTd + bias_HTd).transpose(0, 1).flatten(1)
        return attended_TD

    def share_rows(self, index_R: Tensor, states_NPD: Tensor) -> SharedRows:
        """Return the index alone: torch sums the gradients of what is read."""
        return SharedRows(index_R, None, None)

    def take_rows(self, states_NPD: Tensor, rows: SharedRows) -> Tensor:
        """Return the row that each of R rows reads."""
        return states_NPD.index_select(0, rows.index_R)

    def supports_buckets(self, states: Tensor, num_heads: int, longest_query: int, longest_key: int) -> bool:
        """Return False: on a grid every slot is computed."""
        return False


def joint_weights(layers: tuple[nn.Linear, ...]) -> tuple[Tensor, Tensor]:
    """Return weight and bias of one matmul that computes all layers."""
    return torch.cat([layer.weight for layer in layers]), torch.cat([layer.bias for layer in layers])


def _heads(states: Tensor, layout: Layout | None, num_heads: int) -> Tensor:
    """Return dense or packed states head by head, shape (R, H, N, d)."""
    states_RND = states if layout is None else layout.whole.spread(states)
    heads_RHNd: Tensor = states_RND.unflatten(-1, (num_heads, -1)).transpose(1, 2)
    return heads_RHNd


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
