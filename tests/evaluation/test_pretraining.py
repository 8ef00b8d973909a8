"""What an evaluation computes: each image and caption once, and of the pairs only those that are asked for."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import nn

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


def counted(model: BridgeTower) -> Counter[str]:
    """Images, captions and pairs that run through the parts of a model from now on."""
    found: Counter[str] = Counter()

    def count(name: str, module: nn.Module, rows: int) -> None:
        def note(_: nn.Module, arguments: tuple[torch.Tensor, ...], *__: object) -> None:
            found[name] += len(arguments[rows])
            found[f"{name}, most at once"] = max(found[f"{name}, most at once"], len(arguments[rows]))

        module.register_forward_pre_hook(note)

    count("images", model.vision_tower, 0)
    count("captions", model.text_tower, 0)
    model.cross_modal.register_forward_pre_hook(
        # Those of attention maps, for a person to look at, are fused one by one.
        lambda _, __, named: found.update({"shown": 1} if named.get("maps") else {"pairs": len(named["image_R"])}),
        with_kwargs=True,
    )
    return found


@pytest.mark.parametrize("itc", [True, False], ids=["with ITC", "without"])
def test_retrieval_costs_a_tower_pass_for_each_image_and_caption_and_a_fusion_for_each_pair_that_is_asked_for(
    emoji_shards, itc
):
    task, split = make_task(itc=itc), make_split(str(emoji_shards))
    found = counted(task.model)
    evaluate_split(task, split, CONFIG, seed=0, device=torch.device("cpu"))
    captions = split.num_captions
    assert found["shown"] == 2
    assert found["images"] == split.num_images == IMAGES and found["captions"] == captions
    assert max(found["images, most at once"], found["captions, most at once"]) <= 16
    own_and_negative = 2 * captions
    if itc:
        # The best images of each caption and the best captions of each image, and own and random ones for ITM's score.
        assert captions * TOP < found["pairs"] <= captions * TOP + IMAGES * TOP + own_and_negative
    else:
        in_gallery = int((split.image_of_caption_T < 10).sum())
        assert in_gallery * 10 <= found["pairs"] <= in_gallery * 10 + own_and_negative
    assert found["pairs"] < captions * IMAGES / 2  # not every pair


PROGRAM = """
import json, sys
sys.path[0] = REPO
from pathlib import Path
import torch
from bridgetower.engine import launch as launching
from bridgetower.evaluation.pretraining import evaluate_split
from tests.evaluation.test_pretraining import CONFIG, counted, make_split, make_task
place = launching.read_launch()
launching.start(place, 1)
task, split = make_task(itc=True), make_split(sys.argv[1])
found = counted(task.model)
result = evaluate_split(task, split, CONFIG, seed=0, device=torch.device("cpu"))
Path(sys.argv[2], f"{place.world_size}_{place.rank}.json").write_text(json.dumps([found, result.scores]))
launching.finish()
"""


def test_ranks_share_images_and_captions_and_come_to_the_same_scores(emoji_shards, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.replace("REPO", repr(str(REPO))))
    for ranks in (1, 2):
        run_script(str(program), str(emoji_shards), str(tmp_path), ranks=ranks, launcher="preloaded")
    (alone, scores), *both = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("1_0", "2_0", "2_1"))
    assert both[0][1] == both[1][1] == scores
    for what in ("images", "captions", "pairs", "shown"):
        first, second = (found[what] for found, _ in both)
        assert first + second == alone[what] and first and second, what
