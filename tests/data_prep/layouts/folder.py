"""A folder of images with each kind of caption file; captions.* is beside the folder raw."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

from tests.data_prep.layouts import Expected, make_image_file, put

LAYOUTS = ("csv", "jsonl", "parquet")

ROWS: tuple[dict[str, Any], ...] = (
    {"image": "a.jpg", "caption": "a red ball", "split": "train", "rating": "5"},
    {"image": "deep/b c.png", "caption": 'a "blue", odd\nball', "split": "train", "rating": "4"},
    {"image": "a.jpg", "caption": "the red ball", "split": "train", "rating": "3"},
    {"image": "./a.jpg", "caption": "a red ball", "split": "train", "rating": "2"},  # repeated, in another spelling
    {"image": "missing.jpg", "caption": "nothing to see", "split": "train", "rating": "1"},
    {"image": "cut.jpg", "caption": "half a ball", "split": "train", "rating": "1"},
    {"image": "empty.jpg", "caption": "no ball", "split": "train", "rating": "1"},
    {"image": "c.webp", "caption": " ", "split": "train", "rating": "1"},
    {"image": "c.webp", "caption": "a green ball ☂", "split": "train", "rating": "1"},
    {"image": "v.jpg", "caption": "a ball for the test", "split": "val", "rating": "0"},
)


def captions_file(folder: Path, layout: str) -> Path:
    """Return the path for --captions."""
    return folder / f"captions.{layout}"


def write(folder: Path, layout: str = "csv") -> dict[str, Expected]:
    """Write images below folder/raw and a caption file. Returns: the counts that a build should have, by split."""
    raw = folder / "raw"
    for number, (name, format_name) in enumerate({"a.jpg": "JPEG", "deep/b c.png": "PNG", "c.webp": "WEBP"}.items()):
        put(raw / name, make_image_file(number, format_name=format_name))
    put(raw / "v.jpg", make_image_file(10))
    put(raw / "cut.jpg", make_image_file(11)[:500])
    put(raw / "empty.jpg", b"")
    file = captions_file(folder, layout)
    if layout == "csv":
        stream = io.StringIO()
        writer = csv.DictWriter(stream, list(ROWS[0]))
        writer.writeheader()
        writer.writerows(ROWS)
        put(file, stream.getvalue())
    elif layout == "jsonl":
        put(file, "".join(json.dumps(row) + "\n" for row in ROWS))
    else:
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(list(ROWS)), file, row_group_size=3)
    rejects = {
        "empty caption": 1,
        "image cannot be decoded": 1,
        "image file empty": 1,
        "image file missing": 1,
        "repeated caption": 1,
    }
    return {
        "train": Expected(rows=9, images=3, captions=4, rejects=rejects),
        "val": Expected(rows=1, images=1, captions=1),
    }
