"""The sections and panels of the W&B workspace, over the metrics of docs/metrics.md."""

from __future__ import annotations

import math
import re
from typing import Any

import wandb_workspaces.reports.v2 as wr
import wandb_workspaces.workspaces as ws

from bridgetower.config.run import ObjectivesConfig
from bridgetower.evaluation.table import LABELS
from pretrain.paper_scores import PAPER_SCORES
from pretrain.presets import PRESETS

# Parts of a metric's name, as docs/metrics.md writes it, that differ between runs.
_PLACEHOLDERS = re.compile("CORPUS|GROUP|SPLIT")
_OBJECTIVES = ObjectivesConfig(mlm=True, itm=True, itc=True).heads
_COLUMNS = 3
_FRACTION = (0.0, 1.0)
# Settings that most often differ between runs, for the comparison.
_COMPARED_SETTINGS = ("optim.base_lr", "optim.fusion_lr_scale", "data.global_batch_size", "model.fusion.num_layers")
_RUN_TABLE = ("train/loss/total", "progress/epoch", "progress/eta_hours", "speed/pairs_per_second", "speed/mfu")


def workspace(entity: str, project: str, name: str) -> Any:
    """Build the workspace, a ``wandb_workspaces.workspaces.Workspace`` that is not yet sent.

    Raises:
        ValueError: the name contains signs that W&B does not accept.
    """
    return ws.Workspace(
        entity=entity,
        project=project,
        name=name,
        sections=[
            _section("Training health", _health()),
            _section("By corpus", _by_corpus()),
            _section("Speed", _speed()),
            _section("Data", _data()),
            _section("Memory and pauses", _memory()),
            _section("Held-out scores", _held_out()),
            _section("Comparison of runs", _comparison(), columns=2),
            _section("Paper targets", _paper_targets(), columns=2),
        ],
        runset_settings=ws.RunsetSettings(pinned_columns=[f"summary:{name}" for name in _RUN_TABLE]),
    )


def _section(name: str, panels: list[Any], columns: int = _COLUMNS) -> Any:
    """Build a section that shows all of its panels at once."""
    layout = ws.SectionLayoutSettings(columns=columns, rows=math.ceil(len(panels) / columns))
    return ws.Section(name=name, panels=panels, is_open=True, layout_settings=layout)


def _lines(title: str, *names: str, unit: str = "", **settings: Any) -> Any:
    """Build a panel of curves over the steps.

    Args:
        names: metrics; or one name with placeholders, for all metrics that fit it.
    """
    if _PLACEHOLDERS.search(names[0]) is None:
        return wr.LinePlot(title=title, y=list(names), title_y=unit or None, **settings)
    (name,) = names
    expression = "[^/]+".join(re.escape(fixed) for fixed in _PLACEHOLDERS.split(name))
    return wr.LinePlot(title=title, metric_regex=f"^{expression}$", title_y=unit or None, **settings)


def _health() -> list[Any]:
    return [
        _lines("Loss, all objectives", "train/loss/total", unit="nats"),
        *(_lines(f"Loss, {name.upper()}", f"train/loss/{name}", unit="nats") for name in _OBJECTIVES),
        *(
            _lines(f"Accuracy, {name.upper()}", f"train/accuracy/{name}", unit="fraction", range_y=_FRACTION)
            for name in _OBJECTIVES
        ),
        _lines("Gradient norm, before clipping", "optim/grad_norm", log_y=True),
        _lines(
            "Gradient norm by part",
            *(f"optim/grad_norm/{part}" for part in ("vision", "text", "fusion", "heads")),
            log_y=True,
        ),
        _lines("Learning rates", "optim/lr/GROUP"),
        _lines("Updates skipped (gradient not finite)", "optim/skipped_updates", unit="steps"),
        _lines("Pairs replaced (could not be read)", "train/replaced_fraction", unit="fraction"),
        _lines("ITC temperature", "train/temperature"),
    ]


def _by_corpus() -> list[Any]:
    return [
        _lines("Fraction of the pairs", "train/corpus/CORPUS/share", unit="fraction", range_y=_FRACTION),
        *(
            _lines(f"Loss by corpus, {name.upper()}", f"train/corpus/CORPUS/loss/{name}", unit="nats")
            for name in _OBJECTIVES
        ),
        *(
            _lines(
                f"Accuracy by corpus, {name.upper()}",
                f"train/corpus/CORPUS/accuracy/{name}",
                unit="fraction",
                range_y=_FRACTION,
            )
            for name in _OBJECTIVES
        ),
    ]


