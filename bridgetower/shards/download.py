"""Downloads of shards from object stores and web servers: resumed, retried and checked. Never imports torch."""

from __future__ import annotations

import errno
import hashlib
import io
import logging
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bridgetower.errors import DataError
from bridgetower.io.storage import is_permanent, read_remote
from bridgetower.shards.index import INDEX_DTYPE, index_path
from bridgetower.shards.manifest import ShardEntry

DISK_FULL_ERRORS = (errno.ENOSPC, errno.EDQUOT)

_BLOCK_BYTES = 8 * 2**20
_MAX_BACKOFF_SECONDS = 30.0

logger = logging.getLogger("bridgetower.shards")


@dataclass(frozen=True, kw_only=True)
class RemoteShard:
    """A shard that must be downloaded before it can be read."""

    url: Path
    """URL of the tar, as a UPath. Its row index lies beside it."""
    entry: ShardEntry
    """Entry of the shard in its manifest: sizes and checksum."""


class NotFetched(DataError):
    """A shard could not be downloaded, or its content is not what the manifest lists, after all attempts."""


class Stopped(Exception):
    """The caller's stop event was set while it waited."""


class _TryAgain(Exception):
    """An attempt failed in a way that another attempt may not; the message says how."""


class Downloader:
    """Downloads tars and row indexes. A failed attempt is repeated after a pause that doubles each time."""

    def __init__(self, *, attempts: int, timeout_seconds: float, backoff_seconds: float) -> None:
        """Set the limits.

        Args:
            attempts: attempts per file before it is given up, at least 1.
            timeout_seconds: limit for one answer of the store.
            backoff_seconds: pause before the second attempt.
        """
        self._attempts, self._timeout, self._backoff = attempts, timeout_seconds, backoff_seconds

    def download_tar(self, shard: RemoteShard, file: int, stop: threading.Event) -> None:
        """Write the tar of a shard into an open file and check its SHA-256.

        Raises:
            NotFetched: all attempts failed, or the store refuses it.
            OSError: the disk is full.
            Stopped: ``stop`` was set.
        """
        self._retry(shard.url, _TarDownload(shard, file, self._timeout).run, stop)

    def download_index(self, shard: RemoteShard, stop: threading.Event) -> bytes:
        """Return the row index of a shard.

        Raises:
            NotFetched: all attempts failed, or the store refuses it.
            Stopped: ``stop`` was set.
        """
        return self._retry(index_path(shard.url), lambda stop: _download_index(shard, self._timeout), stop)

    def _retry(self, url: Path, attempt: Callable[[threading.Event], bytes], stop: threading.Event) -> bytes:
        for attempt_number in range(1, self._attempts + 1):
            try:
                return attempt(stop)
            except (Stopped, MemoryError):
                raise
            except Exception as error:  # each store's client has its own error classes
                if isinstance(error, OSError) and error.errno in DISK_FULL_ERRORS:
                    raise
                if is_permanent(error):
                    raise NotFetched(
                        f"{url} cannot be fetched ({type(error).__name__}: {error}). Check that it exists and that you "
                        "may read it."
                    ) from error
                reason = str(error) or type(error).__name__
                if attempt_number == self._attempts:
                    raise NotFetched(
                        f"{url} cannot be fetched; {attempt_number} attempts failed, the last with: {reason} Check "
                        "that the store is reachable. If its bytes are wrong, copy the shard there again."
                    ) from error
                logger.warning("attempt %d of %d to fetch %s failed: %s", attempt_number, self._attempts, url, reason)
                if stop.wait(min(self._backoff * 2 ** (attempt_number - 1), _MAX_BACKOFF_SECONDS)):
                    raise Stopped from None
        raise AssertionError("attempts is at least 1")


class _TarDownload:
    """One tar on its way into a file. An attempt continues after the last byte of the attempt before."""

    def __init__(self, shard: RemoteShard, file: int, timeout_seconds: float) -> None:
        self._shard, self._file, self._timeout = shard, file, timeout_seconds
        self._restart()

    def _restart(self) -> None:
        self._position, self._hash = 0, hashlib.sha256()

    def run(self, stop: threading.Event) -> bytes:
        """Read the rest of the tar and check its SHA-256. Returns nothing of it, as it is in the file."""
        entry = self._shard.entry
        while self._position < entry.bytes:
            if stop.is_set():
                raise Stopped
            end = min(self._position + _BLOCK_BYTES, entry.bytes)
            block = read_remote(self._shard.url, self._timeout, self._position, end)
            if len(block) == entry.bytes > end - self._position:
                # The server ignores ranges and sent the whole tar: use all of it.
                block, end = block[self._position :], entry.bytes
            if len(block) != end - self._position:
                raise _TryAgain(f"bytes {self._position:,} to {end:,} were requested, {len(block):,} came.")
            if os.pwrite(self._file, block, self._position) != len(block):
                raise _TryAgain(f"{len(block):,} bytes could not be written at once.")
            self._hash.update(block)
            self._position = end
        sha256 = self._hash.hexdigest()
        if sha256 != entry.sha256:
            self._restart()  # which of the blocks is wrong is not known
            raise _TryAgain(f"its SHA-256 is {sha256}, its manifest says {entry.sha256}.")
        return b""


def _download_index(shard: RemoteShard, timeout_seconds: float) -> bytes:
    """Return the row index of a shard. The manifest has no checksum of it, so its counts are compared instead."""
    content = read_remote(index_path(shard.url), timeout_seconds)
    try:
        index = np.load(io.BytesIO(content), allow_pickle=False)
        fits = index.dtype == INDEX_DTYPE and len(index) == shard.entry.samples
        fits = fits and int(index["num_captions"].sum()) == shard.entry.pairs
    except (ValueError, EOFError):
        fits = False
    if not fits:
        raise _TryAgain("it is damaged, of another version or of another shard.")
    return content
