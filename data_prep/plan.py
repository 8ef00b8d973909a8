"""Which record goes into which shard, worked out on disk: rows of the same image joined, put in order, cut into shards.

Sources give rows in any order and number. SQLite sorts them in files of its own, so that four million images take no
more memory than four. The order depends on the seed and the keys alone.
"""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import platform
import shutil
import sqlite3
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bridgetower import rng
from bridgetower.errors import DataError
from bridgetower.io.storage import to_path
from data_prep.record import ImageFile, Record, Reject

_PREFIX = ".plan-"
_BATCH = 5_000
_CACHE_KIB = 32_768
_SIGN = 1 << 63  # SQLite's integers are signed

# (path, offset, num_bytes) as JSON holds them
_Image = tuple[str, int, int]


@dataclass(frozen=True, kw_only=True)
class PlannedSplit:
    """The samples of a split, in their final order, and what its source dropped."""

    name: str
    first: int
    """Number of its first sample in the plan."""
    samples: int
    rows: int
    """Texts of all its records and rejects."""
    rejects: dict[str, int]
    """Rows that the source itself dropped, by reason."""


class Plan:
    """A finished plan; opened by each worker for itself, which reads only its own part."""

    def __init__(self, file: Path) -> None:
        """Open a plan that write_plan has made."""
        self.file = file
        self._database = sqlite3.connect(
            f"file:{file.as_posix()}?mode=ro&immutable=1", uri=True, check_same_thread=False
        )

    def splits(self) -> list[PlannedSplit]:
        """All splits by name, those too of which the source dropped every row."""
        return [
            PlannedSplit(name=name, first=first, samples=samples, rows=rows, rejects=json.loads(rejects))
            for name, first, samples, rows, rejects in self._database.execute("SELECT * FROM splits ORDER BY name")
        ]

    def records(self, first: int, count: int) -> Iterator[Record]:
        """The joined records from number ``first`` on."""
        rows = self._database.execute(
            "SELECT split, key, content FROM samples WHERE number >= ? AND number < ? ORDER BY number",
            (first, first + count),
        )
        for split, key, content in rows:
            yield _record(split, key, json.loads(content))

    def close(self) -> None:
        """Give the file back."""
        self._database.close()


@contextmanager
def planning(
    entries: Iterable[Record | Reject],
    *,
    seed: int,
    scratch: Path | None = None,
    on_progress: Callable[[int], None] = lambda rows: None,
) -> Iterator[Plan]:
    """Make a plan that lasts as long as the block.

    Args:
        entries: what a source yields.
        scratch: folder for the plan, which takes about three times the bytes of all texts with their file names; by
            default the system's folder for temporary files.
        on_progress: called now and then with the number of rows so far.

    Raises:
        DataError: rows contradict each other, there are none, or the disk is full.
    """
    source = iter(entries)
    wanted = Path(scratch or tempfile.gettempdir()).absolute()
    there = next(path for path in (wanted, *wanted.parents) if path.is_dir())
    with _sqlite_files(there):
        first = list(itertools.islice(source, 1))  # a source that refuses its input does so now: nothing is made for it
    with _own_folder(scratch) as folder:
        with _sqlite_files(folder):
            _write(itertools.chain(first, source), folder / "plan.sqlite", seed, on_progress)
        plan = Plan(folder / "plan.sqlite")
        try:
            yield plan
        finally:
            plan.close()


@contextmanager
def _sqlite_files(folder: Path) -> Iterator[None]:
    """Where SQLite puts the files of its sorting and of DiskDict: /tmp and /var/tmp are small or memory on some nodes.

    Raises:
        DataError: the disk is full.
    """
    try:
        _set_temporary_folder(str(folder))
        yield
    except sqlite3.OperationalError as error:
        raise DataError(
            f"The plan of the shards cannot be written to {folder} ({error}). Make room there, or give --scratch a "
            "folder on a larger disk."
        ) from error
    finally:
        _set_temporary_folder("")


def _set_temporary_folder(folder: str) -> None:
    # Of the whole process. The variable SQLITE_TMPDIR would be too late: SQLite reads it once, when it is loaded.
    quoted = folder.replace("'", "''")
    with closing(sqlite3.connect(":memory:")) as database:
        database.execute(f"PRAGMA temp_store_directory = '{quoted}'")


@contextmanager
def _own_folder(scratch: Path | None) -> Iterator[Path]:
    """A temporary folder; those that killed programs left behind on this machine are removed."""
    # Locks of other machines are not seen on every file system.
    own = f"{_PREFIX}{platform.node()}-"
    try:
        if scratch is not None:
            scratch.mkdir(parents=True, exist_ok=True)
        _remove_stale(Path(scratch or tempfile.gettempdir()), own)
        unnamed = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}new-", dir=scratch))
    except OSError as error:
        raise DataError(f"{scratch} cannot be written to ({error.strerror}). Use another folder.") from error
    # Locked before it has the name by which others look for it: they would take it for one that was left behind.
    lock = os.open(unnamed, os.O_RDONLY)
    with suppress(OSError):  # a file system without locks
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    folder = unnamed.rename(unnamed.with_name(unnamed.name.replace(f"{_PREFIX}new-", own)))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _remove_stale(scratch: Path, own: str) -> None:
    for stale in scratch.glob(f"{own}*"):
        try:
            lock = os.open(stale, os.O_RDONLY)
        except OSError:  # another user's, or gone by now
            continue
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # refused while its program lives
            shutil.rmtree(stale, ignore_errors=True)
        os.close(lock)


