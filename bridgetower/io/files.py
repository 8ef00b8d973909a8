"""Files that appear whole or not at all, their checksums, and folders that one program writes to at a time."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from bridgetower.errors import DataError


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's content."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file under a temporary name, flush it to disk and rename it, so that nobody sees half of it."""
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
    """Make a folder and keep every other program that asks from writing to it.

    Args:
        shared: allow other programs that ask so, too.
        name: of the lock file.

    Returns: a descriptor; closing it, or the end of the process, gives the folder free.

    Raises:
        DataError: another program holds it, or it cannot be written to.
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
        # A file system without locks: go on without.
    return lock


def short_names(paths: Sequence[str | Path]) -> list[str]:
    """A name for each path, as given to people: as much of its end as makes it the only one."""
    parts = [[part for part in str(path).split("/") if part] for path in paths]
    ends = [1] * len(parts)
    while True:
        names = ["-".join(own[-end:]) for own, end in zip(parts, ends, strict=True)]
        longer = [
            min(end + (names.count(name) > 1), len(own)) for name, own, end in zip(names, parts, ends, strict=True)
        ]
        if longer == ends:
            return names
        ends = longer
