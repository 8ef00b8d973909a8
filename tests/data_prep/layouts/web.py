"""Writes the rows of a corpus from the web in each of the three layouts that people keep them in."""

from __future__ import annotations

import io
import json
import tarfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.data_prep.layouts import Expected, make_image_file, put

LAYOUTS = ("bridgetower", "vilt", "img2dataset")
_KINDS = {"jpg": "JPEG", "jpeg": "JPEG", "png": "PNG", "gif": "GIF", "webp": "WEBP", "": "JPEG"}
_FAILURES = {
    "missing": "image file missing",
    "truncated": "image cannot be decoded",
    "empty": "image file empty",
}


@dataclass(frozen=True)
class Row:
    """A caption with its URL, and the result of the download."""

    caption: str
    url: str
    fate: str = "jpg"
    """Extension of the image file; or missing, truncated or empty."""
    status: str = "HTTP Error 404: Not Found"
    """Message of img2dataset, if the image is missing."""
    reason: str = "HTTP 404"
    """Reason under which the build counts that message."""

    @property
    def suffix(self) -> str:
        fate = "jpg" if self.fate in _FAILURES else self.fate
        return f".{fate}" if fate else ""


def content_of(number: int, row: Row) -> bytes | None:
    """Return the bytes of the row's image file; None if it is missing."""
    if row.fate == "missing":
        return None
    if row.fate == "empty":
        return b""
    content = make_image_file(number, format_name=_KINDS.get(row.fate, "JPEG"))
    return content[: len(content) // 2] if row.fate == "truncated" else content


def expected_of(rows: Sequence[Row], *, is_downloaded_here: bool = False, repeats: int = 0) -> Expected:
    """Count what a build of the rows should have.

    Args:
        is_downloaded_here: True if statistics of img2dataset say why images are missing.
        repeats: number of additional rows that repeat an image with its caption.
    """
    rejects: Counter[str] = Counter({"repeated caption": repeats} if repeats else {})
    for row in rows:
        if row.fate == "missing" and is_downloaded_here:
            rejects[f"download failed: {row.reason}"] += 1
        elif not row.caption.strip():
            rejects["empty caption"] += 1
        elif row.fate in _FAILURES:
            rejects[_FAILURES[row.fate]] += 1
    num_good = len(rows) + repeats - rejects.total()
    return Expected(rows=len(rows) + repeats, images=num_good, captions=num_good, rejects=dict(rejects))


def write_images(folder: Path, rows: Sequence[Row]) -> None:
    """Write the image files of CC3M and CC12M in BridgeTower's layout, named by their row."""
    folder.mkdir(parents=True)
    for number, row in enumerate(rows):
        content = content_of(number, row)
        if content is not None:
            put(folder / f"{number}{row.suffix}", content)


def write_vilt(folder: Path, image_folder: str, list_file: str, rows: Sequence[Row]) -> Expected:
    """Write ViLT's layout, with the last row twice in the list. Returns: the counts that a build should have."""
    entries = []
    for number, row in enumerate(rows):
        name = f"{1000 * number:07d}"
        content = content_of(number, row)
        if content is not None:
            put(folder / image_folder / name[:4] / name, content)
        entries.append([f"/data/somebody/gcc/{image_folder}/{name[:4]}/{name}", row.caption])
    assert rows[-1].caption and rows[-1].fate not in _FAILURES
    put(folder / list_file, json.dumps([*entries, entries[-1]]))
    return expected_of(rows, repeats=1)


def write_tar(folder: Path, shard: int, rows: Sequence[Row], *, has_stats: bool = True) -> Expected:
    """Write a shard as img2dataset 1.47 does, with original files. Returns: the counts that a build should have."""
    folder.mkdir(parents=True, exist_ok=True)
    failures: Counter[str] = Counter()
    with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
        for number, row in enumerate(rows):
            key = f"{shard:05d}{number:04d}"
            content = content_of(1000 * shard + number, row)
            if content is None:
                failures[row.status] += 1
                continue
            fields = {"url": row.url, "caption": row.caption, "key": key, "status": "success", "error_message": None}
            fields |= {"width": None, "height": None, "exif": "{}", "sha256": "0" * 64}
            for suffix, value in (("jpg", content), ("json", json.dumps(fields, indent=4)), ("txt", row.caption)):
                data = value.encode() if isinstance(value, str) else value
                member = tarfile.TarInfo(f"{key}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    successes = len(rows) - failures.total()
    stats = {
        "count": len(rows),
        "successes": successes,
        "failed_to_download": failures.total(),
        "failed_to_resize": 0,
        "duration": 1.5,
        "start_time": 1.0,
        "end_time": 2.5,
        "status_dict": {"success": successes, **failures},
    }
    put(folder / f"{shard:05d}.parquet", b"PAR1, which is not read")
    if has_stats:
        put(folder / f"{shard:05d}_stats.json", json.dumps(stats, indent=4))
        return expected_of(rows, is_downloaded_here=True)
    return expected_of([row for row in rows if row.fate != "missing"])


def add(first: Expected, second: Expected) -> Expected:
    """Add the counts of two shards."""
    rejects = Counter(first.rejects) + Counter(second.rejects)
    return Expected(
        rows=first.rows + second.rows,
        images=first.images + second.images,
        captions=first.captions + second.captions,
        rejects=dict(rejects),
    )
