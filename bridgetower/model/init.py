"""Initial values of the parts that no pretrained tower brings."""

from __future__ import annotations

from torch import nn

INIT_STD = 0.02


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
