"""What every objective returns."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Result(NamedTuple):
    """A loss and what is reported about it."""

    loss: Tensor
    """Scalar, float32, with gradient."""
    metrics: dict[str, Tensor]
    """Each a tensor (sum, count) without gradient, so that means over ranks and micro-steps are exact."""
    values: dict[str, Tensor]
    """Loss and accuracy of each masked token or pair of this rank, by the metric's name; without gradient."""


def mean_metric(total: Tensor, count: int | Tensor) -> Tensor:
    """The pair (sum, count) of a metric; no host sync."""
    summed = total.detach().float()
    # A number of the host that is made a tensor is copied, which waits for the device; filling asks for a kernel.
    counted = count.float() if isinstance(count, Tensor) else torch.full_like(summed, count)
    return torch.stack([summed, counted])
