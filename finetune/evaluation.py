"""Scores of a fine-tuned model on held-out splits, and the best weights that they select.

Each pair is scored by one rank and counted once, so the scores are the same at any number of ranks.

Shapes: B pairs, C classes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch.utils.data import Dataset

from bridgetower import dist
from bridgetower.batch import FinetuneBatch
from bridgetower.config.finetune import SELECTION_METRICS, FinetuneConfig
from bridgetower.config.run import EvaluationConfig, ObjectivesConfig
from bridgetower.data.held_out import HeldOutSplit
from bridgetower.data.labelled import LabelledSplit
from bridgetower.data.loader import prepare_items
from bridgetower.engine.loop import to_device
from bridgetower.engine.score_file import EVAL_NAME
from bridgetower.errors import CheckpointError, ConfigError
from bridgetower.evaluation.encode import merge
from bridgetower.evaluation.pretraining import evaluate_split
from bridgetower.evaluation.recall import RECALL_AT
from bridgetower.evaluation.score_file import write_scores
from bridgetower.evaluation.scorer import SplitScores
from bridgetower.interop.safetensors_file import save_safetensors
from bridgetower.io.storage import to_path
from bridgetower.tasks.pretraining import PretrainTask
from finetune.tasks import ClassifierTask, FinetuneTask

BEST_FOLDER = "best"
_RECALLS = [f"{way}_r{k}" for way in ("i2t", "t2i") for k in RECALL_AT]
# Settings that retrieval's scores depend on: scores under other settings are not comparable.
_RANKING_SETTINGS = ("rerank_top_k", "rerank_score")
# Names in eval.json of an objective's per-pair values.
_SCORES: Mapping[str, str] = {"score": "vqa_score", "accuracy": "accuracy", "loss": "loss"}


class _BlocksOfRank(Dataset[FinetuneBatch]):
    """Every ``world_size``-th block of a split, from block ``rank`` on."""

    def __init__(self, split: LabelledSplit, rank: int, world_size: int) -> None:
        self._split, self._rank, self._world_size = split, rank, world_size

    def __len__(self) -> int:
        return len(range(self._rank, len(self._split), self._world_size))

    def __getitem__(self, index: int) -> FinetuneBatch:
        return self._split[self._rank + index * self._world_size]


def evaluate_splits(
    task: FinetuneTask,
    splits: Sequence[LabelledSplit] | Sequence[HeldOutSplit],
    config: FinetuneConfig,
    device: torch.device,
) -> dict[str, SplitScores]:
    """Score all splits; called on all ranks.

    Returns: the scores by the name of the split.
    """
    task.eval()
    if isinstance(task, ClassifierTask):
        return {split.name: _score_classifier(task, cast(LabelledSplit, split), config, device) for split in splits}
    return {split.name: _score_retrieval(task, cast(HeldOutSplit, split), config, device) for split in splits}


@torch.no_grad()
def _score_classifier(
    task: ClassifierTask, split: LabelledSplit, config: FinetuneConfig, device: torch.device
) -> SplitScores:
    blocks = _BlocksOfRank(split, dist.rank(), dist.world_size())
    sums_by_block: dict[int, dict[str, float]] = {}
    batches = prepare_items(blocks, 0, len(blocks), workers=config.data.workers, prefetch=config.data.prefetch_batches)
    for index, batch in enumerate(batches):
        (result,) = task.results(to_device(batch, device))
        values = {_SCORES[name.split("/")[0]]: value_B for name, value_B in result.values.items()}
        # A random answer scores the mean over the classes.
        values |= {"chance": batch.target_BC.mean(dim=1), "pairs": torch.ones(len(batch.ids_BL))}
        block = dist.rank() + index * dist.world_size()
        sums_by_block[block] = {name: float(value_B.double().sum()) for name, value_B in values.items()}
    sums_by_block = merge(dist.gather_objects(sums_by_block))
    # Added up in the order of the blocks, so that rounding does not depend on the number of ranks.
    means = {
        name: sum(sums_by_block[block][name] for block in range(len(split))) / split.num_pairs
        for name in sums_by_block[0]
    }
    assert means.pop("pairs") == 1.0, "each pair is counted once"
    return SplitScores(means, {SELECTION_METRICS[config.task]: means.pop("chance")}, {})


def _score_retrieval(
    task: FinetuneTask, split: HeldOutSplit, config: FinetuneConfig, device: torch.device
) -> SplitScores:
    objectives = ObjectivesConfig(mlm=False, itm=True, itc=True)
    scorer = PretrainTask(task.model, objectives).eval()
    settings = EvaluationConfig(
        batch_size=config.evaluation.batch_size,
        max_images=0,
        rerank_top_k=config.evaluation.rerank_top_k,
        rerank_score=config.evaluation.rerank_score,
        num_samples=0,
    )
    scored = evaluate_split(scorer, split, settings, seed=config.seed, device=device)
    scores, chance = (
        {**values, "r_mean": float(np.mean([values[name] for name in _RECALLS]))}
        for values in (scored.scores, scored.chance)
    )
    return SplitScores(scores, chance, {})


def check_selection(config: FinetuneConfig) -> None:
    """Check that the split that selects the best weights is evaluated.

    Raises:
        ConfigError: ``evaluation.selection_split`` is not in ``data.eval_shards``.
    """
    names = [to_path(shards).name for shards in config.data.eval_shards]
    selection_split = config.evaluation.selection_split
    if selection_split and selection_split not in names:
        raise ConfigError(
            f"evaluation.selection_split={selection_split} is none of the held-out splits "
            f"({', '.join(names) or 'there is none'}). Use one of them, or add its folder to data.eval_shards."
        )


def write_results(
    folder: Path, step: int, results: Mapping[str, SplitScores], task: FinetuneTask, config: FinetuneConfig
) -> None:
    """Write eval.json, and the weights if they are the best so far; called on all ranks.

    The weights are one file, which ``load_model`` opens. Its name has the step, and eval.json has the name: a run that
    is killed between the two writes leaves an eval.json that still names the weights that it scores.

    Raises:
        CheckpointError: on all ranks, if a file could not be written.
    """
    if not results:
        return
    fault = dist.on_first_rank(lambda: _write(folder, step, results, task, config), (OSError, CheckpointError))
    if fault:
        raise CheckpointError(
            f"The scores of step {step} or the best weights could not be written: {fault} The checkpoint of the step "
            "is saved: make room and run the same command again; it evaluates first."
        )


def _write(
    folder: Path, step: int, results: Mapping[str, SplitScores], task: FinetuneTask, config: FinetuneConfig
) -> None:
    split = config.evaluation.selection_split or next(iter(results))
    picked_by: dict[str, Any] = {"split": split, "metric": SELECTION_METRICS[config.task]}
    if config.task == "retrieval":
        picked_by |= {name: getattr(config.evaluation, name) for name in _RANKING_SETTINGS}
    score = results[split].scores[picked_by["metric"]]
    best = _best_so_far(folder, picked_by)
    if best is None or score > best["score"]:
        file = f"{BEST_FOLDER}/step{step:07d}.safetensors"
        save_safetensors(task.model, folder / file)
        best = {"step": step, **picked_by, "score": score, "file": file}
    write_scores(folder, step, results, best=best)
    for path in (folder / BEST_FOLDER).glob("step*.safetensors"):
        if path != folder / best["file"]:
            path.unlink()


def _best_so_far(folder: Path, picked_by: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the best weights that eval.json names; None without any, or if another score selected them."""
    try:
        best: dict[str, Any] = json.loads((folder / EVAL_NAME).read_bytes())["best"]
    except (OSError, ValueError, KeyError):
        return None
    is_comparable = all(best.get(name) == value for name, value in picked_by.items())
    return best if is_comparable and (folder / best["file"]).is_file() else None
