"""Checks finished shards: names, checksums, counts, members, json, pictures, and duplicates between corpora.

python data_prep/check_shards.py DIR [DIR ...] [--decode=all|none|N] [--duplicates=error|report] [--repair]

Ends with 2 and a list of what is wrong. ``--repair`` writes indexes and manifests anew, moves shards that cannot be
trusted into DIR/quarantine, and checks again; running build_shards.py again then makes what is missing.

Of tars of others that index_shards.py has indexed, the samples in the index are checked: it has left out the others.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fire
import numpy as np
import numpy.typing as npt
from fire.decorators import SetParseFn
from rich.console import Console

from bridgetower import rng
from bridgetower.config.cli import parse_bool, parse_whole, refuse_unknown, run_command
from bridgetower.errors import EXIT_USAGE, ConfigError, DataError
from bridgetower.io.files import claim_folder, sha256_of
from bridgetower.io.storage import explain_read_errors, is_remote, publish_bytes
from bridgetower.rng import hash64
from bridgetower.shards.decode import decode_image
from bridgetower.shards.index import Index, encode_index, index_path, iterate_samples, load_index, scan_tar
from bridgetower.shards.manifest import FORMAT_VERSION, MANIFEST_NAME, Manifest, ShardEntry, Totals, write_manifest
from bridgetower.shards.sample import IMAGE_SUFFIXES, clean_caption, parse_record
from data_prep.build import num_cores
from data_prep.exclusion import is_telling
from data_prep.index_shards import INDEXED, scan_foreign
from data_prep.local import each_shard, local_copy, shard_folder
from data_prep.shard_writer import STATE_FOLDER, writing

_FLAGS = {
    "decode": "pictures to decode in each shard: all, none, or a number of random ones (default 100)",
    "duplicates": "pictures that several of the corpora hold: error, or report (default error)",
    "repair": "write indexes and manifests anew, and move bad shards to DIR/quarantine",
    "workers": "processes (default: all cores)",
}
_USAGE = "Usage: python data_prep/check_shards.py DIR [DIR ...] [flags]\n\nFlags:\n" + "\n".join(
    f"  --{name}  {meaning}" for name, meaning in _FLAGS.items()
)
_QUARANTINE = "quarantine"
_SHARD_NAME = re.compile(r"[A-Za-z0-9_-]+\.tar")
_MAX_SHOWN = 50


@dataclass(frozen=True)
class _Finding:
    """What is wrong with a corpus."""

    where: str
    what: str
    bad_shard: str = ""
    """The shard that has to go for it."""


_U64 = npt.NDArray[np.uint64]


def _none() -> _U64:
    return np.empty(0, np.uint64)


@dataclass(frozen=True, kw_only=True)
class _Shard:
    """What one shard holds, and what is wrong with it."""

    name: str
    findings: tuple[_Finding, ...]
    entry: ShardEntry | None = None
    """None: it cannot be read."""
    keys: _U64 = field(default_factory=_none)
    """64-bit hashes, as of the image ids."""
    image_ids: _U64 = field(default_factory=_none)
    phashes: _U64 = field(default_factory=_none)
    words: int = 0
    has_index: bool = True


@dataclass(frozen=True)
class _Foreign:
    """How index_shards.py has indexed the tars of others."""

    decode: bool


@dataclass(kw_only=True)
class _Corpus:
    """A folder with what was found in it."""

    folder: Path
    manifest: Manifest | None
    foreign: _Foreign | None = None
    """Its tars are those of others."""
    shards: list[_Shard] = field(default_factory=list)
    findings: list[_Finding] = field(default_factory=list)


def main(
    *folders: str,
    decode: str = "100",
    duplicates: str = "error",
    repair: str = "false",
    workers: str = "",
    **unknown: str,
) -> None:
    """Check the shards of folders."""
    refuse_unknown((), unknown, list(_FLAGS), _USAGE)
    places = [shard_folder(folder, _USAGE) for folder in folders or [""]]
    if duplicates not in ("error", "report"):
        raise ConfigError(f"--duplicates={duplicates} is neither error nor report.")
    to_decode = {"all": -1, "none": 0}.get(decode)
    if to_decode is None:
        to_decode = parse_whole("decode", decode, 0)
    num_workers = parse_whole("workers", workers or str(num_cores()), 1)
    corpora = [_check_corpus(place, to_decode, num_workers) for place in places]
    shared = list(_duplicates(corpora))
    console = Console(highlight=False, soft_wrap=True)
    _report(console, corpora, shared)
    broken = [corpus for corpus in corpora if corpus.findings]
    if parse_bool("repair", repair) and broken:
        for corpus in broken:
            console.print(_repair(corpus), markup=False)
        broken = [_check_corpus(corpus.folder, to_decode, num_workers) for corpus in broken]
        console.print("After that:")
        _report(console, broken, [])
        broken = [corpus for corpus in broken if corpus.findings]
    if broken or (shared and duplicates == "error"):
        sys.exit(EXIT_USAGE)


def _report(console: Console, corpora: Sequence[_Corpus], shared: Sequence[_Finding]) -> None:
    for corpus in corpora:
        good = [shard.entry for shard in corpus.shards if shard.entry is not None]
        console.print(
            f"{corpus.folder}: {len(good):,} shards, {sum(one.samples for one in good):,} images, "
            f"{sum(one.pairs for one in good):,} captions: {len(corpus.findings) or 'nothing'} wrong",
            markup=False,
        )
    for finding in shared:
        console.print(f"{finding.where}: {finding.what}", markup=False)
    findings = [finding for corpus in corpora for finding in corpus.findings]
    for finding in findings[:_MAX_SHOWN]:
        console.print(f"  {finding.where}: {finding.what}", markup=False)
    if len(findings) > _MAX_SHOWN:
        console.print(f"  ... and {len(findings) - _MAX_SHOWN:,} more")


def _check_corpus(folder: Path, to_decode: int, workers: int) -> _Corpus:
    manifest, findings = _read_manifest(folder)
    foreign = None
    if manifest is not None and INDEXED in manifest.settings:
        foreign = _Foreign(decode=bool(manifest.settings.get("decode")))
    corpus = _Corpus(folder=folder, manifest=manifest, foreign=foreign, findings=findings)
    with explain_read_errors(folder):
        there = {path.name for path in folder.glob("*.tar")}
        leftovers = sorted(path.name for path in folder.glob(".*.tmp"))
    listed = {entry.name: entry for entry in manifest.shards} if manifest else {}
    for name in sorted(there - listed.keys()):
        if manifest is not None:
            findings.append(_Finding(name, "is not in the manifest", name))
    for name in sorted(listed.keys() - there):
        findings.append(_Finding(name, "is in the manifest but not there"))
    for name in leftovers:
        findings.append(_Finding(name, "is what an interrupted build left behind"))
    calls = [(folder / name, listed.get(name), to_decode, foreign) for name in sorted(there)]
    corpus.shards = each_shard(f"checking {folder}", _check_shard, calls, workers)
    for shard in corpus.shards:
        findings.extend(shard.findings)
    findings.extend(_repeated_keys(corpus))
    if manifest is not None:
        findings.extend(_check_totals(manifest, corpus))
    return corpus


def _read_manifest(folder: Path) -> tuple[Manifest | None, list[_Finding]]:
    """The manifest without a look at the files that it lists."""
    path = folder / MANIFEST_NAME
    try:
        with explain_read_errors(path):
            content = json.loads(path.read_bytes())
        version = content.pop("format_version")
        if version != FORMAT_VERSION:
            return None, [
                _Finding(MANIFEST_NAME, f"has format_version {version!r}, this version reads {FORMAT_VERSION}")
            ]
        shards = tuple(ShardEntry(**shard) for shard in content["shards"])
        manifest = Manifest(**{**content, "totals": Totals(**content["totals"]), "shards": shards})
    except DataError as error:
        return None, [_Finding(MANIFEST_NAME, str(error))]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return None, [_Finding(MANIFEST_NAME, f"is damaged ({error})")]
    return manifest, []


def _check_shard(shard: Path, entry: ShardEntry | None, to_decode: int, foreign: _Foreign | None) -> _Shard:
    """Everything about one shard; runs in a worker."""
    name = shard.name
    findings: list[_Finding] = []

    def wrong(what: str, *, fatal: bool = False) -> None:
        findings.append(_Finding(name, what, name if fatal else ""))

    if not _SHARD_NAME.fullmatch(name):
        wrong("has a name that is not letters, digits, _ and - with .tar")
    try:
        with local_copy(shard) as local:
            index = _true_index(shard, local, foreign)
            found = _read_shard(local, name, index, to_decode, findings, is_foreign=foreign is not None)
            size, digest = local.stat().st_size, sha256_of(local)
    except (DataError, OSError) as error:
        wrong(str(error), fatal=True)
        return _Shard(name=name, findings=tuple(findings))
    own = ShardEntry(name=name, samples=len(index), pairs=int(index["num_captions"].sum()), bytes=size, sha256=digest)
    if entry is not None:
        if (entry.bytes, entry.sha256) != (own.bytes, own.sha256):
            wrong(f"has the SHA-256 {digest[:12]}... and {size:,} bytes, not those of the manifest", fatal=True)
        elif entry != own:
            wrong(f"holds {own.samples} samples and {own.pairs} captions; the manifest says otherwise")
    has_index = True
    try:
        if load_index(shard).tobytes() != index.tobytes():
            has_index = False
            wrong(f"has a row index {index_path(shard).name} of other content")
    except DataError as error:
        has_index = False
        wrong(str(error))
    return _Shard(name=name, findings=tuple(findings), entry=own, has_index=has_index, **found)


def _true_index(shard: Path, local: Path, foreign: _Foreign | None) -> Index:
    """The row index that a shard should have; checks members and json of every sample.

    Args:
        local: the shard itself, or its copy.

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
        # Which pictures cannot be decoded is not found out again.
        every, _ = scan_foreign(local, shard.name, decode=False)
        kept = every[np.isin(every["image_offset"], known["image_offset"])]
        kept["first_pair"] = np.cumsum(kept["num_captions"], dtype=np.int64) - kept["num_captions"]
        if kept.tobytes() == known.tobytes():
            return known
    return scan_foreign(local, shard.name, decode=foreign.decode)[0]


