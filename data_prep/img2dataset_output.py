"""Reads what img2dataset leaves in a folder: tars of pictures with their captions, and a count of the dead links.

    00000.tar          <key>.jpg, <key>.json (caption, url, key, ...) and <key>.txt (the caption) of each picture
    00000_stats.json   how many rows it had, and what became of them
    00000.parquet      a table of the same rows, which is not read
Pictures are not unpacked: a record says where in its tar the picture lies.
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
_PICTURE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif")
_BLOCK_BYTES = 512  # of the tar format
_MAX_TEXT_BYTES = 1 << 24  # a caption with its facts has some hundred, with a camera's notes some thousand
_DONE = "success"
_HTTP_CODE = re.compile(r"HTTP Error (\d{3})")
# What urllib says, in small letters -> what is told to people. The first that fits counts.
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


def download_failure(status: str) -> str:
    """What went wrong with a download in a word or two: there are tens of thousands of messages, but few reasons."""
    code = _HTTP_CODE.search(status)
    if code is not None:
        return f"HTTP {code[1]}"
    text = status.casefold()
    return next((reason for signs, reason in _FAILURES if any(sign in text for sign in signs)), "other")


@dataclass(frozen=True, kw_only=True)
class Downloads:
    """How the rows of a list of URLs ended."""

    rows: int = 0
    pictures: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    """Rows without a picture, by reason."""

    def __add__(self, other: Downloads) -> Downloads:
        return Downloads(
            rows=self.rows + other.rows,
            pictures=self.pictures + other.pictures,
            failures=self.failures + other.failures,
        )


def read_stats(file: Path) -> Downloads:
    """What a *_stats.json says.

    Raises:
        DataError: it is not such a file.
    """
    with explain_read_errors(file):
        raw = file.read_bytes()
    try:
        stats = json.loads(raw)
        statuses = {str(status): int(count) for status, count in stats["status_dict"].items()}
        rows, pictures = int(stats["count"]), int(stats["successes"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{file} is not a statistics file of img2dataset ({type(error).__name__}: {error}). Copy it again, or "
            "delete it together with its tar and run img2dataset again."
        ) from error
    failures: Counter[str] = Counter()
    for status, count in statuses.items():
        if status != _DONE:
            failures[download_failure(status)] += count
    unknown = rows - pictures - failures.total()  # img2dataset forgets messages when there are too many
    if unknown > 0:
        failures["other"] += unknown
    return Downloads(rows=rows, pictures=pictures, failures=failures)


def all_stats(folder: Path) -> Downloads:
    """The sum over a folder.

    Raises:
        DataError: one of the files is not as img2dataset writes it.
    """
    with explain_read_errors(folder):
        files = sorted(folder.glob(f"*{_STATS_SUFFIX}"), key=lambda file: file.name)
    return sum((read_stats(file) for file in files), Downloads())


def downloaded_records(folder: Path, split: str) -> Iterator[Record | Reject]:
    """A record per picture in the tars of a folder, and the rows whose download failed.

    Raises:
        DataError: a tar was cut short or is missing, or does not belong to the statistics beside it.
    """
    with explain_read_errors(folder):
        tars = sorted(folder.glob("*.tar"), key=lambda file: file.name)
        counted = {file.name.removesuffix(_STATS_SUFFIX) for file in folder.glob(f"*{_STATS_SUFFIX}")}
    for name in sorted(counted - {tar.stem for tar in tars}):
        raise DataError(
            f"{folder} has {name}{_STATS_SUFFIX}, but not {name}.tar. Copy the tar, or delete the file and run "
            "img2dataset again: it downloads that shard once more."
        )
    for tar in tars:
        found = 0
        for record in _tar_records(tar, split):
            found += 1
            yield record
        if tar.stem in counted:
            yield from _failures(tar, found, split)


def _failures(tar: Path, found: int, split: str) -> Iterator[Reject]:
    """The rows of a shard that are not in its tar."""
    file = tar.with_name(f"{tar.stem}{_STATS_SUFFIX}")
    stats = read_stats(file)
    if found > stats.rows - stats.failures.total():
        raise DataError(
            f"{tar} holds {found:,} pictures, but {file.name} counts {stats.pictures:,}: they are not of the same run. "
            "Delete both and run img2dataset again."
        )
    for reason, rows in sorted(stats.failures.items()):
        yield Reject(reason=f"download failed: {reason}", rows=rows, split=split)
    lost = stats.rows - stats.failures.total() - found
    if lost:
        yield Reject(reason="download failed: not in its tar", rows=lost, split=split)


@dataclass
class _Member:
    """The parts of a picture that its tar holds."""

    key: str
    image: ImageFile | None = None
    facts: dict[str, Any] | None = None
    text: str | None = None


def _tar_records(path: Path, split: str) -> Iterator[Record | Reject]:
    for member in _members(path):
        if member.image is None:
            yield Reject(reason="no picture in its tar", split=split)
            continue
        facts = member.facts or {}
        caption = facts.get("caption")
        if not isinstance(caption, str):
            caption = member.text or ""
        url = facts.get("url")
        yield Record(
            key=safe_key(member.key),
            image=member.image,
            image_id="",
            captions=(caption,),
            split=split,
            meta={"url": url} if isinstance(url, str) and url else {},
        )


def _members(path: Path) -> Iterator[_Member]:
    """What belongs to each key, in the order of the tar. Only headers and texts are read."""
    current: _Member | None = None
    with explain_read_errors(path), path.open("rb") as stream:
        for header, tar in _headers(path, stream):
            folder, _, name = header.name.rpartition("/")
            stem, _, suffix = name.partition(".")
            key = f"{folder}/{stem}" if folder else stem
            if not header.isreg() or not stem:
                continue
            if current is None or current.key != key:
                if current is not None:
                    yield current
                current = _Member(key)
            suffix = suffix.lower()
            if suffix in _PICTURE_SUFFIXES:
                current.image = ImageFile(path=path, offset=header.offset_data, num_bytes=header.size)
            elif suffix == "json":
                current.facts = _facts(path, header, _content(path, tar, header))
            elif suffix == "txt":
                current.text = _content(path, tar, header).decode("utf-8", "replace")
        if current is not None:
            yield current


def _headers(path: Path, stream: IO[bytes]) -> Iterator[tuple[tarfile.TarInfo, tarfile.TarFile]]:
    try:
        with tarfile.open(fileobj=stream, mode="r:") as tar:
            while (header := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # it would keep them all
                yield header, tar
            # tarfile takes the end of the file for the end of the archive, and a damaged header, too.
            stream.seek(tar.offset)
            ending = stream.read(_BLOCK_BYTES)
    except (tarfile.TarError, EOFError) as error:
        raise _cut_short(path, str(error)) from error
    if ending != bytes(_BLOCK_BYTES):
        raise _cut_short(path, "it does not end as a tar does")


def _content(path: Path, tar: tarfile.TarFile, header: tarfile.TarInfo) -> bytes:
    if header.size > _MAX_TEXT_BYTES:
        raise DataError(f"{path}: its {header.name} has {header.size:,} bytes, too many for a caption.")
    file = tar.extractfile(header)
    assert file is not None, header.name
    try:
        return file.read()
    except tarfile.TarError as error:
        raise _cut_short(path, f"{header.name}: {error}") from error


def _facts(path: Path, header: tarfile.TarInfo, content: bytes) -> dict[str, Any]:
    try:
        facts = json.loads(content)
    except ValueError as error:
        raise DataError(
            f"{path}: its member {header.name} is not JSON ({error}). Download that shard again."
        ) from error
    if not isinstance(facts, dict):
        raise DataError(f"{path}: its {header.name} is not a JSON object. Download that shard again.")
    return facts


def _cut_short(path: Path, problem: str) -> DataError:
    return DataError(
        f"{path} is damaged or was cut short ({problem}). Delete it and {path.stem}{_STATS_SUFFIX}, and run "
        "img2dataset again: it downloads that shard once more."
    )
