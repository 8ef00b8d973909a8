"""A folder on the local disk that holds shards of object stores and web servers. Never imports torch.

Each shard is downloaded once per node, has its checksum verified, and appears whole or not at all; the folder's size is
bounded. A file's name is its SHA-256, so that runs share equal shards and a name guarantees its content. Processes
coordinate by flock, which the kernel releases when a process dies:

- ``SHA256.lock``, exclusive: this process downloads the shard.
- ``SHA256.tar`` itself, shared: this process reads the shard, so nobody may remove it.
- ``room.lock``, exclusive: this process measures the folder, removes files and reserves space.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from bridgetower.errors import ConfigError, DataError
from bridgetower.io.files import write_atomically
from bridgetower.shards.download import DISK_FULL_ERRORS, Downloader, RemoteShard, Stopped
from bridgetower.shards.index import index_path
from bridgetower.shards.manifest import ShardEntry

_POLL_SECONDS = 0.1
_SPACE_LOCK = "room"

logger = logging.getLogger("bridgetower.shards")


class HeldShard:
    """A shard on the local disk that no process removes until it is released or this process ends."""

    def __init__(self, path: Path, file: int) -> None:
        """Take over an open file that has a shared lock."""
        self.path, self._file = path, file

    def release(self) -> None:
        """Allow the shard to be removed. May be called again."""
        file, self._file = self._file, -1
        if file >= 0:
            os.close(file)


class ShardCache:
    """A folder of downloaded shards. Ranks, workers and runs may share it; the object may be pickled."""

    def __init__(
        self,
        folder: Path,
        max_bytes: int,
        *,
        attempts: int = 5,
        timeout_seconds: float = 60.0,
        backoff_seconds: float = 1.0,
    ) -> None:
        """Create the folder if it does not exist.

        Args:
            max_bytes: limit for the folder; the least recently used shards are removed to stay below it.
            attempts: download attempts per file before it is given up.
            timeout_seconds: limit for one answer of the store, and for waiting until space is free.
            backoff_seconds: pause before the second attempt; doubles with each attempt.

        Raises:
            ConfigError: the folder cannot be created or written to.
        """
        self._folder, self._max_bytes = folder, max_bytes
        self._timeout = timeout_seconds
        self._downloader = Downloader(
            attempts=attempts, timeout_seconds=timeout_seconds, backoff_seconds=backoff_seconds
        )
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with self._locked(_SPACE_LOCK):
                pass
        except OSError as error:
            raise ConfigError(
                f"data.cache_dir={folder} cannot be written to ({error.strerror}). Give a folder on a local disk."
            ) from error

    def hold(self, shard: RemoteShard, stop: threading.Event | None = None) -> HeldShard:
        """Return the shard on the local disk, held. If it is missing, one process downloads it and others wait.

        Args:
            stop: give up when this event is set.

        Raises:
            ConfigError: the shard is larger than the whole cache.
            NotFetched: the store does not deliver the shard.
            DataError: the disk is full, or shards that are being read leave no space.
            Stopped: ``stop`` was set.
        """
        entry = shard.entry
        if entry.bytes > self._max_bytes:
            raise ConfigError(
                f"The shard {shard.url} has {entry.bytes / 1e9:.3g} GB, more than the whole cache: "
                f"data.cache_gb={self._max_bytes / 1e9:.3g}. Raise it: three windows of shards must fit."
            )
        path, stop = self._folder / f"{entry.sha256}.tar", stop or threading.Event()
        held = self._hold_if_present(path, entry)
        if held is None:
            with self._locked(entry.sha256, stop):
                # Another process may have downloaded it while this one waited for the lock.
                held = self._hold_if_present(path, entry) or self._fetch(shard, path, stop)
        return held

    def _hold_if_present(self, path: Path, entry: ShardEntry) -> HeldShard | None:
        try:
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        fcntl.flock(file, fcntl.LOCK_SH)
        is_whole = os.fstat(file).st_size == entry.bytes and index_path(path).is_file()
        if not is_whole or not _is_at(path, file):  # another process may remove it between open and flock
            os.close(file)
            return None
        os.utime(file)  # the modification time records the last use
        return HeldShard(path, file)

    def _fetch(self, shard: RemoteShard, path: Path, stop: threading.Event) -> HeldShard:
        """Download a shard and its index; the tar gets its name last. The caller must have the shard's lock file."""
        temporary = path.with_suffix(".tmp")
        for leftover in self._folder.glob(f"*{path.stem}*.tmp"):
            leftover.unlink(missing_ok=True)  # its process was killed: a live one would have the lock
        if path.exists():
            logger.warning("%s in the cache is damaged and will be fetched again", path)
            _remove(path)
        try:
            file = self._reserve_space(temporary, shard.entry.bytes, stop)
            try:
                self._downloader.download_tar(shard, file, stop)
                os.fsync(file)
                write_atomically(index_path(path), self._downloader.download_index(shard, stop))
                fcntl.flock(file, fcntl.LOCK_SH)  # before the rename, so that nobody removes it in between
                os.replace(temporary, path)
            except BaseException:
                os.close(file)
                raise
            return HeldShard(path, file)
        except OSError as error:
            if error.errno not in DISK_FULL_ERRORS:
                raise
            raise DataError(
                f"The disk of data.cache_dir={self._folder} is full: {shard.entry.bytes / 1e9:.3g} GB for {shard.url} "
                f"do not fit. Free space, or lower data.cache_gb={self._max_bytes / 1e9:.3g}."
            ) from error
        finally:
            temporary.unlink(missing_ok=True)

    def _reserve_space(self, temporary: Path, num_bytes: int, stop: threading.Event) -> int:
        """Remove the least recently used shards that nobody holds, and allocate a file of ``num_bytes``.

        Returns: the open file.
        """
        deadline, has_warned = time.monotonic() + self._timeout, False
        while True:
            with self._locked(_SPACE_LOCK):
                excess_bytes = self._used_bytes() + num_bytes - self._max_bytes
                for path in self._oldest_first():
                    if excess_bytes <= 0:
                        break
                    excess_bytes -= self._evict(path)
                if excess_bytes <= 0:
                    file = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
                    try:
                        os.posix_fallocate(file, 0, num_bytes)
                    except BaseException:
                        os.close(file)
                        raise
                    return file
            if time.monotonic() > deadline:
                needed_gb = (self._max_bytes + excess_bytes) / 1e9
                raise DataError(
                    f"The cache {self._folder} is full of shards that are being read. Raise data.cache_gb="
                    f"{self._max_bytes / 1e9:.3g} to {needed_gb:.3g} at least, or lower data.shards_per_window."
                )
            if not has_warned:
                logger.warning("waiting for space in %s: its shards are being read", self._folder)
                has_warned = True
            if stop.wait(_POLL_SECONDS):
                raise Stopped

    def _used_bytes(self) -> int:
        # In this order a shard that is renamed meanwhile is counted twice at worst; in the other it could be missed.
        return sum(_size(path) for pattern in ("*.tmp", "*.tar") for path in self._folder.glob(pattern))

    def _oldest_first(self) -> list[Path]:
        """Return leftovers of killed processes, then shards in the order of their last use."""
        shards = [(path.stat().st_mtime_ns, path) for path in self._folder.glob("*.tar") if path.exists()]
        return [*sorted(self._folder.glob("*.tmp")), *(path for _, path in sorted(shards))]

    def _evict(self, path: Path) -> int:
        """Remove a file unless a process uses it. Returns: the bytes that this freed."""
        is_tar = path.suffix == ".tar"
        lock_path = path if is_tar else self._lock_file(path.name.lstrip(".").partition(".")[0])
        try:
            file = os.open(lock_path, os.O_CLOEXEC | (os.O_RDONLY if is_tar else os.O_RDWR | os.O_CREAT), 0o644)
        except FileNotFoundError:
            return 0
        try:
            if not _try_lock(file) or not _is_at(lock_path, file):
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
        """Hold a lock file. With ``stop``, wait in steps, and raise Stopped when it is set."""
        file = os.open(self._lock_file(name), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            if stop is None:
                fcntl.flock(file, fcntl.LOCK_EX)
            else:
                while not _try_lock(file):
                    if stop.wait(_POLL_SECONDS):
                        raise Stopped
            yield
        finally:
            os.close(file)


def _try_lock(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(path: Path, file: int) -> bool:
    """Return True if the path still names the open file."""
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
        # The index first: a tar without an index is found and fetched again, an index without a tar would stay.
        index_path(path).unlink(missing_ok=True)
    path.unlink(missing_ok=True)
