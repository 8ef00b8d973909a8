"""Local files: atomic writes, checksums, folders locked for one writer, and short names of paths."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from bridgetower.errors import DataError


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file under a temporary name, flush it to disk and rename it, so that readers never see half of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def claim_folder(folder: Path, *, shared: bool = False, name: str = ".lock") -> int:
    """Create a folder if it does not exist, and lock it against other programs that call this function.

    Args:
        shared: allow other programs that also call with ``shared=True``.
        name: file name of the lock file.

    Returns: file descriptor of the lock. Closing it, or the end of the process, unlocks the folder.

    Raises:
        DataError: another program has locked the folder, or it cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise DataError(
            f"{folder} cannot be written to ({error.strerror}). Use another folder, or correct its permissions."
        ) from error
    try:
        fcntl.flock(lock, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            os.close(lock)
            raise DataError(f"Another program is writing to {folder}. Wait for it, or use another folder.") from None
        # Any other error means that the file system has no locks. Continue without one.
    return lock


def shorten_paths(paths: Sequence[str | Path]) -> list[str]:
    """Return a name for each path: the shortest suffix of the path that distinguishes it, with ``-`` for ``/``."""
    components = [[component for component in str(path).split("/") if component] for path in paths]
    lengths = [1] * len(components)
    while True:
        names = ["-".join(path[-length:]) for path, length in zip(components, lengths, strict=True)]
        longer = [
            min(length + (names.count(name) > 1), len(path))
            for name, path, length in zip(names, components, lengths, strict=True)
        ]
        if longer == lengths:
            return names
        lengths = longer
