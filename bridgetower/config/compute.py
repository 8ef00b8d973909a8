"""Settings of how a step is computed: its results are the same, its time and memory are not."""

from __future__ import annotations

from dataclasses import dataclass

from bridgetower.errors import ConfigError

PARTS = ("vision", "text", "fusion")
"""Parts of the model that ``compute.recompute`` may name."""


@dataclass(frozen=True, kw_only=True)
class ComputeConfig:
    """How a step is computed. Losses and gradients are the same up to rounding."""

    fuse_kernels: bool = True
    """On NVIDIA GPUs, use this project's Triton kernels: residual sums with dropout and norm, activations with their
    bias, attention of captions, and attention within images in the vision tower; off: torch's operators."""
    cuda_graphs: bool = True
    """Capture a step as CUDA graphs, one set for each shape, so that it does not wait for the host; off: launch each
    kernel. Used on a GPU, in half precision, with MLM and ITM alone, captions of at most 64 tokens, and nothing
    recomputed or compiled."""
    recompute: tuple[str, ...] = ()
    """Parts whose layers are computed again in the backward pass instead of kept: some of vision, text, fusion."""
    compile: bool = False
    """Compile the layers with torch.compile; the first step then takes minutes."""

    def __post_init__(self) -> None:
        for part in self.recompute:
            if part not in PARTS:
                raise ConfigError(
                    f"compute.recompute={part} is not a part of the model. Use some of {','.join(PARTS)}."
                )
