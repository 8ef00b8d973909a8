"""Print a plan as tables for the terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from bridgetower.cost.work import PARTS

_STAGE_COLUMNS = {
    "weights": "weights",
    "master_weights": "master weights",
    "optimizer": "Adam's states",
    "gradients": "gradients",
    "buckets": "reduce buckets",
}
"""Column titles by the keys of a plan's states_gb."""
_DECODING = {"pictures of 304 px": "JPEGs of 304 px", "pictures of 640 x 480": "JPEGs of 640 x 480"}
"""What is decoded, by the keys of a plan's decode_cores_per_gpu."""


def print_plan(plan: dict[str, Any]) -> None:
    """Print the result of ``plan_report.make_plan``."""
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    run, cluster, best, as_set = plan["run"], plan["cluster"], plan["best"], plan["as_set"]
    console.print(Text(_headline(run, cluster), style="bold"))
    for line in _assumptions(plan):
        console.print(Text(f"Assumed: {line}"))
    for table in (
        _states(plan),
        _choices(plan),
        _memory(plan),
        _times(plan, [best] if as_set is None or _same(as_set, best) else [best, as_set]),
        _scaling(plan),
    ):
        console.print()
        console.print(table)
    for line in _remarks(plan):
        console.print(Text(line))
    console.print()
    console.print(Text("Train the best choice:", style="bold"))
    flags = " ".join([f"--engine.deepspeed={run['deepspeed']}", *best["flags"]])
    console.print(Text(f"pretrain/train.py {run['name']} {flags}"), soft_wrap=True)


def _same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(one[name] == other[name] for name in ("micro_batch", "recompute"))


def _headline(run: dict[str, Any], cluster: dict[str, Any]) -> str:
    nodes = cluster["nodes"]
    network = (
        f"{nodes} nodes of {cluster['gpus_per_node']}, {cluster['nics_per_node']} x {cluster['nic_gbps']:g} Gb/s each"
        if nodes > 1
        else "one node"
    )
    return (
        f"{run['name']}: {run['steps']:,} steps of {run['global_batch_size']:,} pairs in {run['precision']} on "
        f"{cluster['gpus']} x {cluster['gpu']} ({network}); {run['parameters_trained'] / 1e6:,.1f} M parameters trained"
        + (f", {run['parameters_frozen'] / 1e6:,.1f} M frozen" if run["parameters_frozen"] else "")
    )


def _assumptions(plan: dict[str, Any]) -> Iterable[str]:
    assumed, cluster = plan["assumptions"], plan["cluster"]
    origin = "as given" if assumed["mfu_is_given"] else "an assumption, --mfu sets it"
    yield f"{assumed['mfu']:.0%} of {cluster['peak_tflops']:,.0f} TFLOP/s ({origin})"
    yield (
        f"captions of {assumed['text_tokens']:g} tokens (--text_tokens), images of {assumed['image_kb']:g} kB "
        f"(--image_kb), {assumed['reserved_gb']:g} GB for CUDA and NCCL"
    )


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for column_index, column in enumerate(columns):
        is_first, wraps = column_index == 0, column == "" or " " in column
        table.add_column(column, justify="left" if is_first else "right", no_wrap=not wraps)
    return table


def _states(plan: dict[str, Any]) -> Table:
    table = _table("GB per GPU by ZeRO stage, before activations", "stage", *_STAGE_COLUMNS.values(), "sum")
    for stage, states in plan["states_gb"].items():
        values = [states[name] for name in _STAGE_COLUMNS]
        chosen = int(stage) == plan["run"]["zero_stage"]
        name = f"{stage}{' *' if states['not_offered'] else ''}"
        table.add_row(name, *(f"{value:.2f}" for value in values), f"{sum(values):.2f}", style="bold" if chosen else "")
    reasons = {reason: stage for stage, states in plan["states_gb"].items() if (reason := states["not_offered"])}
    table.caption = "; ".join(f"* {stage}: {reason}" for reason, stage in reasons.items())
    table.caption_justify = "left"
    return table


def _name_parts(recompute: Sequence[str]) -> str:
    return "everything" if len(recompute) == len(PARTS) else ", ".join(recompute) or "nothing"