def _read_shard(
    local: Path, name: str, index: Index, to_decode: int, findings: list[_Finding], *, is_foreign: bool
) -> dict[str, Any]:
    """What the samples in the index are, and what is wrong with them."""
    indexed = set(index["image_offset"].tolist())
    chosen = set(range(len(index)))
    if 0 <= to_decode < len(index):
        chosen = set(rng.shuffled(rng.key(name), len(index))[:to_decode].tolist())
    keys: list[int] = []
    image_ids: list[int] = []
    phashes: list[int] = []
    words = 0
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
            wrong = _wrong_in_record(record, content.get("txt"), is_foreign=is_foreign)
            findings.extend(_Finding(where, what, name) for what in wrong)
            phash = record.get("phash")
            if isinstance(phash, str) and re.fullmatch("[0-9a-f]{16}", phash) and is_telling(int(phash, 16)):
                phashes.append(int(phash, 16))
            if number in chosen:
                findings.extend(_wrong_pictures(record, content, where, name, is_foreign=is_foreign))
    return {
        "keys": np.array(keys, np.uint64),
        "image_ids": np.unique(np.array(image_ids, np.uint64)),
        "phashes": np.unique(np.array(phashes, np.uint64)),
        "words": words,
    }


def _wrong_in_record(record: dict[str, Any], text: bytes | None, *, is_foreign: bool) -> Iterator[str]:
    """Where the json of a sample is not as documented, beyond what every reader needs."""
    if text is not None and clean_caption(text.decode(errors="replace")) != record["captions"][0]:
        yield "has a txt that is not its first caption"
    if is_foreign:  # it promises no more
        return
    if not isinstance(record.get("source"), str):
        yield f"has source={record.get('source')!r} in its json"
    for side in ("width", "height"):
        if not isinstance(record.get(side), int) or record[side] < 1:
            yield f"has {side}={record.get(side)!r} in its json"
    annotations = record.get("annotations", [])
    if annotations and (not isinstance(annotations, list) or len(annotations) != len(record["captions"])):
        yield "has not as many annotations as captions"


