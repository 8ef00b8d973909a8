"""Settings of the optimiser and its schedule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from bridgetower.config.checks import check_fraction, check_positive
from bridgetower.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW, its parameter groups and its schedule."""

    base_lr: float
    """Peak learning rate of both towers."""
    total_steps: int
    """Optimiser steps, not micro-steps. Fine-tuning: 0 takes as many as `epochs` come to."""
    warmup_fraction: float = 0.1
    """Share of total_steps spent rising linearly from zero; then it falls linearly to zero."""
    fusion_lr_scale: float = 5.0
    """The rate of transforms, bridges, cross-modal layers and poolers is base_lr times this."""
    head_lr_scale: float = 5.0
    """The rate of the heads (MLM, ITM, ITC, VQA, SNLI-VE, NLVR2) is base_lr times this."""
    weight_decay: float = 0.01
    """Decoupled; on matrices and embeddings, not on biases, norms and other vectors."""
    decay_like_reference: bool = False
    """True also decays the vision tower's norms and class embedding, the temperature and the norms of the VQA, SNLI-VE
    and NLVR2 heads, as the published code does."""
    beta1: float = 0.9
    """Decay of the gradient's running mean."""
    beta2: float = 0.98
    """Decay of the squared gradient's running mean."""
    eps: float = 1e-8
    """Added to the root of the squared gradient's mean."""
    max_grad_norm: float = 0.0
    """Gradients of a larger global norm are scaled down to it; 0 never clips, as published."""
    frozen_vision_layers: int = 0
    """Lowest blocks of the vision tower that are not trained, with what comes before them; -1 the whole tower. They
    cost no backward pass."""
    frozen_text_layers: int = 0
    """The same of the text tower."""
    implementation: Literal["auto", "fused", "torch"] = "auto"
    """fused = DeepSpeed's FusedAdam, torch = torch's AdamW; auto is fused on CUDA and torch on the CPU."""

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
            raise ConfigError(f"optim.total_steps={self.total_steps} must be greater than 0.")
        if not 0.0 <= self.warmup_fraction < 1.0:
            example = f"for {min(1000, self.total_steps // 10)} steps write "
            example += f"{min(1000, self.total_steps // 10) / max(1, self.total_steps):g}"
            raise ConfigError(
                f"optim.warmup_fraction={self.warmup_fraction} is not in [0, 1). It is a share of "
                f"optim.total_steps={self.total_steps}; {example if self.total_steps else '10 % is written 0.1'}."
            )
        if self.max_grad_norm < 0 or self.weight_decay < 0:
            raise ConfigError(
                f"optim.max_grad_norm={self.max_grad_norm} and optim.weight_decay={self.weight_decay} "
                "must be 0 (off) or more."
            )
