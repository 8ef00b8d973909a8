"""AdamW: its parameter groups and its schedule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from bridgetower.config.optim import OptimConfig

_FUSION_PREFIXES = (
    "model.text_transform.",
    "model.image_transform.",
    "model.cross_modal.",
    "model.text_pooler.",
    "model.image_pooler.",
)
_HEAD_PREFIX = "model.heads."
# New parameters that the published code trains at the base rate (reference_spec sections 1.6 and 3.1).
_BASE_RATE_PREFIXES = (
    "model.modality_embedding.",
    "model.heads.itc.temperature",
    "model.heads.rank.",
    "model.text_gate.",
    "model.image_gate.",
)
# Vectors that the published code decays, because its list of undecayed names does not match them.
_DECAYED_VECTORS = (
    "model.heads.itc.temperature",
    "model.heads.vqa.norm.",
    "model.heads.snli_ve.norm.",
    "model.heads.nlvr2.norm.",
)


def group_parameters(task: nn.Module, optim: OptimConfig) -> list[dict[str, Any]]:
    """Sort the trainable parameters into up to six groups: base, head and fusion rate, with and without weight decay.

    Returns: groups as torch's optimizers take them. Empty ones are left out, since ZeRO cannot flatten them.
    """
    rates = {
        "base": optim.base_lr,
        "head": optim.base_lr * optim.head_lr_scale,
        "fusion": optim.base_lr * optim.fusion_lr_scale,
    }
    groups: dict[tuple[str, bool], dict[str, Any]] = {
        (rate_name, is_decayed): {
            "name": f"{rate_name}{'' if is_decayed else '_no_decay'}",
            "params": [],
            "lr": rate,
            "weight_decay": optim.weight_decay if is_decayed else 0.0,
        }
        for rate_name, rate in rates.items()
        for is_decayed in (True, False)
    }
    for name, parameter in task.named_parameters():
        if parameter.requires_grad:
            is_decayed = _is_decayed(name, parameter, optim.decay_like_reference)
            groups[_choose_rate(name), is_decayed]["params"].append(parameter)
    return [group for group in groups.values() if group["params"]]


def _choose_rate(name: str) -> str:
    if name.startswith(_BASE_RATE_PREFIXES):
        return "base"
    if name.startswith(_FUSION_PREFIXES):
        return "fusion"
    return "head" if name.startswith(_HEAD_PREFIX) else "base"


def _is_decayed(name: str, parameter: nn.Parameter, like_reference: bool) -> bool:
    """True for matrices and embeddings, and like the reference also for the vectors of CLIP's vision tower."""
    if parameter.ndim >= 2:
        return True
    is_decayed_vector = name.startswith(("model.vision_tower.", *_DECAYED_VECTORS))
    return like_reference and is_decayed_vector and not name.endswith("bias")


def choose_implementation(optim: OptimConfig, device: torch.device) -> str:
    """Resolve ``optim.implementation`` for a device.

    On a CPU, DeepSpeed's FusedAdam takes 65 s to build and does not resume bit for bit, so auto means torch there.

    Returns: fused or torch.
    """
    if optim.implementation == "auto":
        return "fused" if device.type == "cuda" else "torch"
    return optim.implementation


def build_optimizer(groups: list[dict[str, Any]], optim: OptimConfig, device: torch.device) -> torch.optim.Optimizer:
    """Build AdamW with decoupled weight decay and bias correction."""
    betas = (optim.beta1, optim.beta2)
    if choose_implementation(optim, device) == "fused":
        from deepspeed.ops.adam import FusedAdam

        optimizer: torch.optim.Optimizer = FusedAdam(groups, betas=betas, eps=optim.eps, adam_w_mode=True)
        return optimizer
    return torch.optim.AdamW(groups, betas=betas, eps=optim.eps)


def compute_lr_factor(step: int, optim: OptimConfig) -> float:
    """Compute the fraction of the peak rate at a step: a linear rise from 0 to 1, then a linear fall to 0.

    The published schedule. Its first step, number 0, has rate 0.
    """
    warmup_steps = int(optim.warmup_fraction * optim.total_steps)
    if step < warmup_steps:
        return step / warmup_steps
    return max(0.0, (optim.total_steps - step) / (optim.total_steps - warmup_steps))


def build_schedule(optim: OptimConfig) -> Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler]:
    """Build the function that makes DeepSpeed's scheduler from its inner optimizer.

    DeepSpeed's own schedulers lose the ratios between the rates of the groups.
    """

    def build(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: compute_lr_factor(step, optim))

    return build
