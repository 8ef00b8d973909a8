"""The DeepSpeed configuration of a run: a file that says how memory is split, joined with the run's settings.

DeepSpeed 0.19.8 ignores unknown top-level keys and unknown data types, accepts a negative clip, and clips at 1.0 by
default. So every key and value is checked here before anything starts, and every default that matters is written out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from bridgetower.config.overrides import unknown_name
from bridgetower.errors import ConfigError


class _Value(NamedTuple):
    """The values that a key may have."""

    described: str
    accepts: Callable[[Any], bool]


def _one_of(*values: Any) -> _Value:
    # The types are compared, too: in Python 1 == True.
    return _Value(" or ".join(map(json.dumps, values)), lambda v: any(v == ok and type(v) is type(ok) for ok in values))


_SWITCH = _one_of(True, False)
_POSITIVE = _Value("an integer above 0", lambda value: type(value) is int and value > 0)
_NAMES = _Value(
    "a list of names", lambda value: isinstance(value, list) and all(isinstance(name, str) for name in value)
)

# Keys that a file may set: those that keep weights, optimiser state and checkpoints in the layout that this program
# reads. Stage 3, offloading and round_robin_gradients change the layout of the optimiser's files.
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

# Keys that follow from a setting of the run.
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
    """Return the configuration for ``deepspeed.initialize``.

    Args:
        memory: content of a file of ``ds_configs/``.
        max_grad_norm: 0 never clips.
    """
    return {
        **memory,
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": accumulation_steps,
        "gradient_clipping": max_grad_norm,
        "steps_per_print": 2**31,  # never: the tracker logs instead
    }


def read_named_memory_config(name: str, folder: Path) -> dict[str, Any]:
    """Read the file that ``engine.deepspeed`` names.

    Args:
        name: name of a file in ``folder`` without .json, or a path.

    Raises:
        ConfigError: as ``read_memory_config``.
    """
    return read_memory_config(Path(name) if "/" in name or name.endswith(".json") else folder / f"{name}.json")


def read_memory_config(path: Path) -> dict[str, Any]:
    """Read a file of ``ds_configs/`` and check every key and value.

    Raises:
        ConfigError: the file is missing or not JSON, a key occurs twice, is unknown or belongs to a setting of the run,
            or a value is not allowed.
    """
    try:
        content = json.loads(path.read_text(), object_pairs_hook=_refuse_repeated_keys)
    except FileNotFoundError:
        offered = ", ".join(sorted(file.stem for file in path.parent.glob("*.json"))) or "none"
        raise ConfigError(
            f"engine.deepspeed: there is no {path}. {path.parent} offers: {offered}. Give a name or a path."
        ) from None
    except OSError as error:
        raise ConfigError(f"engine.deepspeed: {path} cannot be read ({error.strerror}). Give a JSON file.") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON ({error}). Correct it.") from error
    if not isinstance(content, dict):
        raise ConfigError(
            f"{path} must hold one JSON object, not {type(content).__name__}. Start from a file of ds_configs/."
        )
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
            f"{path}: with bf16, zero_optimization.stage=0 keeps no float32 master weights. Use stage 1 or 2."
        )
    return content


def _check_keys(
    path: Path, prefix: str, content: Mapping[str, Any], known: Mapping[str, _Value | Mapping[str, _Value]]
) -> None:
    for name, value in content.items():
        full = f"{prefix}{name}"
        if name not in known:
            valid_names = [f"{prefix}{other}" for other in known]
            raise ConfigError(
                f"{path}: {unknown_name('key', full, valid_names)} Other keys are refused: DeepSpeed ignores them "
                "silently, or writes optimiser files that this program cannot resume from."
            )
        expected = known[name]
        if isinstance(expected, _Value):
            if not expected.accepts(value):
                raise ConfigError(
                    f"{path}: {full}={json.dumps(value)} must be {expected.described}.{_explain(full, value)}"
                )
        elif isinstance(value, dict):
            _check_keys(path, f"{full}.", value, expected)
        else:
            raise ConfigError(f"{path}: {full}={json.dumps(value)} must be an object: {{...}}.")


def _explain(name: str, value: Any) -> str:
    """Return why a value is refused, where it is not obvious."""
    if name == "zero_optimization.stage" and value == 3:
        return (
            " Stage 3 also splits the weights, which gains nothing: those of BridgeTower large take 2 GB in bfloat16."
        )
    return ""


def is_bf16(memory: Mapping[str, Any]) -> bool:
    """Return True if the engine computes with bfloat16 weights (and keeps float32 master weights)."""
    return bool(memory.get("bf16", {}).get("enabled", False))


def _refuse_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"the key {name!r} occurs twice")
    return dict(pairs)
