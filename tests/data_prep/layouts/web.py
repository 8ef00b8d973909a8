"""Rows of a corpus from the web, written in each of the three layouts in which people keep them."""

from __future__ import annotations

import io
import json
import tarfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.data_prep.layouts import Expected, picture, put

LAYOUTS = ("bridgetower", "vilt", "img2dataset")
_KINDS = {"jpg": "JPEG", "jpeg": "JPEG", "png": "PNG", "gif": "GIF", "webp": "WEBP", "": "JPEG"}
_FATES = {
    "missing": "image file missing",
    "truncated": "image cannot be decoded",
    "empty": "image file empty",
}


@dataclass(frozen=True)
class Row:
    """A caption with its URL, and what became of the download."""

    caption: str
    url: str
    fate: str = "jpg"
    """Extension of the picture; or missing, truncated or empty."""
    status: str = "HTTP Error 404: Not Found"
    """What img2dataset said, if it is missing."""
    reason: str = "HTTP 404"

    @property
    def suffix(self) -> str:
        fate = "jpg" if self.fate in _FATES else self.fate
        return f".{fate}" if fate else ""


def content_of(number: int, row: Row) -> bytes | None:
    """The bytes of the picture file, if there is one."""
    if row.fate == "missing":
        return None
    if row.fate == "empty":
        return b""
    content = picture(number, kind=_KINDS.get(row.fate, "JPEG"))
    return content[: len(content) // 2] if row.fate == "truncated" else content


def expected_of(rows: Sequence[Row], *, is_downloaded_here: bool = False, repeats: int = 0) -> Expected:
    """What a build gives.

    Args:
        is_downloaded_here: img2dataset says why a picture is missing.
        repeats: further rows of the same picture with the same text.
    """
    fates: Counter[str] = Counter({"repeated caption": repeats} if repeats else {})
    for row in rows:
        if row.fate == "missing" and is_downloaded_here:
            fates[f"download failed: {row.reason}"] += 1
        elif not row.caption.strip():
            fates["empty caption"] += 1
        elif row.fate in _FATES:
            fates[_FATES[row.fate]] += 1
    good = len(rows) + repeats - fates.total()
    return Expected(rows=len(rows) + repeats, images=good, captions=good, rejects=dict(fates))


def write_pictures(folder: Path, rows: Sequence[Row]) -> None:
    """BridgeTower's picture files of CC3M and CC12M: named by their row."""
    folder.mkdir(parents=True)
    for number, row in enumerate(rows):
        content = content_of(number, row)
        if content is not None:
            put(folder / f"{number}{row.suffix}", content)


def write_vilt(folder: Path, pictures: str, list_file: str, rows: Sequence[Row]) -> Expected:
    """ViLT's layout; the last row stands in the list twice."""
    entries = []
    for number, row in enumerate(rows):
        name = f"{1000 * number:07d}"
        content = content_of(number, row)
        if content is not None:
            put(folder / pictures / name[:4] / name, content)
        entries.append([f"/data/somebody/gcc/{pictures}/{name[:4]}/{name}", row.caption])
    assert rows[-1].caption and rows[-1].fate not in _FATES
    put(folder / list_file, json.dumps([*entries, entries[-1]]))
    return expected_of(rows, repeats=1)


def write_tar(folder: Path, shard: int, rows: Sequence[Row], *, has_stats: bool = True) -> Expected:
    """A shard as img2dataset 1.47 writes it, with originals kept and sha256."""
    folder.mkdir(parents=True, exist_ok=True)
    failures: Counter[str] = Counter()
    with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
        for number, row in enumerate(rows):
            key = f"{shard:05d}{number:04d}"
            content = content_of(1000 * shard + number, row)
            if content is None:
                failures[row.status] += 1
                continue
            facts = {"url": row.url, "caption": row.caption, "key": key, "status": "success", "error_message": None}
            facts |= {"width": None, "height": None, "exif": "{}", "sha256": "0" * 64}
            for suffix, part in (("jpg", content), ("json", json.dumps(facts, indent=4)), ("txt", row.caption)):
                data = part.encode() if isinstance(part, str) else part
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
    """Two shards of one split."""
    rejects = Counter(first.rejects) + Counter(second.rejects)
    return Expected(
        rows=first.rows + second.rows,
        images=first.images + second.images,
        captions=first.captions + second.captions,
        rejects=dict(rejects),
    )
