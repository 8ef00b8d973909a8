"""What a run will need, before it is started: ``python pretrain/plan.py base_4m --gpus=64 --gpu=a100-80g``."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import fire
from fire.decorators import SetParseFn

from bridgetower.config.cli import config_from_cli, parse_whole, run_command
from bridgetower.config.deepspeed import read_named_memory_config
from bridgetower.config.overrides import unknown_name, walk_fields
from bridgetower.errors import ConfigError
from bridgetower.io.files import write_atomically
from pretrain.presets import DS_CONFIGS, PRESETS

_FLAGS = {
    "gpus": "number of GPUs (default 64)",
    "gpu": "kind of GPU: a100-40g, a100-80g, h100, h100-pcie, h100-nvl, h200, b200, l40s (default a100-80g)",
    "nodes": "number of nodes (default: as few as nodes of 8 GPUs allow)",
    "nic_gbps": "10^9 bits a second of a NIC, one way (default 200)",
    "nics": "NICs of a node (default: one a GPU)",
    "mfu": "share of the GPU's operations that is reached, 0 to 1 (default: of the kind of GPU, an assumption)",
    "text_tokens": "mean length of captions, with <s> and </s> (default 12)",
    "image_kb": "size of a stored picture, 10^3 bytes (default 30)",
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
    _refuse_unknown(preset, overrides)
    config = config_from_cli(PRESETS, preset, unexpected, overrides, USAGE)
    num_gpus, num_nodes, num_nics = (
        parse_whole(name, text, least)
        for name, text, least in (("gpus", gpus, 1), ("nodes", nodes, 0), ("nics", nics, 0))
    )
    numbers = {
        "nic_gbps": _parse_number("nic_gbps", nic_gbps),
        "mfu": _parse_number("mfu", mfu, most=1.0),
        "text_tokens": _parse_number("text_tokens", text_tokens, least=3.0, most=float(config.model.text.max_tokens)),
        "image_kb": _parse_number("image_kb", image_kb),
        "price_per_gpu_hour": _parse_number("price_per_gpu_hour", price_per_gpu_hour),
    }
    if not numbers["nic_gbps"]:
        raise ConfigError("--nic_gbps=0 connects no nodes. Give the speed of a NIC, e.g. --nic_gbps=200.")
    if num_nodes and num_gpus % num_nodes:
        whole = -(-num_gpus // num_nodes) * num_nodes
        raise ConfigError(
            f"--gpus={num_gpus} does not divide into --nodes={num_nodes}. Use --gpus={whole}, or other --nodes."
        )
    if json and not Path(json).parent.is_dir():
        raise ConfigError(f"--json={json}: there is no folder {Path(json).parent}. Make it, or use another path.")
    # What takes seconds to import stays behind the checks that do not need it.
    from bridgetower.cost.devices import DEVICES
    from bridgetower.model.sizes import complete_model_config
    from pretrain import plan_memory, plan_report
    from pretrain.plan_time import Cluster, Planner

    if gpu not in DEVICES:
        raise ConfigError(unknown_name("GPU", gpu, DEVICES))
    name = "zero2_bf16" if config.engine.deepspeed == "auto" else config.engine.deepspeed
    splitting = plan_memory.read_splitting(read_named_memory_config(name, DS_CONFIGS))
    config = replace(config, model=complete_model_config(config.model))
    gpus_per_node = num_gpus // num_nodes if num_nodes else min(8, num_gpus)
    cluster = Cluster(
        gpu=gpu,
        device=DEVICES[gpu],
        num_gpus=num_gpus,
        gpus_per_node=gpus_per_node,
        nic_gbps=numbers["nic_gbps"],
        nics_per_node=num_nics or gpus_per_node,
        mfu=numbers["mfu"] or DEVICES[gpu].mfu,
    )
    planner = Planner(config, plan_memory.count_parameters(config), splitting, numbers["text_tokens"])
    plan = plan_report.make_plan(
        planner,
        cluster,
        memory_file=name,
        image_bytes=numbers["image_kb"] * 1e3,
        price=numbers["price_per_gpu_hour"],
        is_mfu_given=bool(numbers["mfu"]),
    )
    if not json:
        from pretrain.plan_tables import print_plan

        print_plan(plan)
    else:
        _write_json(plan, json)


def _write_json(plan: dict[str, object], target: str) -> None:
    text = json.dumps(plan, indent=1) + "\n"
    if target.lower() == "true":  # --json without a value
        print(text, end="")
        return
    write_atomically(Path(target), text.encode())
    print(target)


def _refuse_unknown(preset: str, overrides: dict[str, str]) -> None:
    """Name the nearest of flags and settings for one that is neither."""
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
