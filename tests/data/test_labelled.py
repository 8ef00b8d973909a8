"""Labelled pairs: each once per epoch at any number of ranks, augmented by seed and position, and none left out."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bridgetower.batch import FinetuneBatch
from bridgetower.config.finetune import FinetuneDataConfig, TaskName
from bridgetower.data.corpora import Corpora
from bridgetower.data.images import load_whole_image
from bridgetower.data.labelled import LabelledSplit, LabelledStream
from bridgetower.data.loader import micro_batches
from bridgetower.data.order import Order, cut_global_batch
from bridgetower.data.targets import check_labels, count_classes, make_target
from bridgetower.data.text import Tokenizer
from bridgetower.errors import DataError
from tests.finetune.corpora import NUM_ANSWERS, PAIRS_PER_PICTURE, write_task
from tests.small_corpora import draw, file_of

SIDE, IMAGES = 24, 8
PAIRS = IMAGES * PAIRS_PER_PICTURE
TASKS: tuple[TaskName, ...] = ("vqa", "snli_ve", "nlvr2", "retrieval")
TOKENIZER = Tokenizer("emoji")


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("labelled")
    for task in TASKS:
        write_task(folder, task, "train", IMAGES)
    return folder


def make_stream(
    root: Path,
    task: TaskName = "snli_ve",
    *,
    rank: int = 0,
    ranks: int = 1,
    micro: int = 6,
    workers: int = 0,
    augmentation: str = "flip_14_ops",
) -> LabelledStream:
    folder = root / task / "train"
    corpora = Corpora([folder])
    config = FinetuneDataConfig(train_shards=(str(folder),), workers=workers, augmentation=augmentation)  # type: ignore[arg-type]
    return LabelledStream(
        corpora,
        Order(corpora.pairs_per_shard, corpora.corpus_of_shard, seed=3, shards_per_window=64),
        cut_global_batch(12, micro, ranks),
        config,
        task=task,
        classes=count_classes(task, NUM_ANSWERS),
        rank=rank,
        seed=3,
        tokenizer=TOKENIZER,
        image_size_px=SIDE,
        max_text_tokens=20,
    )


def texts(batches: list[FinetuneBatch]) -> list[str]:
    return [TOKENIZER.decode(ids.tolist()) for batch in batches for ids in batch.ids_BL]


@pytest.mark.parametrize("task", TASKS)
def test_each_pair_is_seen_once_per_epoch_by_one_of_the_ranks(root, task):
    for epoch in (0, 1):
        steps = range(2 * epoch, 2 * epoch + 2)
        seen = Counter(texts([make_stream(root, task, rank=r, ranks=2)[step] for step in steps for r in (0, 1)]))
        assert len(seen) == PAIRS and set(seen.values()) == {1}


def joined(batches: list[FinetuneBatch]) -> dict[str, np.ndarray]:
    """Join what belongs to each pair, in the order of the stream."""
    arrays = {}
    for name in ("target_BC", "image_id_B", "draw_B2", "replaced_B"):
        arrays[name] = np.concatenate([getattr(batch, name).numpy() for batch in batches])
    # NLVR2: left and right image of each pair.
    images = [batch.pixels_N3SS.unflatten(0, (-1, len(batch.ids_BL))).transpose(0, 1) for batch in batches]
    return {**arrays, "pixels": torch.cat(images).numpy()}


@pytest.mark.parametrize("task", TASKS)
def test_two_ranks_get_the_pairs_of_one_and_the_next_epoch_is_augmented_differently(root, task):
    one = joined([make_stream(root, task, micro=12)[step] for step in range(4)])
    two = joined([make_stream(root, task, rank=r, ranks=2)[step] for step in range(4) for r in (0, 1)])
    assert all(np.array_equal(one[name], two[name]) for name in one)
    epochs = [{tuple(rows.ravel().tolist()) for rows in one["pixels"][half]} for half in (slice(0, 24), slice(24, 48))]
    assert len(epochs[0] & epochs[1]) == 0


def test_workers_prepare_the_same_batches(root):
    def batches_with(workers: int) -> list[FinetuneBatch]:
        batches = micro_batches(make_stream(root, "nlvr2", workers=workers), 0, 4)
        return [batch._replace(pixels_N3SS=batch.pixels_N3SS.clone()) for batch in batches]

    for one, other in zip(batches_with(0), batches_with(2), strict=True):
        for name in one._fields:
            left, right = getattr(one, name), getattr(other, name)
            assert torch.equal(left, right) if isinstance(left, torch.Tensor) else left == right, name


def test_targets_belong_to_their_texts(root):
    stream = make_stream(root, "vqa", micro=12)
    for text, target in zip(texts([stream[0]]), stream[0].target_BC, strict=True):
        match = re.search(r"(\d+) ?(\w+)$", text)
        assert match is not None
        best = int(match[1]) % 2 + ("red", "green", "blue").index(match[2])
        expected = np.zeros(NUM_ANSWERS)
        expected[best], expected[(best + 1) % NUM_ANSWERS] = 1.0, 0.3
        assert target.numpy() == pytest.approx(expected)


def test_nlvr2_batches_hold_left_images_and_then_right_ones(root):
    stream = make_stream(root, "nlvr2", micro=12, augmentation="none")
    batch = stream[0]
    for row, text in enumerate(texts([batch])):
        match = re.search(r"picture (\d+)", text)
        assert match is not None
        for side in (0, 1):
            number = int(match[1])
            raw = file_of(draw(number + 7 * side, 30, 20 + number % 3))
            assert torch.equal(batch.pixels_N3SS[row + 12 * side], load_whole_image(raw, SIDE, "here"))


@pytest.mark.parametrize("task", ["vqa", "snli_ve", "nlvr2"])
def test_blocks_of_a_split_hold_each_pair_once_and_each_image_once_per_block(root, task):
    split = LabelledSplit(
        root / task / "train",
        task=task,
        classes=count_classes(task, NUM_ANSWERS),
        tokenizer=TOKENIZER,
        image_size_px=SIDE,
        max_text_tokens=20,
        block_size=5,
    )
    blocks = [split[number] for number in range(len(split))]
    assert [len(block.ids_BL) for block in blocks] == [5, 5, 5, 5, 4] and split.num_pairs == PAIRS
    assert len(set(texts(blocks))) == PAIRS
    sides = 2 if task == "nlvr2" else 1
    for block in blocks:
        assert len(block.pixels_N3SS) == sides * len(set(block.image_id_B.tolist()))
        # Texts of the same image have the same row.
        assert len(set(zip(block.image_B.tolist(), block.image_id_B.tolist(), strict=True))) == block.image_B.max() + 1


@pytest.mark.parametrize("size", [(64, 40), (500, 333), (97, 311)])
def test_an_image_is_squashed_as_pillow_does(size):
    noise = np.random.default_rng(1).integers(0, 256, (12, 16, 3), np.uint8)
    image = Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)
    squashed = load_whole_image(file_of(image), 48, "here").permute(1, 2, 0).numpy().astype(int)
    expected = np.asarray(image.resize((48, 48), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(squashed - expected).max() <= 2
    # Without exact=True, a large JPEG is decoded at reduced scale.
    jpeg = file_of(image.resize((1200, 800), Image.Resampling.BICUBIC), "JPEG", quality=95)
    reduced, exact = (load_whole_image(jpeg, 48, "here", exact=exact).float() for exact in (False, True))
    assert not torch.equal(reduced, exact) and (reduced - exact).abs().mean() < 3


# Task of the shards, task that reads them, part of the error.
WRONG = [
    ("retrieval", "snli_ve", "has the label None; snli_ve has 0 to 2"),
    ("retrieval", "vqa", "has no answers to its question"),
    ("snli_ve", "nlvr2", "has one image; NLVR2 needs two"),
    ("vqa", "snli_ve", "has the label None"),
]


@pytest.mark.parametrize(("given", "task", "message"), WRONG)
def test_shards_of_another_task_are_refused_with_the_source_to_build(root, given, task, message):
    with pytest.raises(DataError, match=message) as error:
        check_labels(Corpora([root / given / "train"]), task, count_classes(task, NUM_ANSWERS))
    assert f"build_shards.py {task if task != 'vqa' else 'vqav2'}" in str(error.value)


def test_an_answer_outside_of_the_vocabulary_is_refused_with_its_setting(root):
    corpora = Corpora([root / "vqa" / "train"])
    pairs = [corpora.read(*corpora.pair_of_corpus(0, number)) for number in range(PAIRS)]
    assert max(label for pair in pairs for label in pair.annotation["labels"]) == NUM_ANSWERS - 1
    with pytest.raises(DataError, match=r"label 4; vqa has 0 to 3.*--model\.heads\.num_answers"):
        for pair in pairs:
            make_target(pair, "vqa", NUM_ANSWERS - 1)
