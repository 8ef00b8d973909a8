"""Initial weights of the layers that do not come from a pretrained tower, and ways to skip drawing weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

INIT_STD = 0.02
# transformers wraps the functions of torch.nn.init in a module of its own.
_INIT_MODULES = ("torch.nn.init", "transformers.initialization")
# timm draws truncated normals with these methods, and clamps the result.
_DRAWS = (torch.Tensor.normal_, torch.Tensor.uniform_, torch.Tensor.erfinv_)


class WithoutInitialValues(TorchFunctionMode):
    """Skips the drawing of initial weights, which takes most of the time of building a large model."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        keywords = kwargs or {}
        is_drawn = getattr(func, "__module__", None) in _INIT_MODULES or func in _DRAWS
        if is_drawn or (func is torch.Tensor.clamp_ and args[0].is_meta):
            return keywords.get("tensor", args[0] if args else None)
        return func(*args, **keywords)


@contextmanager
def shapes_alone() -> Iterator[None]:
    """Inside, modules are built on the meta device: with names and shapes, but without values."""
    with torch.device("meta"), WithoutInitialValues():
        yield


class ZeroInitLinear(nn.Linear):
    """A linear layer whose weights and bias start at zero, so that the correction it computes starts at zero."""


def init_weights(module: nn.Module) -> None:
    """Initialise a module in place: linear and embedding weights from N(0, 0.02), biases 0, norms 1 and 0.

    Source: the published code (microsoft/BridgeTower, init_weights); the port in transformers has 0.05.
    """
    for layer in module.modules():
        if isinstance(layer, (nn.Linear, nn.Embedding)):
            nn.init.normal_(layer.weight, std=0.0 if isinstance(layer, ZeroInitLinear) else INIT_STD)
        if isinstance(layer, nn.Linear) and layer.bias is not None:
            nn.init.zeros_(layer.bias)
        if isinstance(layer, nn.LayerNorm):
            nn.init.ones_(layer.weight)
            nn.init.zeros_(layer.bias)