def _wrong_pictures(
    record: dict[str, Any], content: dict[str, bytes], where: str, name: str, *, is_foreign: bool
) -> Iterator[_Finding]:
    for suffix, raw in content.items():
        if suffix.rpartition(".")[2] not in IMAGE_SUFFIXES:
            continue
        try:
            picture = decode_image(raw, where)
        except DataError as error:
            yield _Finding(where, str(error), name)
            continue
        is_first = suffix in IMAGE_SUFFIXES and not is_foreign
        if is_first and picture.size != (record.get("width"), record.get("height")):
            yield _Finding(where, f"is {picture.width} x {picture.height} pixels, not what its json says", name)


def _repeated_keys(corpus: _Corpus) -> Iterator[_Finding]:
    keys = [shard.keys for shard in corpus.shards]
    found, counts = np.unique(np.concatenate([_none(), *keys]), return_counts=True)
    repeated = found[counts > 1]
    for shard in corpus.shards if len(repeated) else ():
        shared = int(np.isin(shard.keys, repeated).sum())
        if shared:
            yield _Finding(shard.name, f"has {shared} keys that other shards have, too")


def _check_totals(manifest: Manifest, corpus: _Corpus) -> Iterator[_Finding]:
    entries = [shard.entry for shard in corpus.shards if shard.entry is not None]
    if len(entries) < len(manifest.shards):
        return  # said already
    totals = manifest.totals
    found = {
        "images": (totals.images, sum(entry.samples for entry in entries)),
        "captions": (totals.captions, sum(entry.pairs for entry in entries)),
        "bytes": (totals.bytes, sum(entry.bytes for entry in entries)),
        "rows": (totals.rows, totals.captions + sum(totals.rejects.values())),
        "images_in": (totals.images_in, totals.images + sum(totals.image_rejects.values())),
    }
    for name, (says, are) in found.items():
        if says != are:
            yield _Finding(MANIFEST_NAME, f"says {name}={says:,}, but there are {are:,}")