def _speed() -> list[Any]:
    return [
        _lines("Pairs per second, all ranks", "speed/pairs_per_second", unit="1/s"),
        _lines("Pairs per second per rank", "speed/pairs_per_second_per_rank", unit="1/s"),
        _lines("Time per step", "speed/step_seconds", unit="s"),
        _lines("Model FLOPs utilisation", "speed/mfu", unit="fraction of the peak", range_y=_FRACTION),
        _lines("Operations per second per rank", "speed/tflops_per_rank", unit="TFLOP/s"),
        _lines("Epoch", "progress/epoch"),
        _lines("Time left, without pauses", "progress/eta_hours", unit="h"),
    ]


def _data() -> list[Any]:
    return [
        _lines("Wait for data, mean over ranks", "data/wait_fraction", unit="fraction", range_y=_FRACTION),
        _lines("Wait for data, slowest rank", "data/wait_fraction_of_slowest", unit="fraction", range_y=_FRACTION),
        _lines("Length of the captions", "train/tokens_per_pair", unit="tokens"),
    ]


def _memory() -> list[Any]:
    return [
        _lines("Device memory, peak in use", "memory/device_peak_gb", unit="GB"),
        _lines("Device memory, reserved by torch", "memory/device_reserved_gb", unit="GB"),
        _lines("Host memory of the training process", "memory/host_gb", unit="GB"),
        _lines("Pauses for checkpoints", "checkpoint/pause_seconds", unit="s"),
        _lines("Pauses for held-out scores", "evaluation/pause_seconds", unit="s"),
    ]


def _held_out() -> list[Any]:
    return [
        _lines(label, f"eval/SPLIT/{score}", range_y=(None, None) if score.endswith("loss") else _FRACTION)
        for score, label in LABELS.items()
    ]


def _comparison() -> list[Any]:
    loss, speed = "train/loss/total", "speed/pairs_per_second_per_rank"
    columns = [*(wr.Config(name) for name in _COMPARED_SETTINGS), wr.SummaryMetric(loss)]
    return [
        wr.RunComparer(diff_only=True),
        # Over pairs, not steps: runs with different batch sizes have then seen equally much at each point of the axis.
        _lines("Loss over pairs trained on", loss, unit="nats", x="progress/pairs", title_x="pairs"),
        wr.ParallelCoordinatesPlot(
            title="Settings and loss", columns=[wr.ParallelCoordinatesPlotColumn(metric=column) for column in columns]
        ),
        wr.ParameterImportancePlot(with_respect_to=loss),
        wr.BarPlot(title="Pairs per second per rank", metrics=[speed]),
        wr.ScatterPlot(
            title="Loss and pairs trained on", x=wr.SummaryMetric("progress/pairs"), y=wr.SummaryMetric(loss)
        ),
    ]


def _paper_targets() -> list[Any]:
    published = PRESETS["base_4m"]()
    pairs = published.optim.total_steps * published.data.global_batch_size
    return [
        wr.MarkdownPanel(markdown=_paper_table(pairs)),
        # W&B has no constant lines: the end of the axis stands for the paper's number.
        _lines(
            f"Pairs trained on; the axis ends at the paper's {pairs / 1e6:.1f} million",
            "progress/pairs",
            unit="pairs",
            range_y=(0.0, float(pairs)),
        ),
        _lines(LABELS["t2i_r1"], "eval/SPLIT/t2i_r1", range_y=_FRACTION),
        _lines(LABELS["i2t_r1"], "eval/SPLIT/i2t_r1", range_y=_FRACTION),
    ]


def _paper_table(pairs: int) -> str:
    """Return the paper's scores and its pretraining as Markdown."""
    published = PRESETS["base_4m"]()
    optim, batch = published.optim, published.data.global_batch_size
    rows = "\n".join(
        f"| {score.task} | {score.model} | {score.percent:.2f}% | {score.source} |" for score in PAPER_SCORES
    )
    return f"""### Scores of the paper

These scores are reached after fine-tuning on each task. A pretraining run's own held-out scores are not comparable:
they show that the run learns, not how far it is from the paper.

| task | model | accuracy | source |
|---|---|---|---|
{rows}

Pretraining: {optim.total_steps:,} steps of {batch:,} pairs ({pairs / 1e6:.1f} million) on 64 A100 GPUs. Peak learning
rate: {optim.base_lr:g} for the towers, {optim.base_lr * optim.fusion_lr_scale:g} for the cross-modal layers.
"""
