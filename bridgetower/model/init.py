"""Initial values of the parts that no pretrained tower brings."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

INIT_STD = 0.02
# transformers has torch's functions by names of its own.
_INITIAL_MODULES = ("torch.nn.init", "transformers.initialization")
# What timm draws from a truncated normal with, and in the end clamps.
_DRAWS = (torch.Tensor.normal_, torch.Tensor.uniform_, torch.Tensor.erfinv_)


class WithoutInitialValues(TorchFunctionMode):
    """Leaves out drawing initial weights, which takes most of the time of building a large model."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        is_drawn = getattr(func, "__module__", None) in _INITIAL_MODULES or func in _DRAWS
        if is_drawn or (func is torch.Tensor.clamp_ and args[0].is_meta):
            return given.get("tensor", args[0] if args else None)
        return func(*args, **given)


@contextmanager
def shapes_alone() -> Iterator[None]:
    """What is built inside has names and shapes, but no numbers."""
    with torch.device("meta"), WithoutInitialValues():
        yield


class ZeroInitLinear(nn.Linear):
    """A correction that starts as none."""


def init_weights(module: nn.Module) -> None:
    """Linear and embedding weights from N(0, 0.02), biases 0, norms 1 and 0, as published (HF's port has 0.05)."""
    for part in module.modules():
        if isinstance(part, (nn.Linear, nn.Embedding)):
            nn.init.normal_(part.weight, std=0.0 if isinstance(part, ZeroInitLinear) else INIT_STD)
        if isinstance(part, nn.Linear) and part.bias is not None:
            nn.init.zeros_(part.bias)
        if isinstance(part, nn.LayerNorm):
            nn.init.ones_(part.weight)
            nn.init.zeros_(part.bias)
