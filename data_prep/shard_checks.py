"""Checks one shard: its name, checksum, members, row index, json and images."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from bridgetower import rng
from bridgetower.errors import DataError
from bridgetower.io.files import sha256_of
from bridgetower.rng import hash64
from bridgetower.shards.decode import decode_image
from bridgetower.shards.index import Index, index_path, iterate_samples, load_index, scan_tar
from bridgetower.shards.manifest import ShardEntry
from bridgetower.shards.sample import IMAGE_SUFFIXES, clean_caption, parse_record
from data_prep.exclusion import is_distinctive
from data_prep.index_shards import scan_foreign_tar
from data_prep.local import copy_locally

_SHARD_NAME = re.compile(r"[A-Za-z0-9_-]+\.tar")
_PHASH = re.compile(r"[0-9a-f]{16}")

U64 = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with a corpus."""

    where: str
    what: str
    bad_shard: str = ""
    """Name of the shard that --repair moves away because of it; empty if the shard can stay."""


@dataclass(frozen=True)
class ForeignTars:
    """How index_shards.py indexed tars that another tool wrote."""

    decode: bool
    """True if it left out the images that cannot be decoded."""


def no_hashes() -> U64:
    """Return an empty array of 64-bit hashes."""
    return np.empty(0, np.uint64)


@dataclass(frozen=True, kw_only=True)
class CheckedShard:
    """What one shard holds, and what is wrong with it."""

    name: str
    findings: tuple[Finding, ...]
    entry: ShardEntry | None = None
    """Line of the manifest that the shard should have; None if the shard cannot be read."""
    keys: U64 = field(default_factory=no_hashes)
    """64-bit hashes of the sample keys, in the order of the tar."""
    image_ids: U64 = field(default_factory=no_hashes)
    """64-bit hashes of the image ids, sorted, without repeats."""
    phashes: U64 = field(default_factory=no_hashes)
    """Perceptual hashes that can be compared, sorted, without repeats."""
    words: int = 0
    has_index: bool = True
    """False if its row index is missing or differs from what the tar holds."""


def check_shard(shard: Path, entry: ShardEntry | None, to_decode: int, foreign: ForeignTars | None) -> CheckedShard:
    """Check everything about one shard; runs in a worker process.

    Args:
        entry: the shard's line in the manifest, None if it has none.
        to_decode: number of images to decode, drawn at random; -1: all.
        foreign: None for shards of build_shards.py.
    """
    name = shard.name
    findings: list[Finding] = []

    def report(what: str, *, is_fatal: bool = False) -> None:
        findings.append(Finding(name, what, name if is_fatal else ""))

    if not _SHARD_NAME.fullmatch(name):
        report("has a name with characters other than letters, digits, _ and - before .tar")
    try:
        with copy_locally(shard) as local:
            index = make_true_index(shard, local, foreign)
            samples = _read_samples(local, name, index, to_decode, is_foreign=foreign is not None)
            size, digest = local.stat().st_size, sha256_of(local)
    except (DataError, OSError) as error:
        report(str(error), is_fatal=True)
        return CheckedShard(name=name, findings=tuple(findings))
    findings += samples.findings
    actual = ShardEntry(
        name=name, samples=len(index), pairs=int(index["num_captions"].sum()), bytes=size, sha256=digest
    )
    if entry is not None:
        if (entry.bytes, entry.sha256) != (actual.bytes, actual.sha256):
            report(
                f"has the SHA-256 {digest[:12]}... and {size:,} bytes, which the manifest does not list", is_fatal=True
            )
        elif entry != actual:
            report(
                f"holds {actual.samples} samples and {actual.pairs} captions; the manifest lists {entry.samples} and "
                f"{entry.pairs}"
            )
    has_index = True
    try:
        if load_index(shard).tobytes() != index.tobytes():
            has_index = False
            report(f"has a row index {index_path(shard).name} that does not match the tar")
    except DataError as error:
        has_index = False
        report(str(error))
    return CheckedShard(
        name=name,
        findings=tuple(findings),
        entry=actual,
        keys=samples.keys,
        image_ids=samples.image_ids,
        phashes=samples.phashes,
        words=samples.words,
        has_index=has_index,
    )


