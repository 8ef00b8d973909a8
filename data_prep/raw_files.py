"""Reads the published files of a corpus without holding them in memory."""

from __future__ import annotations

import csv
import json
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import ijson

from bridgetower.errors import ConfigError, DataError
from bridgetower.io.storage import explain_read_errors
from data_prep.record import SourceOptions


def require_raw_folder(options: SourceOptions, source: str, layout: str) -> Path:
    """Return the folder of --raw.

    Args:
        layout: the files that are expected below it, for error messages.

    Raises:
        ConfigError: the flag is missing.
        DataError: there is no such folder.
    """
    if options.raw is None:
        raise ConfigError(f"The source {source} needs --raw=DIR, a folder with {layout}.")
    with explain_read_errors(options.raw):
        if not options.raw.is_dir():
            raise DataError(f"--raw={options.raw} is not a folder. The source {source} needs one with {layout}.")
    return options.raw


def require_files(folder: Path, names: Sequence[str], source: str) -> list[Path]:
    """Return the paths of files below a folder.

    Raises:
        DataError: some files are missing; the error lists all of them.
    """
    paths = [folder / name for name in names]
    with explain_read_errors(folder):
        missing = [name for name, path in zip(names, paths, strict=True) if not path.is_file()]
    if missing:
        raise DataError(
            f"The source {source} does not find {', '.join(missing)} below {folder}. "
            f"`python data_prep/fetch_corpus.py {source} --out={folder}` says where to get them."
        )
    return paths


def read_json_items(file: Path, prefix: str) -> Iterator[Any]:
    """Yield the elements of an array in a JSON file of any size, one at a time.

    Args:
        prefix: path of the array in ijson's notation: ``item`` for a file that is an array, ``images.item`` for an
            object with an array ``images``.

    Raises:
        DataError: the file is not JSON, or is damaged.
    """
    with explain_read_errors(file), file.open("rb") as stream:
        try:
            yield from ijson.items(stream, prefix, use_float=True)
        except (ijson.JSONError, UnicodeDecodeError) as error:
            raise DataError(f"{file} is not JSON, or was cut short ({error}). Copy or download it again.") from error


def read_json_lines(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the objects of a JSONL file, each with its file and line for error messages.

    Raises:
        DataError: a line is not a JSON object, or the file is not UTF-8.
    """
    with explain_read_errors(file), file.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            where = f"{file}, line {number}"
            try:
                text = line.decode("utf-8-sig")
                if not text.strip():
                    continue
                row = json.loads(text)
            except UnicodeDecodeError as error:
                raise DataError(f"{where} is not UTF-8 ({error}). Convert the file first.") from error
            except ValueError as error:
                raise DataError(f"{where} is not JSON ({error}). Correct it, or copy the file again.") from error
            if not isinstance(row, dict):
                raise DataError(f"{where} is not a JSON object. Correct it, or copy the file again.")
            yield where, row


def read_delimited_rows(
    file: Path, *, delimiter: str, quoting: Literal[0, 3] = csv.QUOTE_NONE
) -> Iterator[tuple[str, list[str]]]:
    """Yield the rows of a text table, each with its file and line for error messages.

    By default quotation marks have no meaning, so that one that is never closed does not join rows.

    Raises:
        DataError: the file is not such a table, or not in UTF-8.
    """
    with explain_read_errors(file), file.open("r", newline="", encoding="utf-8-sig") as stream:
        reader = csv.reader(stream, delimiter=delimiter, quoting=quoting, strict=True)
        try:
            for row in reader:
                yield f"{file}, line {reader.line_num}", row
        except csv.Error as error:
            raise DataError(
                f"{file}, line {reader.line_num} is not a row of a table ({error}). Correct it, or copy the file again."
            ) from error
        except UnicodeDecodeError as error:
            raise DataError(f"{file} is not UTF-8 ({error}). Convert it first.") from error


class DiskDict:
    """Dictionary on disk, from numbers or texts to JSON values: to join two large files by an id."""

    def __init__(self) -> None:
        """Make an empty dictionary; leaving its ``with`` block deletes it."""
        # SQLite keeps a database without a name in a temporary file of its own, with only a cache in memory.
        self._database = sqlite3.connect("")
        self._database.execute("PRAGMA cache_size=-65536")
        self._database.execute("CREATE TABLE entries (key PRIMARY KEY, value TEXT) WITHOUT ROWID")

    def __enter__(self) -> DiskDict:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._database.close()

    def __setitem__(self, key: int | str, value: Any) -> None:
        self._database.execute("INSERT OR REPLACE INTO entries VALUES (?, ?)", (key, json.dumps(value)))

    def get(self, key: int | str, default: Any = None) -> Any:
        """Return the value of a key."""
        row = self._database.execute("SELECT value FROM entries WHERE key = ?", (key,)).fetchone()
        return default if row is None else json.loads(row[0])

    def pop(self, key: int | str, default: Any = None) -> Any:
        """Remove a key and return its value."""
        value = self.get(key, default)
        self._database.execute("DELETE FROM entries WHERE key = ?", (key,))
        return value

    def __contains__(self, key: int | str) -> bool:
        return self._database.execute("SELECT 1 FROM entries WHERE key = ?", (key,)).fetchone() is not None

    def __len__(self) -> int:
        return int(self._database.execute("SELECT count(*) FROM entries").fetchone()[0])
