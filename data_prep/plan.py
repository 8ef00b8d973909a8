"""Plans a build on disk: joins the records of each image into one sample and puts all samples in their final order.

Sources yield any number of records in any order. SQLite sorts them in files of its own, so that four million images
take no more memory than four. The order depends only on the seed and the keys.
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
_SIGN_BIT = 1 << 63  # subtracted from 64-bit hashes, since SQLite's integers are signed

_EncodedImage = tuple[str, int, int]
"""Path, offset and length of an image, as the JSON in the plan holds them."""


@dataclass(frozen=True, kw_only=True)
class PlannedSplit:
    """Samples of one split, which stand one after the other in the plan, and the rows that the source dropped."""

    name: str
    first: int
    """Number of its first sample in the plan."""
    samples: int
    """Number of its samples."""
    rows: int
    """Number of texts of its records and rejects; an image without a text counts as one."""
    rejects: dict[str, int]
    """Number of rows that the source dropped, by reason."""


class Plan:
    """A finished plan. Each worker opens it for itself and reads only the records of its shards."""

    def __init__(self, file: Path) -> None:
        """Open a plan that make_plan has written."""
        self.file = file
        self._database = sqlite3.connect(
            f"file:{file.as_posix()}?mode=ro&immutable=1", uri=True, check_same_thread=False
        )

    def splits(self) -> list[PlannedSplit]:
        """Return all splits, sorted by name, including those of which the source dropped every row."""
        return [
            PlannedSplit(name=name, first=first, samples=samples, rows=rows, rejects=json.loads(rejects))
            for name, first, samples, rows, rejects in self._database.execute("SELECT * FROM splits ORDER BY name")
        ]

    def records(self, first: int, count: int) -> Iterator[Record]:
        """Yield ``count`` joined records, from number ``first`` on."""
        rows = self._database.execute(
            "SELECT split, key, content FROM samples WHERE number >= ? AND number < ? ORDER BY number",
            (first, first + count),
        )
        for split, key, content in rows:
            yield _decode_record(split, key, json.loads(content))

    def close(self) -> None:
        """Close the file."""
        self._database.close()


@contextmanager
def make_plan(
    entries: Iterable[Record | Reject],
    *,
    seed: int,
    scratch: Path | None = None,
    on_progress: Callable[[int], None] = lambda rows: None,
) -> Iterator[Plan]:
    """Make a plan that exists as long as the block.

    Args:
        entries: what a source yields.
        scratch: folder for the plan, which takes about three times the bytes of all texts with their file names; by
            default the system's temporary folder.
        on_progress: called with the number of rows read so far, once per batch of records.

    Raises:
        DataError: rows contradict each other, there are none, or the disk is full.
    """
    source = iter(entries)
    target = Path(scratch or tempfile.gettempdir()).absolute()
    existing = next(path for path in (target, *target.parents) if path.is_dir())
    with _keep_sqlite_files_in(existing):
        # A source that refuses its input does so at its first entry: then no folder is made.
        first = list(itertools.islice(source, 1))
    with _make_plan_folder(scratch) as folder:
        with _keep_sqlite_files_in(folder):
            _write(itertools.chain(first, source), folder / "plan.sqlite", seed, on_progress)
        plan = Plan(folder / "plan.sqlite")
        try:
            yield plan
        finally:
            plan.close()


@contextmanager
def _keep_sqlite_files_in(folder: Path) -> Iterator[None]:
    """Make SQLite put its temporary files, of sorting and of DiskDict, into a folder.

    By default it uses /var/tmp or /tmp, which are small, or memory, on some nodes.

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
    # The pragma sets it for the whole process. The variable SQLITE_TMPDIR would come too late: SQLite reads it once,
    # when it is loaded.
    quoted = folder.replace("'", "''")
    with closing(sqlite3.connect(":memory:")) as database:
        database.execute(f"PRAGMA temp_store_directory = '{quoted}'")


@contextmanager
def _make_plan_folder(scratch: Path | None) -> Iterator[Path]:
    """Make a folder for the block, and remove those that killed programs left behind on this machine."""
    # The name has the machine in it: on some file systems, locks of other machines are invisible.
    prefix = f"{_PREFIX}{platform.node()}-"
    try:
        if scratch is not None:
            scratch.mkdir(parents=True, exist_ok=True)
        _remove_stale(Path(scratch or tempfile.gettempdir()), prefix)
        unlocked = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}new-", dir=scratch))
    except OSError as error:
        raise DataError(f"{scratch} cannot be written to ({error.strerror}). Use another folder.") from error
    # The folder gets its final name only after it is locked: under that name, another program would remove an unlocked
    # folder as stale.
    lock = os.open(unlocked, os.O_RDONLY)
    with suppress(OSError):  # a file system without locks
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    folder = unlocked.rename(unlocked.with_name(unlocked.name.replace(f"{_PREFIX}new-", prefix)))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _remove_stale(scratch: Path, prefix: str) -> None:
    for stale in scratch.glob(f"{prefix}*"):
        try:
            lock = os.open(stale, os.O_RDONLY)
        except OSError:  # it belongs to another user, or has been removed meanwhile
            continue
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while its program is running
            shutil.rmtree(stale, ignore_errors=True)
        os.close(lock)


