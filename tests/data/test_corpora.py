"""Several corpora are read as one list of shards."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from bridgetower.data import corpora as corpora_module
from bridgetower.data.corpora import Corpora, Pair, as_int64
from bridgetower.errors import DataError
from bridgetower.rng import hash64
from tests.small_corpora import draw, file_of, write_corpus

COUNTS = {"cats": [1, 2, 1, 3, 1], "dogs": [2, 2]}


@pytest.fixture
def corpora(tmp_path) -> Corpora:
    return Corpora([write_corpus(tmp_path, counts, name=name, samples_per_shard=2) for name, counts in COUNTS.items()])


def everything(corpora: Corpora) -> list[tuple[int, int]]:
    """Shard and number of every pair, shard by shard."""
    return [(shard, pair) for shard, pairs in enumerate(corpora.pairs_per_shard) for pair in range(pairs)]


def read_all(corpora: Corpora) -> list[Pair]:
    return [corpora.read(shard, number) for shard, number in everything(corpora)]


def test_every_caption_of_every_corpus_is_one_pair(corpora):
    pairs = read_all(corpora)
    captions = sorted((pair.caption.replace(" longer", ""), pair.corpus) for pair in pairs)
    assert captions == sorted(
        (f"{name} picture {number}, caption {caption}", corpus)
        for corpus, (name, counts) in enumerate(COUNTS.items())
        for number, count in enumerate(counts)
        for caption in range(count)
    )


def test_a_pair_has_the_image_of_its_caption(corpora):
    for pair in read_all(corpora):
        name, _, number = pair.caption.split(",")[0].split()
        assert pair.image == file_of(draw(int(number)))
        assert pair.image_id == hash64(f"{name}:{number}")
        assert pair.record["image_id"] == f"{name}:{number}"
        assert f"image_id {name}:{number}" in pair.where


def test_a_pair_is_also_located_by_its_number_in_its_corpus(corpora):
    located = [
        corpora.pair_of_corpus(corpus, number)
        for corpus in range(len(COUNTS))
        for number in range(corpora.pairs_of_corpus(corpus))
    ]
    assert located == everything(corpora)
    assert [corpora.read_image_id(shard, number) for shard, number in located] == [
        pair.image_id for pair in read_all(corpora)
    ]


def test_shards_are_listed_corpus_after_corpus(corpora):
    assert corpora.names == ["cats", "dogs"]
    assert corpora.corpus_of_shard == [0, 0, 0, 1]
    assert [path.parent.name for path in corpora.shard_paths] == ["cats"] * 3 + ["dogs"]
    assert sum(corpora.pairs_per_shard) == 12


def test_a_worker_reads_the_same_pairs(corpora):
    read_all(corpora)  # opens files, which are not pickled
    copy = pickle.loads(pickle.dumps(corpora))
    assert read_all(copy) == read_all(corpora)


def test_no_more_shards_stay_open_than_allowed(corpora, monkeypatch):
    monkeypatch.setattr(corpora_module, "_MAX_OPEN_SHARDS", 2)
    for _ in range(3):
        assert len(read_all(corpora)) == 12
    open_files = [os.path.realpath(link) for link in Path("/proc/self/fd").iterdir()]
    assert sorted(path for path in open_files if path in map(str, corpora.shard_paths)) == [
        str(path) for path in corpora.shard_paths[-2:]
    ]


def test_a_corpus_without_pairs_is_refused_with_what_was_rejected(tmp_path):
    empty = write_corpus(tmp_path, [0, 0])  # images without captions
    with pytest.raises(DataError, match=r"corpus holds no pairs \(rejected: \{'no caption': 2\}\)"):
        Corpora([empty])


def test_the_same_corpus_twice_is_refused(tmp_path):
    folder = write_corpus(tmp_path, [1, 1])
    with pytest.raises(DataError, match="hold the same pairs"):
        Corpora([folder, f"{folder}/"])


def test_an_index_that_counts_other_pairs_than_the_manifest_is_an_error(tmp_path):
    folder = write_corpus(tmp_path, [1, 2, 3])
    manifest = json.loads((folder / "shards.json").read_text())
    manifest["shards"][0]["pairs"] = 5
    (folder / "shards.json").write_text(json.dumps(manifest))
    corpora = Corpora([folder])
    with pytest.raises(DataError, match="counts 6 pairs, the manifest 5: they come from different builds"):
        corpora.read(0, 0)


def test_image_ids_stay_different_as_signed_numbers():
    ids = np.array([0, 1, 2**63 - 1, 2**63, 2**64 - 1], np.uint64)
    assert as_int64(ids).tolist() == [0, 1, 2**63 - 1, -(2**63), -1]
