"""Ranks and gathers, the same in one process as in many."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as torch_dist
from torch import Tensor


def rank() -> int:
    """Number of this process among all."""
    return torch_dist.get_rank() if torch_dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes."""
    return torch_dist.get_world_size() if torch_dist.is_initialized() else 1


def barrier() -> None:
    """Wait until every rank has come here."""
    if world_size() > 1:
        torch_dist.barrier()


def sum_over_ranks(values: Tensor) -> Tensor:
    """The sum of a tensor over all ranks, on every rank."""
    total = values.clone()
    if world_size() > 1:
        torch_dist.all_reduce(total)
    return total


def any_rank(claim: bool, device: torch.device) -> bool:
    """True on every rank if the claim is true on one of them."""
    return bool(sum_over_ranks(torch.tensor([float(claim)], device=device)).item() > 0)


def gather_objects(value: Any) -> list[Any]:
    """The value of every rank, by rank, on every rank. For small things: it is pickled."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    torch_dist.all_gather_object(values, value)
    return values


def from_first_rank(value: Any) -> Any:
    """Rank 0's value, on every rank."""
    if world_size() == 1:
        return value
    values = [value]
    torch_dist.broadcast_object_list(values, src=0)
    return values[0]


def on_first_rank(action: Callable[[], None], faults: tuple[type[Exception], ...] = (OSError,)) -> str:
    """Do something to files on rank 0 while the others wait.

    Args:
        faults: what may go wrong; anything else is raised as it is.

    Returns: on every rank, what went wrong there; empty if nothing did. Raised by rank 0 alone, it would leave the
        others waiting.
    """
    fault = ""
    if rank() == 0:
        try:
            action()
        except faults as failure:
            fault = str(failure)
    told: str = from_first_rank(fault)
    return told


def from_rank(owner: int, value: Tensor | None, device: torch.device) -> Tensor:
    """A rank's tensor, on every rank; the others give None."""
    if world_size() == 1:
        assert value is not None
        return value
    kind: list[Any] = [None if value is None else (value.shape, value.dtype)]
    torch_dist.broadcast_object_list(kind, src=owner)
    shape, dtype = kind[0]
    sent = torch.empty(shape, dtype=dtype, device=device) if value is None else value.contiguous()
    torch_dist.broadcast(sent, src=owner)
    return sent


def gather_rows(rows_BD: Tensor) -> Tensor:
    """Join the rows of all ranks in rank order; gradients flow back to the rank that gave a row.

    Every rank must give the same number of rows.

    Returns: shape (B * world size, D).
    """
    if world_size() == 1:
        return rows_BD
    gathered: Tensor = _GatherRows.apply(rows_BD)
    return gathered


class _GatherRows(torch.autograd.Function):
    """A row's gradient is the sum over the ranks that used it. DeepSpeed's mean over ranks then makes it exact."""

    @staticmethod
    def forward(ctx: Any, rows_BD: Tensor) -> Tensor:
        ctx.num_rows = rows_BD.shape[0]
        parts = [torch.empty_like(rows_BD) for _ in range(world_size())]
        torch_dist.all_gather(parts, rows_BD.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        total = grads[0].contiguous().clone()
        torch_dist.all_reduce(total)
        return total[rank() * ctx.num_rows : (rank() + 1) * ctx.num_rows]
