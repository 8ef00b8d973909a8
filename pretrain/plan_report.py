"""A plan as plain data, which is printed as tables or written as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from bridgetower.cost.published import count_published_step
from bridgetower.errors import ConfigError
from pretrain.plan_memory import STAGES, count_states, why_not_offered
from pretrain.plan_time import DECODES_PER_CORE, RESERVED_BYTES, Choice, Cluster, Planner

_SECONDS_PER_DAY = 86_400
SCALES = tuple(2**power for power in range(11))
"""Numbers of GPUs of the scaling table."""


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """What a plan takes as given, beside the run and the cluster."""

    memory_file: str
    """Name of the file of ds_configs/."""
    image_bytes: float
    """Bytes of a stored image."""
    price: float
    """Price of one GPU for one hour; 0: unknown."""
    is_mfu_given: bool
    """True if the user gave the MFU, False if it is the device's default."""


def make_plan(planner: Planner, cluster: Cluster, assumptions: Assumptions) -> dict[str, Any]:
    """Plan a run.

    Raises:
        ConfigError: the GPUs do not divide the global batch, or nothing fits.
    """
    sizes = planner.micro_batches(cluster.num_gpus)
    best = planner.best(cluster, sizes)
    if best is None:
        raise planner.refuse(cluster, sizes)
    choices = list(planner.choices(cluster, sizes))
    as_set = _find_configured(planner, choices)
    cost = planner.cost(best.micro_batch, best.recompute, cluster.num_gpus)
    return {
        "run": _describe_run(planner, assumptions),
        "cluster": _describe_cluster(planner, cluster),
        "assumptions": {
            "mfu": cluster.mfu,
            "mfu_is_given": assumptions.is_mfu_given,
            "text_tokens": planner.text_tokens,
            "image_kb": assumptions.image_bytes / 1e3,
            "reserved_gb": RESERVED_BYTES / 1e9,
            "price_per_gpu_hour": assumptions.price or None,
        },
        "states_gb": {str(stage): _describe_states(planner, cluster, stage) for stage in STAGES},
        "choices": [_describe_memory(choice) for choice in choices],
        "best": {
            **_describe_memory(best),
            "flags": flags_of(planner, best),
            "parts_gb": {
                **{f"activations, {name}": part.kept / 1e9 for name, part in cost.parts.items()},
                "workspace": best.workspace / 1e9,
                "reserved": RESERVED_BYTES / 1e9,
            },
            **_describe_speed(planner, cluster, best, assumptions),
        },
        "as_set": None
        if as_set is None
        else {**_describe_memory(as_set), **_describe_speed(planner, cluster, as_set, assumptions)},
        "gflop_per_pair": {
            "published": sum(count_published_step(planner.config.model, planner.config.objectives).values()) / 1e9,
            "ours": cost.work / best.micro_batch / 1e9,
            "repeated": cost.repeated / best.micro_batch / 1e9,
        },
        "scaling": [_scale(planner, cluster, num_gpus, assumptions) for num_gpus in SCALES],
    }


def flags_of(planner: Planner, choice: Choice) -> list[str]:
    """Return the flags of pretrain/train.py for a choice."""
    config = planner.config
    flags = [f"--data.micro_batch_size={choice.micro_batch}"]
    if choice.recompute or config.compute.recompute:
        flags.append(f"--compute.recompute={','.join(choice.recompute)}")
    return flags


def _find_configured(planner: Planner, choices: Sequence[Choice]) -> Choice | None:
    """Return the choice that the run's own settings make; None if its micro-batch does not divide the global batch."""
    config = planner.config
    for choice in choices:
        is_stage, is_size = choice.stage == planner.splitting.stage, choice.micro_batch == config.data.micro_batch_size
        if is_stage and is_size and set(choice.recompute) == set(config.compute.recompute):
            return choice
    return None


def _describe_run(planner: Planner, assumptions: Assumptions) -> dict[str, Any]:
    config, splitting = planner.config, planner.splitting
    return {
        "name": config.name,
        "steps": config.optim.total_steps,
        "global_batch_size": config.data.global_batch_size,
        "precision": "bf16" if splitting.bf16 else "fp32",
        "deepspeed": assumptions.memory_file,
        "zero_stage": splitting.stage,
        "parameters_trained": planner.parameters.trained,
        "parameters_frozen": planner.parameters.frozen,
        "objectives": list(config.objectives.heads),
    }


def _describe_cluster(planner: Planner, cluster: Cluster) -> dict[str, Any]:
    return {
        "gpu": cluster.gpu,
        "gpus": cluster.num_gpus,
        "nodes": cluster.num_nodes,
        "gpus_per_node": cluster.gpus_per_node,
        "nics_per_node": cluster.nics_per_node,
        "nic_gbps": cluster.nic_gbps,
        "memory_gb": cluster.device.memory_gb,
        "peak_tflops": cluster.peak(planner.splitting) / 1e12,
        "source": cluster.device.source,
    }


