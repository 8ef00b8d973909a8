"""The order of training, as a pure function: which pair stands at which position of the stream.

The stream is endless. In a run over N pairs, epoch e consists of the positions [e*N, (e+1)*N) and holds each pair
exactly once. Global batch b consists of the positions [b*G, (b+1)*G), so a batch may end one epoch and begin the next,
and no pair is dropped or repeated to fill a batch. A run that resumes at step s continues with b = s.

If a corpus has weight w, an epoch visits each of its pairs w times on average: for w = 2.5 two or three times, and five
times in any two epochs (up to rounding by one pair per shard).

Pairs are shuffled in windows of shards: an epoch permutes the shards, divides them into windows and permutes the pairs
of each window. So reads stay within one window of shards at a time, and a remote shard is fetched once per epoch.
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
    """The shard and number of the pair at each position. Arrays have the shape of the positions."""

    shard: I64
    """Number of the shard, counted over all corpora."""
    pair: I64
    """Number of the pair in the shard."""


class _Turns(NamedTuple):
    """The turns of an epoch. In a turn, each pair of one shard is visited at most once.

    Without weights each shard has one turn; with weight w it has w turns, rounded up.
    """

    shard: I64
    first: I64  # visits of the shard's pairs in earlier turns of the epoch
    size: I64  # visits in this turn
    per_epoch: I64  # visits of the shard's pairs in all its turns of an epoch


class _EpochPlan(NamedTuple):
    """The order of turns in one epoch."""

    turn_order: I64  # numbers of the turns, in the epoch's order
    visit_end: I64  # visits up to and including each turn of that order
    window_start: I64  # visits before each window; at the end, all visits


class Order:
    """Maps positions of the stream to pairs, uniformly over pairs, as in the paper's concatenation of corpora.

    It stores a few numbers per shard and nothing per pair. Any position is computed directly.
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
            pairs_per_shard: number of pairs of each shard, one corpus after another.
            corpus_of_shard: number of each shard's corpus. The shards of every corpus are spread evenly over an epoch,
                so that each window has the corpora in the same proportion.
            shards_per_window: approximate number of shards in a window, within which pairs are shuffled.
            corpus_weights: visits per epoch of each pair of a corpus, by corpus; empty for 1.

        Raises:
            ConfigError: shards_per_window or corpus_weights is out of range.
            DataError: a shard has no pairs.
        """
        if shards_per_window < 1:
            raise ConfigError(f"data.shards_per_window={shards_per_window} must be at least 1; the default is 64.")
        self._pairs_per_shard = np.asarray(pairs_per_shard, np.int64)
        self._corpus_of_shard = np.asarray(corpus_of_shard, np.int64)
        if self._pairs_per_shard.size == 0 or (self._pairs_per_shard < 1).any():
            raise DataError(f"Each shard needs at least one pair; they hold {self._pairs_per_shard.tolist()[:20]}.")
        self._seed = seed
        self._turns = self._make_turns(corpus_weights)
        self._has_partial_turns = bool((self._turns.per_epoch != self._pairs_per_shard[self._turns.shard]).any())
        num_turns = self._turns.shard.size
        num_windows = -(-num_turns // shards_per_window)
        # Windows of equal size: 65 shards in windows of 64 become 33 + 32, not 64 and a lone shard that is not mixed.
        self._window_cuts = np.linspace(0, num_turns, num_windows + 1).round().astype(np.int64)
        self.num_pairs = int(self._turns.size.sum())
        """Number of visits in an epoch; without weights, the number of pairs."""
        self._plan = lru_cache(maxsize=4)(self._make_plan)

    def __getstate__(self) -> dict[str, object]:
        """Leave the cache behind, as a worker process has its own."""
        return {name: value for name, value in self.__dict__.items() if name != "_plan"}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._plan = lru_cache(maxsize=4)(self._make_plan)

    def locate(self, positions: npt.ArrayLike) -> Located:
        """Find the pairs at positions of the stream. Positions may lie in several epochs, in any order."""
        epochs, offsets = np.divmod(np.asarray(positions, np.int64), self.num_pairs)
        shards, pairs = np.empty_like(epochs), np.empty_like(epochs)
        for epoch in np.unique(epochs):
            in_epoch = epochs == epoch
            shards[in_epoch], pairs[in_epoch] = self._locate_in_epoch(int(epoch), offsets[in_epoch])
        return Located(shards, pairs)

    def shards_from(self, position: int, windows: int) -> list[int]:
        """Return the shards of a position's window and of the following ones, ``windows`` in total, each shard once."""
        shards: dict[int, None] = {}
        for _ in range(windows):
            plan = self._plan(position // self.num_pairs)
            window = int(np.searchsorted(plan.window_start, position % self.num_pairs, side="right")) - 1
            turns = plan.turn_order[self._window_cuts[window] : self._window_cuts[window + 1]]
            shards |= dict.fromkeys(self._turns.shard[turns].tolist())
            position += int(plan.window_start[window + 1]) - position % self.num_pairs
        return list(shards)

    def _make_turns(self, corpus_weights: Sequence[float]) -> _Turns:
        shards = np.arange(self._pairs_per_shard.size)
        if not corpus_weights:
            first = np.zeros(shards.size, np.int64)
            return _Turns(shards, first, self._pairs_per_shard, self._pairs_per_shard)
        num_corpora = int(self._corpus_of_shard.max()) + 1
        if len(corpus_weights) != num_corpora or min(corpus_weights) <= 0:
            raise ConfigError(
                f"data.corpus_weights={','.join(map(str, corpus_weights))} must be {num_corpora} numbers above 0, one "
                "per folder of data.train_shards: how often an epoch visits each of its pairs."
            )
        weight = np.asarray(corpus_weights, np.float64)[self._corpus_of_shard]
        per_epoch = np.maximum(1, np.rint(weight * self._pairs_per_shard)).astype(np.int64)
        num_turns = -(-per_epoch // self._pairs_per_shard)
        shard = np.repeat(shards, num_turns)
        turn = np.arange(shard.size) - np.repeat(np.cumsum(num_turns) - num_turns, num_turns)
        first = turn * self._pairs_per_shard[shard]
        size = np.minimum(self._pairs_per_shard[shard], per_epoch[shard] - first)
        return _Turns(shard, first, size, per_epoch[shard])

    def _locate_in_epoch(self, epoch: int, offsets: I64) -> Located:
        """Find the pairs at offsets from the start of an epoch."""
        plan = self._plan(epoch)
        window = np.searchsorted(plan.window_start, offsets, side="right") - 1
        start = plan.window_start[window]
        size = plan.window_start[window + 1] - start
        window_keys = rng.bits(rng.key(self._seed, "order of pairs", epoch), window)
        shuffled = start + rng.permute(window_keys, offsets - start, size)
        slot = np.searchsorted(plan.visit_end, shuffled, side="right")
        turn = plan.turn_order[slot]
        return Located(
            self._turns.shard[turn],
            self._pair_of_visit(epoch, turn, shuffled - (plan.visit_end[slot] - self._turns.size[turn])),
        )

    def _pair_of_visit(self, epoch: int, turn: I64, visit: I64) -> I64:
        """Return the pair of a visit: the shard's visits, counted over all epochs, cycle through its pairs."""
        turns = self._turns
        shard = turns.shard[turn]
        num_pairs = self._pairs_per_shard[shard]
        if not self._has_partial_turns:
            return visit
        cycled = (epoch * turns.per_epoch[turn] + turns.first[turn] + visit) % num_pairs
        # A permutation, so that an epoch that visits only some pairs of a shard does not visit the first ones.
        return rng.permute(rng.bits(rng.key(self._seed, "pairs of a part"), shard), cycled, num_pairs)

    def _make_plan(self, epoch: int) -> _EpochPlan:
        num_turns = self._turns.shard.size
        sort_key = np.empty(num_turns, np.float64)
        corpus_of_turn = self._corpus_of_shard[self._turns.shard]
        for corpus in np.unique(corpus_of_turn):
            turns = np.flatnonzero(corpus_of_turn == corpus)
            stream = rng.key(self._seed, "order of shards", epoch, int(corpus))
            # The corpus's turns get equal slots of [0, 1) in random order, and a random point inside their slot. So
            # sorting mixes all corpora in the same proportion everywhere.
            slots = rng.shuffled(stream, turns.size)
            sort_key[turns] = (slots + rng.uniform(stream, turns.size + np.arange(turns.size))) / turns.size
        turn_order = np.argsort(sort_key, kind="stable").astype(np.int64)
        visit_end = np.cumsum(self._turns.size[turn_order])
        window_start = np.concatenate([[0], visit_end])[self._window_cuts]
        return _EpochPlan(turn_order, visit_end, window_start)


class Cut(NamedTuple):
    """Division of a global batch into micro-batches."""

    global_batch_size: int
    micro_batch_size: int
    world_size: int

    @property
    def accumulation_steps(self) -> int:
        """Number of micro-steps per step."""
        return self.global_batch_size // (self.micro_batch_size * self.world_size)

    def positions(self, micro_step: int, rank: int) -> I64:
        """Return the positions of one rank's micro-batch, int64, shape (B,).

        The micro-batches of all ranks at one micro-step are consecutive: together they are the micro-batch of a single
        process with ``world_size`` times the size.

        Args:
            micro_step: counted from the start of the run.
        """
        first = micro_step * self.micro_batch_size * self.world_size + rank * self.micro_batch_size
        return first + np.arange(self.micro_batch_size, dtype=np.int64)


def cut_global_batch(
    global_batch_size: int, micro_batch_size: int, world_size: int, negative_group_size: int | None = None
) -> Cut:
    """Divide a global batch into micro-batches and groups.

    Args:
        negative_group_size: number of pairs per group; None if no negatives are drawn.

    Raises:
        ConfigError: it does not divide evenly; the message suggests sizes that do.
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
        suggestion = (
            f"Sizes that fit: {', '.join(f'--data.micro_batch_size={size}' for size in nearest)}"
            if nearest
            else f"What fits: --data.micro_batch_size={negative_group_size} and "
            f"--data.global_batch_size={-(-global_batch_size // smallest) * smallest}"
        )
        if micro_batch_size > 1 and global_batch_size % together == 0:
            suggestion += f", or --data.negative_group_size={micro_batch_size} (which changes the negatives)"
        raise ConfigError(
            f"data.micro_batch_size={micro_batch_size} is not a multiple of data.negative_group_size="
            f"{negative_group_size}, within which ITM negatives are drawn. {suggestion}."
        )
    if global_batch_size % together:
        suggestion = (
            f"Micro-batch sizes that divide it: {', '.join(map(str, nearest))}."
            if nearest
            else f"The next global batch that divides is {-(-global_batch_size // together) * together}."
        )
        raise ConfigError(
            f"data.global_batch_size={global_batch_size} does not divide into micro-batches of "
            f"{micro_batch_size} on {world_size} rank(s): {micro_batch_size} x {world_size} = {together}. {suggestion}"
        )
    return Cut(global_batch_size, micro_batch_size, world_size)
