"""Unpacks archives from the network: only plain files, only below one folder, and only up to their stated size."""

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
from data_prep.http_files import Show

_BLOCK_BYTES = 1 << 20
_MAX_RATIO = 200
"""Bytes unpacked per byte packed. Annotations in JSON have 5 to 30; deflate can pack zeros a thousandfold."""
_IGNORED_FOLDERS = ("__MACOSX",)
"""Folders that other systems leave in archives."""


class _Entry(NamedTuple):
    """One member of a zip or tar."""

    name: str
    size: int
    is_folder: bool
    is_special: bool
    """True for a link, a device or a pipe."""
    open: Callable[[], IO[bytes] | None]


def unpack(archive: Path, folder: Path, show: Show = lambda done_bytes, total_bytes: None) -> int:
    """Unpack a zip or a tar (compressed or not). Existing files of the right size are left as they are.

    Returns: number of files in the archive.

    Raises:
        DataError: the archive is damaged, has a member outside the folder or one that is not a plain file, unpacks to
            more than 200 times its size, or the disk is full.
    """
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as packed:
                members = packed.infolist()
                total = sum(member.file_size for member in members)
                _check_free_space(archive, folder, total)
                return _unpack(archive, folder, (_read_zip_entry(packed, member) for member in members), total, show)
        with tarfile.open(archive, "r|*") as stream:
            return _unpack(archive, folder, (_read_tar_entry(stream, member) for member in stream), None, show)
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, zlib.error, NotImplementedError, RuntimeError) as error:
        raise DataError(
            f"{archive} cannot be unpacked ({error}). Delete it and run the command again: it is downloaded once more."
        ) from error
    except OSError as error:
        raise DataError(f"{archive} cannot be unpacked into {folder} ({error.strerror or error}).") from error


def _read_zip_entry(packed: zipfile.ZipFile, member: zipfile.ZipInfo) -> _Entry:
    file_type = stat.S_IFMT(member.external_attr >> 16)  # 0 where the archive was made on Windows
    return _Entry(
        name=member.filename,
        size=member.file_size,
        is_folder=member.is_dir(),
        is_special=file_type not in (0, stat.S_IFREG, stat.S_IFDIR),
        open=lambda: packed.open(member),
    )


def _read_tar_entry(stream: tarfile.TarFile, member: tarfile.TarInfo) -> _Entry:
    return _Entry(
        name=member.name,
        size=member.size,
        is_folder=member.isdir(),
        is_special=not (member.isdir() or member.isreg()),
        open=lambda: stream.extractfile(member),
    )


def _unpack(archive: Path, folder: Path, entries: Iterator[_Entry], total: int | None, show: Show) -> int:
    num_files = done_bytes = 0
    max_bytes = max(archive.stat().st_size, 1) * _MAX_RATIO
    for entry in entries:
        relative = _check_name(archive, entry)
        if relative is None:
            continue
        target = folder / relative
        done_bytes += entry.size
        if done_bytes > max_bytes:
            raise DataError(
                f"{archive} unpacks to more than {_MAX_RATIO} times its size. No data set does: it may be an attack. "
                "Delete it and check where it came from."
            )
        if entry.is_folder:
            target.mkdir(parents=True, exist_ok=True)
            continue
        if not (target.is_file() and target.stat().st_size == entry.size):
            if total is None:
                _check_free_space(archive, folder, entry.size)
            _write(archive, entry, target)
        num_files += 1
        show(done_bytes, total)
    return num_files


def _check_name(archive: Path, entry: _Entry) -> PurePosixPath | None:
    """Return the path of a member below the folder; None if the member is not needed.

    Raises:
        DataError: it would be written outside the folder, or is not a plain file.
    """
    path = PurePosixPath(entry.name)
    is_outside = path.is_absolute() or ".." in path.parts or "\\" in entry.name or "\0" in entry.name
    if is_outside or ":" in (path.parts or ("",))[0]:
        raise DataError(
            f"{archive} has a member {entry.name!r}, which would be written outside its folder. Do not use this "
            "archive; delete it and check where it came from."
        )
    if entry.is_special:
        raise DataError(
            f"{archive} has a member {entry.name!r} that is a link or a device, which data sets do not need. Do not "
            "use this archive; delete it and check where it came from."
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
            raise DataError(
                f"{archive}: its member {entry.name} does not have the {entry.size:,} bytes that the archive states. "
                "Delete the archive and run the command again."
            )
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _check_free_space(archive: Path, folder: Path, size: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if size > free:
        raise DataError(
            f"{archive} unpacks to {size / 1e9:.1f} GB, but {folder} has only {free / 1e9:.1f} GB free. Make room, or "
            "use another --out."
        )
