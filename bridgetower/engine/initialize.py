"""DeepSpeed's engine around a task."""

from __future__ import annotations

from typing import Any

import deepspeed
import torch
from torch import nn

from bridgetower.config.optim import OptimConfig
from bridgetower.engine.optim import build_optimizer, build_schedule, group_parameters
from bridgetower.engine.zero import partitioned_zero


def build_engine(task: nn.Module, optim: OptimConfig, deepspeed_config: dict[str, Any], device: torch.device) -> Any:
    """Wrap a task: partitioned optimizer states, mixed precision, gradient accumulation and schedule.

    Args:
        task: on the CPU or the device, in float32; DeepSpeed casts it to the precision of the configuration.
        deepspeed_config: merged with the run's settings. DeepSpeed gets a copy, as it writes into it.
    """
    task.to(device)
    optimizer = build_optimizer(group_parameters(task, optim), optim, device)
    with partitioned_zero():
        engine, _, _, _ = deepspeed.initialize(
            model=task,
            optimizer=optimizer,
            lr_scheduler=build_schedule(optim),
            config=dict(deepspeed_config),
            dist_init_required=False,
        )
    return engine