def make_true_index(shard: Path, local: Path, foreign: ForeignTars | None) -> Index:
    """Compute the row index that a shard should have, checking the members and json of every sample on the way.

    Args:
        local: the shard itself, or its local copy.
        foreign: None for shards of build_shards.py.

    Raises:
        DataError: the shard is damaged.
    """
    if foreign is None:
        return scan_tar(local, shard.name)
    try:
        known = load_index(shard)
    except DataError:
        known = None
    if known is not None:
        # Decoding every image again would take hours: an index that fits the tar is believed about which ones failed.
        every, _ = scan_foreign_tar(local, shard.name, decode=False)
        kept = every[np.isin(every["image_offset"], known["image_offset"])]
        kept["first_pair"] = np.cumsum(kept["num_captions"], dtype=np.int64) - kept["num_captions"]
        if kept.tobytes() == known.tobytes():
            return known
    return scan_foreign_tar(local, shard.name, decode=foreign.decode)[0]


class _Samples(NamedTuple):
    """What the samples of a shard are, as CheckedShard has it."""

    keys: U64
    image_ids: U64
    phashes: U64
    words: int
    findings: list[Finding]


def _read_samples(local: Path, name: str, index: Index, to_decode: int, *, is_foreign: bool) -> _Samples:
    """Read and check the samples that the index lists."""
    indexed = set(index["image_offset"].tolist())
    chosen = set(range(len(index)))
    if 0 <= to_decode < len(index):
        chosen = set(rng.shuffled(rng.key(name), len(index))[:to_decode].tolist())
    keys: list[int] = []
    image_ids: list[int] = []
    phashes: list[int] = []
    words = 0
    findings: list[Finding] = []
    with local.open("rb") as file:
        samples = (
            (key, members)
            for key, members in iterate_samples(local, name)
            if any(member.offset_data in indexed for member in members.values())
        )
        for number, (key, members) in enumerate(samples):
            where = f"{name}:{key}"
            content = {}
            for suffix, member in members.items():
                if suffix in ("json", "txt") or number in chosen:
                    file.seek(member.offset_data)
                    content[suffix] = file.read(member.size)
            record = parse_record(content["json"], where)
            keys.append(hash64(key))
            image_ids.append(hash64(record["image_id"]))
            words += sum(len(caption.split()) for caption in record["captions"])
            problems = _check_record(record, content.get("txt"), is_foreign=is_foreign)
            findings.extend(Finding(where, problem, name) for problem in problems)
            phash = record.get("phash")
            if isinstance(phash, str) and _PHASH.fullmatch(phash) and is_distinctive(int(phash, 16)):
                phashes.append(int(phash, 16))
            if number in chosen:
                problems = _check_images(record, content, where, is_foreign=is_foreign)
                findings.extend(Finding(where, problem, name) for problem in problems)
    return _Samples(
        keys=np.array(keys, np.uint64),
        image_ids=np.unique(np.array(image_ids, np.uint64)),
        phashes=np.unique(np.array(phashes, np.uint64)),
        words=words,
        findings=findings,
    )


def _check_record(record: dict[str, Any], text: bytes | None, *, is_foreign: bool) -> Iterator[str]:
    """Yield what is wrong with the json of a sample, beyond the fields that parse_record checks."""
    if text is not None and clean_caption(text.decode(errors="replace")) != record["captions"][0]:
        yield "has a txt that is not its first caption"
    if is_foreign:  # other tools write no more fields than those
        return
    if not isinstance(record.get("source"), str):
        yield f"has source={record.get('source')!r} in its json"
    for side in ("width", "height"):
        if not isinstance(record.get(side), int) or record[side] < 1:
            yield f"has {side}={record.get(side)!r} in its json"
    annotations = record.get("annotations", [])
    if annotations and (not isinstance(annotations, list) or len(annotations) != len(record["captions"])):
        yield "does not have one annotation per caption"


def _check_images(record: dict[str, Any], content: dict[str, bytes], where: str, *, is_foreign: bool) -> Iterator[str]:
    """Yield what is wrong with the images of a sample."""
    for suffix, raw in content.items():
        if suffix.rpartition(".")[2] not in IMAGE_SUFFIXES:
            continue
        try:
            image = decode_image(raw, where)
        except DataError as error:
            yield str(error)
            continue
        is_first = suffix in IMAGE_SUFFIXES and not is_foreign
        if is_first and image.size != (record.get("width"), record.get("height")):
            yield (
                f"has an image of {image.width} x {image.height} pixels, but its json says {record.get('width')} x "
                f"{record.get('height')}"
            )
