"""Floating-point operations counted by running code, on torch's meta device or on a real one.

A multiplication and an addition are two operations. Attention is counted in full, forward and backward, because it runs
as matmuls: torch's counter takes its fused CPU kernels for nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bridgetower.config.model import ModelConfig
from bridgetower.cost.sizes import num_read_states
from bridgetower.cost.towers import CountedVision
from bridgetower.model.init import shapes_alone

Result = TypeVar("Result")


def count_flops(run: Callable[[], Result]) -> tuple[int, Result]:
    """Count what a function computes. Returns: operations, and the function's result."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        result = run()
    return int(counter.get_total_flops()), result


def count_vision_tower(config: ModelConfig) -> CountedVision:
    """Run a vision tower forward and backward on the shapes of one image, for towers that have no formula.

    Args:
        config: complete.
    """
    from bridgetower.model.vision_tower import VisionTower

    side = config.image_size_px
    with shapes_alone():
        tower = VisionTower(config.vision, side)
        pixels = torch.empty(1, 3, side, side)
    num_states = num_read_states(config, config.vision.num_layers)
    forward, states = count_flops(lambda: tower(pixels, num_states))
    backward, _ = count_flops(lambda: torch.stack(states).sum().backward())
    return CountedVision(states[-1].shape[1], forward, backward)
