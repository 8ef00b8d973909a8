"""What the W&B workspace shows: its sections and panels, over the names of docs/metrics.md."""

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

# Parts of a name that a run decides.
_PLACES = re.compile("CORPUS|GROUP|SPLIT")
_OBJECTIVES = ObjectivesConfig(mlm=True, itm=True, itc=True).heads
_COLUMNS = 3
_SHARE = (0.0, 1.0)
# What sets runs apart most often, for the comparison.
_COMPARED_SETTINGS = ("optim.base_lr", "optim.fusion_lr_scale", "data.global_batch_size", "model.fusion.num_layers")
_RUN_TABLE = ("train/loss/total", "progress/epoch", "progress/eta_hours", "speed/pairs_per_second", "speed/mfu")


def workspace(entity: str, project: str, name: str) -> Any:
    """The workspace, not yet sent: a ``wandb_workspaces.workspaces.Workspace``.

    Raises:
        ValueError: the name holds signs that W&B does not take.
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
    """A section that shows all of its panels at once."""
    layout = ws.SectionLayoutSettings(columns=columns, rows=math.ceil(len(panels) / columns))
    return ws.Section(name=name, panels=panels, is_open=True, layout_settings=layout)


def _lines(title: str, *names: str, unit: str = "", **settings: Any) -> Any:
    """Curves over the steps: of metrics by name, or of all that fit one name with places that a run fills in."""
    if _PLACES.search(names[0]) is None:
        return wr.LinePlot(title=title, y=list(names), title_y=unit or None, **settings)
    (name,) = names
    expression = "[^/]+".join(re.escape(part) for part in _PLACES.split(name))
    return wr.LinePlot(title=title, metric_regex=f"^{expression}$", title_y=unit or None, **settings)


def _health() -> list[Any]:
    return [
        _lines("Loss, all objectives", "train/loss/total", unit="nats"),
        *(_lines(f"Loss, {one.upper()}", f"train/loss/{one}", unit="nats") for one in _OBJECTIVES),
        *(
            _lines(f"Accuracy, {one.upper()}", f"train/accuracy/{one}", unit="share", range_y=_SHARE)
            for one in _OBJECTIVES
        ),
        _lines("Gradient norm, before clipping", "optim/grad_norm", log_y=True),
        _lines(
            "Gradient norm by part",
            *(f"optim/grad_norm/{part}" for part in ("vision", "text", "fusion", "heads")),
            log_y=True,
        ),
        _lines("Learning rates", "optim/lr/GROUP"),
        _lines("Updates skipped, as the gradient was not finite", "optim/skipped_updates", unit="steps"),
        _lines("Pairs replaced, as they could not be read", "train/replaced_fraction", unit="share"),
        _lines("ITC temperature", "train/temperature"),
    ]


def _by_corpus() -> list[Any]:
    return [
        _lines("Share of the pairs", "train/corpus/CORPUS/share", unit="share", range_y=_SHARE),
        *(
            _lines(f"Loss by corpus, {one.upper()}", f"train/corpus/CORPUS/loss/{one}", unit="nats")
            for one in _OBJECTIVES
        ),
        *(
            _lines(
                f"Accuracy by corpus, {one.upper()}",
                f"train/corpus/CORPUS/accuracy/{one}",
                unit="share",
                range_y=_SHARE,
            )
            for one in _OBJECTIVES
        ),
    ]


def _speed() -> list[Any]:
    return [
        _lines("Pairs a second, all ranks", "speed/pairs_per_second", unit="1/s"),
        _lines("Pairs a second and rank", "speed/pairs_per_second_per_rank", unit="1/s"),
        _lines("Time of a step", "speed/step_seconds", unit="s"),
        _lines("Model FLOPs utilisation", "speed/mfu", unit="share of the peak", range_y=_SHARE),
        _lines("Operations a second and rank", "speed/tflops_per_rank", unit="TFLOP/s"),
        _lines("Epoch", "progress/epoch"),
        _lines("Time left, without pauses", "progress/eta_hours", unit="h"),
    ]


def _data() -> list[Any]:
    return [
        _lines("Waits for data, mean over ranks", "data/wait_fraction", unit="share", range_y=_SHARE),
        _lines("Waits for data, slowest rank", "data/wait_fraction_of_slowest", unit="share", range_y=_SHARE),
        _lines("Length of the captions", "train/tokens_per_pair", unit="tokens"),
    ]


def _memory() -> list[Any]:
    return [
        _lines("Device memory, most in use", "memory/device_peak_gb", unit="GB"),
        _lines("Device memory, taken by torch", "memory/device_reserved_gb", unit="GB"),
        _lines("Host memory of the training process", "memory/host_gb", unit="GB"),
        _lines("Pauses for checkpoints", "checkpoint/pause_seconds", unit="s"),
        _lines("Pauses for held-out scores", "evaluation/pause_seconds", unit="s"),
    ]


def _held_out() -> list[Any]:
    return [
        _lines(label, f"eval/SPLIT/{score}", range_y=(None, None) if score.endswith("loss") else _SHARE)
        for score, label in LABELS.items()
    ]


def _comparison() -> list[Any]:
    loss, speed = "train/loss/total", "speed/pairs_per_second_per_rank"
    columns = [*(wr.Config(name) for name in _COMPARED_SETTINGS), wr.SummaryMetric(loss)]
    return [
        wr.RunComparer(diff_only=True),
        # Runs of different batch sizes have seen the same at the same place of this axis.
        _lines("Loss over pairs trained on", loss, unit="nats", x="progress/pairs", title_x="pairs"),
        wr.ParallelCoordinatesPlot(
            title="Settings and loss", columns=[wr.ParallelCoordinatesPlotColumn(metric=column) for column in columns]
        ),
        wr.ParameterImportancePlot(with_respect_to=loss),
        wr.BarPlot(title="Pairs a second and rank", metrics=[speed]),
        wr.ScatterPlot(
            title="Loss and pairs trained on", x=wr.SummaryMetric("progress/pairs"), y=wr.SummaryMetric(loss)
        ),
    ]


def _paper_targets() -> list[Any]:
    published = PRESETS["base_4m"]()
    pairs = published.optim.total_steps * published.data.global_batch_size
    return [
        wr.MarkdownPanel(markdown=_paper_table(pairs)),
        # W&B has no constant lines: the end of the axis stands for one.
        _lines(
            f"Pairs trained on; the axis ends at the paper's {pairs / 1e6:.1f} million",
            "progress/pairs",
            unit="pairs",
            range_y=(0.0, float(pairs)),
        ),
        _lines(LABELS["t2i_r1"], "eval/SPLIT/t2i_r1", range_y=_SHARE),
        _lines(LABELS["i2t_r1"], "eval/SPLIT/i2t_r1", range_y=_SHARE),
    ]


def _paper_table(pairs: int) -> str:
    published = PRESETS["base_4m"]()
    optim, batch = published.optim, published.data.global_batch_size
    rows = "\n".join(f"| {one.task} | {one.model} | {one.percent:.2f}% | {one.source} |" for one in PAPER_SCORES)
    return f"""### What the paper reached

After fine-tuning on each task. The held-out scores of a pretraining run are of another kind: they show that it learns,
not how far it is from these.

| task | model | accuracy | source |
|---|---|---|---|
{rows}

Pretraining: {optim.total_steps:,} steps of {batch:,} pairs ({pairs / 1e6:.1f} million), peak learning rate
{optim.base_lr:g} of the towers and {optim.base_lr * optim.fusion_lr_scale:g} of the cross-modal layers, on 64 A100.
"""
