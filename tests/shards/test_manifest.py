"""A manifest describes the files of its folder, or an error says which one is wrong."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from bridgetower.errors import DataError
from bridgetower.io.files import sha256_of
from bridgetower.shards.index import ShardReader
from bridgetower.shards.manifest import load_manifest, write_manifest
from tests.small_corpora import write_corpus


@pytest.fixture
def corpus(tmp_path) -> Path:
    return write_corpus(tmp_path, [1, 2, 1, 1, 3, 1])


def change(corpus: Path, **fields: object) -> None:
    path = corpus / "shards.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_a_written_manifest_is_read_back(corpus, tmp_path):
    manifest = load_manifest(corpus)
    write_manifest(corpus, manifest)
    assert load_manifest(corpus) == manifest


@pytest.mark.parametrize("split", ["train", "combination", "concept"])
def test_names_counts_sizes_and_checksums_are_those_of_the_files(emoji_shards, split):
    folder = emoji_shards / split
    manifest = load_manifest(folder)
    assert {shard.name for shard in manifest.shards} == {path.name for path in folder.glob("*.tar")}
    captions = words = 0
    for shard in manifest.shards:
        reader = ShardReader(folder / shard.name)
        assert (shard.samples, shard.pairs) == (len(reader), reader.num_pairs)
        assert (shard.bytes, shard.sha256) == ((folder / shard.name).stat().st_size, sha256_of(folder / shard.name))
        for number in range(len(reader)):
            texts = reader.read(number).record["captions"]
            captions += len(texts)
            words += sum(len(text.split()) for text in texts)
    totals = manifest.totals
    assert totals.images == totals.images_in == sum(shard.samples for shard in manifest.shards)
    assert totals.captions == manifest.num_pairs == captions
    assert totals.bytes == sum(shard.bytes for shard in manifest.shards)
    assert totals.caption_words == words
    assert totals.rejects == {}


def test_the_digest_changes_with_the_content_of_a_shard_and_not_with_a_new_read(corpus):
    manifest = load_manifest(corpus)
    assert load_manifest(corpus).digest() == manifest.digest()
    other = dataclasses.replace(manifest.shards[0], sha256="0" * 64)
    assert dataclasses.replace(manifest, shards=(other, *manifest.shards[1:])).digest() != manifest.digest()
    assert dataclasses.replace(manifest, shards=manifest.shards[::-1]).digest() != manifest.digest()


def test_a_missing_folder_is_an_error_with_the_command_that_builds_it(tmp_path):
    with pytest.raises(DataError, match=r"nowhere does not exist\. Build it .* --out=.*nowhere"):
        load_manifest(tmp_path / "nowhere")


def test_a_folder_without_a_manifest_is_an_error_that_says_how_to_continue(corpus):
    (corpus / "shards.json").unlink()
    with pytest.raises(DataError, match=r"has no shards\.json.*run the same build_shards\.py command again"):
        load_manifest(corpus)


def test_a_folder_of_splits_is_an_error_that_names_them(emoji_shards):
    with pytest.raises(DataError) as error:
        load_manifest(emoji_shards)
    for split in ("train", "combination", "concept"):
        assert str(emoji_shards / split) in str(error.value)


@pytest.mark.parametrize("version", [0, 1, "2", None])
def test_another_format_version_is_an_error_with_both_versions(corpus, version):
    change(corpus, format_version=version)
    with pytest.raises(DataError, match=rf"format_version {version!r}, this version reads 2"):
        load_manifest(corpus)


@pytest.mark.parametrize("content", ["", '{"format_version": 1', "\x00\xff"])
def test_a_manifest_that_is_not_json_is_an_error(corpus, content):
    (corpus / "shards.json").write_text(content)
    with pytest.raises(DataError, match=r"shards\.json is not JSON"):
        load_manifest(corpus)


@pytest.mark.parametrize("content", ["[]", "null", '"text"', "[1, 2]"])
def test_json_that_is_not_an_object_is_an_error(corpus, content):
    (corpus / "shards.json").write_text(content)
    with pytest.raises(DataError, match="not a manifest"):
        load_manifest(corpus)


@pytest.mark.parametrize("fields", [{"shards": None}, {"shards": [{"name": "00000.tar"}]}, {"totals": {}}, {"new": 1}])
def test_missing_and_unknown_fields_are_errors(corpus, fields):
    change(corpus, **fields)
    with pytest.raises(DataError, match="is not a manifest of version 2"):
        load_manifest(corpus)


def test_a_manifest_that_cannot_be_opened_is_an_error(corpus):
    (corpus / "shards.json").unlink()
    (corpus / "shards.json").mkdir()
    with pytest.raises(DataError, match="cannot be read"):
        load_manifest(corpus)


def test_a_missing_shard_is_an_error_that_says_what_to_do(corpus):
    (corpus / "00001.tar").unlink()
    with pytest.raises(DataError, match=r"00001\.tar is in the manifest but not on disk\. Copy it again"):
        load_manifest(corpus)


def test_a_shard_of_another_size_is_an_error_with_both_sizes(corpus):
    shard = corpus / "00001.tar"
    shard.write_bytes(shard.read_bytes()[:-512])
    with pytest.raises(DataError, match=r"00001\.tar has 9,728 bytes, its manifest says 10,240"):
        load_manifest(corpus)


def test_a_missing_row_index_is_an_error(corpus):
    (corpus / "00000.index.npy").unlink()
    with pytest.raises(DataError, match=r"00000\.tar has no row index 00000\.index\.npy"):
        load_manifest(corpus)
