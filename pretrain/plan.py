"""Plan what a run will need, before it is started: ``python pretrain/plan.py base_4m --gpus=64 --gpu=a100-80g``."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import fire
from fire.decorators import SetParseFn

from bridgetower.config.cli import config_from_cli, parse_whole, run_command
from bridgetower.config.deepspeed import read_named_memory_config
from bridgetower.config.overrides import unknown_name, walk_fields
from bridgetower.config.run import RunConfig
from bridgetower.errors import ConfigError
from bridgetower.io.files import write_atomically
from pretrain.presets import DS_CONFIGS, PRESETS

_FLAGS = {
    "gpus": "number of GPUs (default 64)",
    "gpu": "type of GPU: a100-40g, a100-80g, h100, h100-pcie, h100-nvl, h200, b200, l40s (default a100-80g)",
    "nodes": "number of nodes (default: as few nodes of 8 GPUs as possible)",
    "nic_gbps": "10^9 bits per second of a NIC, one way (default 200)",
    "nics": "NICs per node (default: one per GPU)",
    "mfu": "fraction of the GPU's peak operations per second that is reached, 0 to 1 (default: an assumption per GPU)",
    "text_tokens": "mean length of captions, with <s> and </s> (default 12)",
    "image_kb": "size of a stored image, 10^3 bytes (default 30)",
    "price_per_gpu_hour": "in any currency (default: no cost is shown)",
    "json": "print JSON instead of tables, or write it to a file: --json=plan.json",
}
USAGE = (
    "Usage: python pretrain/plan.py PRESET|RUN.json [flags] [--section.field=value ...]\n\n"
    "Memory, speed, data, time, cost and energy of a run on GPUs that need not be there; docs/plan.md has every "
    "formula.\n\nFlags:\n" + "\n".join(f"  --{name:18}  {meaning}" for name, meaning in _FLAGS.items())
)


def main(
    preset: str = "",
    *unexpected: str,
    gpus: str = "64",
    gpu: str = "a100-80g",
    nodes: str = "0",
    nic_gbps: str = "200",
    nics: str = "0",
    mfu: str = "0",
    text_tokens: str = "12",
    image_kb: str = "30",
    price_per_gpu_hour: str = "0",
    json: str = "",
    **overrides: str,
) -> None:
    """Plan ``preset`` with dotted overrides."""
    _refuse_unknown(overrides)
    config = config_from_cli(PRESETS, preset, unexpected, overrides, USAGE)
    counts = {
        name: parse_whole(name, text, least)
        for name, text, least in (("gpus", gpus, 1), ("nodes", nodes, 0), ("nics", nics, 0))
    }
    numbers = {
        "nic_gbps": _parse_number("nic_gbps", nic_gbps),
        "mfu": _parse_number("mfu", mfu, most=1.0),
        "text_tokens": _parse_number("text_tokens", text_tokens, least=3.0, most=float(config.model.text.max_tokens)),
        "image_kb": _parse_number("image_kb", image_kb),
        "price_per_gpu_hour": _parse_number("price_per_gpu_hour", price_per_gpu_hour),
    }
    _check_cluster(counts["gpus"], counts["nodes"], numbers["nic_gbps"])
    if json and not Path(json).parent.is_dir():
        raise ConfigError(f"--json={json}: there is no folder {Path(json).parent}. Make it, or use another path.")
    plan = _make_plan(config, gpu, counts, numbers)
    if json:
        _write_json(plan, json)
        return
    from pretrain.plan_tables import print_plan

    print_plan(plan)


def _check_cluster(num_gpus: int, num_nodes: int, nic_gbps: float) -> None:
    if not nic_gbps:
        raise ConfigError("--nic_gbps=0 connects no nodes. Give the speed of a NIC, e.g. --nic_gbps=200.")
    if num_nodes and num_gpus % num_nodes:
        whole = -(-num_gpus // num_nodes) * num_nodes
        raise ConfigError(
            f"--gpus={num_gpus} does not divide into --nodes={num_nodes}. Use --gpus={whole}, or other --nodes."
        )


def _make_plan(config: RunConfig, gpu: str, counts: Mapping[str, int], numbers: Mapping[str, float]) -> dict[str, Any]:
    """Make the plan of a run.

    Args:
        counts: the flags that are whole numbers, by name; 0 nodes or NICs: the default.
        numbers: the other flags that are numbers, by name; an MFU of 0: the device's.

    Raises:
        ConfigError: the GPU is unknown, there is no formula for the model, or the run does not fit.
    """
    # These import torch, which takes seconds, so they stand behind the checks that do not need it.
    from bridgetower.cost.devices import DEVICES
    from bridgetower.model.sizes import complete_model_config
    from pretrain.plan_memory import count_parameters, read_splitting
    from pretrain.plan_report import Assumptions, make_plan
    from pretrain.plan_time import Cluster, Planner

    if gpu not in DEVICES:
        raise ConfigError(unknown_name("GPU", gpu, DEVICES))
    memory_file = "zero2_bf16" if config.engine.deepspeed == "auto" else config.engine.deepspeed
    splitting = read_splitting(read_named_memory_config(memory_file, DS_CONFIGS))
    config = replace(config, model=complete_model_config(config.model))
    gpus_per_node = counts["gpus"] // counts["nodes"] if counts["nodes"] else min(8, counts["gpus"])
    cluster = Cluster(
        gpu=gpu,
        device=DEVICES[gpu],
        num_gpus=counts["gpus"],
        gpus_per_node=gpus_per_node,
        nic_gbps=numbers["nic_gbps"],
        nics_per_node=counts["nics"] or gpus_per_node,
        mfu=numbers["mfu"] or DEVICES[gpu].mfu,
    )
    assumptions = Assumptions(
        memory_file=memory_file,
        image_bytes=numbers["image_kb"] * 1e3,
        price=numbers["price_per_gpu_hour"],
        is_mfu_given=bool(numbers["mfu"]),
    )
    planner = Planner(config, count_parameters(config), splitting, numbers["text_tokens"])
    return make_plan(planner, cluster, assumptions)


def _write_json(plan: dict[str, Any], target: str) -> None:
    """Write a plan to a file; to the terminal if --json was given without a value, which fire reads as True."""
    text = json.dumps(plan, indent=1) + "\n"
    if target.lower() == "true":
        print(text, end="")
        return
    write_atomically(Path(target), text.encode())
    print(target)


def _refuse_unknown(overrides: Mapping[str, str]) -> None:
    """Stop at a name that is neither a flag nor a setting, and suggest the nearest of both."""
    known = [name for name, *_ in walk_fields(next(iter(PRESETS.values()))())]
    for name in overrides:
        if name not in (*known, "help", "h"):
            raise ConfigError(unknown_name("flag", f"--{name}", [*_FLAGS, *known]))


def _parse_number(name: str, text: str, *, least: float = 0.0, most: float = math.inf) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not least <= number <= most or math.isinf(number):
        bounds = f"from {least:g} to {most:g}" if most < math.inf else f"of {least:g} or more"
        raise ConfigError(f"--{name}={text} is not a number {bounds}.")
    return number


if __name__ == "__main__":
    run_command(lambda: fire.Fire(SetParseFn(str)(main)))
