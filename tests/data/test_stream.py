"""Properties of the stream for any corpora, ranks, batch sizes and stops: each pair once per epoch, always the same."""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import Dataset

from bridgetower.batch import PretrainBatch
from bridgetower.config.data import DataConfig
from bridgetower.data.corpora import Corpora
from bridgetower.data.loader import micro_batches, prepare_items
from bridgetower.data.order import Cut, Order
from bridgetower.data.stream import PretrainStream
from bridgetower.data.text import Tokenizer
from bridgetower.errors import DataError
from tests.small_corpora import write_corpus

GROUP = 4
# Number of captions of each image. The corpora have 11, 16, 5, 1 and 29 pairs.
COUNTS = {
    "cats": [1, 2, 1, 3, 1, 2, 1],
    "dogs": [2, 2, 3, 1, 1, 3, 4],
    "owls": [5],
    "ants": [1],
    "bees": [1, 4, 2, 1, 3, 3, 1, 2, 1, 1, 5, 2, 3],
}
EXAMPLES = settings(derandomize=True, deadline=None, max_examples=40)
TOKENIZER = Tokenizer("emoji")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("corpora")
    return {
        name: write_corpus(root, counts, name=name, samples_per_shard=3, first_image=100 * corpus)
        for corpus, (name, counts) in enumerate(COUNTS.items())
    }


def make_stream(
    folders: Sequence[Path],
    *,
    micro: int = 16,
    ranks: int = 1,
    steps: int = 1,
    rank: int = 0,
    seed: int = 0,
    **data: Any,
) -> PretrainStream:
    """Make a stream whose global batch is micro x ranks x steps."""
    names = tuple(map(str, folders))
    config = DataConfig(train_shards=names, negative_group_size=GROUP, **{"shards_per_window": 2, "workers": 0, **data})
    corpora = Corpora(folders)
    order = Order(
        corpora.pairs_per_shard,
        corpora.corpus_of_shard,
        seed=seed,
        shards_per_window=config.shards_per_window,
        corpus_weights=config.corpus_weights,
    )
    return PretrainStream(
        corpora,
        order,
        Cut(micro * ranks * steps, micro, ranks),
        config,
        rank=rank,
        seed=seed,
        tokenizer=TOKENIZER,
        image_size_px=16,
        max_text_tokens=32,
        mlm_probability=0.15,
    )


class Lines(Dataset[list[str]]):
    """Description of each micro-batch of a stream, without decoding images."""

    def __init__(self, stream: PretrainStream) -> None:
        self.stream = stream

    def __getitem__(self, micro_step: int) -> list[str]:
        return self.stream.describe_pairs(micro_step, self.stream.draw(micro_step))


class LinesWithIds(Lines):
    """Lines that also have the masked token ids."""

    def __getitem__(self, micro_step: int) -> list[str]:
        drawn = self.stream.draw(micro_step)
        masked_ids = [
            row[: (clean != TOKENIZER.pad_id).sum()]
            for row, clean in zip(drawn.masked.ids_BL, drawn.ids_BL, strict=True)
        ]
        lines = map(json.loads, self.stream.describe_pairs(micro_step, drawn))
        return [json.dumps({**line, "ids": row.tolist()}) for line, row in zip(lines, masked_ids, strict=True)]


def parse_lines(lines: Sequence[str]) -> list[dict[str, Any]]:
    """Parse lines, without the fields that depend on ranks and batch sizes."""
    return [{k: v for k, v in json.loads(line).items() if k not in ("rank", "micro_step", "step")} for line in lines]


CORPORA = st.lists(st.sampled_from(sorted(COUNTS)), min_size=1, max_size=4, unique=True)


@EXAMPLES
@given(
    corpora=CORPORA,
    ranks=st.integers(1, 8),
    micro=st.sampled_from([4, 8, 12]),
    steps=st.integers(1, 3),
    seed=st.integers(0, 3),
    negatives=st.sampled_from(["group", "corpus"]),
    data=st.data(),
)
def test_ranks_that_stop_anywhere_get_the_pairs_of_one_process(
    folders, corpora, ranks, micro, steps, seed, negatives, data
):
    chosen = [folders[name] for name in corpora]
    options: dict[str, Any] = {"seed": seed, "itm_negatives": negatives}
    if data.draw(st.booleans()):
        options["corpus_weights"] = data.draw(st.tuples(*[st.sampled_from([0.5, 1.0, 1.7, 3.0])] * len(corpora)))
    cut = {"micro": micro, "ranks": ranks, "steps": steps}
    size = micro * ranks * steps
    last = data.draw(st.integers(2, 4))
    # A global batch is in the order of its micro-steps, and within each in the order of ranks.
    alone = LinesWithIds(make_stream(chosen, micro=size, **options))
    expected = parse_lines([line for batch in range(last) for line in alone[batch]])
    stop = data.draw(st.integers(0, last * steps))
    streams = [LinesWithIds(make_stream(chosen, rank=rank, **cut, **options)) for rank in range(ranks)]
    before = [line for n in range(stop) for one in streams for line in one[n]]
    # As after a restart: nothing is known but the number of the micro-step.
    again = [LinesWithIds(make_stream(chosen, rank=rank, **cut, **options)) for rank in range(ranks)]
    after = [line for n in range(stop, last * steps) for one in again for line in one[n]]
    assert parse_lines(before + after) == expected
    assert [line["position"] for line in expected] == list(range(last * size))
    for line in expected:
        assert (line["negative_key"] is None) == (line["itm_label"] == 1)
        assert line["negative_key"] != line["key"]


