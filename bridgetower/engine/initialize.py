"""DeepSpeed's engine around a task."""

from __future__ import annotations

from typing import Any

import deepspeed
import torch
from torch import nn

from bridgetower.config.optim import OptimConfig
from bridgetower.engine.optim import build_optimizer, parameter_groups, schedule
from bridgetower.engine.zero import look_at_partitions


def build_engine(task: nn.Module, optim: OptimConfig, deepspeed_config: dict[str, Any], device: torch.device) -> Any:
    """Wrap a task: split optimiser states, mixed precision, gradient accumulation and schedule.

    Args:
        task: on the CPU or the device, in float32; DeepSpeed casts it as the configuration says.
        deepspeed_config: as merged; a copy is taken, as DeepSpeed writes into it.
    """
    task.to(device)
    optimizer = build_optimizer(parameter_groups(task, optim), optim, device)
    engine, _, _, _ = deepspeed.initialize(
        model=task,
        optimizer=optimizer,
        lr_scheduler=schedule(optim),
        config=dict(deepspeed_config),
        dist_init_required=False,
    )
    look_at_partitions(engine.optimizer)
    return engine
