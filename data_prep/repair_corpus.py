"""Repairs a checked corpus: moves bad shards away, and writes row indexes and the manifest anew."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

from bridgetower.io.files import claim_folder
from bridgetower.io.storage import is_remote, publish_bytes
from bridgetower.shards.index import encode_index, index_path
from bridgetower.shards.manifest import Manifest, ShardEntry, Totals, write_manifest
from data_prep.corpus_checks import CheckedCorpus
from data_prep.local import copy_locally
from data_prep.shard_checks import make_true_index
from data_prep.shard_writer import STATE_FOLDER, explain_write_errors

_QUARANTINE = "quarantine"


def repair_corpus(corpus: CheckedCorpus) -> str:
    """Keep the shards that can be trusted, and move the others to a subfolder. Returns: a report for people.

    Raises:
        DataError: a build is writing to the folder, or it cannot be written to.
    """
    state = corpus.folder / STATE_FOLDER
    if is_remote(corpus.folder) or not state.is_dir():
        return _repair_claimed(corpus)
    lock = claim_folder(state)  # the temporary files of a running build must not be removed as leftovers
    try:
        return _repair_claimed(corpus)
    finally:
        os.close(lock)


def _repair_claimed(corpus: CheckedCorpus) -> str:
    folder = corpus.folder
    bad = {finding.bad_shard for finding in corpus.findings if finding.bad_shard}
    kept = [shard for shard in corpus.shards if shard.name not in bad]
    with explain_write_errors(folder):
        for name in sorted(bad):
            for file in (folder / name, index_path(folder / name)):
                _move(file, folder / _QUARANTINE / file.name)
        for leftover in folder.glob(".*.tmp"):
            leftover.unlink()
        for shard in kept:
            if not shard.has_index:
                with copy_locally(folder / shard.name) as local:
                    index = make_true_index(folder / shard.name, local, corpus.foreign)
                publish_bytes(index_path(folder / shard.name), encode_index(index))
        entries = [shard.entry for shard in kept if shard.entry is not None and shard.entry.samples]
        write_manifest(folder, _make_manifest(corpus, entries, sum(shard.words for shard in kept)))
    num_rebuilt = sum(not shard.has_index for shard in kept)
    next_step = "Run build_shards.py again to make the missing shards."
    if corpus.foreign is not None:
        next_step = "Download the missing shards again, and run index_shards.py."
    return (
        f"{folder}: {len(bad)} shards moved to {folder / _QUARANTINE}, {num_rebuilt} indexes and the manifest written "
        f"anew. {next_step}"
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


def _make_manifest(corpus: CheckedCorpus, entries: Sequence[ShardEntry], words: int) -> Manifest:
    """Describe the shards that are kept. Rejected rows are known only if no shard was moved away."""
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
