"""Micro-batches are the same for any number of ranks and workers; a failure is an error and never a hang."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

import bridgetower.data.loader as loader_module
from bridgetower.batch import PretrainBatch
from bridgetower.config.data import DataConfig
from bridgetower.data.corpora import Corpora, as_int64
from bridgetower.data.images import load_image
from bridgetower.data.loader import micro_batches
from bridgetower.data.order import Order, cut_global_batch
from bridgetower.data.stream import PretrainStream
from bridgetower.data.text import Tokenizer
from bridgetower.errors import EXIT_FAILED, DataError, TrainingError
from tests.conftest import REPO, run_script
from tests.small_corpora import write_corpus

GROUP = 4
# 29 pairs in two corpora, so that batches of 16 straddle epochs. Images have up to 3 captions.
COUNTS = {"cats": [1, 2, 1, 3, 1, 2, 3, 1, 2], "dogs": [2, 2, 3, 1, 1, 3, 1]}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[Path]:
    root = tmp_path_factory.mktemp("corpora")
    return [
        write_corpus(root, counts, name=name, samples_per_shard=3, first_image=100 * corpus)
        for corpus, (name, counts) in enumerate(COUNTS.items())
    ]


def make_stream(
    folders: Sequence[Path], *, ranks: int = 1, rank: int = 0, micro: int = 8, **data: Any
) -> PretrainStream:
    corpora = Corpora(folders)
    config = DataConfig(
        train_shards=tuple(map(str, folders)),
        negative_group_size=GROUP,
        shards_per_window=3,
        prefetch_batches=2,
        **data,
    )
    weights = config.corpus_weights
    return PretrainStream(
        corpora,
        Order(corpora.pairs_per_shard, corpora.corpus_of_shard, seed=5, shards_per_window=3, corpus_weights=weights),
        cut_global_batch(16, micro, ranks, GROUP),
        config,
        rank=rank,
        seed=5,
        tokenizer=Tokenizer("emoji"),
        image_size_px=20,
        max_text_tokens=48,
        mlm_probability=0.15,
    )


def read(stream: PretrainStream, first: int, end: int, workers: int = 0) -> list[PretrainBatch]:
    stream.config = dataclasses.replace(stream.config, workers=workers)
    # Clones, as the stream overwrites images later.
    return [batch._replace(pixels_N3SS=batch.pixels_N3SS.clone()) for batch in micro_batches(stream, first, end)]


def assert_same(batches: Sequence[PretrainBatch], others: Sequence[PretrainBatch]) -> None:
    assert len(batches) == len(others)
    for batch, other in zip(batches, others, strict=True):
        for name, value, expected in zip(batch._fields, batch, other, strict=True):
            if isinstance(value, torch.Tensor) and isinstance(expected, torch.Tensor):
                assert value.dtype == expected.dtype and torch.equal(value, expected), name
            else:
                assert value == expected, name


def join(parts: Sequence[PretrainBatch], pad_id: int) -> PretrainBatch:
    """Join the micro-batches of all ranks into one: padded to the widest, with rows renumbered."""
    width = max(part.clean_ids_BL.shape[1] for part in parts)
    rows = [sum(len(part.image_id_B) for part in parts[:number]) for number in range(len(parts))]

    def widen(ids_BL: torch.Tensor, value: int) -> torch.Tensor:
        return torch.nn.functional.pad(ids_BL, (0, width - ids_BL.shape[1]), value=value)

    def recount(part: PretrainBatch, first: int) -> torch.Tensor:
        length = part.clean_ids_BL.shape[1]
        return (first + part.mlm_index_M // length) * width + part.mlm_index_M % length

    return PretrainBatch(
        pixels_N3SS=torch.cat([part.pixels_N3SS for part in parts]),
        clean_ids_BL=torch.cat([widen(part.clean_ids_BL, pad_id) for part in parts]),
        masked_ids_BL=torch.cat([widen(part.masked_ids_BL, pad_id) for part in parts]),
        attention_mask_BL=torch.cat([widen(part.attention_mask_BL, False) for part in parts]),
        mlm_index_M=torch.cat([recount(part, first) for part, first in zip(parts, rows, strict=True)]),
        mlm_label_M=torch.cat([part.mlm_label_M for part in parts]),
        # Each rank's loss is the mean over its groups; the joined loss is the mean over all ranks.
        mlm_weight_M=torch.cat([part.mlm_weight_M for part in parts]) / len(parts),
        itm_image_B=torch.cat([part.itm_image_B + first for part, first in zip(parts, rows, strict=True)]),
        itm_label_B=torch.cat([part.itm_label_B for part in parts]),
        image_id_B=torch.cat([part.image_id_B for part in parts]),
        corpus_B=torch.cat([part.corpus_B for part in parts]),
        num_tokens=tuple(count for part in parts for count in part.num_tokens),
        num_masked=tuple(count for part in parts for count in part.num_masked),
        replaced_B=torch.cat([part.replaced_B for part in parts]),
    )


@pytest.mark.filterwarnings(
    "ignore:This DataLoader will create 3 worker processes"
)  # more than the cores of this machine
def test_micro_batches_are_the_same_with_0_1_and_3_workers(folders):
    alone = read(make_stream(folders), 0, 12)
    assert len(alone) == 12
    assert_same(read(make_stream(folders), 0, 12, workers=1), alone)
    assert_same(read(make_stream(folders), 0, 12, workers=3), alone)


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_micro_batches_of_all_ranks_together_are_the_batch_of_one_rank(folders, ranks):
    joined = read(make_stream(folders, micro=16), 0, 10)
    parts = [read(make_stream(folders, ranks=ranks, rank=rank, micro=16 // ranks), 0, 10) for rank in range(ranks)]
    assert_same([join(step, pad_id=1) for step in zip(*parts, strict=True)], joined)


def test_accumulated_micro_batches_together_are_the_joined_batch(folders):
    joined = read(make_stream(folders, micro=16), 0, 5)
    halves = read(make_stream(folders, micro=8), 0, 10)
    assert_same([join(halves[step : step + 2], pad_id=1) for step in range(0, 10, 2)], joined)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_that_resumes_in_the_middle_gives_the_same_tail(folders, workers):
    assert_same(read(make_stream(folders), 7, 12, workers), read(make_stream(folders), 0, 12)[7:])


def test_an_epoch_holds_every_pair_with_its_own_image(folders):
    corpora = Corpora(folders)
    total = sum(corpora.pairs_per_shard)
    assert total == 29
    expected = {}  # image of each caption, by token ids, read from the shards one after another
    tokenizer = Tokenizer("emoji")
    for shard in range(len(corpora.shard_paths)):
        reader = corpora.reader(shard)
        for number in range(len(reader)):
            sample = reader.read(number)
            for ids in tokenizer.encode(sample.record["captions"], 48):
                expected[tuple(ids.tolist())] = load_image(sample.image, 20, "x")
    batches = read(make_stream(folders, micro=4), 0, 29)  # 116 pairs: four epochs
    seen: dict[tuple[int, ...], int] = {}
    for batch in batches:
        for row in range(4):
            caption = tuple(batch.clean_ids_BL[row][batch.attention_mask_BL[row]].tolist())
            assert torch.equal(batch.pixels_N3SS[row], expected[caption])
            seen[caption] = seen.get(caption, 0) + 1
    assert seen.keys() == expected.keys()
    assert set(seen.values()) == {4}


def test_a_negative_is_another_image_and_from_the_same_corpus_if_the_group_has_one(folders):
    corpora = Corpora(folders)
    corpus_of = {
        image_id: corpus
        for shard, corpus in enumerate(corpora.corpus_of_shard)
        for image_id in as_int64(corpora.reader(shard).image_ids()).tolist()
    }
    num_same = num_other = 0
    for batch in read(make_stream(folders), 0, 30):
        ids, images = batch.image_id_B.tolist(), batch.itm_image_B.tolist()
        assert batch.itm_label_B.sum() == 4
        for row, is_positive in enumerate(batch.itm_label_B.tolist()):
            image_id = ids[images[row]]
            if is_positive:
                assert image_id == ids[row]
                continue
            group = ids[row // GROUP * GROUP : row // GROUP * GROUP + GROUP]
            has_same_corpus = any(other != ids[row] and corpus_of[other] == corpus_of[ids[row]] for other in group)
            assert image_id != ids[row] and image_id in group
            assert (corpus_of[image_id] == corpus_of[ids[row]]) == has_same_corpus
            num_same, num_other = num_same + has_same_corpus, num_other + (not has_same_corpus)
    assert num_same > 50 and num_other > 5


def test_a_batch_is_as_wide_as_its_longest_caption(folders):
    widths = {batch.clean_ids_BL.shape[1] for batch in read(make_stream(folders), 0, 12)}
    assert len(widths) > 1 and max(widths) <= 48
    for batch in read(make_stream(folders), 0, 12):
        assert batch.attention_mask_BL.sum(dim=1).max() == batch.clean_ids_BL.shape[1]
        assert torch.equal(batch.clean_ids_BL != 1, batch.attention_mask_BL)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_shard_is_the_same_error_with_and_without_workers(tmp_path, workers):
    folder = write_corpus(tmp_path, [1] * 16)
    shard = folder / "00001.tar"
    raw = bytearray(shard.read_bytes())
    start = raw.index(b"\x89PNG")
    raw[start : start + 40] = bytes(40)
    shard.write_bytes(raw)
    with pytest.raises(DataError) as error:
        read(make_stream([folder]), 0, 2, workers)
    # The worker's error itself, without a traceback in its text.
    assert str(error.value).startswith(f"The image of {shard}, sample 0 (image_id corpus:")
    assert "\n" not in str(error.value)


@pytest.fixture
def workers_are_checked_often(monkeypatch):
    """Make DataLoader check every 0.2 s, instead of every 5 s, that its workers live."""
    monkeypatch.setattr(_MultiProcessingDataLoaderIter._try_get_data, "__defaults__", (0.2,))


@pytest.mark.usefixtures("workers_are_checked_often")
@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_worker_ends_in_an_error_and_not_in_a_hang(folders, workers):
    # A hang would end at pytest's time limit.
    stream = micro_batches(make_stream(folders, workers=workers), 0, 100_000)
    before = set(multiprocessing.active_children())
    next(stream)
    pids = [child.pid for child in set(multiprocessing.active_children()) - before]
    assert len(pids) == workers and pids[0] is not None
    os.kill(pids[0], signal.SIGKILL)
    with pytest.raises(TrainingError, match=r"died .*--resume=auto.*--data\.workers") as error:
        for _ in stream:
            pass
    assert error.value.exit_code == EXIT_FAILED


@pytest.mark.usefixtures("workers_are_checked_often")
def test_a_worker_whose_read_hangs_ends_in_an_error_and_not_in_a_hang(tmp_path, monkeypatch):
    monkeypatch.setattr(loader_module, "_WORKER_TIMEOUT_SECONDS", 3)
    folder = write_corpus(tmp_path, [1] * 16)
    stream = make_stream([folder], workers=1)
    # Opening a pipe that nobody writes to hangs, like a file system that does not answer.
    (folder / "00001.tar").unlink()
    os.mkfifo(folder / "00001.tar")
    with pytest.raises(TrainingError, match=r"died .*a read hung"):
        list(micro_batches(stream, 0, 4))


# Prints if the server that a worker was forked from has loaded torch.
SERVER_OF_A_WORKER = """
import multiprocessing, psutil
from bridgetower.data.loader import prepare_items
if __name__ == "__main__":
    items = prepare_items("numbers", 0, 5, workers=1, prefetch=1)
    assert next(items) == "n"
    (worker,) = multiprocessing.active_children()
    print(any("libtorch" in region.path for region in psutil.Process(worker.pid).parent().memory_maps()))
"""


def test_workers_share_what_they_import(tmp_path):
    (tmp_path / "program.py").write_text(SERVER_OF_A_WORKER)
    # A separate program, as this one may have a server already.
    result = run_script(str(tmp_path / "program.py"), env={"PYTHONPATH": str(REPO)}, launcher="preloaded")
    assert result.stdout == "True\n", result.stderr