@settings(EXAMPLES, max_examples=12)
@given(
    corpora=CORPORA,
    ranks=st.integers(1, 8),
    steps=st.integers(1, 3),
    workers=st.tuples(st.integers(0, 4), st.integers(0, 4)),
    prefetch=st.integers(1, 3),
    negatives=st.sampled_from(["group", "corpus"]),
    data=st.data(),
)
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_a_rank_that_resumes_with_another_number_of_workers_gets_the_same_batches(
    folders, corpora, ranks, steps, workers, prefetch, negatives, data
):
    rank, end = data.draw(st.integers(0, ranks - 1)), 3 * steps
    stop = data.draw(st.integers(1, end - 1))

    def batches_with(num_workers: int, first: int, end: int) -> list[PretrainBatch]:
        stream = make_stream(
            [folders[name] for name in corpora],
            **{"micro": 8, "ranks": ranks, "steps": steps, "rank": rank, "workers": num_workers},
            **{"itm_negatives": negatives, "prefetch_batches": prefetch, "record_pairs": True},
        )
        # Clones, as the stream overwrites images later.
        return [batch._replace(pixels_N3SS=batch.pixels_N3SS.clone()) for batch in micro_batches(stream, first, end)]

    batches = batches_with(workers[0], 0, stop) + batches_with(workers[1], stop, end)
    for batch, expected in zip(batches, batches_with(0, 0, end), strict=True):
        for name, value, other in zip(batch._fields, batch, expected, strict=True):
            if isinstance(value, torch.Tensor) and isinstance(other, torch.Tensor):
                assert torch.equal(value, other), name
            else:
                assert value == other, name


