"""Settings of how a step is computed."""

from __future__ import annotations

from dataclasses import dataclass

from bridgetower.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ComputeConfig:
    """How much of the step's work is saved. Losses and gradients are those of the plain step, with all of it off."""

    share_images: bool = True
    """The vision tower runs once per image of a micro-batch; off: once for MLM and once for ITM, as published."""
    pack_text: bool = True
    """Nothing is computed for padding; off: captions are padded to the longest of the micro-batch."""
    masked_logits_only: bool = True
    """MLM's logits are computed at masked tokens only; off: at all."""
    prune_last_layer: bool = True
    """Of the last cross-modal layer only what a loss reads is computed."""
    share_first_layer: bool = True
    """Images enter the first cross-modal layer once, not once for MLM and once for ITM."""
    absorb_projections: bool = True
    """Texts attend to images without projecting these to keys and values, where captions are short."""
    joint_pass: bool = True
    """MLM and ITM go through the cross-modal encoder together; off: one after the other."""
    fuse_kernels: bool = True
    """On a GPU, sums, dropout and norms in one kernel, activations with their biases in one, attention of texts, and of
    images in the vision tower, by kernels of this project; off: torch's operators."""
    cuda_graphs: bool = True
    """The step is recorded as CUDA graphs, once for each shape, and asked for at once; off: kernel by kernel. On a GPU,
    in half precision, with MLM and ITM alone, captions of 64 tokens at most, and nothing recomputed or compiled."""
    recompute: tuple[str, ...] = ()
    """Parts whose layers are computed again in the backward pass instead of kept: some of vision, text, fusion."""
    compile: bool = False
    """torch.compile of what the layers are made of; the first step then takes minutes."""

    def __post_init__(self) -> None:
        for part in self.recompute:
            if part not in ("vision", "text", "fusion"):
                raise ConfigError(f"compute.recompute={part} is no part of the model. Use some of vision,text,fusion.")


PLAIN = ComputeConfig(
    share_images=False,
    pack_text=False,
    masked_logits_only=False,
    prune_last_layer=False,
    share_first_layer=False,
    absorb_projections=False,
    joint_pass=False,
    fuse_kernels=False,
    cuda_graphs=False,
)
"""The step without any of it."""
