"""Ranks and collective operations, which also work in a single process without torch.distributed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as torch_dist
from torch import Tensor


def rank() -> int:
    """Return the rank of this process, from 0."""
    return torch_dist.get_rank() if torch_dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of processes."""
    return torch_dist.get_world_size() if torch_dist.is_initialized() else 1


def sum_over_ranks(values: Tensor) -> Tensor:
    """Return the sum of a tensor over all ranks, as a new tensor on every rank."""
    total = values.clone()
    if world_size() > 1:
        torch_dist.all_reduce(total)
    return total


def any_rank(claim: bool, device: torch.device) -> bool:
    """Return True on every rank if the claim is true on at least one of them."""
    return bool(sum_over_ranks(torch.tensor([float(claim)], device=device)).item() > 0)


def gather_objects(value: Any) -> list[Any]:
    """Return the values of all ranks in rank order, on every rank. They are pickled, so keep them small."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    torch_dist.all_gather_object(values, value)
    return values


def from_first_rank(value: Any) -> Any:
    """Return the value of rank 0, on every rank."""
    if world_size() == 1:
        return value
    values = [value]
    torch_dist.broadcast_object_list(values, src=0)
    return values[0]


def on_first_rank(action: Callable[[], None], faults: tuple[type[Exception], ...] = (OSError,)) -> str:
    """Run an action on files on rank 0 while the other ranks wait.

    An error that rank 0 alone raised would leave the others waiting, so its message is returned instead.

    Args:
        faults: errors to return; all others are raised.

    Returns: the message of rank 0's error, on every rank; empty if there was none.
    """
    fault = ""
    if rank() == 0:
        try:
            action()
        except faults as failure:
            fault = str(failure)
    message: str = from_first_rank(fault)
    return message


def from_rank(owner: int, value: Tensor | None, device: torch.device) -> Tensor:
    """Return the tensor of rank ``owner``, on every rank; the other ranks pass None."""
    if world_size() == 1:
        assert value is not None
        return value
    header: list[Any] = [None if value is None else (value.shape, value.dtype)]
    torch_dist.broadcast_object_list(header, src=owner)
    shape, dtype = header[0]
    received = torch.empty(shape, dtype=dtype, device=device) if value is None else value.contiguous()
    torch_dist.broadcast(received, src=owner)
    return received


def gather_rows(rows_BD: Tensor) -> Tensor:
    """Concatenate the rows of all ranks in rank order; gradients flow back to the rank that a row comes from.

    Every rank must pass the same number of rows.

    Returns: shape (B * world size, D).
    """
    if world_size() == 1:
        return rows_BD
    gathered: Tensor = _GatherRows.apply(rows_BD)
    return gathered


class _GatherRows(torch.autograd.Function):
    """Gathers rows. The gradient of a row is summed over ranks; DeepSpeed's later mean over ranks makes it exact."""

    @staticmethod
    def forward(ctx: Any, rows_BD: Tensor) -> Tensor:
        ctx.num_rows = rows_BD.shape[0]
        gathered = [torch.empty_like(rows_BD) for _ in range(world_size())]
        torch_dist.all_gather(gathered, rows_BD.contiguous())
        return torch.cat(gathered)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        total = grads[0].contiguous().clone()
        torch_dist.all_reduce(total)
        return total[rank() * ctx.num_rows : (rank() + 1) * ctx.num_rows]
