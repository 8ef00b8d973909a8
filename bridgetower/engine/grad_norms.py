"""The norms of the gradient's parts, computed from the fragments that each rank holds between backward and step."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bridgetower import dist

# Parts of the model by the prefix of their parameters' names; everything else belongs to the fusion.
_PREFIXES = {"model.vision_tower.": "vision", "model.text_tower.": "text", "model.heads.": "heads"}


@torch.no_grad()
def measure_grad_norms(module: nn.Module, device: torch.device) -> dict[str, float]:
    """Compute the norms of the averaged gradient of vision tower, text tower, fusion and heads, before clipping.

    All ranks must call it, after the last backward pass of a step and before the step. Under ZeRO 1 and 2 each rank
    sums the squares of its own fragment, so that only one number per part is communicated.

    Args:
        module: the one that DeepSpeed's engine was built around.
    """
    from bridgetower.engine.zero import read_local_gradient  # DeepSpeed: whoever trains has imported it by now

    gradients: dict[str, list[Tensor]] = {"vision": [], "text": [], "fusion": [], "heads": []}
    for name, parameter in module.named_parameters():
        part = next((part for prefix, part in _PREFIXES.items() if name.startswith(prefix)), "fusion")
        gradient = read_local_gradient(parameter)
        if gradient is not None:
            gradients[part].append(gradient)
    squares = torch.stack([_sum_squares(fragments, device) for fragments in gradients.values()])
    squares = dist.sum_over_ranks(squares)
    return {part: float(square) ** 0.5 for part, square in zip(gradients, squares.tolist(), strict=True)}


def _sum_squares(fragments: list[Tensor], device: torch.device) -> Tensor:
    if not fragments:
        return torch.zeros((), dtype=torch.float64, device=device)
    return torch.stack([norm.double() for norm in torch._foreach_norm(fragments)]).square().sum()
