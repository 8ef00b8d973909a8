"""Checks a corpus folder: its manifest against its shards, keys that repeat, and images that two corpora share."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from bridgetower.errors import DataError
from bridgetower.io.storage import explain_read_errors
from bridgetower.shards.manifest import FORMAT_VERSION, MANIFEST_NAME, Manifest, ShardEntry, Totals
from data_prep.index_shards import INDEXED
from data_prep.local import map_shards
from data_prep.shard_checks import CheckedShard, Finding, ForeignTars, check_shard, no_hashes


@dataclass(kw_only=True)
class CheckedCorpus:
    """A corpus folder, and what is wrong with it."""

    folder: Path
    manifest: Manifest | None
    """None if it is missing or damaged."""
    foreign: ForeignTars | None = None
    """None for shards of build_shards.py."""
    shards: list[CheckedShard] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)


def check_corpus(folder: Path, to_decode: int, workers: int) -> CheckedCorpus:
    """Check every shard of a folder, and the manifest against them.

    Args:
        to_decode: number of images to decode in each shard, drawn at random; -1: all.

    Raises:
        DataError: the folder cannot be read, or a worker process died.
    """
    manifest, findings = _read_manifest(folder)
    foreign = None
    if manifest is not None and INDEXED in manifest.settings:
        foreign = ForeignTars(decode=bool(manifest.settings.get("decode")))
    corpus = CheckedCorpus(folder=folder, manifest=manifest, foreign=foreign, findings=findings)
    with explain_read_errors(folder):
        present = {path.name for path in folder.glob("*.tar")}
        leftovers = sorted(path.name for path in folder.glob(".*.tmp"))
    listed = {entry.name: entry for entry in manifest.shards} if manifest else {}
    for name in sorted(present - listed.keys()):
        if manifest is not None:
            findings.append(Finding(name, "is not in the manifest", name))
    for name in sorted(listed.keys() - present):
        findings.append(Finding(name, "is in the manifest but not in the folder"))
    for name in leftovers:
        findings.append(Finding(name, "is a temporary file of an interrupted build"))
    calls = [(folder / name, listed.get(name), to_decode, foreign) for name in sorted(present)]
    corpus.shards = map_shards(f"checking {folder}", check_shard, calls, workers)
    for shard in corpus.shards:
        findings.extend(shard.findings)
    findings.extend(_find_repeated_keys(corpus))
    if manifest is not None:
        findings.extend(_check_totals(manifest, corpus))
    return corpus


def _read_manifest(folder: Path) -> tuple[Manifest | None, list[Finding]]:
    """Read the manifest, but do not check that its shards exist: missing ones are findings here, not errors."""
    path = folder / MANIFEST_NAME
    try:
        with explain_read_errors(path):
            content = json.loads(path.read_bytes())
        version = content.pop("format_version")
        if version != FORMAT_VERSION:
            return None, [
                Finding(MANIFEST_NAME, f"has format_version {version!r}, this version reads {FORMAT_VERSION}")
            ]
        shards = tuple(ShardEntry(**shard) for shard in content["shards"])
        manifest = Manifest(**{**content, "totals": Totals(**content["totals"]), "shards": shards})
    except DataError as error:
        return None, [Finding(MANIFEST_NAME, str(error))]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return None, [Finding(MANIFEST_NAME, f"is damaged ({error})")]
    return manifest, []


def _find_repeated_keys(corpus: CheckedCorpus) -> Iterator[Finding]:
    keys, counts = np.unique(
        np.concatenate([no_hashes(), *(shard.keys for shard in corpus.shards)]), return_counts=True
    )
    repeated = keys[counts > 1]
    for shard in corpus.shards if len(repeated) else ():
        num_shared = int(np.isin(shard.keys, repeated).sum())
        if num_shared:
            yield Finding(shard.name, f"has {num_shared} keys that occur more than once in the corpus")


def _check_totals(manifest: Manifest, corpus: CheckedCorpus) -> Iterator[Finding]:
    entries = [shard.entry for shard in corpus.shards if shard.entry is not None]
    if len(entries) < len(manifest.shards):
        return  # a missing or unreadable shard is a finding already
    totals = manifest.totals
    expected_and_actual = {
        "images": (totals.images, sum(entry.samples for entry in entries)),
        "captions": (totals.captions, sum(entry.pairs for entry in entries)),
        "bytes": (totals.bytes, sum(entry.bytes for entry in entries)),
        "rows": (totals.rows, totals.captions + sum(totals.rejects.values())),
        "images_in": (totals.images_in, totals.images + sum(totals.image_rejects.values())),
    }
    for name, (expected, actual) in expected_and_actual.items():
        if expected != actual:
            yield Finding(MANIFEST_NAME, f"says {name}={expected:,}, but there are {actual:,}")


def find_shared_images(corpora: Sequence[CheckedCorpus]) -> Iterator[Finding]:
    """Yield each two corpora that hold the same images, by image id and by perceptual hash."""
    for number, first in enumerate(corpora):
        for second in corpora[number + 1 :]:
            for field_name, what in (("image_ids", "with the same image id"), ("phashes", "that look the same")):
                first_hashes, second_hashes = (
                    np.unique(np.concatenate([no_hashes(), *(getattr(shard, field_name) for shard in corpus.shards)]))
                    for corpus in (first, second)
                )
                num_shared = len(np.intersect1d(first_hashes, second_hashes, assume_unique=True))
                if num_shared:
                    yield Finding(
                        f"{first.folder} and {second.folder}",
                        f"share {num_shared:,} images {what} (build one again with --exclude, or accept it with "
                        "--duplicates=report)",
                    )
