"""The DeepSpeed configuration of a run: a file that says how memory is split, joined with what the run decides.

DeepSpeed 0.19.8 ignores unknown top-level keys and unknown data types, accepts a negative clip, and clips at 1.0 unless
told otherwise, so every key and value is checked and written out here, before anything is started.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from bridgetower.config.overrides import unknown_name
from bridgetower.errors import ConfigError


class _Value(NamedTuple):
    """What a key may be set to."""

    described: str
    accepts: Callable[[Any], bool]


def _one_of(*values: Any) -> _Value:
    # 1 == True in Python, but not in a file of settings.
    return _Value(" or ".join(map(json.dumps, values)), lambda v: any(v == ok and type(v) is type(ok) for ok in values))


_SWITCH = _one_of(True, False)
_POSITIVE = _Value("a whole number above 0", lambda value: type(value) is int and value > 0)
_NAMES = _Value(
    "a list of names", lambda value: isinstance(value, list) and all(isinstance(name, str) for name in value)
)

# What a file may say: what keeps weights, optimiser and checkpoints as this program reads them. Left out are stage 3,
# offloading and round_robin_gradients, which lay the optimiser's files out in another way.
MEMORY_KEYS: Mapping[str, _Value | Mapping[str, _Value]] = {
    "zero_optimization": {
        "stage": _one_of(0, 1, 2),
        "overlap_comm": _SWITCH,
        "contiguous_gradients": _SWITCH,
        "reduce_scatter": _SWITCH,
        "reduce_bucket_size": _POSITIVE,
        "use_multi_rank_bucket_allreduce": _SWITCH,
        "allgather_partitions": _SWITCH,
        "allgather_bucket_size": _POSITIVE,
    },
    "bf16": {"enabled": _SWITCH, "immediate_grad_update": _SWITCH, "check_grad_overflow": _SWITCH},
    "data_types": {"grad_accum_dtype": _one_of("fp32", "bf16")},
    "communication_data_type": _one_of("fp32", "bf16"),
    "comms_logger": {
        "enabled": _SWITCH,
        "prof_all": _SWITCH,
        "prof_ops": _NAMES,
        "verbose": _SWITCH,
        "debug": _SWITCH,
    },
    "wall_clock_breakdown": _SWITCH,
    "memory_breakdown": _SWITCH,
}

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


def read_named_memory_config(name: str, folder: Path) -> dict[str, Any]:
    """Read the file that ``engine.deepspeed`` names.

    Args:
        name: of a file of ``folder`` without .json, or a path.

    Raises:
        ConfigError: as ``read_memory_config``.
    """
    return read_memory_config(Path(name) if "/" in name or name.endswith(".json") else folder / f"{name}.json")


def read_memory_config(path: Path) -> dict[str, Any]:
    """Read a file of ``ds_configs/`` and check every key and value.

    Raises:
        ConfigError: no such file, not JSON, a key twice, an unknown key, one that a setting of the run decides, or a
            value that it cannot have.
    """
    try:
        content = json.loads(path.read_text(), object_pairs_hook=_refuse_twice)
    except FileNotFoundError:
        offered = ", ".join(sorted(file.stem for file in path.parent.glob("*.json"))) or "none"
        raise ConfigError(
            f"engine.deepspeed: there is no {path}. {path.parent} offers: {offered}. A path to your own file works too."
        ) from None
    except OSError as error:
        raise ConfigError(f"engine.deepspeed: {path} cannot be read ({error.strerror}). Give a JSON file.") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON ({error}).") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold one JSON object, not {type(content).__name__}.")
    for name in content:
        if name in _OWNED_KEYS:
            raise ConfigError(f"{path} sets {name}, which the run decides. Delete it and use --{_OWNED_KEYS[name]}.")
        if name == "fp16":
            raise ConfigError(f"{path} sets fp16, which needs loss scaling. Use bf16, which does not.")
    _check_keys(path, "", content, MEMORY_KEYS)
    stage = content.get("zero_optimization", {}).get("stage")
    if stage is None:
        raise ConfigError(f'{path} does not say how memory is split. Add "zero_optimization": {{"stage": 2}}.')
    if stage == 0 and is_bf16(content):
        raise ConfigError(
            f"{path}: zero_optimization.stage=0 keeps no float32 master weights beside bf16. Use stage 1 or 2."
        )
    return content


def _check_keys(
    path: Path, prefix: str, content: Mapping[str, Any], known: Mapping[str, _Value | Mapping[str, _Value]]
) -> None:
    for name, value in content.items():
        full = f"{prefix}{name}"
        if name not in known:
            every = [f"{prefix}{other}" for other in known]
            raise ConfigError(
                f"{path}: {unknown_name('key', full, every)} Others are refused: DeepSpeed ignores them without a "
                "word, or stores the optimiser so that this program cannot resume from it."
            )
        expected = known[name]
        if isinstance(expected, _Value):
            if not expected.accepts(value):
                raise ConfigError(
                    f"{path}: {full}={json.dumps(value)} must be {expected.described}.{_why(full, value)}"
                )
        elif isinstance(value, dict):
            _check_keys(path, f"{full}.", value, expected)
        else:
            raise ConfigError(f"{path}: {full}={json.dumps(value)} must be an object in braces.")


def _why(name: str, value: Any) -> str:
    if name == "zero_optimization.stage" and value == 3:
        return (
            " Stage 3 splits the weights themselves; BridgeTower large needs 2 GB for them in bfloat16 and gains "
            "nothing from it."
        )
    return ""


def is_bf16(memory: Mapping[str, Any]) -> bool:
    """True where the engine holds the weights in bfloat16 (and their master copies in float32)."""
    return bool(memory.get("bf16", {}).get("enabled", False))


def _refuse_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"the key {name!r} stands there twice")
    return dict(pairs)
