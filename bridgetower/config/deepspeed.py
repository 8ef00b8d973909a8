"""The DeepSpeed configuration of a run: a file that says how memory is split, joined with what the run decides.

DeepSpeed 0.19.8 ignores unknown top-level keys, accepts a negative clip, and clips at 1.0 unless told otherwise, so
everything is checked and written out here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bridgetower.config.overrides import unknown_name
from bridgetower.errors import ConfigError

MEMORY_KEYS = (
    "zero_optimization",
    "bf16",
    "data_types",
    "communication_data_type",
    "activation_checkpointing",
    "aio",
    "comms_logger",
    "wall_clock_breakdown",
    "memory_breakdown",
)
"""What a file may say."""

_OWNED_KEYS = {
    "train_batch_size": "data.global_batch_size",
    "train_micro_batch_size_per_gpu": "data.micro_batch_size",
    "gradient_accumulation_steps": "data.global_batch_size and data.micro_batch_size",
    "gradient_clipping": "optim.max_grad_norm",
    "optimizer": "optim.*",
    "scheduler": "optim.*",
    "wandb": "tracker.wandb",
    "steps_per_print": "tracker.every_steps",
}


def merge_deepspeed_config(
    memory: Mapping[str, Any], *, micro_batch_size: int, accumulation_steps: int, max_grad_norm: float
) -> dict[str, Any]:
    """What is given to ``deepspeed.initialize``."""
    return {
        **memory,
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": accumulation_steps,
        "gradient_clipping": max_grad_norm,
        "steps_per_print": 2**31,  # the tracker reports
    }


def read_memory_config(path: Path) -> dict[str, Any]:
    """Read a file of ``ds_configs/`` and check every top-level key; nested ones DeepSpeed checks itself.

    Raises:
        ConfigError: no such file, not JSON, a key twice, an unknown key, or one that a setting of the run decides.
    """
    try:
        content = json.loads(path.read_text(), object_pairs_hook=_refuse_twice)
    except FileNotFoundError:
        offered = ", ".join(sorted(file.stem for file in path.parent.glob("*.json"))) or "none"
        raise ConfigError(
            f"engine.deepspeed: there is no {path}. {path.parent} offers: {offered}. A path to your own file works too."
        ) from None
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON ({error}).") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold one JSON object, not {type(content).__name__}.")
    for name in content:
        if name in _OWNED_KEYS:
            raise ConfigError(f"{path} sets {name}, which the run decides. Delete it and use --{_OWNED_KEYS[name]}.")
        if name == "fp16":
            raise ConfigError(f"{path} sets fp16, which needs loss scaling. Use bf16, which does not.")
        if name not in MEMORY_KEYS:
            raise ConfigError(f"{path}: {unknown_name('key', name, MEMORY_KEYS)} DeepSpeed would ignore it silently.")
    stage = content.get("zero_optimization", {}).get("stage")
    if stage not in (0, 1, 2):
        raise ConfigError(
            f"{path}: zero_optimization.stage={stage!r} is not 0, 1 or 2. Stage 3 splits the weights themselves; "
            "BridgeTower large needs 2 GB for them in bfloat16 and gains nothing from it."
        )
    return content


def is_bf16(memory: Mapping[str, Any]) -> bool:
    """True where the engine holds the weights in bfloat16 (and their master copies in float32)."""
    return bool(memory.get("bf16", {}).get("enabled", False))


def _refuse_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"the key {name!r} stands there twice")
    return dict(pairs)