def _describe_states(planner: Planner, cluster: Cluster, stage: int) -> dict[str, Any]:
    states = count_states(stage, planner.parameters, planner.splitting, cluster.num_gpus)._asdict()
    sizes = {name: size / 1e9 for name, size in states.items() if name != "stage"}
    return {**sizes, "not_offered": why_not_offered(stage, planner.splitting) or None}


def _describe_memory(choice: Choice) -> dict[str, Any]:
    return {
        "zero_stage": choice.stage,
        "micro_batch": choice.micro_batch,
        "recompute": list(choice.recompute),
        "states_gb": choice.states.total / 1e9,
        "activations_gb": choice.kept / 1e9,
        "workspace_gb": choice.workspace / 1e9,
        "total_gb": choice.total / 1e9,
        "fits": choice.fits,
        "offered": choice.offered,
    }


def _describe_speed(planner: Planner, cluster: Cluster, choice: Choice, assumptions: Assumptions) -> dict[str, Any]:
    """Return the network, time, data, cost and energy of a choice."""
    config, device = planner.config, cluster.device
    timing = planner.time(cluster, choice)
    pairs_per_second = config.data.global_batch_size / timing.step
    images_per_second = pairs_per_second * (1.5 if planner.reads_negatives else 1.0)
    hours = timing.step * config.optim.total_steps / 3600
    gpu_hours = hours * cluster.num_gpus
    sent_bytes = timing.reduce_bytes + timing.gather_bytes
    return {
        "accumulation_steps": timing.accumulation,
        "seconds": {
            "compute": timing.compute,
            "backward_of_micro_step": timing.backward,
            "gradients_of_micro_step": timing.reduce,
            "gradients_waited_for": timing.reduce_exposed,
            "weights_gathered": timing.gather,
            "optimizer": timing.optimizer,
            "step": timing.step,
        },
        "network_gb_per_step": {
            "gradients_per_gpu": timing.reduce_bytes / 1e9,
            "gradients_per_gpu_by_reduce_scatter": timing.reduce_bytes / 2e9,
            "weights_per_gpu": timing.gather_bytes / 1e9,
            "per_nic": sent_bytes / cluster.nics_per_node / 1e9 if cluster.num_nodes > 1 else 0.0,
        },
        "gradients_hide_behind_backward": timing.reduce <= timing.backward,
        "pairs_per_second": pairs_per_second,
        "pairs_per_second_per_gpu": pairs_per_second / cluster.num_gpus,
        "images_per_second": images_per_second,
        "decode_cores_per_gpu": {
            size: images_per_second / cluster.num_gpus / rate for size, rate in DECODES_PER_CORE.items()
        },
        "read_gb_per_second": images_per_second * assumptions.image_bytes / 1e9,
        "hours": hours,
        "days": hours * 3600 / _SECONDS_PER_DAY,
        "gpu_hours": gpu_hours,
        "cost": gpu_hours * assumptions.price if assumptions.price else None,
        "energy_mwh": {
            "gpus": gpu_hours * device.power_watts / 1e6,
            "servers": gpu_hours * device.server_watts / 1e6 if device.server_watts else None,
        },
    }


def _scale(planner: Planner, cluster: Cluster, num_gpus: int, assumptions: Assumptions) -> dict[str, Any]:
    """Return a row of the scaling table: the best choice on so many GPUs, or why there is none."""
    config = planner.config
    per_node = min(cluster.gpus_per_node if cluster.num_nodes > 1 else 8, num_gpus)
    nics = max(1, round(cluster.nics_per_node * per_node / cluster.gpus_per_node))
    scaled = replace(cluster, num_gpus=num_gpus, gpus_per_node=per_node, nics_per_node=nics)
    row: dict[str, Any] = {"gpus": num_gpus, "negative_group_size": config.data.negative_group_size}
    try:
        sizes = planner.micro_batches(num_gpus)
    except ConfigError:
        # More GPUs than groups of negatives: smaller groups, as cut_global_batch advises.
        row["negative_group_size"] = config.data.global_batch_size // num_gpus
        if row["negative_group_size"] < 2 or config.data.global_batch_size % num_gpus:
            return {**row, "problem": "the global batch does not divide"}
        sizes = planner.micro_batches(num_gpus, row["negative_group_size"])
    best = planner.best(scaled, sizes)
    if best is None:
        return {**row, "problem": "nothing fits"}
    memory, speed = _describe_memory(best), _describe_speed(planner, scaled, best, assumptions)
    return {
        **row,
        "problem": None,
        **{name: memory[name] for name in ("micro_batch", "recompute", "total_gb")},
        "step_seconds": speed["seconds"]["step"],
        "computing": speed["seconds"]["compute"] / speed["seconds"]["step"],
        **{
            name: speed[name]
            for name in ("accumulation_steps", "pairs_per_second", "days", "gpu_hours", "cost", "energy_mwh")
        },
    }