def _shorten_parts(recompute: Sequence[str]) -> str:
    return "all" if len(recompute) == len(PARTS) else "+".join(part[0] for part in recompute) or "none"


def _choices(plan: dict[str, Any]) -> Table:
    """Return the choices of the run's ZeRO stage; those of other stages differ by the states alone."""
    stage, best = plan["run"]["zero_stage"], plan["best"]
    choices = [choice for choice in plan["choices"] if choice["zero_stage"] == stage]
    columns = list(dict.fromkeys(tuple(choice["recompute"]) for choice in choices))
    table = _table(
        f"GB per GPU under stage {stage}, by what is recomputed (compute.recompute)",
        "pairs",
        *map(_shorten_parts, columns),
    )
    per_gpu = plan["run"]["global_batch_size"] // plan["cluster"]["gpus"]
    for size in dict.fromkeys(choice["micro_batch"] for choice in choices):
        row = [choice for choice in choices if choice["micro_batch"] == size]
        cells = [
            Text(
                f"{choice['total_gb']:.1f}" if choice["fits"] else f"({choice['total_gb']:.1f})",
                style="bold green" if _same(choice, best) else "" if choice["fits"] else "dim",
            )
            for choice in row
        ]
        table.add_row(f"{size} x {per_gpu // size}", *cells)
    table.caption = "pairs x micro-steps; recomputed: v vision, t text, f fusion"
    if not all(choice["fits"] for choice in choices):
        table.caption += f"; in brackets: more than the GPU's {plan['cluster']['memory_gb']:g} GB"
    table.caption_justify = "left"
    return table


def _memory(plan: dict[str, Any]) -> Table:
    best, cluster = plan["best"], plan["cluster"]
    states = plan["states_gb"][str(plan["run"]["zero_stage"])]
    sizes = {**{title: states[name] for name, title in _STAGE_COLUMNS.items()}, **best["parts_gb"]}
    choice = f"{best['micro_batch']} pairs, {_name_parts(best['recompute'])} recomputed"
    table = _table("Where the memory goes", "part", choice)
    for name, value in sizes.items():
        table.add_row(name, f"{value:.2f}")
    table.add_section()
    table.add_row(f"sum, GB of {cluster['memory_gb']:g}", f"{best['total_gb']:.2f}", style="bold")
    return table


def _times(plan: dict[str, Any], choices: Sequence[dict[str, Any]]) -> Table:
    cluster, flops = plan["cluster"], plan["gflop_per_pair"]
    heads = ["best", "as configured"][: len(choices)]
    table = _table("Speed, data, time and energy", "", *heads)

    def row(name: str, form: str, values: Iterable[float | None], scale: float = 1.0) -> None:
        shown = ["-" if value is None else form.format(value * scale) for value in values]
        table.add_row(name, *shown)

    def get(*path: str) -> list[Any]:
        values = []
        for choice in choices:
            value: Any = choice
            for name in path:
                value = value[name]
            values.append(value)
        return values

    sent = [choice["network_gb_per_step"] for choice in choices]
    waits = ["hidden" if choice["gradients_hide_behind_backward"] else "not hidden" for choice in choices]
    table.add_row("pairs x micro-steps per GPU", *(f"{c['micro_batch']} x {c['accumulation_steps']}" for c in choices))
    table.add_row("recomputed", *(_name_parts(c["recompute"]) for c in choices))
    row("memory, GB per GPU", "{:.1f}", get("total_gb"))
    table.add_section()
    table.add_row("GFLOP per pair, published step", *[f"{flops['published']:,.1f}"] * len(choices))
    table.add_row("GFLOP per pair, this step", *[f"{flops['ours']:,.1f}"] * len(choices))
    row("compute, ms", "{:,.1f}", get("seconds", "compute"), 1e3)
    row("gradients sent, GB per GPU (all-reduce)", "{:.2f}", [s["gradients_per_gpu"] for s in sent])
    row("weights gathered, GB per GPU", "{:.2f}", [s["weights_per_gpu"] for s in sent])
    if cluster["nodes"] > 1:
        row("sent, GB per NIC", "{:.2f}", [s["per_nic"] for s in sent])
    row("gradients of one micro-step, ms", "{:,.1f}", get("seconds", "gradients_of_micro_step"), 1e3)
    row("backward pass of one micro-step, ms", "{:,.1f}", get("seconds", "backward_of_micro_step"), 1e3)
    table.add_row("gradients behind the backward pass", *waits)
    row("waiting for the last gradients, ms", "{:,.1f}", get("seconds", "gradients_waited_for"), 1e3)
    row("waiting for weights, ms", "{:,.1f}", get("seconds", "weights_gathered"), 1e3)
    row("optimizer, ms", "{:,.1f}", get("seconds", "optimizer"), 1e3)
    row("step, ms", "{:,.1f}", get("seconds", "step"), 1e3)
    table.add_section()
    row("pairs per second", "{:,.0f}", get("pairs_per_second"))
    for key, images in _DECODING.items():
        row(f"cores per GPU for {images}", "{:.2f}", get("decode_cores_per_gpu", key))
    row("reading images, GB/s", "{:.2f}", get("read_gb_per_second"))
    table.add_section()
    row("hours", "{:,.2f}", get("hours"))
    row("days", "{:,.2f}", get("days"))
    row("GPU hours", "{:,.0f}", get("gpu_hours"))
    row("cost", "{:,.0f}", get("cost"))
    row("MWh, GPUs at full power", "{:,.3f}", get("energy_mwh", "gpus"))
    row("MWh, whole servers at full power", "{:,.3f}", get("energy_mwh", "servers"))
    return table


