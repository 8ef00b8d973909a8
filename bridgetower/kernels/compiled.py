"""torch.compile of what layers are made of.

Compiled are the parts between the attention kernels: projections, feed-forwards, norms, residuals and bridges, and
whole blocks of the vision tower. The modules of one kind share their compiled code, and states of one rank share
theirs: images have the same shape in every step, and packed texts, whose number of tokens changes, are compiled once
for any.
So a step whose captions are of other lengths compiles nothing anew.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bridgetower.model.attention import Attention, FeedForward
from bridgetower.model.bridge import Bridge
from bridgetower.model.bridgetower import BridgeTower
from bridgetower.model.vision_tower import blocks_of


def compile_parts(model: BridgeTower, backend: str = "inductor") -> None:
    """Compile the parts of a model in place; names and values of its weights stay. They compile at their first call.

    Args:
        backend: of torch.compile; aot_eager traces and splits as inductor does, but generates no kernels.
    """
    # Each kind of module is compiled for training and evaluation, and for images of one or two kinds of shapes.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 32)
    # Its own generator draws each number anew; torch's kernel of dropout took 6 ms less of 106 (base, 64 pairs, H100).
    torch._inductor.config.fallback_random = True
    for block in blocks_of(model.vision_tower.vit):
        block.compile(dynamic=False, backend=backend)
    for layer in model.text_tower.encoder.encoder.layer:
        for part in (layer.attention.output, layer.intermediate, layer.output):
            part.compile(dynamic=True, backend=backend)
    for module in model.modules():
        if isinstance(module, Attention):
            _replace(module, "project", backend)
            _replace(module, "finish", backend)
        elif isinstance(module, FeedForward | Bridge):
            _replace(module, "forward", backend)


def _replace(module: nn.Module, name: str, backend: str) -> None:
    """Two compiled versions of a method: of dense states, (R, P, D), and of packed ones, (T, D)."""
    method: Callable[..., Any] = getattr(module, name)
    dense, packed = (torch.compile(method, dynamic=dynamic, backend=backend) for dynamic in (False, True))

    def either(states: Tensor, *arguments: Any, **settings: Any) -> Any:
        return (packed if states.dim() == 2 else dense)(states, *arguments, **settings)

    setattr(module, name, either)