def _write(entries: Iterable[Record | Reject], file: Path, seed: int, on_progress: Callable[[int], None]) -> None:
    with closing(sqlite3.connect(file, isolation_level=None)) as database:
        # Faster without safety: nothing in the plan has to survive a crash.
        for pragma in ("journal_mode=OFF", "synchronous=OFF", f"cache_size=-{_CACHE_KIB}", "temp_store=FILE"):
            database.execute(f"PRAGMA {pragma}")
        database.execute(
            "CREATE TABLE rows (seq INTEGER PRIMARY KEY, split TEXT, position INTEGER, key TEXT, content TEXT)"
        )
        database.execute("CREATE TABLE samples (number INTEGER PRIMARY KEY, split TEXT, key TEXT, content TEXT)")
        database.execute(
            "CREATE TABLE splits (name TEXT PRIMARY KEY, first INTEGER, samples INTEGER, rows INTEGER, rejects TEXT)"
        )
        rows, rejects = _collect(database, entries, seed, on_progress)
        _check_splits(rows, {split for split, _ in rejects})
        ranges = {split: (first, samples) for split, first, samples in _join(database)}
        for split in sorted(rows.keys() | {split for split, _ in rejects}):
            split_rejects = {reason: count for (name, reason), count in sorted(rejects.items()) if name == split}
            first, samples = ranges.get(split, (0, 0))
            num_rows = rows[split] + sum(split_rejects.values())
            row = (split, first, samples, num_rows, json.dumps(split_rejects))
            database.execute("INSERT INTO splits VALUES (?, ?, ?, ?, ?)", row)
        database.execute("DROP TABLE rows")


def _collect(
    database: sqlite3.Connection, entries: Iterable[Record | Reject], seed: int, on_progress: Callable[[int], None]
) -> tuple[Counter[str], Counter[tuple[str, str]]]:
    """Write all records to the database, unsorted. Returns: texts by split, and dropped rows by split and reason."""
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
        positions = rng.keys(stream, [record.key for record in records])
        database.execute("BEGIN")
        database.executemany(
            "INSERT INTO rows (split, position, key, content) VALUES (?, ?, ?, ?)",
            [
                (record.split, int(position) - _SIGN_BIT, record.key, _encode_record(record))
                for record, position in zip(records, positions, strict=True)
            ],
        )
        database.execute("COMMIT")
        on_progress(rows.total() + rejects.total())
    if not rows and not rejects:
        raise DataError("The source has no rows. Is --raw the right folder, and is its caption file not empty?")
    return rows, rejects


def _check_splits(rows: Counter[str], rejected: set[str]) -> None:
    names = sorted(set(rows) | rejected)
    if "" in names and len(names) > 1:
        raise DataError(
            f"{rows['']} rows have no split, others are in {', '.join(name for name in names if name)}. Give every row "
            "a split, or none."
        )
    for name in names:
        if name and not all(letter.isalnum() or letter in "_-" for letter in name):
            raise DataError(f"The split {name!r} cannot be a folder name: use letters, digits, _ and -.")


def _join(database: sqlite3.Connection) -> list[tuple[str, int, int]]:
    """Write one sample per key, in the final order. Returns: each split, its first number and number of samples."""
    ordered = database.execute("SELECT split, key, content FROM rows ORDER BY split, position, key, seq")
    ranges: list[tuple[str, int, int]] = []
    number = 0
    for split, split_rows in itertools.groupby(ordered, key=lambda row: str(row[0])):
        first = number
        samples = (
            (split, key, json.dumps(_join_records(key, [json.loads(row[2]) for row in key_rows])))
            for key, key_rows in itertools.groupby(split_rows, key=lambda row: str(row[1]))
        )
        while batch := list(itertools.islice(samples, _BATCH)):
            numbered = [(number, *sample) for number, sample in enumerate(batch, number)]
            database.execute("BEGIN")
            database.executemany("INSERT INTO samples VALUES (?, ?, ?, ?)", numbered)
            database.execute("COMMIT")
            number += len(batch)
        ranges.append((split, first, number - first))
    return ranges


def _join_records(key: str, records: list[dict[str, Any]]) -> dict[str, Any]:
    first = records[0]
    for record in records[1:]:
        for field in ("image", "second_image", "image_id", "meta"):
            if record[field] != first[field]:
                raise DataError(
                    f"Two images have the key {key!r}: their {field} is {_format(first[field])} and "
                    f"{_format(record[field])}. Keys are made from file names; rename one, or give both rows the same "
                    f"{field}."
                )
        first["captions"] += record["captions"]
        first["annotations"] += record["annotations"]
    return first


def _format(value: Any) -> str:
    return str(value[0]) if isinstance(value, list) else repr(value)


def _encode_record(record: Record) -> str:
    assert not record.annotations or len(record.annotations) == len(record.captions), record.key
    return json.dumps(
        {
            "image": _encode_image(record.image),
            "second_image": None if record.second_image is None else _encode_image(record.second_image),
            "image_id": record.image_id,
            "captions": record.captions,
            "annotations": record.annotations,
            "meta": dict(record.meta),
        }
    )


def _encode_image(image: ImageFile) -> _EncodedImage:
    return str(image.path), image.offset, image.num_bytes


def _decode_record(split: str, key: str, content: dict[str, Any]) -> Record:
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
