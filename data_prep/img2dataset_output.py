"""Reads the output of img2dataset: tars of images with their captions, and counts of the dead links.

    00000.tar          <key>.jpg, <key>.json (caption, url, key, ...) and <key>.txt (the caption) of each image
    00000_stats.json   how many rows the shard has, and how their downloads ended
    00000.parquet      a table of the same rows, which is not read
Images are not unpacked: a record holds the image's offset in its tar.
"""

from __future__ import annotations

import json
import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from bridgetower.errors import DataError
from bridgetower.io.storage import explain_read_errors
from bridgetower.shards.sample import safe_key
from data_prep.record import ImageFile, Record, Reject

_STATS_SUFFIX = "_stats.json"
_IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif")
_BLOCK_BYTES = 512  # fixed by the tar format
_MAX_TEXT_BYTES = 1 << 24  # the json of an image has some hundred bytes; with EXIF fields, some thousand
_SUCCESS = "success"
_HTTP_CODE = re.compile(r"HTTP Error (\d{3})")
# Parts of the messages of urllib and img2dataset, in lower case, and the reason under which they are counted. The first
# match decides.
_FAILURES = (
    (("timed out", "timeout"), "timeout"),
    (
        ("name or service not known", "name resolution", "no address associated", "getaddrinfo", "nodename"),
        "no such host",
    ),
    (("ssl", "certificate", "tls"), "TLS error"),
    (("x-robots-tag",), "forbidden by X-Robots-Tag"),
    (("incompleteread", "cut short"), "connection lost"),
    (("refused", "reset by peer", "remote end closed", "unreachable", "no route", "broken pipe"), "no connection"),
    (
        ("unknown url type", "no host given", "control characters", "nonnumeric port", "invalid url", "codec can't"),
        "not a URL",
    ),
    (("image decoding error", "cannot identify image"), "not an image"),
    (("image too small", "area too large", "aspect ratio"), "size refused"),
    (("hash mismatch",), "hash mismatch"),
)


def classify_failure(status: str) -> str:
    """Name the reason of a failed download: messages differ by the ten thousand, reasons are few."""
    code = _HTTP_CODE.search(status)
    if code is not None:
        return f"HTTP {code[1]}"
    text = status.casefold()
    return next((reason for phrases, reason in _FAILURES if any(phrase in text for phrase in phrases)), "other")


@dataclass(frozen=True, kw_only=True)
class Downloads:
    """How the downloads of a list of URLs ended."""

    rows: int = 0
    images: int = 0
    """Number of images that were downloaded."""
    failures: Counter[str] = field(default_factory=Counter)
    """Number of rows without an image, by reason."""

    def __add__(self, other: Downloads) -> Downloads:
        return Downloads(
            rows=self.rows + other.rows,
            images=self.images + other.images,
            failures=self.failures + other.failures,
        )


