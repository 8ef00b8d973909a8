"""The published fine-tunings, number by number."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bridgetower.config.overrides import walk_fields
from bridgetower.data.order import cut_global_batch
from bridgetower.model.sizes import complete_model_config
from finetune.assemble import complete_steps, evaluation_steps
from finetune.presets import PRESETS, snli_ve_base
from tests.conftest import REPO

GPUS = 8
# Section 3.3 of the reference_spec: px, tokens, micro-batch, global batch, epochs, learning rate, head scale, warm-up,
# weight decay, augmentation.
PUBLISHED = {
    "vqav2_base": (576, 50, 16, 512, 10, 1e-5, 50, 0.06, 0.05, "no_flip_10_ops"),
    "vqav2_large": (574, 50, 4, 512, 10, 4e-6, 50, 0.06, 0.05, "no_flip_10_ops"),
    "snli_ve_base": (384, 50, 8, 64, 5, 3e-6, 10, 0.06, 0.01, "flip_14_ops"),
    "nlvr2_base": (384, 50, 8, 64, 10, 5e-6, 10, 0.1, 0.008, "flip_14_ops"),
    "flickr30k_base": (384, 40, 8, 512, 20, 5e-6, 5, 0.05, 0.01, "flip_14_ops"),
    "coco_base": (384, 40, 16, 256, 30, 4.5e-6, 5, 0.1, 0.01, "flip_14_ops"),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_run_has_the_published_values(name):
    run = PRESETS[name]()
    values = (
        run.model.image_size_px,
        run.model.text.max_tokens,
        run.data.micro_batch_size,
        run.data.global_batch_size,
        run.epochs,
        run.optim.base_lr,
        run.optim.head_lr_scale,
        run.optim.warmup_fraction,
        run.optim.weight_decay,
        run.data.augmentation,
    )
    assert list(values) == list(PUBLISHED[name])
    assert (run.optim.fusion_lr_scale, run.optim.max_grad_norm, run.model.fusion.dropout) == (5.0, 0.0, 0.1)
    assert (run.optim.beta1, run.optim.beta2, run.optim.eps) == (0.9, 0.98, 1e-8)
    assert (run.model.heads.classifier_scale, run.model.heads.nlvr2_scale) == (2.0, 1.5)
    assert run.model.heads.num_answers == 3129


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_can_be_built_and_its_batches_cut_on_one_node(name):
    run = PRESETS[name]()
    assert run.name == name
    model = complete_model_config(run.model)
    assert model.image_size_px % model.vision.patch_size_px == 0
    ranks = 2 if name.startswith("tiny_") else GPUS
    data = run.data
    cut = cut_global_batch(data.global_batch_size, data.micro_batch_size, ranks, data.negative_group_size or None)
    assert cut.accumulation_steps * cut.micro_batch_size * ranks == data.global_batch_size
    # ITM's negatives are drawn within the published micro-batch.
    assert data.negative_group_size == (0 if run.task != "retrieval" else 4 if ranks == 2 else data.micro_batch_size)


def test_the_table_in_the_docs_agrees_with_the_presets():
    lines = (REPO / "docs/finetune.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| `")]
    assert [row[0].strip("`") for row in rows] == list(PUBLISHED)
    for name, task, train, scored, px, tokens, batch, epochs, lr, head, fusion, warmup, decay, kind in rows:
        run = PRESETS[name.strip("`")]()
        assert task == run.task and kind.strip("`") == run.data.augmentation
        assert train.split(", ") == [shards.split("/")[-1] for shards in run.data.train_shards]
        assert scored.split(", ") == [shards.split("/")[-1] for shards in run.data.eval_shards]
        assert (int(px), int(tokens), float(epochs), float(lr)) == (
            run.model.image_size_px,
            run.model.text.max_tokens,
            run.epochs,
            run.optim.base_lr,
        )
        cut = cut_global_batch(run.data.global_batch_size, run.data.micro_batch_size, GPUS)
        assert batch == f"{cut.global_batch_size} = {GPUS} × {cut.micro_batch_size} × {cut.accumulation_steps}"
        assert (float(head), float(fusion)) == (run.optim.head_lr_scale, run.optim.fusion_lr_scale)
        assert (warmup, float(decay)) == (f"{100 * run.optim.warmup_fraction:g} %", run.optim.weight_decay)


def test_epochs_become_steps_so_that_no_pair_is_seen_less_often():
    # Section 3.3: 529,527 pairs of SNLI-VE are 41,370 steps.
    run = complete_steps(snli_ve_base(), 529_527)
    assert run.optim.total_steps == 41_370
    assert evaluation_steps(run, 529_527) == 8_274
    # 1.25 steps per epoch: evaluations after steps 2 and 4, the last of which is at the end.
    short = complete_steps(replace(snli_ve_base(), epochs=3.0), 80)
    assert short.optim.total_steps == 4 and evaluation_steps(short, 80) == 2
    assert complete_steps(run, 7).optim.total_steps == 41_370


def test_no_two_settings_of_a_run_have_the_same_name():
    names = [name for name, *_ in walk_fields(snli_ve_base())]
    assert len(names) == len(set(names)) and "init" in names
