"""Random numbers as pure functions of key and counter: their distribution, and that their values never change."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bridgetower import rng

KEYS = st.integers(0, 2**64 - 1)
SAME_EVERY_TIME = settings(derandomize=True, deadline=None)


def splitmix64_finaliser(value: int) -> int:
    """Apply the published finaliser to a Python integer."""
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB % 2**64
    return value ^ (value >> 31)


def test_the_reference_in_this_file_computes_the_first_published_number_of_splitmix64():
    # First output of the generator with seed 0, in Vigna's splitmix64.c and Java's SplittableRandom.
    assert splitmix64_finaliser(0x9E3779B97F4A7C15) == 0xE220A8397B1DCDAF


@SAME_EVERY_TIME
@given(KEYS, st.integers(0, 2**63 - 1))
def test_bits_are_splitmix64_twice_with_the_key_in_between(key, counter):
    once = splitmix64_finaliser((counter * 0x9E3779B97F4A7C15 + key) % 2**64)
    assert int(rng.bits(key, counter)) == splitmix64_finaliser(once ^ key)


def test_the_numbers_of_existing_runs_do_not_change():
    # Frozen: another value here would change the order, masks and negatives of every existing run.
    assert rng.hash64("BridgeTower") == 13389028695850294950
    assert rng.key(0, "mlm") == 7832900790730964975
    assert rng.key(7, "order of pairs", 3) == 15034402108609590875
    assert rng.bits(rng.key(0, "x"), np.arange(4)).tolist() == [
        16283138803390520609,
        11928410693647206045,
        7293444088906868076,
        17514584341147629616,
    ]
    assert rng.uniform(1, [0, 1, 2]).tolist() == [0.5153260482675259, 0.3606375009593753, 0.34362312686658336]
    assert rng.below(5, np.arange(10), 100).tolist() == [26, 83, 24, 43, 78, 27, 1, 12, 19, 22]
    assert rng.shuffled(3, 10).tolist() == [9, 3, 6, 7, 2, 0, 8, 4, 5, 1]
    assert rng.permute(3, np.arange(10), 10).tolist() == [9, 5, 7, 0, 2, 4, 3, 1, 6, 8]
    assert rng.permute(3, [0, 1, 999_999], 1_000_000).tolist() == [770365, 292077, 725965]


@SAME_EVERY_TIME
@given(st.integers(1, 3000), KEYS)
def test_permute_is_a_bijection_of_its_range(count, key):
    assert sorted(rng.permute(key, np.arange(count), count).tolist()) == list(range(count))


@SAME_EVERY_TIME
@given(st.integers(1, 2**40), KEYS)
def test_permute_keeps_numbers_of_a_large_range_distinct_and_in_range(count, key):
    numbers = np.unique(np.linspace(0, count - 1, 50).astype(np.int64))
    permuted = rng.permute(key, numbers, count)
    assert len(set(permuted.tolist())) == len(numbers)
    assert (permuted >= 0).all() and (permuted < count).all()


@SAME_EVERY_TIME
@given(st.lists(st.tuples(KEYS, st.integers(1, 500), st.integers(0, 499)), min_size=1, max_size=8))
def test_permute_of_several_keys_and_sizes_equals_one_call_for_each(calls):
    calls = [(key, size, number % size) for key, size, number in calls]
    keys, sizes, numbers = zip(*calls, strict=True)
    together = rng.permute(np.array(keys, np.uint64), numbers, np.array(sizes))
    assert together.tolist() == [int(rng.permute(key, number, size)) for key, size, number in calls]


def test_all_permutations_of_three_are_about_equally_frequent():
    keys = np.repeat(rng.bits(1, np.arange(6000)), 3)
    orders = rng.permute(keys, np.tile([0, 1, 2], 6000), 3).reshape(6000, 3)
    counts = {order: int((orders == order).all(axis=1).sum()) for order in permutations(range(3))}
    # 1000 are expected of each, with a standard deviation of 29.
    assert sum(counts.values()) == 6000
    assert all(850 < count < 1150 for count in counts.values()), counts


@SAME_EVERY_TIME
@given(KEYS, st.lists(st.integers(0, 2**62), min_size=1, max_size=20))
def test_uniform_numbers_are_at_least_0_and_below_1(key, counters):
    numbers = rng.uniform(key, counters)
    assert (numbers >= 0).all() and (numbers < 1).all()


@SAME_EVERY_TIME
@given(KEYS, st.lists(st.integers(0, 2**62), min_size=1, max_size=20), st.integers(1, 2**53))
def test_below_stays_below_its_bound(key, counters, bound):
    numbers = rng.below(key, counters, bound)
    assert (numbers >= 0).all() and (numbers < bound).all()


def test_below_takes_one_bound_per_number():
    assert rng.below(9, np.zeros(3), [1, 2, 1000]).tolist() == [int(rng.below(9, 0, b)) for b in (1, 2, 1000)]


@pytest.mark.parametrize("key", [0, 1, 2**64 - 1, rng.key(0, "mlm")])
def test_numbers_of_a_key_are_spread_evenly(key):
    counts = np.bincount(rng.below(key, np.arange(160_000), 16), minlength=16)
    # 10,000 are expected in each of 16 bins, with a standard deviation of 97.
    assert (abs(counts - 10_000) < 500).all(), counts


def test_numbers_of_neighbouring_counters_and_keys_are_not_correlated():
    table = rng.uniform(np.arange(300, dtype=np.uint64)[:, None], np.arange(300))
    assert abs(np.corrcoef(table[:, :-1].ravel(), table[:, 1:].ravel())[0, 1]) < 0.02
    assert abs(np.corrcoef(table[:-1].ravel(), table[1:].ravel())[0, 1]) < 0.02


@SAME_EVERY_TIME
@given(KEYS, st.integers(0, 200))
def test_shuffled_is_a_permutation(key, count):
    assert sorted(rng.shuffled(key, count).tolist()) == list(range(count))


def test_keys_differ_by_seed_purpose_and_order_of_their_parts():
    parts: list[tuple[int | str, ...]] = [
        (),
        (0,),
        (1,),
        ("",),
        ("0",),
        ("itm",),
        ("mlm",),
        (0, "mlm"),
        ("mlm", 0),
        (0, 1),
        (1, 0),
        (0, 0),
        (0, 0, 0),
    ]
    assert len({rng.key(*part) for part in parts}) == len(parts)
