"""Unpacks archives that came from the network: plain files below one folder, and no more than they say."""

from __future__ import annotations

import os
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple

from bridgetower.errors import DataError

_BLOCK_BYTES = 1 << 20
_MAX_RATIO = 200
"""Bytes unpacked per byte packed. Annotations in JSON have 5 to 30; deflate can pack zeros a thousandfold."""
_IGNORED_FOLDERS = ("__MACOSX",)

Show = Callable[[int, int | None], None]
"""Is told how many bytes are unpacked, of how many (None: not known before)."""


class _Entry(NamedTuple):
    name: str
    size: int
    is_folder: bool
    is_link: bool
    """Or a device, or a pipe."""
    open: Callable[[], IO[bytes] | None]


def unpack(archive: Path, folder: Path, show: Show = lambda there, total: None) -> int:
    """Unpack a zip or a tar (also compressed). Files that are already there in their size are left as they are.

    Returns: how many files it has.

    Raises:
        DataError: it is damaged, a member would leave the folder or is no plain file, it unpacks to far more than it
            is, or the disk is full.
    """
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as packed:
                members = packed.infolist()
                total = sum(member.file_size for member in members)
                _check_room(archive, folder, total)
                return _unpack(archive, folder, (_of_zip(packed, member) for member in members), total, show)
        with tarfile.open(archive, "r|*") as stream:
            return _unpack(archive, folder, (_of_tar(stream, member) for member in stream), None, show)
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, zlib.error, NotImplementedError, RuntimeError) as error:
        raise DataError(
            f"{archive} cannot be unpacked ({error}). Delete it and run the command again: it is downloaded once more."
        ) from error
    except OSError as error:
        raise DataError(f"{archive} cannot be unpacked into {folder} ({error.strerror or error}).") from error


def _of_zip(packed: zipfile.ZipFile, member: zipfile.ZipInfo) -> _Entry:
    kind = stat.S_IFMT(member.external_attr >> 16)  # 0 where the archive was made on Windows
    return _Entry(
        name=member.filename,
        size=member.file_size,
        is_folder=member.is_dir(),
        is_link=kind not in (0, stat.S_IFREG, stat.S_IFDIR),
        open=lambda: packed.open(member),
    )


def _of_tar(stream: tarfile.TarFile, member: tarfile.TarInfo) -> _Entry:
    return _Entry(
        name=member.name,
        size=member.size,
        is_folder=member.isdir(),
        is_link=not (member.isdir() or member.isreg()),
        open=lambda: stream.extractfile(member),
    )


def _unpack(archive: Path, folder: Path, entries: Iterator[_Entry], total: int | None, show: Show) -> int:
    files = done = 0
    most = max(archive.stat().st_size, 1) * _MAX_RATIO
    for entry in entries:
        relative = _checked_name(archive, entry)
        if relative is None:
            continue
        target = folder / relative
        done += entry.size
        if done > most:
            raise DataError(
                f"{archive} unpacks to more than {_MAX_RATIO} times its size, as no data does: it is not what it "
                "should be. Delete it and look at where it came from."
            )
        if entry.is_folder:
            target.mkdir(parents=True, exist_ok=True)
            continue
        if not (target.is_file() and target.stat().st_size == entry.size):
            if total is None:
                _check_room(archive, folder, entry.size)
            _write(archive, entry, target)
        files += 1
        show(done, total)
    return files


def _checked_name(archive: Path, entry: _Entry) -> PurePosixPath | None:
    """The path below the folder; None for what other systems leave in archives."""
    path = PurePosixPath(entry.name)
    is_outside = path.is_absolute() or ".." in path.parts or "\\" in entry.name or "\0" in entry.name
    if is_outside or ":" in (path.parts or ("",))[0]:
        raise DataError(
            f"{archive} has a member {entry.name!r}, which would be written outside its folder. Do not use this "
            "archive; delete it and look at where it came from."
        )
    if entry.is_link:
        raise DataError(
            f"{archive} has a member {entry.name!r} that is a link or a device, which data sets do not need. Do not "
            "use this archive; delete it and look at where it came from."
        )
    return None if not path.parts or path.parts[0] in _IGNORED_FOLDERS else path


def _write(archive: Path, entry: _Entry, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.tmp")
    source = entry.open()
    assert source is not None, entry.name
    written = 0
    try:
        with source, temporary.open("wb") as file:
            while block := source.read(_BLOCK_BYTES):
                written += len(block)
                if written > entry.size:
                    break
                file.write(block)
        if written != entry.size:
            raise DataError(f"{archive}: {entry.name} is not as long as the archive says. Delete it and run again.")
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _check_room(archive: Path, folder: Path, size: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if size > free:
        raise DataError(
            f"{archive} unpacks to {size / 1e9:.1f} GB, but {folder} has room for {free / 1e9:.1f} GB. Make room, or "
            "use another --out."
        )
