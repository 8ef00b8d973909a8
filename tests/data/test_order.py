"""The order of training: every pair once per epoch, and the same pairs for any number of ranks."""

from __future__ import annotations

import pickle
import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bridgetower.data.order import Cut, Order, cut_global_batch
from bridgetower.errors import ConfigError, DataError

SAME_EVERY_TIME = settings(derandomize=True, deadline=None, max_examples=60)
SHARDS = st.lists(st.tuples(st.integers(1, 30), st.integers(0, 2)), min_size=1, max_size=12)


def make_order(shards, seed=0, window=4) -> Order:
    """Order of shards that are given as (pairs, corpus)."""
    return Order([pairs for pairs, _ in shards], [corpus for _, corpus in shards], seed=seed, shards_per_window=window)


def located(order: Order, positions) -> list[tuple[int, int]]:
    shards, pairs = order.locate(positions)
    return list(zip(shards.tolist(), pairs.tolist(), strict=True))


@SAME_EVERY_TIME
@given(SHARDS, st.integers(0, 5), st.integers(1, 6), st.integers(0, 3))
def test_an_epoch_holds_every_pair_exactly_once(shards, seed, window, epoch):
    order = make_order(shards, seed, window)
    stream = located(order, epoch * order.num_pairs + np.arange(order.num_pairs))
    assert sorted(stream) == [(shard, pair) for shard, (pairs, _) in enumerate(shards) for pair in range(pairs)]


def test_batches_that_straddle_epochs_drop_and_repeat_nothing():
    order = make_order([(7, 0), (5, 0), (11, 1)])  # 23 pairs: no batch of 8 ends where an epoch does
    batches = [located(order, range(8 * batch, 8 * batch + 8)) for batch in range(23)]
    counts = Counter(pair for batch in batches for pair in batch)
    assert len(counts) == 23 and set(counts.values()) == {8}
    # The third batch holds the last 7 pairs of the first epoch and the first pair of the second.
    assert batches[2] == located(order, range(16, 23)) + located(order, [23])


@SAME_EVERY_TIME
@given(SHARDS, st.lists(st.integers(0, 2000), min_size=1, max_size=30))
def test_a_position_is_the_same_pair_whatever_it_is_located_with(shards, positions):
    order = make_order(shards)
    assert located(order, positions) == [located(order, [position])[0] for position in positions]


def test_each_epoch_and_each_seed_has_another_order():
    shards = [(20, 0), (20, 0), (20, 1)]
    epochs = [located(make_order(shards, seed), epoch * 60 + np.arange(60)) for seed in (0, 1) for epoch in (0, 1, 2)]
    for one in range(len(epochs)):
        for other in range(one):
            num_equal = sum(a == b for a, b in zip(epochs[one], epochs[other], strict=True))
            assert num_equal < 10  # 1 is expected by chance


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("micro_batch_size", [8, 16, 32])
def test_all_ranks_together_read_the_stream_of_one_rank(world_size, micro_batch_size):
    cut = cut_global_batch(128, micro_batch_size, world_size, 8)
    micro_steps = 3 * cut.accumulation_steps
    read = [cut.positions(step, rank) for step in range(micro_steps) for rank in range(world_size)]
    assert np.concatenate(read).tolist() == list(range(3 * 128))