def read_stats(file: Path) -> Downloads:
    """Read the counts of a *_stats.json.

    Raises:
        DataError: the file is not one of img2dataset's.
    """
    with explain_read_errors(file):
        raw = file.read_bytes()
    try:
        stats = json.loads(raw)
        statuses = {str(status): int(count) for status, count in stats["status_dict"].items()}
        rows, images = int(stats["count"]), int(stats["successes"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{file} is not a statistics file of img2dataset ({type(error).__name__}: {error}). Copy it again, or "
            "delete it together with its tar and run img2dataset again."
        ) from error
    failures: Counter[str] = Counter()
    for status, count in statuses.items():
        if status != _SUCCESS:
            failures[classify_failure(status)] += count
    unknown = rows - images - failures.total()  # img2dataset drops the rarest messages when there are too many
    if unknown > 0:
        failures["other"] += unknown
    return Downloads(rows=rows, images=images, failures=failures)


def sum_stats(folder: Path) -> Downloads:
    """Add up the counts of all shards in a folder.

    Raises:
        DataError: one of the files is not img2dataset's.
    """
    with explain_read_errors(folder):
        files = sorted(folder.glob(f"*{_STATS_SUFFIX}"), key=lambda file: file.name)
    return sum((read_stats(file) for file in files), Downloads())


def read_downloaded_records(folder: Path, split: str) -> Iterator[Record | Reject]:
    """Yield one record per image in the tars of a folder, and the rows whose download failed.

    Raises:
        DataError: a tar was cut short or is missing, or does not match the statistics beside it.
    """
    with explain_read_errors(folder):
        tars = sorted(folder.glob("*.tar"), key=lambda file: file.name)
        with_stats = {file.name.removesuffix(_STATS_SUFFIX) for file in folder.glob(f"*{_STATS_SUFFIX}")}
    for name in sorted(with_stats - {tar.stem for tar in tars}):
        raise DataError(
            f"{folder} has {name}{_STATS_SUFFIX}, but not {name}.tar. Copy the tar, or delete the file and run "
            "img2dataset again: it downloads that shard once more."
        )
    for tar in tars:
        num_entries = 0
        for entry in _read_tar(tar, split):
            num_entries += 1
            yield entry
        if tar.stem in with_stats:
            yield from _read_failures(tar, num_entries, split)


def _read_failures(tar: Path, num_entries: int, split: str) -> Iterator[Reject]:
    """Yield the rows of a shard that are not among the entries of its tar."""
    file = tar.with_name(f"{tar.stem}{_STATS_SUFFIX}")
    stats = read_stats(file)
    if num_entries > stats.rows - stats.failures.total():
        raise DataError(
            f"{tar} holds {num_entries:,} images, but {file.name} counts {stats.images:,}: they are from different "
            "runs. Delete both and run img2dataset again."
        )
    for reason, rows in sorted(stats.failures.items()):
        yield Reject(reason=f"download failed: {reason}", rows=rows, split=split)
    num_lost = stats.rows - stats.failures.total() - num_entries
    if num_lost:
        yield Reject(reason="download failed: not in its tar", rows=num_lost, split=split)


@dataclass
class _TarSample:
    """The members of a tar that share a key."""

    key: str
    image: ImageFile | None = None
    json: dict[str, Any] | None = None
    text: str | None = None


def _read_tar(path: Path, split: str) -> Iterator[Record | Reject]:
    for sample in _read_samples(path):
        if sample.image is None:
            yield Reject(reason="no picture in its tar", split=split)
            continue
        fields = sample.json or {}
        caption = fields.get("caption")
        if not isinstance(caption, str):
            caption = sample.text or ""
        url = fields.get("url")
        yield Record(
            key=safe_key(sample.key),
            image=sample.image,
            image_id="",
            captions=(caption,),
            split=split,
            meta={"url": url} if isinstance(url, str) and url else {},
        )


def _read_samples(path: Path) -> Iterator[_TarSample]:
    """Yield the samples of a tar in their order. Only headers and texts are read, no image."""
    current: _TarSample | None = None
    with explain_read_errors(path), path.open("rb") as stream:
        for header, tar in _read_headers(path, stream):
            folder, _, name = header.name.rpartition("/")
            stem, _, suffix = name.partition(".")
            key = f"{folder}/{stem}" if folder else stem
            if not header.isreg() or not stem:
                continue
            if current is None or current.key != key:
                if current is not None:
                    yield current
                current = _TarSample(key)
            suffix = suffix.lower()
            if suffix in _IMAGE_SUFFIXES:
                current.image = ImageFile(path=path, offset=header.offset_data, num_bytes=header.size)
            elif suffix == "json":
                current.json = _parse_json(path, header, _read_content(path, tar, header))
            elif suffix == "txt":
                current.text = _read_content(path, tar, header).decode("utf-8", "replace")
        if current is not None:
            yield current


def _read_headers(path: Path, stream: IO[bytes]) -> Iterator[tuple[tarfile.TarInfo, tarfile.TarFile]]:
    try:
        with tarfile.open(fileobj=stream, mode="r:") as tar:
            while (header := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # tarfile would keep every header in memory
                yield header, tar
            # tarfile ends in silence at the end of a file that was cut, and at a damaged header. Only a block of zeros
            # is the end of the archive.
            stream.seek(tar.offset)
            ending = stream.read(_BLOCK_BYTES)
    except (tarfile.TarError, EOFError) as error:
        raise _make_damage_error(path, str(error)) from error
    if ending != bytes(_BLOCK_BYTES):
        raise _make_damage_error(path, "it does not end as a tar does")


def _read_content(path: Path, tar: tarfile.TarFile, header: tarfile.TarInfo) -> bytes:
    if header.size > _MAX_TEXT_BYTES:
        raise DataError(
            f"{path}: its member {header.name} has {header.size:,} bytes, too many for a caption. Download that shard "
            "again."
        )
    file = tar.extractfile(header)
    assert file is not None, header.name
    try:
        return file.read()
    except tarfile.TarError as error:
        raise _make_damage_error(path, f"{header.name}: {error}") from error


def _parse_json(path: Path, header: tarfile.TarInfo, content: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(content)
    except ValueError as error:
        raise DataError(
            f"{path}: its member {header.name} is not JSON ({error}). Download that shard again."
        ) from error
    if not isinstance(fields, dict):
        raise DataError(f"{path}: its member {header.name} is not a JSON object. Download that shard again.")
    return fields


def _make_damage_error(path: Path, problem: str) -> DataError:
    return DataError(
        f"{path} is damaged or was cut short ({problem}). Delete it and {path.stem}{_STATS_SUFFIX}, and run "
        "img2dataset again: it downloads that shard once more."
    )
