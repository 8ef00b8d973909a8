"""The result that every objective returns."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Result(NamedTuple):
    """A loss, and the metrics that are reported with it."""

    loss: Tensor
    """Scalar, float32, with gradient."""
    metrics: dict[str, Tensor]
    """Each metric as a tensor (sum, count) without gradient, so that means over ranks and micro-steps are exact."""
    values: dict[str, Tensor]
    """Loss and accuracy per masked token or per pair of this rank, by the metric's name; without gradient."""


def mean_metric(total: Tensor, count: int | Tensor) -> Tensor:
    """Return (sum, count) of a metric as a tensor of shape (2,), without waiting for the device."""
    summed = total.detach().float()
    # torch.tensor(count) would copy a number from the host, which waits for the device; filling only launches a kernel.
    counted = count.float() if isinstance(count, Tensor) else torch.full_like(summed, count)
    return torch.stack([summed, counted])
