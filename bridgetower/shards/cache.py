"""Shards of object stores and web servers on the local disk: fetched once a node, checked, bounded, never half.

Files are named by their SHA-256, so that what has the name is what the manifest lists, and equal shards of several runs
are one file. Processes agree by flock, which vanishes with the process that has it. Never imports torch.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import io
import logging
import os
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bridgetower.errors import ConfigError, DataError
from bridgetower.io.files import write_atomically
from bridgetower.io.storage import is_final, read_remote
from bridgetower.shards.index import INDEX_DTYPE, index_path
from bridgetower.shards.manifest import ShardEntry

_BLOCK_BYTES = 8 * 2**20
_MAX_BACKOFF_SECONDS = 30.0
_POLL_SECONDS = 0.1
_MAX_CLOSE_SECONDS = 5.0
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)

logger = logging.getLogger("bridgetower.data")


@dataclass(frozen=True, kw_only=True)
class RemoteShard:
    """A shard that has to be fetched before it is read."""

    url: Path
    """The tar (a UPath); its row index lies beside it."""
    entry: ShardEntry
    """What its manifest says of it."""


class Held:
    """A shard on the local disk, which no process removes until it is released or this one ends."""

    def __init__(self, path: Path, file: int) -> None:
        """Take an open file with a shared lock."""
        self.path, self._file = path, file

    def release(self) -> None:
        """Let it be removed; may be called again."""
        file, self._file = self._file, -1
        if file >= 0:
            os.close(file)


class NotFetched(DataError):
    """A store does not give a shard, or not what the manifest lists, however often it is asked."""


class _Stopped(Exception):
    """The one who asked does not want it any more."""


class _Broken(Exception):
    """An attempt failed in a way that another may not; the text says how."""


class ShardCache:
    """A folder of fetched shards. Ranks, workers and runs may share it; a copy in another process is as good."""

    def __init__(
        self,
        folder: Path,
        max_bytes: int,
        *,
        attempts: int = 5,
        timeout_seconds: float = 60.0,
        backoff_seconds: float = 1.0,
    ) -> None:
        """Make the folder.

        Args:
            max_bytes: shards whose use is longest ago make room.
            attempts: how often a shard is asked for before it is given up.
            timeout_seconds: of one answer of the store, and of waiting for room.
            backoff_seconds: before the second attempt; doubles with each.

        Raises:
            ConfigError: the folder cannot be made or written to.
        """
        self._folder, self._max_bytes = folder, max_bytes
        self._attempts, self._timeout, self._backoff = attempts, timeout_seconds, backoff_seconds
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with self._locked("room"):
                pass
        except OSError as error:
            raise ConfigError(
                f"data.cache_dir={folder} cannot be written to ({error.strerror}). Give a folder on a local disk."
            ) from error

    def hold(self, shard: RemoteShard, stop: threading.Event | None = None) -> Held:
        """The shard on the local disk; fetched if it is not there, by one process while others wait.

        Args:
            stop: gives up when it is set.

        Raises:
            ConfigError: it is larger than the cache.
            NotFetched: it cannot be had.
            DataError: what others hold leaves no room for it; or the disk is full.
        """
        entry = shard.entry
        if entry.bytes > self._max_bytes:
            raise ConfigError(
                f"The shard {shard.url} has {entry.bytes / 1e9:.3g} GB, the whole cache may have "
                f"data.cache_gb={self._max_bytes / 1e9:.3g}. Three windows of shards need to fit."
            )
        path, stop = self._folder / f"{entry.sha256}.tar", stop or threading.Event()
        held = self._hold_what_is_there(path, entry)
        if held is None:
            with self._locked(entry.sha256, stop):
                # Another process may have fetched it meanwhile.
                held = self._hold_what_is_there(path, entry) or self._fetch(shard, path, stop)
        return held

    def _hold_what_is_there(self, path: Path, entry: ShardEntry) -> Held | None:
        try:
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        fcntl.flock(file, fcntl.LOCK_SH)
        is_whole = os.fstat(file).st_size == entry.bytes and index_path(path).is_file()
        if not is_whole or not _is_at(path, file):  # it may have been removed between opening and locking
            os.close(file)
            return None
        os.utime(file)
        return Held(path, file)

    def _fetch(self, shard: RemoteShard, path: Path, stop: threading.Event) -> Held:
        """Bring a shard and its index; the tar gets its name last. Only for who has the shard's lock file."""
        temporary = path.with_suffix(".tmp")
        for left in self._folder.glob(f"*{path.stem}*.tmp"):
            left.unlink(missing_ok=True)  # of a process that was killed: it would have the lock otherwise
        if path.exists():
            logger.warning("%s in the cache is damaged and fetched again", path)
            _remove(path)
        try:
            file = self._make_room(temporary, shard.entry.bytes, stop)
            try:
                self._try_often(shard.url, _Download(shard, file, self._timeout).run, stop)
                os.fsync(file)
                index = self._try_often(index_path(shard.url), lambda stop: _fetch_index(shard, self._timeout), stop)
                write_atomically(index_path(path), index)
                fcntl.flock(file, fcntl.LOCK_SH)  # before it has its name, so that nobody removes it in between
                os.replace(temporary, path)
            except BaseException:
                os.close(file)
                raise
            return Held(path, file)
        except OSError as error:
            if error.errno not in _DISK_FULL:
                raise
            raise DataError(
                f"The disk of data.cache_dir={self._folder} is full: {shard.entry.bytes / 1e9:.3g} GB for {shard.url} "
                f"do not fit. Make room, or lower data.cache_gb={self._max_bytes / 1e9:.3g}."
            ) from error
        finally:
            temporary.unlink(missing_ok=True)

    def _try_often(self, url: Path, attempt: Callable[[threading.Event], bytes], stop: threading.Event) -> bytes:
        for number in range(1, self._attempts + 1):
            try:
                return attempt(stop)
            except (_Stopped, MemoryError):
                raise
            except Exception as error:  # clients of stores have error classes of their own
                if isinstance(error, OSError) and error.errno in _DISK_FULL:
                    raise
                if is_final(error):
                    raise NotFetched(
                        f"{url} cannot be fetched ({type(error).__name__}: {error}). Is it there, and may you read it?"
                    ) from error
                reason = str(error) or type(error).__name__
                if number == self._attempts:
                    raise NotFetched(
                        f"{url} cannot be fetched; {number} attempts failed, the last with: {reason} Is the store "
                        "reachable? If its bytes are wrong, copy the shard there again."
                    ) from error
                logger.warning("attempt %d of %d to fetch %s failed: %s", number, self._attempts, url, reason)
                if stop.wait(min(self._backoff * 2 ** (number - 1), _MAX_BACKOFF_SECONDS)):
                    raise _Stopped from None
        raise AssertionError("attempts is at least 1")

    def _make_room(self, temporary: Path, num_bytes: int, stop: threading.Event) -> int:
        """Remove what was used longest ago and nobody holds, and take the room. Returns: the open file."""
        deadline, is_said = time.monotonic() + self._timeout, False
        while True:
            with self._locked("room"):
                too_much = self._used_bytes() + num_bytes - self._max_bytes
                for path in self._oldest_first():
                    if too_much <= 0:
                        break
                    too_much -= self._evict(path)
                if too_much <= 0:
                    file = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
                    try:
                        os.posix_fallocate(file, 0, num_bytes)
                    except BaseException:
                        os.close(file)
                        raise
                    return file
            if time.monotonic() > deadline:
                least = (self._max_bytes + too_much) / 1e9
                raise DataError(
                    f"The cache {self._folder} is full of shards that are being read. Raise data.cache_gb="
                    f"{self._max_bytes / 1e9:.3g} to {least:.3g} at least, or lower data.shards_per_window."
                )
            if not is_said:
                logger.warning("waiting for room in %s: its shards are being read", self._folder)
                is_said = True
            if stop.wait(_POLL_SECONDS):
                raise _Stopped

    def _used_bytes(self) -> int:
        # A shard that gets its name meanwhile is counted twice at worst; the other way round it would not be counted.
        return sum(_size(path) for pattern in ("*.tmp", "*.tar") for path in self._folder.glob(pattern))

    def _oldest_first(self) -> list[Path]:
        """Shards, after what processes that were killed have left."""
        shards = [(path.stat().st_mtime_ns, path) for path in self._folder.glob("*.tar") if path.exists()]
        return [*sorted(self._folder.glob("*.tmp")), *(path for _, path in sorted(shards))]

    def _evict(self, path: Path) -> int:
        """Remove a file that nobody uses. Returns: the bytes it gave."""
        # Who reads a shard has a lock on it; who fetches one has its lock file.
        is_tar = path.suffix == ".tar"
        guard = path if is_tar else self._lock_file(path.name.lstrip(".").partition(".")[0])
        try:
            file = os.open(guard, os.O_CLOEXEC | (os.O_RDONLY if is_tar else os.O_RDWR | os.O_CREAT), 0o644)
        except FileNotFoundError:
            return 0
        try:
            if not _try_lock(file) or not _is_at(guard, file):
                return 0
            size = _size(path)
            _remove(path)
            return size
        finally:
            os.close(file)

    def _lock_file(self, name: str) -> Path:
        return self._folder / f"{name}.lock"

    @contextlib.contextmanager
    def _locked(self, name: str, stop: threading.Event | None = None) -> Iterator[None]:
        file = os.open(self._lock_file(name), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            if stop is None:
                fcntl.flock(file, fcntl.LOCK_EX)
            else:
                while not _try_lock(file):
                    if stop.wait(_POLL_SECONDS):
                        raise _Stopped
            yield
        finally:
            os.close(file)


class _Download:
    """A tar on its way into a file. What has arrived is kept when the connection breaks."""

    def __init__(self, shard: RemoteShard, file: int, timeout_seconds: float) -> None:
        self._shard, self._file, self._timeout = shard, file, timeout_seconds
        self._begin()

    def _begin(self) -> None:
        self._position, self._hash = 0, hashlib.sha256()

    def run(self, stop: threading.Event) -> bytes:
        """Read from where the last attempt came to, to the end, and check the checksum."""
        entry = self._shard.entry
        while self._position < entry.bytes:
            if stop.is_set():
                raise _Stopped
            end = min(self._position + _BLOCK_BYTES, entry.bytes)
            block = read_remote(self._shard.url, self._timeout, self._position, end)
            if len(block) == entry.bytes > end - self._position:
                block, end = block[self._position :], entry.bytes  # the server does not know ranges
            if len(block) != end - self._position:
                raise _Broken(f"bytes {self._position:,} to {end:,} were asked for, {len(block):,} came.")
            if os.pwrite(self._file, block, self._position) != len(block):
                raise _Broken(f"{len(block):,} bytes could not be written at once.")
            self._hash.update(block)
            self._position = end
        found = self._hash.hexdigest()
        if found != entry.sha256:
            self._begin()
            raise _Broken(f"its SHA-256 is {found}, its manifest says {entry.sha256}.")
        return b""


def _fetch_index(shard: RemoteShard, timeout_seconds: float) -> bytes:
    """The row index, which the manifest has no checksum of: its counts have to be right."""
    content = read_remote(index_path(shard.url), timeout_seconds)
    try:
        index = np.load(io.BytesIO(content), allow_pickle=False)
        fits = index.dtype == INDEX_DTYPE and len(index) == shard.entry.samples
        fits = fits and int(index["num_captions"].sum()) == shard.entry.pairs
    except (ValueError, EOFError):
        fits = False
    if not fits:
        raise _Broken("it is damaged, of another version or of another shard.")
    return content


def _try_lock(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(path: Path, file: int) -> bool:
    """True if the name still is that of the open file."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file))
    except FileNotFoundError:
        return False


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _remove(path: Path) -> None:
    if path.suffix == ".tar":
        index_path(path).unlink(missing_ok=True)  # first: a tar alone is noticed, an index alone stays for ever
    path.unlink(missing_ok=True)


class Prefetcher:
    """Fetches shards in the background before they are needed, and holds them until they no longer are."""

    def __init__(self, cache: ShardCache, shards: Sequence[RemoteShard | None]) -> None:
        """Start the thread.

        Args:
            shards: by number; None for those that are local.
        """
        self._cache, self._shards = cache, shards
        self._changed = threading.Condition()
        self._wanted: list[int] = []
        self._needed: frozenset[int] = frozenset()
        self._held: dict[int, Held] = {}
        self._failed: set[int] = set()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="shard prefetcher", daemon=True)
        self._thread.start()

    def advance(self, upcoming: Sequence[int], *, keep: Collection[int] = ()) -> None:
        """Fetch these shards in this order, hold them and those of ``keep``, and let all others go."""
        with self._changed:
            self._wanted = [shard for shard in upcoming if self._shards[shard] is not None]
            self._needed = frozenset((*self._wanted, *keep))
            self._failed.clear()
            for shard in [shard for shard in self._held if shard not in self._needed]:
                self._held.pop(shard).release()
            self._changed.notify()

    def close(self) -> None:
        """End soon, also in the middle of a shard."""
        self._stop.set()
        with self._changed:
            self._changed.notify()
        # A store that hangs is given up later; what comes then is let go.
        self._thread.join(_MAX_CLOSE_SECONDS)
        with self._changed:
            for held in self._held.values():
                held.release()
            self._held.clear()

    def _next(self) -> int | None:
        return next((shard for shard in self._wanted if shard not in self._held and shard not in self._failed), None)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._stop.is_set() or self._next() is not None)
                if self._stop.is_set():
                    return
                number = self._next()
            assert number is not None
            shard = self._shards[number]
            assert shard is not None
            try:
                held = self._cache.hold(shard, self._stop)
            except _Stopped:
                return
            except Exception as error:  # the reader that needs the shard meets the error itself
                logger.warning("not fetched ahead: %s", error)
                with self._changed:
                    self._failed.add(number)
                continue
            with self._changed:
                if number in self._needed and number not in self._held and not self._stop.is_set():
                    self._held[number] = held
                else:
                    held.release()