def _scaling(plan: dict[str, Any]) -> Table:
    has_price = plan["assumptions"]["price_per_gpu_hour"]
    table = _table(
        "The same run on other numbers of GPUs, each with its best choice",
        *("GPUs", "pairs", "recompute", "GB", "ms", "busy", "pairs/s", "days"),
        *(["cost"] if has_price else ["GPUh", "MWh"]),
    )
    table.padding = (0, 0, 0, 1)  # so that 80 columns are enough
    table.caption = "busy: fraction of a step that is compute" + ("" if has_price else "; MWh: GPUs alone")
    table.caption_justify = "left"
    for row in plan["scaling"]:
        mark = "" if row["negative_group_size"] == plan["scaling"][0]["negative_group_size"] else " *"
        if row["problem"]:
            table.add_row(f"{row['gpus']:,}{mark}", row["problem"])
            continue
        table.add_row(
            f"{row['gpus']:,}{mark}",
            f"{row['micro_batch']}x{row['accumulation_steps']}",
            _shorten_parts(row["recompute"]),
            f"{row['total_gb']:.1f}",
            f"{row['step_seconds'] * 1e3:,.0f}",
            f"{row['computing']:.0%}",
            f"{row['pairs_per_second']:,.0f}",
            f"{row['days']:,.2f}",
            *(
                [f"{row['cost']:,.0f}"]
                if has_price
                else [f"{row['gpu_hours']:,.0f}", f"{row['energy_mwh']['gpus']:,.2f}"]
            ),
            style="bold" if row["gpus"] == plan["cluster"]["gpus"] else "",
        )
    return table


def _remarks(plan: dict[str, Any]) -> Iterable[str]:
    usual = plan["scaling"][0]["negative_group_size"]
    smaller = [row for row in plan["scaling"] if row["negative_group_size"] != usual and not row["problem"]]
    if smaller:
        sizes = ", ".join(f"{row['negative_group_size']} at {row['gpus']:,}" for row in smaller)
        yield (
            f"* More GPUs than groups of {usual} pairs: --data.negative_group_size is smaller there ({sizes}), which "
            "draws other negatives."
        )
    if "itc" in plan["run"]["objectives"]:
        yield "ITC compares the pairs of all GPUs' micro-batches, so the loss depends on the micro-batch."
    if plan["as_set"] is None:
        yield "As configured, data.micro_batch_size does not divide the global batch on so many GPUs."
    elif not plan["as_set"]["fits"]:
        yield "As configured, the run does not fit."
