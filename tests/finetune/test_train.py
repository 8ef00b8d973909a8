"""Short real runs of every task: they learn, count every pair once, resume where they stopped, and keep the best."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import bridgetower
from bridgetower.config.overrides import apply_overrides, to_dict
from bridgetower.config.snapshot import read_model_config
from bridgetower.data.corpora import Corpora
from bridgetower.data.held_out import HeldOutSplit
from bridgetower.data.images import load_whole_image
from bridgetower.data.text import Tokenizer
from bridgetower.errors import BridgeTowerError
from bridgetower.evaluation.table import LABELS, format_score
from bridgetower.interop.safetensors_file import load_safetensors, save_safetensors
from bridgetower.model.bridgetower import BridgeTower
from finetune.assemble import build_task, find_start
from finetune.presets import PRESETS
from finetune.train import main, run
from pretrain.report import render
from tests.conftest import REPO, run_script
from tests.finetune.conftest import PRESET_OF, restored_process, scores_of
from tests.finetune.corpora import PAIRS_PER_PICTURE, settings
from tests.integration.runs import (
    assert_same_tensors,
    last_checkpoint,
    metrics,
    optimizer_tensors,
    relative_difference,
    weights,
)

STEPS = {"vqa": 80, "snli_ve": 80, "nlvr2": 80, "retrieval": 140}
METRIC = {"vqa": "vqa_score", "snli_ve": "accuracy", "nlvr2": "accuracy", "retrieval": "r_mean"}
# Every step changes the weights, and no element steps by rounding alone (tests/integration/test_ranks.py).
EXACT = {"optim__warmup_fraction": "0", "optim__eps": "1e-3", "data__augmentation": "flip_14_ops"}


@pytest.fixture(scope="module", params=list(PRESET_OF))
def learned(request, root, train) -> tuple[str, Path]:
    """Return a task, and a run of it that was trained and scored on nine pairs of three images."""
    task: str = request.param
    seen = {"data__train_shards": str(root / task / "dev"), "evaluation__on_trained_pictures": "true"}
    return task, train(task, f"{task}-learned", STEPS[task], **seen, optim__base_lr="1e-3")


def test_a_task_learns_its_training_pairs(learned):
    task, folder = learned
    lines = metrics(folder.parent, folder.name)
    assert [line["step"] for line in lines if "train/loss/total" in line] == list(range(1, STEPS[task] + 1))
    first, last = (
        sum(line["train/loss/total"] for line in part) / 5 for part in (lines[:5], lines[STEPS[task] - 5 : STEPS[task]])
    )
    assert last < 0.8 * first
    (split,) = scores_of(folder)["splits"].values()
    chance = split["chance"][METRIC[task]]
    assert split["scores"][METRIC[task]] > chance + 0.3 * (1 - chance)


def test_its_metrics_are_documented(learned):
    task, folder = learned
    names = re.findall(r"^\| `([^`]+)` \|", (REPO / "docs/metrics.md").read_text(), flags=re.MULTILINE)
    objective = {"retrieval": "(itm|itc)"}.get(task, task)
    placeholders = {"OBJECTIVE": objective, "GROUP": "[a-z_]+", "SPLIT": "dev", "SCORE": "[a-z0-9_]+"}
    for placeholder, pattern in placeholders.items():
        names = [name.replace(placeholder, pattern) for name in names]
    written = {name for line in lines_of(folder) for name in line} - {"step", "train/score/vqa"}
    assert [name for name in written if not any(re.fullmatch(known, name) for known in names)] == []
    assert {f"train/loss/{one}" for one in ("itm", "itc")} <= written or f"train/loss/{task}" in written


def test_its_report_shows_its_score(learned):
    task, folder = learned
    page = render(folder)
    assert LABELS[METRIC[task]] in page and format_score(METRIC[task], scores_of(folder)[METRIC[task]]) in page


@pytest.mark.parametrize("learned", ["vqa", "snli_ve", "nlvr2"], indirect=True)
def test_its_scores_count_every_pair_once(learned, root):
    task, folder = learned
    model = bridgetower.load_model(folder)
    corpora, side = Corpora([root / task / "dev"]), model.config.image_size_px
    pair_scores = []
    for number in range(3 * PAIRS_PER_PICTURE):
        pair = corpora.read(*corpora.pair_of_corpus(0, number))
        ids = torch.from_numpy(Tokenizer("emoji").encode([pair.caption], 40)[0])[None]
        image_files = [raw for raw in (pair.image, pair.second_image) if raw]
        with torch.no_grad():
            text, pooled = model.encode_text(ids, torch.ones_like(ids)), []
            for row, raw in enumerate(image_files, 1):
                image = model.encode_image(model.normalize(load_whole_image(raw, side, "here")[None]), row)
                pooled.append(model.fuse(text.states_KBND, image.states_KBND, torch.ones_like(ids)).pooled)
            answer = int(model.heads[task](torch.cat(pooled, dim=1)).argmax())
        if task == "vqa":
            pair_scores.append(
                dict(zip(pair.annotation["labels"], pair.annotation["scores"], strict=True)).get(answer, 0.0)
            )
        else:
            pair_scores.append(float(answer == pair.annotation["label"]))
    assert scores_of(folder)[METRIC[task]] == pytest.approx(sum(pair_scores) / len(pair_scores))


def open_whole(shards: Path, side: int) -> HeldOutSplit:
    return HeldOutSplit(
        shards,
        tokenizer=Tokenizer("emoji"),
        image_size_px=side,
        max_text_tokens=40,
        mlm_probability=0.0,
        whole_images=True,
    )


@pytest.mark.parametrize("score", ["itm_logit", "itm"])
def test_retrieval_reranks_the_best_of_itc_by_itm_on_whole_images(root, train, score):
    top_k, shards = 3, root / "retrieval/train"
    more = {"data__eval_shards": str(shards), "evaluation__on_trained_pictures": "true"}
    more |= {"evaluation__rerank_top_k": str(top_k), "evaluation__rerank_score": score}
    folder = train("retrieval", f"ranked-{score}", 1, **more)
    model, corpora = bridgetower.load_model(folder).eval(), Corpora([shards])
    pairs = [corpora.read(*corpora.pair_of_corpus(0, number)) for number in range(8 * PAIRS_PER_PICTURE)]
    with torch.no_grad():
        raws = list(dict.fromkeys(pair.image for pair in pairs))
        whole = [load_whole_image(raw, model.config.image_size_px, "here") for raw in raws]
        assert torch.equal(
            open_whole(shards, model.config.image_size_px).image_batch(0, 8).pixels_N3SS, torch.stack(whole)
        )
        images = [model.encode_image(model.normalize(image[None])) for image in whole]
        similarity, ranking = torch.empty(len(pairs), 8), torch.full((len(pairs), 8), -torch.inf)
        fused = torch.empty(len(pairs), 8)
        for row, pair in enumerate(pairs):
            ids = torch.from_numpy(Tokenizer("emoji").encode([pair.caption], 40)[0])[None]
            text = model.encode_text(ids, torch.ones_like(ids))
            for column, image in enumerate(images):
                embedded = model.itc_head.embed_text(text.class_BD) * model.itc_head.embed_image(image.class_BD)
                similarity[row, column] = embedded.sum()
                pooled = model.fuse(text.states_KBND, image.states_KBND, torch.ones_like(ids)).pooled
                wrong, match = model.itm_head(pooled)[0]
                fused[row, column] = match if score == "itm_logit" else match - wrong
    for dim in (0, 1):
        best = similarity.topk(top_k, dim).indices
        ranking.scatter_(dim, best, fused.gather(dim, best))
    own = torch.tensor([raws.index(pair.image) for pair in pairs])
    is_own = own[:, None] == torch.arange(8)
    recalls = []
    for scores, right in ((ranking, is_own), (ranking.T, is_own.T)):
        best_right = scores.where(right, torch.tensor(-torch.inf)).amax(1, keepdim=True)
        num_better = ((scores >= best_right) & ~right).sum(1)
        recalls += [float((num_better < k).float().mean()) for k in (1, 5, 10)]
    assert len(raws) == 8 and ranking.isinf().any()
    assert scores_of(folder)["r_mean"] == pytest.approx(sum(recalls) / 6, abs=1e-6)


def test_the_best_weights_are_a_file_that_loads_with_only_the_heads_of_the_task(learned):
    task, folder = learned
    best = scores_of(folder)["best"]
    assert (
        best["step"] == STEPS[task]
        and best["metric"] == METRIC[task]
        and best["score"] == scores_of(folder)[METRIC[task]]
    )
    model = bridgetower.load_model(folder / best["file"])
    assert tuple(model.heads) == {"retrieval": ("itm", "itc")}.get(task, (task,))
    trained = {name.removeprefix("model."): value for name, value in weights(folder.parent, folder.name).items()}
    assert trained.keys() == model.state_dict().keys()
    assert_same_tensors(list(trained.values()), [model.state_dict()[name] for name in trained])


def test_weights_that_score_worse_do_not_replace_better_ones(root, train):
    folder = train("snli_ve", "kept", 8, evaluation__every_epochs="1", checkpoint__every_steps="2")
    scores = [line["eval/dev/accuracy"] for line in lines_of(folder) if "eval/dev/accuracy" in line]
    best = scores_of(folder)["best"]
    assert len(scores) == 4 and best["score"] == pytest.approx(max(scores))
    assert best["step"] == 2 * (1 + scores.index(max(scores)))
    assert [path.name for path in (folder / "best").iterdir()] == [Path(best["file"]).name]


def test_the_best_is_forgotten_when_the_run_resumes_from_before_it_or_selects_by_another_score(root, train):
    folder = train("retrieval", "forgotten", 3, checkpoint__every_steps="1", checkpoint__keep_last="0")
    claimed = scores_of(folder)
    assert claimed["best"]["rerank_top_k"] == 4 and claimed["best"]["rerank_score"] == "itm_logit"
    # The weights exist, and no other score reaches theirs.
    claimed["best"]["score"] = 2.0

    def best_after(**more: str) -> float:
        (folder / "eval.json").write_text(json.dumps(claimed))
        train("retrieval", "forgotten", 3, checkpoint__every_steps="1", checkpoint__keep_last="0", **more)
        score: float = scores_of(folder)["best"]["score"]
        return score

    assert best_after() == 2.0
    assert best_after(evaluation__rerank_score="itm") <= 1
    assert best_after(evaluation__rerank_top_k="3") <= 1
    shutil.rmtree(folder / "checkpoints/step0000003")
    assert best_after() <= 1


def test_best_weights_that_cannot_be_written_are_an_error_and_the_resumed_run_writes_them(root, train):
    (root / "runs/no_room").mkdir(parents=True)
    (root / "runs/no_room/best").write_text("a file where a folder has to be")
    with pytest.raises(BridgeTowerError, match=r"best weights could not be written.*run the same command again"):
        train("snli_ve", "no_room", 4, evaluation__every_epochs="1")
    assert last_checkpoint(root / "runs", "no_room").name == "step0000002"
    (root / "runs/no_room/best").unlink()
    lines = lines_of(train("snli_ve", "no_room", 4, evaluation__every_epochs="1"))
    assert [line["step"] for line in lines if "eval/dev/accuracy" in line] == [2, 4]


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_that_was_killed_and_resumed_equals_an_uninterrupted_one_bit_for_bit(root, train):
    lively = {"model__text__dropout": "0.1", "model__fusion__dropout": "0.1", "data__augmentation": "no_flip_10_ops"}
    more = {**lively, "checkpoint__every_steps": "3"}
    whole = train("vqa", "whole", 6, **more)
    shutil.copytree(whole, whole.parent / "killed")
    for left in ("checkpoints/step0000006", "best"):
        shutil.rmtree(whole.parent / "killed" / left)
    (whole.parent / "killed/eval.json").unlink()
    train("vqa", "killed", 6, **more)
    runs = whole.parent
    assert metrics(runs, "killed") == metrics(runs, "whole") and len(metrics(runs, "whole")) >= 6
    ours, others = weights(runs, "killed"), weights(runs, "whole")
    assert_same_tensors(list(ours.values()), list(others.values()))
    assert_same_tensors(optimizer_tensors(runs, "killed"), optimizer_tensors(runs, "whole"))
    assert scores_of(runs / "killed") == scores_of(whole)


def test_an_evaluation_that_a_stop_prevented_is_made_up_for_when_the_run_resumes(root, train):
    often = {"evaluation__every_epochs": "1", "checkpoint__keep_last": "0"}  # two steps per epoch
    whole = train("snli_ve", "unstopped", 4, **often)
    left = whole.parent / "left_out"
    shutil.copytree(whole, left)
    shutil.rmtree(left / "checkpoints/step0000004")
    lines = [json.dumps(line) for line in lines_of(left) if line["step"] <= 2 and "eval/dev/accuracy" not in line]
    (left / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    train("snli_ve", "left_out", 4, **often)
    names = ("train/", "optim/", "eval/")
    assert metrics(whole.parent, "left_out", names) == metrics(whole.parent, "unstopped", names)
    assert [line["step"] for line in lines_of(left) if "eval/dev/accuracy" in line] == [2, 4]
    assert scores_of(left) == scores_of(whole)


@pytest.mark.parametrize("task", ["snli_ve", "retrieval"])
def test_two_ranks_train_and_score_as_one_with_the_joined_batch(root, train, task):
    one = train(task, f"{task}-one", 3, **EXACT, data__micro_batch_size="12")
    flags = {**settings(task, root, f"{task}-two", 3), **{key.replace("__", "."): v for key, v in EXACT.items()}}
    words = [f"--{name}={value}" for name, value in flags.items()]
    run_script("finetune/train.py", PRESET_OF[task], *words, ranks=2)
    two = one.parent / f"{task}-two"
    for line, expected in zip(metrics(one.parent, two.name), metrics(one.parent, one.name), strict=True):
        assert line == pytest.approx(expected, abs=1e-5)
    two_weights, one_weights = weights(one.parent, two.name), weights(one.parent, one.name)
    for name, value in two_weights.items():
        assert relative_difference(one_weights[name] + 0.02, value + 0.02) < 1e-6, name
    assert scores_of(two)["splits"]["dev"]["scores"] == pytest.approx(
        scores_of(one)["splits"]["dev"]["scores"], abs=1e-5
    )


def test_a_run_starts_from_every_tensor_of_its_pretrained_model(root):
    config = apply_overrides(
        PRESETS["tiny_nlvr2"](), {**settings("nlvr2", root, "start", 1), "model.image_size_px": "96"}
    )
    start = find_start(config, root / "runs/start")
    model = build_task(replace(config, model=start.config), start).model
    given = bridgetower.load_model(root / "pretrained", image_size_px=96).state_dict()
    initial = model.state_dict()
    # The second image's row is a copy of the first's; the heads of pretraining are left out.
    assert torch.equal(initial.pop("modality_embedding.weight")[2], given["modality_embedding.weight"][1])
    assert {name for name in initial if not name.startswith("heads.nlvr2.")} | {"modality_embedding.weight"} == {
        name for name in given if not name.startswith(("heads.mlm.", "heads.itm."))
    }
    assert all(
        torch.equal(value, given[name]) for name, value in initial.items() if not name.startswith("heads.nlvr2.")
    )
    assert start.config.image_size_px == 96 and to_dict(model.config) == to_dict(start.config)


def test_itc_keeps_its_pretrained_width_in_new_and_in_resumed_runs(root):
    source = load_safetensors(root / "pretrained/model.safetensors").config
    source = replace(source, heads=replace(source.heads, itc_width=24))
    save_safetensors(BridgeTower(source, ("itc",)), root / "narrow/model.safetensors")
    flags = {**settings("retrieval", root, "narrow", 1), "init": str(root / "narrow")}
    preset = PRESETS[PRESET_OF["retrieval"]]()
    with restored_process():
        for _ in range(2):  # the second time the run is complete
            assert run(apply_overrides(preset, flags))
    assert preset.model.heads.itc_width != 24
    assert read_model_config(root / "runs/narrow/run.json")[0].heads.itc_width == 24


def test_a_run_json_is_repeated_for_other_epochs_only_without_its_steps(root, train):
    repeated = str(train("snli_ve", "repeated", 1) / "run.json")
    with pytest.raises(BridgeTowerError, match=r"--optim\.total_steps=0"):
        main(repeated, epochs="2")
    with restored_process():
        main(repeated, epochs="2", name="longer", **{"optim.total_steps": "0"})
    assert metrics(root / "runs", "longer")[-1]["step"] == 4


def test_a_fine_tuned_run_can_be_started_from_again(root, train):
    first = train("snli_ve", "first", 1)
    second = train("snli_ve", "second", 1, init=str(first), optim__base_lr="1e-9")
    before, after = weights(first.parent, "first"), weights(first.parent, "second")
    head = [name for name in after if "heads.snli_ve" in name]
    assert len(head) == 6 and all(torch.allclose(before[name], after[name], atol=1e-6) for name in head)
    model, heads = read_model_config(second / "run.json")
    assert heads == ("snli_ve",) and isinstance(bridgetower.load_model(second), BridgeTower)
    assert last_checkpoint(first.parent, "second").name == "step0000001" and model.image_size_px == 72


def refused(root: Path, task: str, **more: str) -> str:
    overrides = {**settings(task, root, "wrong", 1), **{key.replace("__", "."): value for key, value in more.items()}}
    with restored_process(), pytest.raises(BridgeTowerError) as error:
        run(apply_overrides(PRESETS[PRESET_OF[task]](), overrides))
    assert error.value.exit_code == 2 and not (root / "runs/wrong").exists()
    return str(error.value)


WRONG = [
    ({"init": ""}, "init is empty", "--init=runs/NAME"),
    ({"init": "/nowhere/run"}, "There is no file or folder /nowhere/run", "a run folder"),
    ({"model__fusion__bridge": "product"}, "model.fusion.bridge: add, not product", "--model.fusion.bridge=add"),
    ({"model__text__width": "64"}, "model.text.width: 32, not 64", "--model.text.width=32"),
    (
        {"data__global_batch_size": "10"},
        "does not divide into micro-batches of 6",
        "Micro-batch sizes that divide it: 1, 2, 5, 10",
    ),
    ({"evaluation__selection_split": "test"}, "none of the held-out splits (dev)", "data.eval_shards"),
    ({"data__train_shards": "ROOT/retrieval/train"}, "has the label None", "build_shards.py snli_ve"),
    (
        {"data__eval_shards": "ROOT/snli_ve/train"},
        "8 images of the held-out",
        "--evaluation.on_trained_pictures=true",
    ),
]


@pytest.mark.parametrize(("more", "expected", "suggestion"), WRONG, ids=[next(iter(row[0])) for row in WRONG])
def test_wrong_settings_are_refused_with_a_suggestion_before_anything_is_started(root, more, expected, suggestion):
    message = refused(root, "snli_ve", **{name: value.replace("ROOT", str(root)) for name, value in more.items()})
    assert expected in message and suggestion in message


def test_a_run_resumes_only_with_its_own_settings(root, train):
    folder = train("snli_ve", "own", 1)
    kept = (folder / "run.json").read_bytes()
    with restored_process(), pytest.raises(BridgeTowerError, match=r"init: .*pretrained -> none"):
        run(apply_overrides(PRESETS["tiny_snli_ve"](), {**settings("snli_ve", root, "own", 1), "init": "none"}))
    assert (folder / "run.json").read_bytes() == kept


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["snli_ve_bass"], "Did you mean snli_ve_base"),
        (["snli_ve_base"], "init is empty"),
        (["snli_ve_base", "--init=x", "--epochs=2", "--optim.total_steps=9"], "epochs=2 would have no effect"),
        (["snli_ve_base", "--init=x", "--optim.base_lrr=1"], "Did you mean --optim.base_lr"),
        (["coco_base", "--init=x", "--data.negative_group_size=0"], "8 (Flickr30K) and 16 (COCO)"),
        (["nlvr2_base", "--init=x", "--data.negative_group_size=8"], "Leave it out"),
    ],
)
def test_a_wrong_command_line_is_refused_with_a_suggestion(words, expected):
    preset, *flags = words
    with pytest.raises(BridgeTowerError) as error:
        main(preset, **dict(flag[2:].split("=", 1) for flag in flags))
    assert expected in str(error.value) and error.value.exit_code == 2


def test_the_command_exits_2_and_its_help_0():
    result = run_script("finetune/train.py", "vqav2_base", code=2)
    assert result.stderr.startswith("error: init is empty") and "Traceback" not in result.stderr
    printed = run_script("finetune/train.py", "vqav2_base", "--help").stdout
    assert (
        "\n  --init=" in printed
        and "\n  --data.train_shards=shards/vqav2/train  (text,text,...)\n      Corpus" in printed
    )
