"""Paths and URLs: one pathlib-like object for ``/data/cc3m`` and ``s3://bucket/cc3m``. Never imports torch.

universal_pathlib gives fsspec's file systems the interface of pathlib. This module adds what shards need beside it:
checked protocols, retried reads, atomic writes, and errors that say what to do.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar, cast

from fsspec.asyn import AsyncFileSystem, sync
from upath import UPath

from bridgetower.errors import ConfigError, DataError
from bridgetower.io.files import write_atomically

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
SCHEMES = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "http": "aiohttp", "https": "aiohttp", "memory": "", "file": ""}
"""Accepted protocols and the package that each needs. Other protocols of fsspec run commands or open archives."""

# Errors of Python and HTTP statuses that another attempt would meet again.
_PERMANENT_ERRORS = (FileNotFoundError, PermissionError)
_PERMANENT_STATUSES = (401, 403, 404, 410)
# Limits for manifests and indexes, which are read whole when a run starts. Shards have their own, in ShardCache.
_ATTEMPTS = 5
_BACKOFF_SECONDS = 1.0
_TIMEOUT_SECONDS = 60.0

Result = TypeVar("Result")

logger = logging.getLogger("bridgetower.io.storage")


class EndOfFile(OSError):
    """A file ends before the requested bytes."""


def to_path(text: str | Path) -> Path:
    """Turn a local path or a URL into an object with the interface of Path.

    Args:
        text: a local path, or a URL such as ``s3://bucket/folder``.

    Returns: a Path, or for a URL a UPath, which has the interface of Path but not its type.

    Raises:
        ConfigError: the protocol is not one of SCHEMES, or its package is not installed.
    """
    if as_remote(text) is not None:
        return cast(Path, text)
    match = _URL.match(str(text))
    if match is None or not isinstance(text, str):
        return text if isinstance(text, Path) else Path(text)
    scheme = match[1].lower()
    if scheme not in SCHEMES:
        raise ConfigError(f"{text}: the protocol {scheme} is unknown. Use a path, or one of {', '.join(SCHEMES)}.")
    if scheme == "file":
        return Path(text[match.end() :])
    try:
        path = cast(Path, UPath(text))
        remote = as_remote(path)
        assert remote is not None and remote.fs is not None  # creates the file system, which imports its package
    except (ImportError, ValueError) as error:
        suggestion = f"Install its package: `pip install {SCHEMES[scheme]}`." if SCHEMES[scheme] else "Correct the URL."
        raise ConfigError(f"{text} cannot be opened ({error}). {suggestion}") from error
    return path


def is_remote(path: Path) -> bool:
    """Return True if a path is a URL: its store has no renames and no locks, and each request takes long."""
    return as_remote(path) is not None


def as_remote(path: object) -> UPath | None:
    """Return a path as a UPath (with ``fs`` and ``path``) if it is remote, else None."""
    if not isinstance(path, UPath) or path.protocol in ("", "file", "local"):
        return None
    return path


@contextmanager
def explain_read_errors(path: Path) -> Iterator[None]:
    """Turn errors of reading a file into a DataError that says what to do.

    Errors that already explain themselves (DataError, ConfigError) and EndOfFile pass unchanged; so do errors other
    than OSError of a local file, which are our own mistakes.

    Raises:
        DataError: the file is missing or cannot be read.
    """
    try:
        yield
    except (DataError, ConfigError, EndOfFile):
        raise
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist. Correct the path, or put the file there.") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror or error}). Correct its permissions.") from error
    except Exception as error:
        if not is_remote(path):
            raise
        # Each store's client has its own error classes.
        raise DataError(f"{path} cannot be read ({type(error).__name__}: {error}). Is the store reachable?") from error


def read_part(path: Path, offset: int = 0, num_bytes: int = -1) -> bytes:
    """Read ``num_bytes`` of a file from byte ``offset`` on; by default the whole file.

    Raises:
        EndOfFile: the file is shorter.
        OSError: the file cannot be read. A store's client may raise errors of its own.
    """
    if num_bytes < 0 and offset == 0:
        return path.read_bytes()
    if num_bytes == 0:  # a store reads an empty range as no range at all, and sends the whole object
        return b""
    remote = as_remote(path)
    if remote is not None:
        block = bytes(remote.fs.cat_file(remote.path, start=offset, end=offset + num_bytes))
    else:
        with path.open("rb") as file:
            block = os.pread(file.fileno(), num_bytes, offset)
    if len(block) != num_bytes:
        raise EndOfFile(errno.EIO, f"the file ends before byte {offset + num_bytes:,}")
    return block


def read_remote(path: Path, timeout_seconds: float, start: int | None = None, end: int | None = None) -> bytes:
    """Read bytes ``start`` to ``end`` of a remote file; by default all of it.

    Raises:
        Exception: the client's own error, or fsspec's timeout error after ``timeout_seconds`` (HTTP, S3 and GCS).
    """
    remote = as_remote(path)
    assert remote is not None
    if isinstance(remote.fs, AsyncFileSystem):
        fs = remote.fs
        return bytes(sync(fs.loop, fs._cat_file, remote.path, start=start, end=end, timeout=timeout_seconds))
    return bytes(remote.fs.cat_file(remote.path, start=start, end=end))


def is_permanent(error: Exception) -> bool:
    """Return True if another attempt would fail in the same way: the file is missing or may not be read."""
    return isinstance(error, _PERMANENT_ERRORS) or getattr(error, "status", None) in _PERMANENT_STATUSES


def retry_read(read: Callable[[], Result], path: Path) -> Result:
    """Call ``read``, and repeat it with growing pauses while a remote ``path`` fails in a way that may pass.

    Raises:
        Exception: the error of the last attempt, as the client raised it.
    """
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            return read()
        except Exception as error:  # each store's client has its own error classes
            if not is_remote(path) or attempt == _ATTEMPTS or is_permanent(error):
                raise
            reason = str(error) or type(error).__name__
            logger.warning("attempt %d of %d to read %s failed: %s", attempt, _ATTEMPTS, path, reason)
            time.sleep(_BACKOFF_SECONDS * 2 ** (attempt - 1))
    raise AssertionError("there is at least one attempt")


def read_file(path: Path) -> bytes:
    """Read a whole file, local or remote; a remote read is retried."""
    return retry_read(lambda: read_remote(path, _TIMEOUT_SECONDS), path) if is_remote(path) else path.read_bytes()


def publish_file(temporary: Path, target: Path) -> None:
    """Move a finished local file to its target, local or remote. Readers never see half of it."""
    remote = as_remote(target)
    if remote is not None:
        remote.fs.put_file(str(temporary), remote.path)  # an object appears when its upload is complete
        temporary.unlink()
    else:
        os.replace(temporary, target)


def publish_bytes(target: Path, content: bytes) -> None:
    """Write a file, local or remote. Readers never see half of it."""
    if is_remote(target):
        target.write_bytes(content)
    else:
        write_atomically(target, content)
