"""A folder of images with a caption file: for your own data.

The caption file is a CSV with a header, JSONL or Parquet. Its columns or fields:
    image     path below --raw (required)
    caption   text, or `captions`, a list of texts (JSONL and Parquet) (required)
    split     optional; each split becomes a corpus folder of its own below --out
    image_id  optional; pairs with the same id are never each other's negatives (default: a hash of the image file, so
              that copies under other names have the same id)
Rows of the same image are joined. Other columns are kept with each caption, as annotations in the sample's json.
Both --raw and --captions may be in an object store (s3://bucket/photos).
"""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from bridgetower.errors import ConfigError, DataError
from bridgetower.io.storage import explain_read_errors, is_remote, to_path
from bridgetower.shards.sample import safe_key
from data_prep.raw_files import DiskDict, read_json_lines
from data_prep.record import ImageFile, ImagePolicy, Record, Reject, SourceOptions

FLAGS = {"captions": "caption file (CSV, JSONL or Parquet)"}
KEEP_REPEATS = False
SAMPLES_PER_SHARD = 10_000
# A little above the 294 px that the large model reads: pretraining crops the centre and never augments.
IMAGES = ImagePolicy(short_side_px=304)
ATTRIBUTION = ""

_KNOWN_FIELDS = ("image", "caption", "captions", "split", "image_id")
_PARQUET_BATCH = 1_000  # rows in memory at a time; a row may hold much more than a caption

_Rows = Iterator[tuple[str, dict[str, Any]]]
"""Rows of a caption file, each with its file and line for error messages."""


def records(options: SourceOptions) -> Iterator[Record | Reject]:
    """Yield one record per row.

    Raises:
        ConfigError: a flag or a package is missing.
        DataError: the folder, the caption file or a row is not as described above.
    """
    if options.raw is None or not options.flags.get("captions"):
        raise ConfigError(
            "The source folder needs --raw=DIR (the images) and --captions=FILE (a CSV, JSONL or Parquet)."
        )
    with explain_read_errors(options.raw):
        if not options.raw.is_dir():
            raise DataError(f"--raw={options.raw} is not a folder. Give the folder of the images.")
    root = options.raw if is_remote(options.raw) else options.raw.resolve()
    file = to_path(options.flags["captions"])
    read_rows = _choose_reader(file)
    # Joined rows need one annotation per caption: either every row gets annotations, or none does.
    has_annotations = _has_other_fields(read_rows(file), is_table=file.suffix.lower() != ".jsonl")
    with DiskDict() as split_of:
        for where, row in read_rows(file):
            name, captions = _get_image(root, row, where), _get_captions(row, where)
            split = str(row.get("split") or "")
            if split and split_of.get(name, split) != split:
                raise DataError(
                    f"{where}: the image {name} is in the splits {split_of.get(name)!r} and {split!r}. An image in "
                    "two splits would leak from one into the other: delete the rows of one."
                )
            if split:
                split_of[name] = split
            if not captions:
                yield Reject(reason="no caption", split=split)
                continue
            other_fields = {
                field: value for field, value in row.items() if field not in _KNOWN_FIELDS and value is not None
            }
            image_id = row.get("image_id")
            yield Record(
                key=safe_key(PurePosixPath(name).with_suffix("").as_posix()),
                image=ImageFile(path=root / name),
                image_id="" if image_id is None else str(image_id),
                captions=captions,
                annotations=(other_fields,) * len(captions) if has_annotations else (),
                split=split,
            )


def _get_image(root: Path, row: dict[str, Any], where: str) -> str:
    """Return the path of a row's image below the folder."""
    name = row.get("image")
    if not isinstance(name, str) or not name:
        raise DataError(f"{where} has image={name!r}. Each row has to name an image file below --raw={root}.")
    return _normalize_remote_path(root, name, where) if is_remote(root) else _normalize_path(root, name, where)


def _get_captions(row: dict[str, Any], where: str) -> tuple[str, ...]:
    captions = row.get("caption") if row.get("captions") is None else row["captions"]
    captions = [captions] if isinstance(captions, str) else captions
    if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
        raise DataError(
            f"{where} has caption={captions!r}. Each row needs a text `caption`, or a list of texts `captions`."
        )
    return tuple(captions)


def _normalize_path(root: Path, name: str, where: str) -> str:
    """Return the one path of an image below the folder, however a row spells it: ./a.jpg and b/../a.jpg are a.jpg."""
    try:
        path = Path(os.path.normpath(root / name))
        target = path.resolve()
    except ValueError as error:  # a NUL or half a surrogate pair
        raise _make_name_error(name, where, error) from error
    if not path.is_relative_to(root):  # an absolute path through a link to the folder
        path = target
    if target == root or not (path.is_relative_to(root) and target.is_relative_to(root)):
        raise DataError(
            f"{where} names the image {name!r}, which is not a file below --raw={root}. Correct the row, or move the "
            "image into that folder."
        )
    return path.relative_to(root).as_posix()


