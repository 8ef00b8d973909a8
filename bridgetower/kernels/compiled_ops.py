"""The operations by torch.compile: what stands between attention kernels becomes one kernel per operation.

States of one rank share their compiled code: dense ones have the same shape in every step, and packed ones, whose
number of tokens changes, are compiled once for any number. So a step with other captions compiles nothing anew.

Shapes: D width; "..." is (T,) of packed or (R, N) of dense states.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bridgetower.kernels.layout import Layout, SharedRows
from bridgetower.kernels.torch_ops import TorchOps


class CompiledOps(TorchOps):
    """Torch's operators, compiled, around the attention of another implementation."""

    def __init__(self, attention: TorchOps, backend: str = "inductor") -> None:
        """Compile nothing yet: each operation is compiled at its first call.

        Args:
            attention: computes attention and shared rows.
            backend: of torch.compile; aot_eager traces and splits as inductor does, but generates no kernels.
        """
        self._attention, self._backend = attention, backend
        self.name = f"torch.compile, {attention.name}"
        self._compiled: dict[Any, Callable[..., Any]] = {}
        # Every operation is compiled for training and evaluation, for dense and packed states, and for a few widths.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 32)
        # Inductor's own generator draws each number anew; torch's dropout took 6 ms less of 106 (base, 64 pairs, H100).
        torch._inductor.config.fallback_random = True

    def norm(self, states: Tensor, layer: nn.Module) -> tuple[Tensor, Tensor]:
        """Return x and LN(x)."""
        if not isinstance(layer, nn.LayerNorm):
            return super().norm(states, layer)
        normed: Tensor = self._call(_norm, states, layer.weight, layer.bias, eps=layer.eps)
        return states, normed

    def add_norm(self, states: Tensor, update: Tensor, layer: nn.LayerNorm) -> Tensor:
        """Return LN(x + u)."""
        normed: Tensor = self._call(_add_norm, states, update, layer.weight, layer.bias, eps=layer.eps)
        return normed

    def project_add_norm(
        self, states: Tensor, inner: Tensor, linear: nn.Linear, layer: nn.Module, dropout: float
    ) -> tuple[Tensor, Tensor]:
        """Return s = x + Dropout(W h + b), and LN(s)."""
        if not isinstance(layer, nn.LayerNorm):
            return super().project_add_norm(states, inner, linear, layer, dropout)
        weights = linear.weight, linear.bias, layer.weight, layer.bias
        total, normed = self._call(_project_add_norm, states, inner, *weights, eps=layer.eps, dropout=dropout)
        return total, normed

    def activate(self, states: Tensor, linear: nn.Linear, *, quick: bool = False) -> tuple[Tensor, Tensor]:
        """Return x and its activation."""
        activated: Tensor = self._call(_activate, states, linear.weight, linear.bias, quick=quick)
        return states, activated

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
        """Attend as the other implementation does."""
        return self._attention.attend(
            query,
            key,
            value,
            num_heads,
            dropout,
            query_layout=query_layout,
            key_layout=key_layout,
            sees_padding=sees_padding,
        )

    def attend_to_dense(self, *arguments: Any, **settings: Any) -> tuple[Tensor, Tensor]:
        """Attend as the other implementation does."""
        return self._attention.attend_to_dense(*arguments, **settings)

    def drop(self, states: Tensor, dropout: float) -> Tensor:
        """Return the states after the other implementation's dropout."""
        return self._attention.drop(states, dropout)

    def share_rows(self, index_R: Tensor, states_NPD: Tensor) -> SharedRows:
        """Return the other implementation's plan."""
        return self._attention.share_rows(index_R, states_NPD)

    def take_rows(self, states_NPD: Tensor, rows: SharedRows) -> Tensor:
        """Return the row that each of R rows reads."""
        return self._attention.take_rows(states_NPD, rows)

    def _call(self, operation: Callable[..., Any], states: Tensor, *tensors: Tensor, **constants: Any) -> Any:
        """Call an operation compiled for these constants, and for dense or packed states."""
        is_packed = states.dim() == 2
        key = operation, is_packed, tuple(constants.values())
        if key not in self._compiled:
            bound = partial(operation, **constants)
            self._compiled[key] = torch.compile(bound, dynamic=is_packed, backend=self._backend)
        return self._compiled[key](states, *tensors)


def _norm(states: Tensor, gain_D: Tensor, shift_D: Tensor, *, eps: float) -> Tensor:
    return F.layer_norm(states, gain_D.shape, gain_D, shift_D, eps)


def _add_norm(states: Tensor, update: Tensor, gain_D: Tensor, shift_D: Tensor, *, eps: float) -> Tensor:
    return F.layer_norm(states + update, gain_D.shape, gain_D, shift_D, eps)


def _project_add_norm(
    states: Tensor,
    inner: Tensor,
    weight: Tensor,
    bias_D: Tensor,
    gain_D: Tensor,
    shift_D: Tensor,
    *,
    eps: float,
    dropout: float,
) -> tuple[Tensor, Tensor]:
    total = states + F.dropout(F.linear(inner, weight, bias_D), dropout)
    return total, F.layer_norm(total, gain_D.shape, gain_D, shift_D, eps)


def _activate(states: Tensor, weight: Tensor, bias: Tensor, *, quick: bool) -> Tensor:
    inner = F.linear(states, weight, bias)
    return F.silu(1.702 * inner) / 1.702 if quick else F.gelu(inner)
