"""The order of training: which pair stands at which position of the stream, as a pure function.

The stream is endless: epoch e takes the positions [e*N, (e+1)*N) of a run over N pairs, and holds each pair exactly
once. Global batch b is the positions [b*G, (b+1)*G), so that a batch may end one epoch and begin the next; no pair is
dropped or repeated to fill a batch. Resuming at step s is the arithmetic b = s. Where a run gives a corpus a weight w,
each of its pairs is visited w times an epoch: for w = 2.5 two or three times, and five times in any two epochs (to one
pair of a shard).

Shuffling is in windows of shards: an epoch permutes the shards, cuts them into windows and permutes the pairs inside
each window. Reads stay within one window's shards at a time, and a remote shard is fetched once an epoch.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from bridgetower import rng
from bridgetower.errors import ConfigError, DataError

I64 = npt.NDArray[np.int64]


class Located(NamedTuple):
    """Where the pairs of some positions lie. All arrays have the shape of the positions."""

    shard: I64
    """Number of the shard, counted over all corpora."""
    pair: I64
    """Number of the pair inside the shard."""


class _Turns(NamedTuple):
    """When shards come up in an epoch: once each, or as often as the weight of their corpus says."""

    shard: I64
    first: I64  # visits of the shard's pairs in the same epoch before this turn
    size: I64  # visits in this turn; each of the shard's pairs at most once
    per_epoch: I64  # visits of the shard's pairs in all its turns


class _EpochPlan(NamedTuple):
    turn_order: I64  # numbers of turns in the order of this epoch
    pair_end: I64  # pairs up to and including each turn of that order
    window_pair_start: I64  # pairs before each window, and all pairs at the end


class Order:
    """Maps positions of the stream to pairs. Uniform over pairs, as the paper's concatenation of corpora.

    Holds a few numbers per shard and nothing per pair, so any position is found at once.
    """

    def __init__(
        self,
        pairs_per_shard: Sequence[int],
        corpus_of_shard: Sequence[int],
        *,
        seed: int,
        shards_per_window: int,
        corpus_weights: Sequence[float] = (),
    ) -> None:
        """Describe the corpora.

        Args:
            pairs_per_shard: pairs of each shard, all corpora one after another.
            corpus_of_shard: which corpus each shard belongs to; the shards of every corpus are spread evenly over
                an epoch, so that each window holds the corpora in the same proportion.
            shards_per_window: pairs are shuffled within windows of about this many shards.
            corpus_weights: visits of each pair of a corpus in an epoch, by corpus; empty: 1.

        Raises:
            ConfigError: a setting is out of its range.
            DataError: a shard without pairs.
        """
        if shards_per_window < 1:
            raise ConfigError(f"data.shards_per_window={shards_per_window} must be at least 1; the default is 64.")
        self._pairs_per_shard = np.asarray(pairs_per_shard, np.int64)
        self._corpus_of_shard = np.asarray(corpus_of_shard, np.int64)
        if self._pairs_per_shard.size == 0 or (self._pairs_per_shard < 1).any():
            raise DataError(f"Each shard needs at least one pair; they hold {self._pairs_per_shard.tolist()[:20]}.")
        self._seed = seed
        self._turns = self._take_turns(corpus_weights)
        self._has_parts = bool((self._turns.per_epoch != self._pairs_per_shard[self._turns.shard]).any())
        num_turns = self._turns.shard.size
        num_windows = -(-num_turns // shards_per_window)
        # Even cuts: 65 shards in windows of 64 are 33 + 32, not 64 + a lone shard that is not mixed with anything.
        self._window_cuts = np.linspace(0, num_turns, num_windows + 1).round().astype(np.int64)
        self.num_pairs = int(self._turns.size.sum())
        """Visits of an epoch: all pairs, where no corpus has a weight."""
        self._plan = lru_cache(maxsize=4)(self._make_plan)

    def __getstate__(self) -> dict[str, object]:
        """Leave the cache behind when a worker process is started."""
        return {name: value for name, value in self.__dict__.items() if name != "_plan"}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._plan = lru_cache(maxsize=4)(self._make_plan)

    def locate(self, positions: npt.ArrayLike) -> Located:
        """Find the pairs at positions of the stream, which may be of several epochs and in any order."""
        asked = np.asarray(positions, np.int64)
        epochs, inside = asked // self.num_pairs, asked % self.num_pairs
        shards, pairs = np.empty_like(asked), np.empty_like(asked)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            shards[here], pairs[here] = self._locate_in_epoch(int(epoch), inside[here])
        return Located(shards, pairs)

    def shards_of(self, position: int, windows: int) -> list[int]:
        """The shards that are read from a position on: those of its window, then those of the next ones."""
        found: dict[int, None] = {}
        for _ in range(windows):
            plan = self._plan(position // self.num_pairs)
            window = int(np.searchsorted(plan.window_pair_start, position % self.num_pairs, side="right")) - 1
            turns = plan.turn_order[self._window_cuts[window] : self._window_cuts[window + 1]]
            found |= dict.fromkeys(self._turns.shard[turns].tolist())
            position += int(plan.window_pair_start[window + 1]) - position % self.num_pairs
        return list(found)

    def _take_turns(self, corpus_weights: Sequence[float]) -> _Turns:
        shards = np.arange(self._pairs_per_shard.size)
        if not corpus_weights:
            first = np.zeros(shards.size, np.int64)
            return _Turns(shards, first, self._pairs_per_shard, self._pairs_per_shard)
        num_corpora = int(self._corpus_of_shard.max()) + 1
        if len(corpus_weights) != num_corpora or min(corpus_weights) <= 0:
            raise ConfigError(
                f"data.corpus_weights={','.join(map(str, corpus_weights))} must be {num_corpora} numbers above 0, one "
                "for each of data.train_shards: how often each of its pairs is seen in an epoch."
            )
        weight = np.asarray(corpus_weights, np.float64)[self._corpus_of_shard]
        per_epoch = np.maximum(1, np.rint(weight * self._pairs_per_shard)).astype(np.int64)
        num_turns = -(-per_epoch // self._pairs_per_shard)
        shard = np.repeat(shards, num_turns)
        turn = np.arange(shard.size) - np.repeat(np.cumsum(num_turns) - num_turns, num_turns)
        first = turn * self._pairs_per_shard[shard]
        size = np.minimum(self._pairs_per_shard[shard], per_epoch[shard] - first)
        return _Turns(shard, first, size, per_epoch[shard])

    def _locate_in_epoch(self, epoch: int, positions: I64) -> Located:
        plan = self._plan(epoch)
        window = np.searchsorted(plan.window_pair_start, positions, side="right") - 1
        start = plan.window_pair_start[window]
        size = plan.window_pair_start[window + 1] - start
        window_keys = rng.bits(rng.key(self._seed, "order of pairs", epoch), window)
        shuffled = start + rng.permute(window_keys, positions - start, size)
        slot = np.searchsorted(plan.pair_end, shuffled, side="right")
        turn = plan.turn_order[slot]
        return Located(
            self._turns.shard[turn],
            self._pair_of_visit(epoch, turn, shuffled - (plan.pair_end[slot] - self._turns.size[turn])),
        )

    def _pair_of_visit(self, epoch: int, turn: I64, visit: I64) -> I64:
        """The pair of a visit of a turn: the shard's visits of all epochs go round its pairs again and again."""
        turns = self._turns
        shard = turns.shard[turn]
        num_pairs = self._pairs_per_shard[shard]
        if not self._has_parts:
            return visit
        round_trip = (epoch * turns.per_epoch[turn] + turns.first[turn] + visit) % num_pairs
        # Where an epoch sees a part of a shard, it is not the beginning.
        return rng.permute(rng.bits(rng.key(self._seed, "pairs of a part"), shard), round_trip, num_pairs)

    def _make_plan(self, epoch: int) -> _EpochPlan:
        num_turns = self._turns.shard.size
        place = np.empty(num_turns, np.float64)
        corpus_of_turn = self._corpus_of_shard[self._turns.shard]
        for corpus in np.unique(corpus_of_turn):
            own = np.flatnonzero(corpus_of_turn == corpus)
            stream = rng.key(self._seed, "order of shards", epoch, int(corpus))
            # A random permutation, spread evenly over [0, 1) with a random jitter inside each slot.
            slots = rng.shuffled(stream, own.size)
            place[own] = (slots + rng.uniform(stream, own.size + np.arange(own.size))) / own.size
        turn_order = np.argsort(place, kind="stable").astype(np.int64)
        pair_end = np.cumsum(self._turns.size[turn_order])
        window_pair_start = np.concatenate([[0], pair_end])[self._window_cuts]
        return _EpochPlan(turn_order, pair_end, window_pair_start)


