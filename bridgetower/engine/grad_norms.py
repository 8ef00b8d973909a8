"""The gradient's norm, part by part, as it lies split over the ranks between backward and step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bridgetower import dist

# Parts of the model by the beginning of their parameters' names; everything else is the fusion.
_PARTS = {"model.vision_tower.": "vision", "model.text_tower.": "text", "model.heads.": "heads"}


@torch.no_grad()
def grad_norms(module: nn.Module, device: torch.device) -> dict[str, float]:
    """Norm of the averaged gradient of the vision tower, the text tower, the fusion and the heads, before clipping.

    To be called on all ranks after the last backward pass of a step and before the step. Each rank adds up the share
    of the gradient that it holds under ZeRO 1 and 2; nothing is gathered but a number a part.

    Args:
        module: what DeepSpeed's engine was built around.
    """
    totals: dict[str, list[Tensor]] = {"vision": [], "text": [], "fusion": [], "heads": []}
    for name, parameter in module.named_parameters():
        part = next((part for beginning, part in _PARTS.items() if name.startswith(beginning)), "fusion")
        own = _own_gradient(parameter)
        if own is not None:
            totals[part].append(own)
    squares = torch.stack([_square(tensors, device) for tensors in totals.values()])
    squares = dist.sum_over_ranks(squares)
    return {part: float(square) ** 0.5 for part, square in zip(totals, squares.tolist(), strict=True)}


def _square(tensors: list[Tensor], device: torch.device) -> Tensor:
    if not tensors:
        return torch.zeros((), dtype=torch.float64, device=device)
    return torch.stack([norm.double() for norm in torch._foreach_norm(tensors)]).square().sum()


def _own_gradient(parameter: nn.Parameter) -> Tensor | None:
    """What this rank holds of a gradient; without ZeRO every rank holds it whole, and gives its share of the square."""
    if not hasattr(parameter, "_hp_mapping"):
        return None if parameter.grad is None else parameter.grad.float() / dist.world_size() ** 0.5
    held: Any = parameter._hp_mapping  # DeepSpeed's; None where other ranks have all of it
    if held is None:
        return None
    number: Any = parameter._index_in_param_group  # type: ignore[attr-defined]
    gradient: Tensor = held.get_lp_grad_fragment(number)
    return gradient