def _write(entries: Iterable[Record | Reject], file: Path, seed: int, on_progress: Callable[[int], None]) -> None:
    with closing(sqlite3.connect(file, isolation_level=None)) as database:
        # Nothing of it has to survive a crash.
        for pragma in ("journal_mode=OFF", "synchronous=OFF", f"cache_size=-{_CACHE_KIB}", "temp_store=FILE"):
            database.execute(f"PRAGMA {pragma}")
        database.execute(
            "CREATE TABLE rows (seq INTEGER PRIMARY KEY, split TEXT, place INTEGER, key TEXT, content TEXT)"
        )
        database.execute("CREATE TABLE samples (number INTEGER PRIMARY KEY, split TEXT, key TEXT, content TEXT)")
        database.execute(
            "CREATE TABLE splits (name TEXT PRIMARY KEY, first INTEGER, samples INTEGER, rows INTEGER, rejects TEXT)"
        )
        rows, rejects = _collect(database, entries, seed, on_progress)
        _check_splits(rows, {split for split, _ in rejects})
        first = {split: (number, samples) for split, number, samples in _join(database)}
        for split in sorted(rows.keys() | {split for split, _ in rejects}):
            own = {reason: count for (name, reason), count in sorted(rejects.items()) if name == split}
            start, samples = first.get(split, (0, 0))
            row = (split, start, samples, rows[split] + sum(own.values()), json.dumps(own))
            database.execute("INSERT INTO splits VALUES (?, ?, ?, ?, ?)", row)
        database.execute("DROP TABLE rows")


def _collect(
    database: sqlite3.Connection, entries: Iterable[Record | Reject], seed: int, on_progress: Callable[[int], None]
) -> tuple[Counter[str], Counter[tuple[str, str]]]:
    """Write all records down as they come. Returns: texts by split, and dropped rows by split and reason."""
    stream = rng.key(seed, "order of records")
    rows: Counter[str] = Counter()
    rejects: Counter[tuple[str, str]] = Counter()
    source = iter(entries)
    while batch := list(itertools.islice(source, _BATCH)):
        records = [entry for entry in batch if isinstance(entry, Record)]
        for entry in batch:
            if isinstance(entry, Reject):
                rejects[entry.split, entry.reason] += entry.rows
        for record in records:
            rows[record.split] += max(1, len(record.captions))
        places = rng.keys(stream, [record.key for record in records])
        database.execute("BEGIN")
        database.executemany(
            "INSERT INTO rows (split, place, key, content) VALUES (?, ?, ?, ?)",
            [(r.split, int(at) - _SIGN, r.key, _content(r)) for r, at in zip(records, places, strict=True)],
        )
        database.execute("COMMIT")
        on_progress(rows.total() + rejects.total())
    if not rows and not rejects:
        raise DataError("The source gave no rows: is --raw the right folder, and its caption file not empty?")
    return rows, rejects


def _check_splits(rows: Counter[str], rejected: set[str]) -> None:
    names = sorted(set(rows) | rejected)
    if "" in names and len(names) > 1:
        raise DataError(
            f"{rows['']} rows have no split, others are in {', '.join(name for name in names if name)}. Give each one "
            "a split."
        )
    for name in names:
        if name and not all(letter.isalnum() or letter in "_-" for letter in name):
            raise DataError(f"The split {name!r} cannot be a folder name: use letters, digits, _ and -.")


def _join(database: sqlite3.Connection) -> list[tuple[str, int, int]]:
    """Make one sample of all rows of a key, in the final order. Returns: split, its first number, how many samples."""
    ordered = database.execute("SELECT split, key, content FROM rows ORDER BY split, place, key, seq")
    found: list[tuple[str, int, int]] = []
    number = 0
    for split, of_split in itertools.groupby(ordered, key=lambda row: str(row[0])):
        first = number
        samples = (
            (split, key, json.dumps(_joined(key, [json.loads(row[2]) for row in of_key])))
            for key, of_key in itertools.groupby(of_split, key=lambda row: str(row[1]))
        )
        while batch := list(itertools.islice(samples, _BATCH)):
            numbered = [(number + at, *sample) for at, sample in enumerate(batch)]
            database.execute("BEGIN")
            database.executemany("INSERT INTO samples VALUES (?, ?, ?, ?)", numbered)
            database.execute("COMMIT")
            number += len(batch)
        found.append((split, first, number - first))
    return found


def _joined(key: str, parts: list[dict[str, Any]]) -> dict[str, Any]:
    first = parts[0]
    for part in parts[1:]:
        for field in ("image", "second_image", "image_id", "meta"):
            if part[field] != first[field]:
                raise DataError(
                    f"Two images have the key {key!r}: their {field} is {_short(first[field])} and "
                    f"{_short(part[field])}. Keys are made from file names; rename one, or give both rows the same "
                    f"{field}."
                )
        first["captions"] += part["captions"]
        first["annotations"] += part["annotations"]
    return first


def _short(value: Any) -> str:
    return str(value[0]) if isinstance(value, list) else repr(value)


def _content(record: Record) -> str:
    assert not record.annotations or len(record.annotations) == len(record.captions), record.key
    return json.dumps(
        {
            "image": _image(record.image),
            "second_image": None if record.second_image is None else _image(record.second_image),
            "image_id": record.image_id,
            "captions": record.captions,
            "annotations": record.annotations,
            "meta": dict(record.meta),
        }
    )


def _image(image: ImageFile) -> _Image:
    return str(image.path), image.offset, image.num_bytes


def _record(split: str, key: str, content: dict[str, Any]) -> Record:
    images = [
        None if image is None else ImageFile(path=to_path(image[0]), offset=image[1], num_bytes=image[2])
        for image in (content["image"], content["second_image"])
    ]
    assert images[0] is not None
    return Record(
        key=key,
        image=images[0],
        second_image=images[1],
        image_id=content["image_id"],
        captions=tuple(content["captions"]),
        annotations=tuple(content["annotations"]),
        split=split,
        meta=content["meta"],
    )