@pytest.mark.parametrize(("world_size", "micro_batch_size"), [(1, 64), (2, 32), (4, 16), (2, 16)])
def test_no_group_is_divided_between_ranks_or_micro_batches(world_size, micro_batch_size):
    cut = cut_global_batch(64, micro_batch_size, world_size, 16)
    for micro_step in range(5):
        for rank in range(world_size):
            groups = Counter((cut.positions(micro_step, rank) // 16).tolist())
            assert set(groups.values()) == {16}


def test_every_window_has_the_corpora_in_the_same_proportion():
    # 40 shards of one corpus and 10 of another, in windows of 10 shards of 10 pairs: 80 and 20 pairs per window.
    order = make_order([(10, 0)] * 40 + [(10, 1)] * 10, window=10)
    for epoch in range(20):
        shards = order.locate(epoch * 500 + np.arange(500)).shard.reshape(5, 100)
        small_corpus = (shards >= 40).sum(axis=1)
        # A purely random order would leave some of these 100 windows without the small corpus.
        assert (small_corpus >= 10).all() and (small_corpus <= 30).all(), small_corpus


def test_reads_stay_within_one_window_of_shards():
    order = make_order([(10, 0)] * 20, window=5)
    shards = order.locate(np.arange(200)).shard.reshape(4, 50)
    windows = [set(row.tolist()) for row in shards]
    assert [len(window) for window in windows] == [5, 5, 5, 5]
    assert set.union(*windows) == set(range(20))


def test_pairs_of_a_window_are_mixed_over_all_its_shards():
    order = make_order([(100, 0)] * 5, window=5)
    first_half = Counter(order.locate(np.arange(250)).shard.tolist())
    assert all(30 < count < 70 for count in first_half.values())  # 50 are expected of each


def test_one_shard_more_than_a_window_makes_two_windows_of_half_the_size():
    order = make_order([(10, 0)] * 65, window=64)
    shards = order.locate(np.arange(650)).shard
    assert len(set(shards[:320].tolist())) == 32
    assert len(set(shards[320:].tolist())) == 33


def test_old_runs_keep_their_order():
    # Frozen. Another order would change the data of every existing run that is resumed.
    order = Order([5, 3, 4, 6], [0, 0, 1, 1], seed=0, shards_per_window=2)
    # fmt: off
    assert located(order, np.arange(20)) == [
        (0, 0), (2, 1), (0, 4), (2, 3), (2, 2), (0, 3), (0, 1), (2, 0), (0, 2), (3, 0),
        (3, 3), (1, 1), (3, 1), (3, 2), (1, 0), (3, 4), (1, 2), (3, 5), (1, 2), (2, 2),
    ]
    # fmt: on


def test_a_worker_gets_the_same_order():
    order = make_order([(10, 0)] * 7 + [(3, 1)] * 5)
    located(order, np.arange(10))  # fills the cache, which is not pickled
    assert located(pickle.loads(pickle.dumps(order)), np.arange(300)) == located(order, np.arange(300))


@pytest.mark.parametrize("pairs", [[], [3, 0, 2]])
def test_a_shard_without_pairs_is_refused(pairs):
    with pytest.raises(DataError, match="at least one pair"):
        Order(pairs, [0] * len(pairs), seed=0, shards_per_window=4)


def test_a_window_of_no_shards_is_refused_with_the_default():
    with pytest.raises(ConfigError, match=r"data\.shards_per_window=0 .* 64"):
        make_order([(3, 0)], window=0)


@pytest.mark.parametrize(
    ("sizes", "value", "suggestion"),
    [
        ((4096, 48, 1, 32), "data.micro_batch_size=48", "--data.micro_batch_size=32, --data.micro_batch_size=64"),
        ((60, 30, 1, 32), "data.micro_batch_size=30", "--data.negative_group_size=30"),
        ((60, 1, 1, 32), "data.micro_batch_size=1", "--data.micro_batch_size=32 and --data.global_batch_size=64"),
        ((4096, 96, 64, 32), "data.global_batch_size=4096", "divide it: 32, 64"),
        ((100, 32, 4, 32), "data.global_batch_size=100", "next global batch that divides is 128"),
        ((64, 32, 1, 1), "data.negative_group_size=1", "The default is 32"),
        ((0, 32, 1, 32), "data.global_batch_size=0", "must be positive"),
    ],
)
def test_a_batch_that_does_not_divide_is_refused_with_its_value_and_a_suggestion(sizes, value, suggestion):
    with pytest.raises(ConfigError) as refused:
        cut_global_batch(*sizes)
    assert value in str(refused.value)
    assert suggestion in str(refused.value)


@SAME_EVERY_TIME
@given(st.integers(1, 600), st.integers(1, 100), st.sampled_from([1, 2, 3, 8]), st.integers(2, 40))
def test_every_size_that_an_error_suggests_fits(global_batch_size, micro_batch_size, world_size, group_size):
    try:
        cut = cut_global_batch(global_batch_size, micro_batch_size, world_size, group_size)
    except ConfigError as refused:
        text = str(refused)
    else:
        assert cut == Cut(global_batch_size, micro_batch_size, world_size)
        assert cut.accumulation_steps * micro_batch_size * world_size == global_batch_size
        return
    names = ("micro_batch_size", "global_batch_size", "negative_group_size")
    flags = {name: [int(size) for size in re.findall(rf"--data\.{name}=(\d+)", text)] for name in names}
    divide_it = re.search(r"divide it: ([\d, ]+)", text)
    micro_sizes = flags["micro_batch_size"] + ([int(n) for n in divide_it[1].split(",")] if divide_it else [])
    global_sizes = flags["global_batch_size"] + [int(n) for n in re.findall(r"that divides is (\d+)", text)]
    assert micro_sizes or global_sizes
    for size in micro_sizes or [micro_batch_size]:
        cut_global_batch((global_sizes or [global_batch_size])[0], size, world_size, group_size)
    for size in flags["negative_group_size"]:
        cut_global_batch(global_batch_size, micro_batch_size, world_size, size)
