"""A plan as plain data: what is printed as tables and written as JSON."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from bridgetower.cost.closed_form import count_published_step
from bridgetower.errors import ConfigError
from pretrain.plan_memory import STAGES, count_states, why_not_offered
from pretrain.plan_time import (
    DECODES_PER_CORE,
    RESERVED_BYTES,
    Choice,
    Cluster,
    Planner,
)

_SECONDS_A_DAY = 86_400
SCALES = tuple(2**power for power in range(11))
"""Numbers of GPUs of the scaling table."""


def make_plan(
    planner: Planner, cluster: Cluster, *, memory_file: str, image_bytes: float, price: float, is_mfu_given: bool
) -> dict[str, Any]:
    """Plan a run.

    Args:
        memory_file: name of the file of ds_configs/.
        image_bytes: of a stored picture.
        price: of an hour of a GPU; 0: unknown.

    Raises:
        ConfigError: the GPUs do not divide the global batch, or nothing fits.
    """
    config, splitting = planner.config, planner.splitting
    sizes = planner.micro_batches(cluster.num_gpus)
    best = planner.best(cluster, sizes)
    if best is None:
        raise planner.refuse(cluster, sizes)
    choices = list(planner.choices(cluster, sizes))
    as_set = next(
        (
            choice
            for choice in choices
            if choice.stage == splitting.stage
            and choice.micro_batch == config.data.micro_batch_size
            and set(choice.recompute) == set(config.compute.recompute)
        ),
        None,
    )
    cost = planner.cost(best.micro_batch, best.recompute, cluster.num_gpus)
    options = {"image_bytes": image_bytes, "price": price}
    return {
        "run": {
            "name": config.name,
            "steps": config.optim.total_steps,
            "global_batch_size": config.data.global_batch_size,
            "precision": "bf16" if splitting.bf16 else "fp32",
            "deepspeed": memory_file,
            "zero_stage": splitting.stage,
            "parameters_trained": planner.parameters.trained,
            "parameters_frozen": planner.parameters.frozen,
            "objectives": list(config.objectives.heads),
        },
        "cluster": {
            "gpu": cluster.gpu,
            "gpus": cluster.num_gpus,
            "nodes": cluster.num_nodes,
            "gpus_per_node": cluster.gpus_per_node,
            "nics_per_node": cluster.nics_per_node,
            "nic_gbps": cluster.nic_gbps,
            "memory_gb": cluster.device.memory_gb,
            "peak_tflops": cluster.peak(splitting) / 1e12,
            "source": cluster.device.source,
        },
        "assumptions": {
            "mfu": cluster.mfu,
            "mfu_is_given": is_mfu_given,
            "text_tokens": planner.text_tokens,
            "image_kb": image_bytes / 1e3,
            "reserved_gb": RESERVED_BYTES / 1e9,
            "price_per_gpu_hour": price or None,
        },
        "states_gb": {
            str(stage): {
                **{
                    name: value / 1e9
                    for name, value in count_states(stage, planner.parameters, splitting, cluster.num_gpus)
                    ._asdict()
                    .items()
                    if name != "stage"
                },
                "not_offered": why_not_offered(stage, splitting) or None,
            }
            for stage in STAGES
        },
        "choices": [_choice(choice) for choice in choices],
        "best": {
            **_choice(best),
            "flags": flags_of(planner, best),
            "parts_gb": {
                **{f"activations, {name}": part.kept / 1e9 for name, part in cost.parts.items()},
                "workspace": best.workspace / 1e9,
                "reserved": RESERVED_BYTES / 1e9,
            },
            **_running(planner, cluster, best, **options),
        },
        "as_set": None if as_set is None else {**_choice(as_set), **_running(planner, cluster, as_set, **options)},
        "gflop_per_pair": {
            "published": count_published_step(config.model, config.objectives) / 1e9,
            "ours": cost.work / best.micro_batch / 1e9,
            "repeated": cost.repeated / best.micro_batch / 1e9,
        },
        "scaling": [_scaled(planner, cluster, num_gpus, price) for num_gpus in SCALES],
    }


def flags_of(planner: Planner, choice: Choice) -> list[str]:
    """What pretrain/train.py is given for a choice."""
    config = planner.config
    flags = [f"--data.micro_batch_size={choice.micro_batch}"]
    if choice.recompute or config.compute.recompute:
        flags.append(f"--compute.recompute={','.join(choice.recompute)}")
    return flags


def _choice(choice: Choice) -> dict[str, Any]:
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


def _running(planner: Planner, cluster: Cluster, choice: Choice, *, image_bytes: float, price: float) -> dict[str, Any]:
    """Network, time, data, cost and energy of a choice."""
    config, device = planner.config, cluster.device
    timing = planner.time(cluster, choice)
    pairs_per_second = config.data.global_batch_size / timing.step
    images_per_second = pairs_per_second * (1.5 if planner.reads_negatives else 1.0)
    hours = timing.step * config.optim.total_steps / 3600
    nodes = cluster.num_nodes
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
            "per_nic": (timing.reduce_bytes + timing.gather_bytes) / cluster.nics_per_node / 1e9 if nodes > 1 else 0.0,
        },
        "gradients_hide_behind_backward": timing.reduce <= timing.backward,
        "pairs_per_second": pairs_per_second,
        "pairs_per_second_per_gpu": pairs_per_second / cluster.num_gpus,
        "images_per_second": images_per_second,
        "decode_cores_per_gpu": {
            kind: images_per_second / cluster.num_gpus / rate for kind, rate in DECODES_PER_CORE.items()
        },
        "read_gb_per_second": images_per_second * image_bytes / 1e9,
        "hours": hours,
        "days": hours * 3600 / _SECONDS_A_DAY,
        "gpu_hours": hours * cluster.num_gpus,
        "cost": hours * cluster.num_gpus * price if price else None,
        "energy_mwh": {
            "gpus": hours * cluster.num_gpus * device.power_watts / 1e6,
            "servers": hours * cluster.num_gpus * device.server_watts / 1e6 if device.server_watts else None,
        },
    }


def _scaled(planner: Planner, cluster: Cluster, num_gpus: int, price: float) -> dict[str, Any]:
    """A row of the scaling table: the best choice at so many GPUs, or why there is none."""
    config = planner.config
    per_node = cluster.gpus_per_node if cluster.num_nodes > 1 else 8
    per_node = min(per_node, num_gpus)
    nics = max(1, round(cluster.nics_per_node * per_node / cluster.gpus_per_node))
    there = replace(cluster, num_gpus=num_gpus, gpus_per_node=per_node, nics_per_node=nics)
    row: dict[str, Any] = {"gpus": num_gpus, "negative_group_size": config.data.negative_group_size}
    try:
        sizes = planner.micro_batches(num_gpus)
    except ConfigError:
        # More GPUs than groups of negatives: smaller groups, as cut_global_batch advises.
        row["negative_group_size"] = config.data.global_batch_size // num_gpus
        if row["negative_group_size"] < 2 or config.data.global_batch_size % num_gpus:
            return {**row, "problem": "the global batch does not divide"}
        sizes = planner.micro_batches(num_gpus, row["negative_group_size"])
    best = planner.best(there, sizes)
    if best is None:
        return {**row, "problem": "nothing fits"}
    running = _running(planner, there, best, image_bytes=0.0, price=price)
    kept = ("accumulation_steps", "pairs_per_second", "days", "gpu_hours", "cost", "energy_mwh")
    return {
        **row,
        "problem": None,
        **{name: value for name, value in _choice(best).items() if name in ("micro_batch", "recompute", "total_gb")},
        "step_seconds": running["seconds"]["step"],
        "computing": running["seconds"]["compute"] / running["seconds"]["step"],
        **{name: running[name] for name in kept},
    }
