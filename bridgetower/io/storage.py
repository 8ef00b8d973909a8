"""Folders and files, local or in an object store: one pathlib-like object for ``/data/cc3m`` and ``s3://bucket/cc3m``.

universal_pathlib gives fsspec's file systems the interface of pathlib; what is added here is what a build needs beside:
names that are checked, files that appear whole or not at all, and errors that say what to do. Never imports torch.
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
"""The protocols that are accepted, and the package that each needs. Others would run commands or open archives."""

# What another attempt cannot change: as Python says it, and as a web server does.
_FINAL_ERRORS = (FileNotFoundError, PermissionError)
_FINAL_STATUSES = (401, 403, 404, 410)
# For manifests and indexes, which are read when a run starts.
_ATTEMPTS = 5
_BACKOFF_SECONDS = 1.0
_TIMEOUT_SECONDS = 60.0

Answer = TypeVar("Answer")

logger = logging.getLogger("bridgetower.io.storage")


class EndOfFile(OSError):
    """A file is shorter than what was to be read."""


def place(text: str | Path) -> Path:
    """The folder or file of that name, as a Path, or a UPath (which has the interface, though not the type).

    Args:
        text: a local path, or a URL such as ``s3://bucket/folder``.

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
        found = cast(Path, UPath(text))
        remote = as_remote(found)
        assert remote is not None and remote.fs is not None  # opens the file system, for which it needs the package
    except (ImportError, ValueError) as error:
        cure = f"pip install {SCHEMES[scheme]}" if SCHEMES[scheme] else "see the error"
        raise ConfigError(f"{text} cannot be opened ({error}). Install what it needs: `{cure}`.") from error
    return found


def is_remote(path: Path) -> bool:
    """True if it is in an object store: without renames and locks, and slow to ask for each file."""
    return as_remote(path) is not None


def as_remote(path: object) -> UPath | None:
    """The path with its file system (``fs``, ``path``) if it is in an object store, else None."""
    if not isinstance(path, UPath) or path.protocol in ("", "file", "local"):
        return None
    return path


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what goes wrong when a file is read into a sentence for people.

    Raises:
        DataError: whatever was raised inside, but for a DataError itself.
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
        # Clients of object stores have error classes of their own.
        raise DataError(f"{path} cannot be read ({type(error).__name__}: {error}). Is the store reachable?") from error


def read_part(path: Path, offset: int = 0, num_bytes: int = -1) -> bytes:
    """A part of a file, the whole one by default.

    Raises:
        OSError: it cannot be read, or ends earlier.
    """
    if num_bytes < 0 and offset == 0:
        return path.read_bytes()
    if num_bytes == 0:  # a store would take an empty range for no range, and send the whole object
        return b""
    remote = as_remote(path)
    if remote is not None:
        part = bytes(remote.fs.cat_file(remote.path, start=offset, end=offset + num_bytes))
    else:
        with path.open("rb") as file:
            part = os.pread(file.fileno(), num_bytes, offset)
    if len(part) != num_bytes:
        raise EndOfFile(errno.EIO, f"the file ends before byte {offset + num_bytes:,}")
    return part


def read_remote(path: Path, timeout_seconds: float, start: int | None = None, end: int | None = None) -> bytes:
    """Bytes of a remote file. A store that does not answer is an error after a while."""
    remote = as_remote(path)
    assert remote is not None
    if isinstance(remote.fs, AsyncFileSystem):
        fs = remote.fs
        return bytes(sync(fs.loop, fs._cat_file, remote.path, start=start, end=end, timeout=timeout_seconds))
    return bytes(remote.fs.cat_file(remote.path, start=start, end=end))


def is_final(error: Exception) -> bool:
    """True if a store would say the same again."""
    return isinstance(error, _FINAL_ERRORS) or getattr(error, "status", None) in _FINAL_STATUSES


def patiently(ask: Callable[[], Answer], path: Path) -> Answer:
    """What a store answers; one that fails, hangs or breaks off is asked again, with growing pauses.

    Args:
        path: what it is about, for people.

    Raises:
        Exception: the client's own, of the last attempt.
    """
    for number in range(1, _ATTEMPTS + 1):
        try:
            return ask()
        except Exception as error:  # clients of stores have error classes of their own
            if not is_remote(path) or number == _ATTEMPTS or is_final(error):
                raise
            reason = str(error) or type(error).__name__
            logger.warning("attempt %d of %d to read %s failed: %s", number, _ATTEMPTS, path, reason)
            time.sleep(_BACKOFF_SECONDS * 2 ** (number - 1))
    raise AssertionError("there is at least one attempt")


def read_whole(path: Path) -> bytes:
    """A whole file, local or remote; a store is asked patiently."""
    return patiently(lambda: read_remote(path, _TIMEOUT_SECONDS), path) if is_remote(path) else path.read_bytes()


def publish_file(temporary: Path, target: Path) -> None:
    """Give a finished local file its name, where it is to be: nobody sees half of it."""
    remote = as_remote(target)
    if remote is not None:
        remote.fs.put_file(str(temporary), remote.path)  # an object appears when its upload is complete
        temporary.unlink()
    else:
        os.replace(temporary, target)


def publish_bytes(target: Path, content: bytes) -> None:
    """Write a file so that nobody sees half of it."""
    if is_remote(target):
        target.write_bytes(content)
    else:
        write_atomically(target, content)
