"""A folder of images with a caption file: the door for data of one's own.

The caption file is a CSV with a header, or JSONL. Columns or fields:
    image     path below --raw (required)
    caption   text, or `captions`, a list of texts (JSONL) (required)
    split     optional; each split becomes a corpus folder of its own below --out
    image_id  optional; pairs with the same id are never each other's negatives (default: a hash of the image file, so
              that a picture is the same one under any name)
Rows of the same image are joined. Any other column is kept in the sample's json.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bridgetower.data.sample import safe_key
from bridgetower.errors import ConfigError, DataError
from data_prep.record import ImagePolicy, Record, SourceOptions

FLAGS = ("raw", "captions")
SAMPLES_PER_SHARD = 10_000
# A little above the 294 px that the large model reads: pretraining crops the centre and never augments.
IMAGES = ImagePolicy(short_side_px=304)
ATTRIBUTION = ""

_OWN_FIELDS = ("image", "caption", "captions", "split", "image_id")


def records(options: SourceOptions) -> Iterator[Record]:
    """One record per image.

    Raises:
        ConfigError: a flag is missing.
        DataError: the folder, the caption file or a row is not as described above.
    """
    if options.raw is None or options.captions is None:
        raise ConfigError("The source folder needs --raw=DIR (the images) and --captions=FILE (a CSV or JSONL).")
    root = options.raw.resolve()
    if not root.is_dir():
        raise DataError(f"--raw={options.raw} is not a folder.")
    joined: dict[str, dict[str, Any]] = {}
    for where, row in _rows(options.captions):
        name, captions = row.get("image"), row.get("captions", row.get("caption"))
        captions = [captions] if isinstance(captions, str) else captions
        if not isinstance(name, str) or not name:
            raise DataError(f"{where} has image={name!r}. Each row names an image file below --raw={options.raw}.")
        if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
            raise DataError(f"{where} has caption={captions!r}. Each row has a text `caption`, or a list `captions`.")
        name = _place(root, name, where)
        entry = joined.setdefault(name, {**row, "captions": []})
        if (row.get("split") or "") != (entry.get("split") or ""):
            raise DataError(
                f"{where}: the image {name} is in the splits {entry.get('split')!r} and {row.get('split')!r}. An image "
                "in two splits would leak from one into the other."
            )
        entry["captions"] += captions
    for name, entry in joined.items():
        yield Record(
            key=safe_key(Path(name).with_suffix("").as_posix()),
            image=root / name,
            image_id=str(entry.get("image_id") or ""),
            captions=tuple(entry["captions"]),
            split=str(entry.get("split") or ""),
            meta={field: value for field, value in entry.items() if field not in _OWN_FIELDS and value is not None},
        )


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


def _rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a caption file, each with its place for errors."""
    readers = {".csv": _csv_rows, ".jsonl": _jsonl_rows}
    if file.suffix.lower() not in readers:
        raise ConfigError(f"--captions={file} must end in {' or '.join(readers)}.")
    try:
        yield from readers[file.suffix.lower()](file)
    except OSError as error:
        raise DataError(f"--captions={file} cannot be read ({error.strerror}).") from error
    except UnicodeDecodeError as error:
        raise DataError(f"--captions={file} is not UTF-8 ({error}). Convert it first.") from error


def _csv_rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with file.open(newline="", encoding="utf-8-sig") as stream:
        reader = csv.DictReader(stream, strict=True)
        try:
            header = reader.fieldnames or []
            if "image" not in header or "caption" not in header:
                columns = ", ".join(header) or "none"
                raise DataError(f"--captions={file} has the columns {columns}; it needs image,caption.")
            for row in reader:
                if None in row or None in row.values():
                    raise DataError(
                        f"{file}, line {reader.line_num} does not have {len(header)} columns. A caption with a comma "
                        "stands in double quotes."
                    )
                yield f"{file}, line {reader.line_num}", row
        except csv.Error as error:
            raise DataError(f"{file}, line {reader.reader.line_num} is not CSV ({error}).") from error


def _jsonl_rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with file.open(encoding="utf-8-sig") as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise DataError(f"{file}, line {number} is not JSON ({error}).") from error
            if not isinstance(row, dict):
                raise DataError(f"{file}, line {number} is not a JSON object.")
            yield f"{file}, line {number}", row