@EXAMPLES
@given(corpora=CORPORA, window=st.integers(1, 5), seed=st.integers(0, 5), epoch=st.integers(0, 50))
def test_each_epoch_holds_each_caption_once(folders, corpora, window, seed, epoch):
    stream = make_stream([folders[name] for name in corpora], micro=4, seed=seed, shards_per_window=window)
    pairs = stream.order.num_pairs
    first, end = epoch * pairs, (epoch + 1) * pairs
    lines = [line for n in range(first // 4, -(-end // 4)) for line in parse_lines(Lines(stream)[n])]
    seen = Counter(line["caption"] for line in lines if line["epoch"] == epoch)
    assert len(seen) == pairs == sum(sum(COUNTS[name]) for name in corpora) and set(seen.values()) == {1}


@EXAMPLES
@given(
    shards=st.lists(st.tuples(st.integers(1, 40), st.integers(0, 2)), min_size=1, max_size=8),
    weights=st.tuples(*[st.sampled_from([0.1, 0.5, 1.0, 1.7, 2.0, 3.25])] * 3),
    epochs=st.integers(1, 12),
)
def test_with_weights_pairs_of_a_shard_are_visited_equally_often(shards, weights, epochs):
    pairs, corpora = [pairs for pairs, _ in shards], [corpus for _, corpus in shards]
    corpora[-1] = 2  # so that there are three corpora
    order = Order(pairs, corpora, seed=1, shards_per_window=3, corpus_weights=weights)
    located = order.locate(range(epochs * order.num_pairs))
    visits = Counter(zip(located.shard.tolist(), located.pair.tolist(), strict=True))
    for shard, count in enumerate(pairs):
        per_epoch = max(1, round(weights[corpora[shard]] * count))
        of_shard = [visits[shard, pair] for pair in range(count)]
        assert sum(of_shard) == epochs * per_epoch and max(of_shard) - min(of_shard) <= 1


def test_a_pair_of_weight_two_is_visited_at_two_distant_positions_of_an_epoch():
    order = Order([50] * 40, [0] * 40, seed=0, shards_per_window=4, corpus_weights=[2.0])
    located = order.locate(range(order.num_pairs))
    positions: dict[tuple[int, int], list[int]] = {}
    for position, pair in enumerate(zip(located.shard.tolist(), located.pair.tolist(), strict=True)):
        positions.setdefault(pair, []).append(position)
    gaps = [second - first for first, second in positions.values()]
    assert len(gaps) == 2_000 and sum(gap < 64 for gap in gaps) < 0.1 * len(gaps)


def test_weights_of_one_give_the_order_without_weights():
    plain, weighted = (
        Order([7, 5, 9], [0, 1, 1], seed=3, shards_per_window=2, corpus_weights=weights) for weights in ((), (1.0, 1.0))
    )
    for one, other in zip(plain.locate(range(60)), weighted.locate(range(60)), strict=True):
        assert one.tolist() == other.tolist()


def test_any_position_of_the_published_run_is_located_without_memory_per_pair():
    """9 million pairs in 400 shards, at step 90,000 of 4,096 pairs: nothing is replayed or stored per pair."""
    import tracemalloc

    tracemalloc.start()
    order = Order([22_500] * 400, [0] * 30 + [1] * 60 + [2] * 60 + [3] * 250, seed=0, shards_per_window=64)
    located = order.locate(90_000 * 4_096 + torch.arange(64).numpy())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(located.pair) == 64 and peak < 1e6


@pytest.mark.parametrize("workers", [1, 2, 4])
@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes")
def test_any_number_of_workers_gives_the_same_items(folders, workers):
    stream = make_stream([folders["cats"], folders["bees"]], micro=8)
    expected = [Lines(stream)[n] for n in range(3, 12)]
    assert list(prepare_items(Lines(stream), 3, 12, workers=workers, prefetch=2)) == expected


def test_negatives_from_the_corpus_are_further_images_of_the_same_corpus(folders):
    stream = make_stream([folders["cats"], folders["bees"]], micro=16, itm_negatives="corpus")
    of_corpus = {key: corpus for corpus, name in enumerate(("cats", "bees")) for key in keys_of(folders[name])}
    for number in range(6):
        batch, lines = stream[number], parse_lines(Lines(stream)[number])
        assert len(batch.pixels_N3SS) == 16 + 8 and batch.itm_label_B.sum() == 8
        assert sorted(batch.itm_image_B[batch.itm_label_B == 0].tolist()) == list(range(16, 24))
        for line in lines:
            if line["negative_key"] is not None:
                assert of_corpus[line["negative_key"]] == of_corpus[line["key"]]
    drawn = Counter(line["negative_key"] for n in range(200) for line in parse_lines(Lines(stream)[n]))
    # Every image of the corpus is drawn sooner or later.
    assert set(of_corpus) <= set(drawn)


def keys_of(folder: Path) -> list[str]:
    corpora = Corpora([folder])
    readers = [corpora.reader(shard) for shard in range(len(corpora.shard_paths))]
    return [reader.key(sample) for reader in readers for sample in range(len(reader))]


def test_the_only_image_of_a_corpus_has_no_negative(folders):
    batch = make_stream([folders["ants"]], micro=8, itm_negatives="corpus")[0]
    assert batch.itm_label_B.tolist() == [1] * 8 and len(batch.pixels_N3SS) == 8


# Lines that tell a person what the model was given.


def test_a_line_names_the_pair_its_mask_and_its_negative(folders):
    stream = make_stream([folders["dogs"]], micro=8)
    batch, lines = stream[1], [json.loads(line) for line in Lines(stream)[1]]
    width = batch.clean_ids_BL.shape[1]
    masked = [(row, column) for row, line in enumerate(lines) for column in line["masked"]]
    assert masked == [divmod(index, width) for index in batch.mlm_index_M.tolist()]
    assert [line["itm_label"] for line in lines] == batch.itm_label_B.tolist()
    for row, line in enumerate(lines):
        assert line["position"] == 8 + row and line["step"] == 2 and line["shard"].endswith(".tar")
        image = int(batch.itm_image_B[row])
        assert line["negative_key"] == (None if image == row else lines[image]["key"])


def test_recorded_batches_carry_the_lines_of_their_pairs(folders):
    stream = make_stream([folders["dogs"]], micro=8, record_pairs=True)
    assert [list(batch.lines) for batch in micro_batches(stream, 0, 3)] == [Lines(stream)[n] for n in range(3)]


# Pairs that cannot be read.


@pytest.fixture
def damaged(tmp_path) -> Path:
    """A corpus with one image that cannot be decoded."""
    folder = write_corpus(tmp_path, [1] * 40, samples_per_shard=10)
    reader = Corpora([folder]).reader(1)
    with (folder / "00001.tar").open("r+b") as file:
        file.seek(int(reader._index[4]["image_offset"]))
        file.write(b"not pixels" * 5)
    return folder


def test_a_bad_pair_stops_the_run_by_default(damaged):
    with pytest.raises(DataError, match=r"00001\.tar, sample 4 .*cannot be decoded"):
        list(micro_batches(make_stream([damaged], micro=8), 0, 5))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_pair_is_replaced_and_named_in_the_log(damaged, workers, caplog):
    options: dict[str, Any] = {"on_bad_sample": "replace", "max_bad_fraction": 0.01, "record_pairs": True}
    stream = make_stream([damaged], micro=8, workers=workers, **options)
    logging.getLogger("bridgetower").propagate = True
    with caplog.at_level(logging.WARNING, "bridgetower"):
        batches = [(batch.replaced_B.tolist(), batch.lines) for batch in micro_batches(stream, 0, 10)]
    assert sum(sum(replaced) for replaced, _ in batches) == 2  # once in each of two epochs
    (first, second) = (record.getMessage() for record in caplog.records)
    assert "(1 of " in first and "sample 4" in first and "replaces it" in first and "(2 of " in second
    recorded = [json.loads(line) for _, lines in batches for line in lines]
    assert [bool(line.get("replaced")) for line in recorded] == [r for replaced, _ in batches for r in replaced]
    # Other batch sizes give the same pairs.
    other = make_stream([damaged], micro=16, **options)
    again = [line for batch in micro_batches(other, 0, 5) for line in batch.lines]
    assert parse_lines([line for _, lines in batches for line in lines]) == parse_lines(again)


@pytest.mark.parametrize("damage", ["start", "end", "tables"])
@pytest.mark.parametrize("rule", ["fail", "replace"])
def test_a_corrupted_jpeg_stops_the_run_or_is_replaced(tmp_path, damage, rule):
    folder = write_corpus(tmp_path, [1] * 16, samples_per_shard=16, image_format="JPEG")
    stream = make_stream([folder], micro=16, on_bad_sample=rule)
    row = stream.corpora.reader(0)._index[5]
    start, size = int(row["image_offset"]), int(row["image_bytes"])
    offset, length = {"start": (0, 8), "end": (size - 100, 100), "tables": (60, 60)}[damage]
    with (folder / "00000.tar").open("r+b") as file:
        file.seek(start + offset)
        file.write(bytes(length))
    if rule == "fail":
        with pytest.raises(DataError, match=r"00000\.tar, sample 5 .*cannot be decoded"):
            stream[0]
    else:
        batch = stream[0]
        assert batch.replaced_B.sum() == 1 and "sample 5" in batch.notes[0]


def test_too_many_bad_pairs_stop_the_run(damaged):
    stream = make_stream([damaged], micro=8, on_bad_sample="replace", max_bad_fraction=0.0002)
    with pytest.raises(DataError, match=r"3 of \d+ pairs could not be read.*data\.max_bad_fraction=0\.0002 of 10,000"):
        list(micro_batches(stream, 0, 40))


def test_pairs_of_a_shard_that_disappears_are_replaced_and_named(tmp_path):
    folder = write_corpus(tmp_path, [1] * 40, samples_per_shard=10)
    stream = make_stream([folder], micro=8, on_bad_sample="replace", max_bad_fraction=0.01)
    (folder / "00002.tar").unlink()
    notes = [note for batch in micro_batches(stream, 0, 5) for note in batch.notes]
    assert len(notes) == 10 and all("00002.tar cannot be read" in note for note in notes)


@pytest.mark.parametrize("at", ["image", "json"])
def test_a_shard_that_was_cut_short_after_the_start_is_named(tmp_path, at):
    folder = write_corpus(tmp_path, [1] * 8, samples_per_shard=8)
    stream = make_stream([folder], micro=8)
    index = stream.corpora.reader(0)._index[7]
    end = int(index["image_offset"]) + (10 if at == "image" else int(index["record_offset"]) + 5)
    os.truncate(folder / "00000.tar", end)
    with pytest.raises(DataError, match=r"00000\.tar ends before byte .*where sample 7 ends"):
        stream[0]


def test_replacing_gives_up_if_nothing_can_be_read(tmp_path):
    folder = write_corpus(tmp_path, [1] * 8, samples_per_shard=8)
    stream = make_stream([folder], micro=8, on_bad_sample="replace")
    (folder / "00000.tar").unlink()
    with pytest.raises(DataError, match="A pair and 8 replacements from corpus cannot be read"):
        stream[0]


def test_workers_whose_batches_do_not_fit_into_shared_memory_are_refused_before_they_start(folders, monkeypatch):
    stream = make_stream([folders["cats"]], micro=8, workers=1)
    stream.image_size_px = 1_000_000
    with pytest.raises(Exception, match=r"MB of shared memory .*data\.workers or data\.prefetch_batches"):
        next(iter(micro_batches(stream, 0, 1)))