def _duplicates(corpora: Sequence[_Corpus]) -> Iterator[_Finding]:
    """Pictures that two corpora share, by id and by look."""
    for number, one in enumerate(corpora):
        for other in corpora[number + 1 :]:
            for kind, what in (("image_ids", "with the same image id"), ("phashes", "that look the same")):
                ours, theirs = (
                    np.unique(np.concatenate([_none(), *(getattr(shard, kind) for shard in corpus.shards)]))
                    for corpus in (one, other)
                )
                shared = len(np.intersect1d(ours, theirs, assume_unique=True))
                if shared:
                    yield _Finding(
                        f"{one.folder} and {other.folder}",
                        f"share {shared:,} pictures {what} (build one again with --exclude, or --duplicates=report)",
                    )


def _repair(corpus: _Corpus) -> str:
    """Keep what can be trusted. Returns: what was done.

    Raises:
        DataError: a build is at work in the folder, or it cannot be written to.
    """
    state = corpus.folder / STATE_FOLDER
    if is_remote(corpus.folder) or not state.is_dir():
        return _repair_claimed(corpus)
    lock = claim_folder(state)  # else what a build is writing would be taken for what one has left behind
    try:
        return _repair_claimed(corpus)
    finally:
        os.close(lock)


def _repair_claimed(corpus: _Corpus) -> str:
    folder = corpus.folder
    bad = {finding.bad_shard for finding in corpus.findings if finding.bad_shard}
    kept = [shard for shard in corpus.shards if shard.name not in bad]
    with writing(folder):
        for name in sorted(bad):
            for file in (folder / name, index_path(folder / name)):
                _move(file, folder / _QUARANTINE / file.name)
        for leftover in folder.glob(".*.tmp"):
            leftover.unlink()
        for shard in kept:
            if not shard.has_index:
                with local_copy(folder / shard.name) as local:
                    index = _true_index(folder / shard.name, local, corpus.foreign)
                publish_bytes(index_path(folder / shard.name), encode_index(index))
        entries = [shard.entry for shard in kept if shard.entry is not None and shard.entry.samples]
        write_manifest(folder, _new_manifest(corpus, entries, sum(shard.words for shard in kept)))
    rebuilt = sum(not shard.has_index for shard in kept)
    cure = "Run build_shards.py again to make what is missing."
    if corpus.foreign is not None:
        cure = "Download what is missing again, and run index_shards.py."
    return (
        f"{folder}: {len(bad)} shards moved to {folder / _QUARANTINE}, {rebuilt} indexes and the manifest written "
        f"anew. {cure}"
    )


def _move(source: Path, target: Path) -> None:
    if not source.exists():
        return
    if is_remote(source):
        target.write_bytes(source.read_bytes())
        source.unlink()
    else:
        target.parent.mkdir(exist_ok=True)
        source.replace(target)


def _new_manifest(corpus: _Corpus, entries: Sequence[ShardEntry], words: int) -> Manifest:
    """What the kept shards hold; of rejected rows nothing is known any more."""
    images, captions = sum(entry.samples for entry in entries), sum(entry.pairs for entry in entries)
    totals = Totals(
        rows=captions,
        images_in=images,
        images=images,
        captions=captions,
        bytes=sum(entry.bytes for entry in entries),
        caption_words=words,
        rejects={},
        image_rejects={},
    )
    if corpus.manifest is not None:
        before = corpus.manifest
        if (images, captions) == (before.totals.images, before.totals.captions):
            totals = dataclasses.replace(before.totals, bytes=totals.bytes, caption_words=words)
            totals = dataclasses.replace(
                totals,
                rows=captions + sum(totals.rejects.values()),
                images_in=images + sum(totals.image_rejects.values()),
            )
        return dataclasses.replace(before, totals=totals, shards=tuple(entries))
    return Manifest(
        source=corpus.folder.name,
        split="",
        settings={"repaired": True},
        attribution="",
        totals=totals,
        shards=tuple(entries),
    )


if __name__ == "__main__":
    run_command(lambda: fire.Fire(SetParseFn(str)(main)))
