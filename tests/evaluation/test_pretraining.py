"""An evaluation encodes each image and each caption once, and fuses only the pairs that are judged."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch

from bridgetower.config.named_models import MODELS
from bridgetower.config.run import EvaluationConfig, ObjectivesConfig
from bridgetower.data.held_out import HeldOutSplit
from bridgetower.evaluation.pretraining import evaluate_split
from bridgetower.model.bridgetower import BridgeTower
from bridgetower.run.prepare import build_tokenizer
from bridgetower.tasks.pretraining import PretrainTask
from pretrain.assemble_data import build_splits
from pretrain.presets import tiny
from tests.conftest import REPO, run_script

IMAGES, TOP = 40, 3
CONFIG = EvaluationConfig(batch_size=16, rerank_top_k=TOP, max_images_without_itc=10, num_samples=2)


def make_split(shards: str) -> HeldOutSplit:
    config = tiny()
    config = replace(
        config,
        data=replace(config.data, eval_shards=(f"{shards}/combination",)),
        evaluation=EvaluationConfig(max_images=IMAGES),
    )
    return build_splits(config, build_tokenizer(config.model))[0]


def make_task(*, itc: bool) -> PretrainTask:
    objectives = ObjectivesConfig(mlm=False, itm=True, itc=itc)
    torch.manual_seed(0)
    return PretrainTask(BridgeTower(MODELS["tiny"](), objectives.heads), objectives).eval()


def count_passes(model: BridgeTower) -> Counter[str]:
    """Count the images, captions and pairs that pass the parts of a model from now on."""
    counts: Counter[str] = Counter()

    def count(name: str, num_rows: int) -> None:
        counts[name] += num_rows
        counts[f"{name}, most at once"] = max(counts[f"{name}, most at once"], num_rows)

    begin_image = model.vision_tower.begin

    def begin(pixels: torch.Tensor, *arguments: Any, **settings: Any) -> Any:
        count("images", len(pixels))
        return begin_image(pixels, *arguments, **settings)

    model.vision_tower.begin = begin  # type: ignore[method-assign, assignment]
    model.text_tower.register_forward_pre_hook(lambda _, arguments: count("captions", len(arguments[0])))
    model.cross_modal.register_forward_pre_hook(
        # Pairs whose attention maps are reported are fused one by one.
        lambda _, __, named: counts.update({"reported": 1} if named.get("maps") else {"pairs": len(named["image_R"])}),
        with_kwargs=True,
    )
    return counts


@pytest.mark.parametrize("itc", [True, False], ids=["with ITC", "without"])
def test_retrieval_costs_one_tower_pass_per_image_and_caption_and_one_fusion_per_judged_pair(emoji_shards, itc):
    task, split = make_task(itc=itc), make_split(str(emoji_shards))
    counts = count_passes(task.model)
    evaluate_split(task, split, CONFIG, seed=0, device=torch.device("cpu"))
    captions = split.num_captions
    assert counts["reported"] == 2
    assert counts["images"] == split.num_images == IMAGES and counts["captions"] == captions
    assert max(counts["images, most at once"], counts["captions, most at once"]) <= 16
    true_and_negative = 2 * captions
    if itc:
        # The best images of each caption, the best captions of each image, and true and random pairs for ITM's score.
        assert captions * TOP < counts["pairs"] <= captions * TOP + IMAGES * TOP + true_and_negative
    else:
        in_gallery = int((split.image_of_caption_T < 10).sum())
        assert in_gallery * 10 <= counts["pairs"] <= in_gallery * 10 + true_and_negative
    assert counts["pairs"] < captions * IMAGES / 2  # not every pair


PROGRAM = """
import json, sys
sys.path[0] = REPO
from pathlib import Path
import torch
from bridgetower.engine import launch as launching
from bridgetower.evaluation.pretraining import evaluate_split
from tests.evaluation.test_pretraining import CONFIG, count_passes, make_split, make_task
launch = launching.read_launch()
launching.start(launch, 1)
task, split = make_task(itc=True), make_split(sys.argv[1])
counts = count_passes(task.model)
result = evaluate_split(task, split, CONFIG, seed=0, device=torch.device("cpu"))
Path(sys.argv[2], f"{launch.world_size}_{launch.rank}.json").write_text(json.dumps([counts, result.scores]))
launching.finish()
"""


def test_ranks_share_the_work_and_compute_the_same_scores(emoji_shards, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.replace("REPO", repr(str(REPO))))
    for ranks in (1, 2):
        run_script(str(program), str(emoji_shards), str(tmp_path), ranks=ranks, launcher="preloaded")
    (alone, scores), *both = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("1_0", "2_0", "2_1"))
    assert both[0][1] == both[1][1] == scores
    for name in ("images", "captions", "pairs", "reported"):
        first, second = (counts[name] for counts, _ in both)
        assert first + second == alone[name] and first and second, name
