"""Scores of a fine-tuned model on held-out splits, the same at any number of ranks, and the weights that they select.

Each pair is scored by one rank and counted once.
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
from bridgetower.errors import CheckpointError, ConfigError
from bridgetower.evaluation.pretraining import EVAL_NAME, RECALL_AT, SplitScores, evaluate_split, write_scores
from bridgetower.interop.safetensors_file import save_safetensors
from bridgetower.tasks.pretraining import PretrainTask
from finetune.tasks import ClassifierTask, FinetuneTask

BEST_FOLDER = "best"
_RECALLS = [f"{way}_r{k}" for way in ("i2t", "t2i") for k in RECALL_AT]
# Settings that retrieval's scores depend on.
_RANKING = ("rerank_top_k", "rerank_score")
# The name in eval.json of what an objective says of each pair.
_SCORES: Mapping[str, str] = {"score": "vqa_score", "accuracy": "accuracy", "loss": "loss"}


class _EveryNth(Dataset[FinetuneBatch]):
    """The blocks of one rank."""

    def __init__(self, split: LabelledSplit, rank: int, world_size: int) -> None:
        self._split, self._rank, self._world_size = split, rank, world_size

    def __len__(self) -> int:
        return len(range(self._rank, len(self._split), self._world_size))

    def __getitem__(self, number: int) -> FinetuneBatch:
        return self._split[self._rank + number * self._world_size]


def evaluate_splits(
    task: FinetuneTask,
    splits: Sequence[LabelledSplit] | Sequence[HeldOutSplit],
    config: FinetuneConfig,
    device: torch.device,
) -> dict[str, SplitScores]:
    """Scores of all splits, by name; called on all ranks."""
    task.eval()
    if isinstance(task, ClassifierTask):
        return {split.name: _classified(task, cast(LabelledSplit, split), config, device) for split in splits}
    return {split.name: _retrieved(task, cast(HeldOutSplit, split), config, device) for split in splits}


@torch.no_grad()
def _classified(
    task: ClassifierTask, split: LabelledSplit, config: FinetuneConfig, device: torch.device
) -> SplitScores:
    own = _EveryNth(split, dist.rank(), dist.world_size())
    blocks: dict[int, dict[str, float]] = {}
    batches = prepare_items(own, 0, len(own), workers=config.data.workers, prefetch=config.data.prefetch_batches)
    for number, batch in enumerate(batches):
        (result,) = task.results(to_device(batch, device))
        sums = {_SCORES[name.split("/")[0]]: value_B for name, value_B in result.values.items()}
        # Guessing gives an answer's mean score.
        sums |= {"chance": batch.target_BC.mean(dim=1), "pairs": torch.ones(len(batch.ids_BL))}
        block = dist.rank() + number * dist.world_size()
        blocks[block] = {name: float(value_B.double().sum()) for name, value_B in sums.items()}
    found = {number: block for part in dist.gather_objects(blocks) for number, block in part.items()}
    # In the order of blocks, so that the sums are the same at any number of ranks.
    means = {name: sum(found[block][name] for block in range(len(split))) / split.num_pairs for name in found[0]}
    assert means.pop("pairs") == 1.0, "each pair is counted once"
    return SplitScores(means, {SELECTION_METRICS[config.task]: means.pop("chance")}, {})


def _retrieved(task: FinetuneTask, split: HeldOutSplit, config: FinetuneConfig, device: torch.device) -> SplitScores:
    objectives = ObjectivesConfig(mlm=False, itm=True, itc=True)
    scorer = PretrainTask(task.model, objectives, task.model.compute).eval()
    settings = EvaluationConfig(
        batch_size=config.evaluation.batch_size,
        max_images=0,
        rerank_top_k=config.evaluation.rerank_top_k,
        rerank_score=config.evaluation.rerank_score,
        num_samples=0,
    )
    found = evaluate_split(scorer, split, settings, seed=config.seed, device=device)
    scores, chance = dict(found.scores), dict(found.chance)
    for part in (scores, chance):
        part["r_mean"] = float(np.mean([part[name] for name in _RECALLS]))
    return SplitScores(scores, chance, {})


def check_selection(config: FinetuneConfig, names: Sequence[str]) -> None:
    """Stop at a split to select by that is not evaluated.

    Raises:
        ConfigError: with those that are.
    """
    wanted = config.evaluation.selection_split
    if wanted and wanted not in names:
        raise ConfigError(
            f"evaluation.selection_split={wanted} is none of the held-out splits ({', '.join(names) or 'none'}"
            "). Use one of them, or add its folder to data.eval_shards."
        )


def write_results(
    folder: Path, step: int, results: Mapping[str, SplitScores], task: FinetuneTask, config: FinetuneConfig
) -> None:
    """Write eval.json, and the weights if they are the best so far: one file, which ``load_model`` opens.

    The file's name has its step, and eval.json names it: at no moment it names other weights than those scored.

    Raises:
        CheckpointError: on all ranks, if they could not be written.
    """
    if not results:
        return
    fault = dist.on_first_rank(lambda: _write(folder, step, results, task, config), (OSError, CheckpointError))
    if fault:
        raise CheckpointError(
            f"The scores of step {step} or the best weights could not be written: {fault} The step itself is saved: "
            "make room and run the same command again; it evaluates first."
        )


def _write(
    folder: Path, step: int, results: Mapping[str, SplitScores], task: FinetuneTask, config: FinetuneConfig
) -> None:
    split = config.evaluation.selection_split or next(iter(results))
    picked_by: dict[str, Any] = {"split": split, "metric": SELECTION_METRICS[config.task]}
    if config.task == "retrieval":
        picked_by |= {name: getattr(config.evaluation, name) for name in _RANKING}
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
    """What eval.json says; None where there is none, or one that was picked by another score."""
    try:
        best: dict[str, Any] = json.loads((folder / EVAL_NAME).read_bytes())["best"]
    except (OSError, ValueError, KeyError):
        return None
    is_of_the_same = all(best.get(name) == value for name, value in picked_by.items())
    return best if is_of_the_same and (folder / best["file"]).is_file() else None
