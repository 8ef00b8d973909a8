"""The operations that the model is made of: one object computes them all, and knows how its device does that best.

The model holds an ``Ops`` and never asks which one. ``bridgetower.kernels.choose.choose_ops`` picks it once, when the
model is built. What an implementation cannot take (another dtype, another device) it hands to the class above it:

    Ops            the interface
    TorchOps       torch's operators, on any device
    CpuOps         dropout and attention that are faster on a CPU; matrix units (AMX) for bfloat16
    FlashOps       FlashAttention for packed rows, on NVIDIA GPUs
    TritonOps      FlashOps, and our own kernels for norms, activations, dropout and short rows
    CompiledOps    torch.compile around the operations of another one, but its attention

Several operations return their input beside their result. The caller goes on with that input, so that a kernel can sum
the gradients of both on the way. ``dropout`` is 0 when the model does not train.

Shapes: D width, E width inside a feed-forward, N positions, R rows, T packed tokens, H heads; "..." is (T,) or (R, N).
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from bridgetower.kernels.layout import Layout, SharedRows


class Ops(ABC):
    """The interface of every implementation."""

    name: str
    """What ``run.json`` and a run's first lines call it."""

    @abstractmethod
    def norm(self, states: Tensor, layer: nn.Module) -> tuple[Tensor, Tensor]:
        """Return x and LN(x), shape (..., D); ``layer`` may be an identity, which some towers have in its stead."""

    @abstractmethod
    def add_norm(self, states: Tensor, update: Tensor, layer: nn.LayerNorm) -> Tensor:
        """Return LN(x + u), shape (..., D)."""

    @abstractmethod
    def project_add_norm(
        self, states: Tensor, inner: Tensor, linear: nn.Linear, layer: nn.Module, dropout: float
    ) -> tuple[Tensor, Tensor]:
        """Return s = x + Dropout(W h + b), and LN(s).

        Args:
            states: x, shape (..., D).
            inner: h.
        """

    @abstractmethod
    def project(self, states: Tensor, *layers: nn.Linear) -> tuple[Tensor, ...]:
        """Return x and W x + b of each layer; all layers have the same width."""

    @abstractmethod
    def activate(self, states: Tensor, linear: nn.Linear, *, quick: bool = False) -> tuple[Tensor, Tensor]:
        """Return x, shape (..., D), and GELU(W x + b), shape (..., E).

        Args:
            quick: CLIP's x * sigmoid(1.702 x) instead of GELU.
        """

    @abstractmethod
    def drop(self, states: Tensor, dropout: float) -> Tensor:
        """Return the states after dropout."""

    @abstractmethod
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
        """Return what each row's queries attend to among the row's own keys, in the shape of ``query``.

        Args:
            query: dense, (R, N, D), or packed, (T, D).
            query_layout: where packed queries lie; None if they are dense.
            key_layout: where packed keys and values lie; every row has a key.
            sees_padding: attend to padded keys, too.
        """

    @abstractmethod
    def attend_within_rows(
        self, states_RPD: Tensor, weight_ED: Tensor, bias_E: Tensor, num_heads: int, dropout: float
    ) -> tuple[Tensor, Tensor]:
        """Return x, and what the positions of each dense row attend to among each other, both (R, P, D).

        Args:
            weight_ED: the joint projection to queries, keys and values.
        """

    @abstractmethod
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
        """Return x and what short packed rows attend to in long dense ones, both (T, D).

        Args:
            layers: the projections to queries, keys and values.
            layout: where the queries lie.
            rows: the dense row that each row reads; None: its own.
            absorb: for rows as short as the model's, moving the projections of keys and values to the queries is less
                work. A kernel that reads projected keys may still project them.
        """

    @abstractmethod
    def share_rows(self, index_R: Tensor, states_NPD: Tensor) -> SharedRows:
        """Return the plan of reading dense rows like ``states_NPD`` more than once."""

    @abstractmethod
    def take_rows(self, states_NPD: Tensor, rows: SharedRows) -> Tensor:
        """Return the row that each of R rows reads, shape (R, P, D)."""

    @abstractmethod
    def supports_buckets(self, states: Tensor, num_heads: int, longest_query: int, longest_key: int) -> bool:
        """Return True if attention of such states leaves tokens alone that belong to no row.

        Then batches may be filled up to the size of a shape bucket, and share one CUDA graph.
        """
