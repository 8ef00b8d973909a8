"""Settings of the optimiser and of the learning-rate schedule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from bridgetower.config.checks import check_fraction, check_positive
from bridgetower.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW, its parameter groups and the learning-rate schedule."""

    base_lr: float
    """Peak learning rate of both towers."""
    total_steps: int
    """Number of optimiser steps, not micro-steps. In fine-tuning, 0 takes as many steps as `epochs` needs."""
    warmup_fraction: float = 0.1
    """Fraction of total_steps in which the rate rises linearly from zero; afterwards it falls linearly to zero."""
    fusion_lr_scale: float = 5.0
    """Factor on base_lr for transforms, bridges, cross-modal layers and poolers."""
    head_lr_scale: float = 5.0
    """Factor on base_lr for the heads (MLM, ITM, ITC, VQA, SNLI-VE, NLVR2)."""
    weight_decay: float = 0.01
    """Decoupled weight decay, on matrices and embeddings; biases, norms and other vectors are not decayed."""
    decay_like_reference: bool = False
    """True: also decay the vision tower's norms and class embedding, the temperature, and the norms of the VQA, SNLI-VE
    and NLVR2 heads, as the published code does."""
    beta1: float = 0.9
    """Decay rate of the running mean of gradients."""
    beta2: float = 0.98
    """Decay rate of the running mean of squared gradients."""
    eps: float = 1e-8
    """Constant added to the root of the running mean of squared gradients."""
    max_grad_norm: float = 0.0
    """Maximum global norm of the gradients; larger gradients are scaled down to it. 0 never clips, as published."""
    frozen_vision_layers: int = 0
    """Number of lowest blocks of the vision tower that are not trained, together with the embeddings below them; -1 for
    the whole tower. Frozen blocks need no backward pass."""
    frozen_text_layers: int = 0
    """Number of lowest layers of the text tower that are not trained, as in frozen_vision_layers."""
    implementation: Literal["auto", "fused", "torch"] = "auto"
    """Implementation of AdamW: fused (DeepSpeed's FusedAdam), torch (torch's AdamW), or auto (fused on CUDA, torch on
    the CPU)."""

    def __post_init__(self) -> None:
        check_positive(
            optim__base_lr=self.base_lr,
            optim__fusion_lr_scale=self.fusion_lr_scale,
            optim__head_lr_scale=self.head_lr_scale,
            optim__eps=self.eps,
        )
        check_fraction("optim.beta1", self.beta1)
        check_fraction("optim.beta2", self.beta2)
        if self.total_steps < 0:
            raise ConfigError(f"optim.total_steps={self.total_steps} is negative. Give the number of optimiser steps.")
        if not 0.0 <= self.warmup_fraction < 1.0:
            example = f"for {min(1000, self.total_steps // 10)} steps write "
            example += f"{min(1000, self.total_steps // 10) / max(1, self.total_steps):g}"
            raise ConfigError(
                f"optim.warmup_fraction={self.warmup_fraction} is not in [0, 1). It is a fraction of "
                f"optim.total_steps={self.total_steps}; {example if self.total_steps else '10 % is written 0.1'}."
            )
        if self.max_grad_norm < 0 or self.weight_decay < 0:
            raise ConfigError(
                f"optim.max_grad_norm={self.max_grad_norm} and optim.weight_decay={self.weight_decay} "
                "must be 0 (off) or more."
            )
