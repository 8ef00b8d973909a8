"""The optimiser: parameter groups, AdamW and its schedule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from bridgetower.config.optim import OptimConfig

_FUSION_PARTS = (
    "model.text_transform.",
    "model.image_transform.",
    "model.cross_modal.",
    "model.text_pooler.",
    "model.image_pooler.",
)
_HEAD_PART = "model.heads."
# Published rates: these have the base rate though they are new (reference_spec sections 1.6 and 3.1).
_BASE_RATE = (
    "model.modality_embedding.",
    "model.heads.itc.temperature",
    "model.heads.rank.",
    "model.text_gate.",
    "model.image_gate.",
)
# Vectors that the published code decays, as its list of names lets them through.
_DECAYED_VECTORS = (
    "model.heads.itc.temperature",
    "model.heads.vqa.norm.",
    "model.heads.snli_ve.norm.",
    "model.heads.nlvr2.norm.",
)


def parameter_groups(task: nn.Module, optim: OptimConfig) -> list[dict[str, Any]]:
    """Up to six groups: base, fusion and head rates, each with and without weight decay.

    Args:
        task: frozen parameters are left out.
    """
    rates = {
        "base": optim.base_lr,
        "head": optim.base_lr * optim.head_lr_scale,
        "fusion": optim.base_lr * optim.fusion_lr_scale,
    }
    groups: dict[tuple[str, bool], dict[str, Any]] = {
        (kind, is_decayed): {
            "name": f"{kind}{'' if is_decayed else '_no_decay'}",
            "params": [],
            "lr": rate,
            "weight_decay": optim.weight_decay if is_decayed else 0.0,
        }
        for kind, rate in rates.items()
        for is_decayed in (True, False)
    }
    for name, parameter in task.named_parameters():
        if parameter.requires_grad:
            is_decayed = _is_decayed(name, parameter, optim.decay_like_reference)
            groups[_rate_of(name), is_decayed]["params"].append(parameter)
    return [group for group in groups.values() if group["params"]]


def _rate_of(name: str) -> str:
    if name.startswith(_BASE_RATE):
        return "base"
    if name.startswith(_FUSION_PARTS):
        return "fusion"
    return "head" if name.startswith(_HEAD_PART) else "base"


def _is_decayed(name: str, parameter: nn.Parameter, like_reference: bool) -> bool:
    """Matrices and embeddings; the published code's list of names also lets some of CLIP's vectors through."""
    if parameter.ndim >= 2:
        return True
    is_let_through = name.startswith(("model.vision_tower.", *_DECAYED_VECTORS))
    return like_reference and is_let_through and not name.endswith("bias")


def chosen_implementation(optim: OptimConfig, device: torch.device) -> str:
    """What ``optim.implementation`` means on a device: fused or torch.

    On a CPU FusedAdam takes 65 s to build and does not resume bit for bit, so auto is torch's there.
    """
    if optim.implementation == "auto":
        return "fused" if device.type == "cuda" else "torch"
    return optim.implementation


def build_optimizer(groups: list[dict[str, Any]], optim: OptimConfig, device: torch.device) -> torch.optim.Optimizer:
    """AdamW with decoupled decay and bias correction."""
    betas = (optim.beta1, optim.beta2)
    if chosen_implementation(optim, device) == "fused":
        from deepspeed.ops.adam import FusedAdam

        optimizer: torch.optim.Optimizer = FusedAdam(groups, betas=betas, eps=optim.eps, adam_w_mode=True)
        return optimizer
    return torch.optim.AdamW(groups, betas=betas, eps=optim.eps)


def lr_factor(step: int, optim: OptimConfig) -> float:
    """The share of the peak rate at a step (counted from 0): linear from 0 to 1 and back to 0, as published.

    The first step has rate 0, as in the published code.
    """
    warmup_steps = int(optim.warmup_fraction * optim.total_steps)
    if step < warmup_steps:
        return step / warmup_steps
    return max(0.0, (optim.total_steps - step) / (optim.total_steps - warmup_steps))


def schedule(optim: OptimConfig) -> Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler]:
    """What DeepSpeed calls with the inner optimiser; its own schedulers lose the ratios between groups."""

    def build(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(step, optim))

    return build