def _normalize_remote_path(root: Path, name: str, where: str) -> str:
    """Return the path of an image below a folder in a store.

    A store has no links, and ``..`` has no meaning there: names that contain it are refused.
    """
    path = PurePosixPath(name)
    try:
        name.encode()
    except UnicodeEncodeError as error:  # half a surrogate pair
        raise _make_name_error(name, where, error) from error
    if path.is_absolute() or "://" in name or "\0" in name or ".." in path.parts or not path.parts:
        raise DataError(
            f"{where} names the image {name!r}, which is not a file below --raw={root}. Names in a store start at "
            "--raw and have no `..`."
        )
    return path.as_posix()


def _make_name_error(name: str, where: str, error: ValueError) -> DataError:
    return DataError(f"{where} has image={name!r}, which cannot be the name of a file ({error}). Correct the row.")


def _choose_reader(file: Path) -> Callable[[Path], _Rows]:
    """Return the function that reads a caption file with this suffix.

    Raises:
        ConfigError: the suffix is unknown.
        DataError: the file cannot be opened.
    """
    readers = {".csv": _csv_rows, ".jsonl": read_json_lines, ".parquet": _parquet_rows}
    if file.suffix.lower() not in readers:
        raise ConfigError(f"--captions={file} must end in .csv, .jsonl or .parquet.")
    try:
        with explain_read_errors(file), file.open("rb"):
            pass
    except DataError as error:
        cause = error.__cause__
        reason = (cause.strerror if isinstance(cause, OSError) else None) or cause
        raise DataError(f"--captions={file} cannot be read ({reason}). Correct the path.") from error
    return readers[file.suffix.lower()]


def _has_other_fields(rows: _Rows, *, is_table: bool) -> bool:
    """Return true if any row has a field besides the known ones.

    Args:
        is_table: all rows have the same fields, so that the first one decides.
    """
    for _, row in rows:
        if any(field not in _KNOWN_FIELDS for field in row):
            return True
        if is_table:
            return False
    return False


def _csv_rows(file: Path) -> _Rows:
    with explain_read_errors(file), file.open("r", newline="", encoding="utf-8-sig") as stream:
        reader = csv.DictReader(stream, strict=True)
        try:
            header = list(reader.fieldnames or [])
            if "image" not in header or "caption" not in header:
                columns = ", ".join(header) or "none"
                raise DataError(
                    f"--captions={file} has the columns {columns}; it needs image,caption. Correct its first line."
                )
            if len(set(header)) < len(header):
                raise DataError(
                    f"--captions={file} has two columns with the same name: {', '.join(header)}. Rename one."
                )
            for row in reader:
                if None in row or None in row.values():
                    raise DataError(
                        f"{file}, line {reader.line_num} does not have {len(header)} columns. Put captions with commas "
                        "in double quotes."
                    )
                yield f"{file}, line {reader.line_num}", row
        except csv.Error as error:
            raise DataError(f"{file}, line {reader.reader.line_num} is not CSV ({error}). Correct it.") from error
        except UnicodeDecodeError as error:
            raise DataError(f"--captions={file} is not UTF-8 ({error}). Convert it first.") from error


def _parquet_rows(file: Path) -> _Rows:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ConfigError(f"--captions={file} needs a package that is not installed: `pip install pyarrow`.") from error
    with explain_read_errors(file), file.open("rb") as stream:
        try:
            table = parquet.ParquetFile(stream)
            columns = list(table.schema_arrow.names)
            if "image" not in columns or not {"caption", "captions"} & set(columns):
                shown = ", ".join(columns) or "none"
                raise DataError(
                    f"--captions={file} has the columns {shown}; it needs image and caption, or image and captions."
                )
            rows = (row for batch in table.iter_batches(batch_size=_PARQUET_BATCH) for row in batch.to_pylist())
            for number, row in enumerate(rows, 1):
                where = f"{file}, row {number}"
                yield where, {name: _to_json_value(value, name, where) for name, value in row.items()}
        except pyarrow.ArrowException as error:
            raise DataError(f"{file} is not Parquet, or is damaged ({error}). Copy it again.") from error


def _to_json_value(value: Any, name: str, where: str) -> Any:
    """Convert a value of a table to one that JSON can hold: dates and the like to text, infinity and NaN to null."""
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, bytes):
        raise DataError(
            f"{where}: the column {name} holds bytes, which the json of a sample cannot hold. Leave the column out."
        )
    if isinstance(value, list):
        return [_to_json_value(element, name, where) for element in value]
    if isinstance(value, dict):
        return {str(field): _to_json_value(element, name, where) for field, element in value.items()}
    return str(value)
