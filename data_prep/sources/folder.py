"""A folder of images with a caption file: the door for data of one's own.

The caption file is a CSV with a header, JSONL or Parquet. Columns or fields:
    image     path below --raw (required)
    caption   text, or `captions`, a list of texts (JSONL and Parquet) (required)
    split     optional; each split becomes a corpus folder of its own below --out
    image_id  optional; pairs with the same id are never each other's negatives (default: a hash of the image file, so
              that a picture is the same one under any name)
Rows of the same image are joined. Any other column is kept beside each caption, as annotations in the sample's json.
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
from data_prep.raw_files import DiskDict, json_lines
from data_prep.record import ImageFile, ImagePolicy, Record, Reject, SourceOptions

FLAGS = {"captions": "caption file (CSV, JSONL or Parquet)"}
KEEP_REPEATS = False
SAMPLES_PER_SHARD = 10_000
# A little above the 294 px that the large model reads: pretraining crops the centre and never augments.
IMAGES = ImagePolicy(short_side_px=304)
ATTRIBUTION = ""

_OWN_FIELDS = ("image", "caption", "captions", "split", "image_id")
_PARQUET_BATCH = 1_000  # rows in memory; they may hold much more than a caption

# A place for errors, and what stands there.
_Rows = Iterator[tuple[str, dict[str, Any]]]


def records(options: SourceOptions) -> Iterator[Record | Reject]:
    """One record per row.

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
            raise DataError(f"--raw={options.raw} is not a folder.")
    root = options.raw if is_remote(options.raw) else options.raw.resolve()
    file = to_path(options.flags["captions"])
    reader = _reader(file)
    # Captions and annotations of joined rows stand side by side: all rows have annotations, or none.
    has_others = _has_other_fields(reader(file), is_table=file.suffix.lower() != ".jsonl")
    with DiskDict() as split_of:
        for where, row in reader(file):
            name, captions, split = _image(root, row, where), _captions(row, where), str(row.get("split") or "")
            if split and split_of.get(name, split) != split:
                raise DataError(
                    f"{where}: the image {name} is in the splits {split_of.get(name)!r} and {split!r}. An image in "
                    "two splits would leak from one into the other."
                )
            if split:
                split_of[name] = split
            if not captions:
                yield Reject(reason="no caption", split=split)
                continue
            others = {field: value for field, value in row.items() if field not in _OWN_FIELDS and value is not None}
            image_id = row.get("image_id")
            yield Record(
                key=safe_key(PurePosixPath(name).with_suffix("").as_posix()),
                image=ImageFile(path=root / name),
                image_id="" if image_id is None else str(image_id),
                captions=captions,
                annotations=(others,) * len(captions) if has_others else (),
                split=split,
            )


def _image(root: Path, row: dict[str, Any], where: str) -> str:
    """The path of a row's image below the folder."""
    name = row.get("image")
    if not isinstance(name, str) or not name:
        raise DataError(f"{where} has image={name!r}. Each row names an image file below --raw={root}.")
    return _place_remote(root, name, where) if is_remote(root) else _place(root, name, where)


def _captions(row: dict[str, Any], where: str) -> tuple[str, ...]:
    captions = row.get("caption") if row.get("captions") is None else row["captions"]
    captions = [captions] if isinstance(captions, str) else captions
    if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
        raise DataError(f"{where} has caption={captions!r}. Each row has a text `caption`, or a list `captions`.")
    return tuple(captions)


def _place(root: Path, name: str, where: str) -> str:
    """The path of an image below the folder, the same however a row spells it: ./a.jpg and b/../a.jpg are a.jpg."""
    try:
        path = Path(os.path.normpath(root / name))
        target = path.resolve()
    except ValueError as error:  # a NUL or half a surrogate pair
        raise DataError(f"{where} has image={name!r}, which cannot be the name of a file ({error}).") from error
    if not path.is_relative_to(root):  # an absolute name through a link to the folder
        path = target
    if target == root or not (path.is_relative_to(root) and target.is_relative_to(root)):
        raise DataError(f"{where} names the image {name!r}, which is not a file below --raw={root}.")
    return path.relative_to(root).as_posix()


def _place_remote(root: Path, name: str, where: str) -> str:
    """The same for a store. It has no links and gives ``..`` no meaning, so that such names are refused."""
    path = PurePosixPath(name)
    try:
        name.encode()
    except UnicodeEncodeError as error:  # half a surrogate pair
        raise DataError(f"{where} has image={name!r}, which cannot be the name of a file ({error}).") from error
    if path.is_absolute() or "://" in name or "\0" in name or ".." in path.parts or not path.parts:
        raise DataError(
            f"{where} names the image {name!r}, which is not a file below --raw={root}. Names in a store start at "
            "--raw and have no `..`."
        )
    return path.as_posix()


def _reader(file: Path) -> Callable[[Path], _Rows]:
    """The function that reads a caption file of that name."""
    readers = {".csv": _csv_rows, ".jsonl": json_lines, ".parquet": _parquet_rows}
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
    """True if any row has a field that the caller knows about; the rows of a table all have the same."""
    for _, row in rows:
        if any(field not in _OWN_FIELDS for field in row):
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
                raise DataError(f"--captions={file} has the columns {columns}; it needs image,caption.")
            if len(set(header)) < len(header):
                raise DataError(f"--captions={file} has two columns of one name: {', '.join(header)}. Rename one.")
            for row in reader:
                if None in row or None in row.values():
                    raise DataError(
                        f"{file}, line {reader.line_num} does not have {len(header)} columns. A caption with a comma "
                        "stands in double quotes."
                    )
                yield f"{file}, line {reader.line_num}", row
        except csv.Error as error:
            raise DataError(f"{file}, line {reader.reader.line_num} is not CSV ({error}).") from error
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
                raise DataError(f"--captions={file} has the columns {shown}; it needs image and caption, or captions.")
            rows = (row for batch in table.iter_batches(batch_size=_PARQUET_BATCH) for row in batch.to_pylist())
            for number, row in enumerate(rows, 1):
                where = f"{file}, row {number}"
                yield where, {name: _plain(value, name, where) for name, value in row.items()}
        except pyarrow.ArrowException as error:
            raise DataError(f"{file} is not Parquet, or is damaged ({error}). Copy it again.") from error


def _plain(value: Any, name: str, where: str) -> Any:
    """A value of a table as JSON has it; dates and the like as text, and nothing for what is not a number."""
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, bytes):
        raise DataError(f"{where}: the column {name} holds bytes, which a sample's json cannot. Leave the column out.")
    if isinstance(value, list):
        return [_plain(part, name, where) for part in value]
    if isinstance(value, dict):
        return {str(field): _plain(part, name, where) for field, part in value.items()}
    return str(value)
