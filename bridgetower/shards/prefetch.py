"""A thread that fetches shards into the cache before they are read. Never imports torch."""

from __future__ import annotations

import logging
import threading
from collections.abc import Collection, Sequence

from bridgetower.shards.cache import HeldShard, ShardCache
from bridgetower.shards.download import RemoteShard, Stopped

_MAX_CLOSE_SECONDS = 5.0

logger = logging.getLogger("bridgetower.shards")


class Prefetcher:
    """Fetches shards in the background, and holds them in the cache until they are no longer needed."""

    def __init__(self, cache: ShardCache, shards: Sequence[RemoteShard | None]) -> None:
        """Start the thread.

        Args:
            shards: every shard by its number; None for a local one.
        """
        self._cache, self._shards = cache, shards
        self._changed = threading.Condition()
        self._upcoming: list[int] = []
        self._needed: frozenset[int] = frozenset()
        self._held: dict[int, HeldShard] = {}
        self._failed: set[int] = set()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="shard prefetcher", daemon=True)
        self._thread.start()

    def advance(self, upcoming: Sequence[int], *, keep: Collection[int] = ()) -> None:
        """Fetch the shards ``upcoming`` in this order, hold them and those of ``keep``, and release all others."""
        with self._changed:
            self._upcoming = [shard for shard in upcoming if self._shards[shard] is not None]
            self._needed = frozenset((*self._upcoming, *keep))
            self._failed.clear()
            for shard in [shard for shard in self._held if shard not in self._needed]:
                self._held.pop(shard).release()
            self._changed.notify()

    def close(self) -> None:
        """Stop the thread, also in the middle of a shard, and release every shard."""
        self._stop.set()
        with self._changed:
            self._changed.notify()
        # If the store hangs, the thread outlives this call, and releases what it gets when it sees the stop event.
        self._thread.join(_MAX_CLOSE_SECONDS)
        with self._changed:
            for held in self._held.values():
                held.release()
            self._held.clear()

    def _next(self) -> int | None:
        """Return the first upcoming shard that is neither held nor failed."""
        return next((shard for shard in self._upcoming if shard not in self._held and shard not in self._failed), None)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._stop.is_set() or self._next() is not None)
                if self._stop.is_set():
                    return
                shard_number = self._next()
            assert shard_number is not None
            shard = self._shards[shard_number]
            assert shard is not None
            try:
                held = self._cache.hold(shard, self._stop)
            except Stopped:
                return
            except Exception as error:  # whoever reads the shard meets the same error, and handles it
                logger.warning("not fetched ahead: %s", error)
                with self._changed:
                    self._failed.add(shard_number)
                continue
            with self._changed:
                if shard_number in self._needed and shard_number not in self._held and not self._stop.is_set():
                    self._held[shard_number] = held
                else:
                    held.release()