class Cut(NamedTuple):
    """How a global batch is cut into micro-batches."""

    global_batch_size: int
    micro_batch_size: int
    world_size: int

    @property
    def accumulation_steps(self) -> int:
        """Micro-steps of a step."""
        return self.global_batch_size // (self.micro_batch_size * self.world_size)

    def positions(self, micro_step: int, rank: int) -> I64:
        """Positions of one rank's micro-batch; micro-steps count from the start of the run.

        The micro-batches of all ranks at one micro-step are consecutive: together they are the same pairs in the same
        order as the one micro-batch of a single process with ``world_size`` times the size.
        """
        first = micro_step * self.micro_batch_size * self.world_size + rank * self.micro_batch_size
        return first + np.arange(self.micro_batch_size, dtype=np.int64)


def cut_global_batch(
    global_batch_size: int, micro_batch_size: int, world_size: int, negative_group_size: int | None = None
) -> Cut:
    """Check that a global batch divides into micro-batches and groups, and say how it does.

    Args:
        negative_group_size: None where nothing is drawn within groups.

    Raises:
        ConfigError: it does not; the message names sizes that do.
    """
    if min(global_batch_size, micro_batch_size) < 1:
        raise ConfigError(
            f"data.global_batch_size={global_batch_size} and data.micro_batch_size={micro_batch_size} must be positive."
        )
    if negative_group_size is None:
        negative_group_size = 1
    elif negative_group_size < 2:
        raise ConfigError(
            f"data.negative_group_size={negative_group_size} must be at least 2: a pair's negative is another pair of "
            "its group. The default is 32."
        )
    together = micro_batch_size * world_size
    fitting = [
        size
        for size in range(negative_group_size, global_batch_size // world_size + 1, negative_group_size)
        if global_batch_size % (size * world_size) == 0
    ]
    nearest = sorted(sorted(fitting, key=lambda size: abs(size - micro_batch_size))[:4])
    if micro_batch_size % negative_group_size:
        smallest = negative_group_size * world_size
        cure = (
            f"Sizes that fit: {', '.join(f'--data.micro_batch_size={size}' for size in nearest)}"
            if nearest
            else f"What fits: --data.micro_batch_size={negative_group_size} and "
            f"--data.global_batch_size={-(-global_batch_size // smallest) * smallest}"
        )
        if micro_batch_size > 1 and global_batch_size % together == 0:
            cure += f", or --data.negative_group_size={micro_batch_size} (another group size draws other negatives)"
        raise ConfigError(
            f"data.micro_batch_size={micro_batch_size} is not a multiple of data.negative_group_size="
            f"{negative_group_size}, within which ITM negatives are drawn. {cure}."
        )
    if global_batch_size % together:
        cure = (
            f"Micro-batch sizes that divide it: {', '.join(map(str, nearest))}."
            if nearest
            else f"The next global batch that divides is {-(-global_batch_size // together) * together}."
        )
        raise ConfigError(
            f"data.global_batch_size={global_batch_size} does not divide into micro-batches of "
            f"{micro_batch_size} on {world_size} rank(s): {micro_batch_size} x {world_size} = {together}. {cure}"
        )
    return Cut(global_batch_size, micro_batch_size, world_size)
