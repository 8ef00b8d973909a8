"""The webdataset package reads the shards as plain tars, without code of this project."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image

from bridgetower.shards.decode import decode_image
from bridgetower.shards.index import ShardReader
from bridgetower.shards.manifest import load_manifest


def read_with_webdataset(shards: Iterable[Path]) -> Iterable[tuple[str, Image.Image, str, dict[str, Any]]]:
    urls = [str(shard) for shard in shards]
    decoded = webdataset.WebDataset(urls, shardshuffle=False).decode("pil")
    samples: Iterable[tuple[str, Image.Image, str, dict[str, Any]]]
    samples = decoded.to_tuple("__key__", "png;jpg;jpeg;webp", "txt", "json")
    return samples


@pytest.mark.parametrize("split", ["combination", "concept"])
def test_webdataset_reads_every_sample_as_it_is(emoji_shards, split):
    manifest = load_manifest(emoji_shards / split)
    shards = [emoji_shards / split / shard.name for shard in manifest.shards]
    samples = list(read_with_webdataset(shards))
    assert len(samples) == manifest.totals.images
    assert len({key for key, *_ in samples}) == len(samples)
    assert sum(len(record["captions"]) for *_, record in samples) == manifest.totals.captions
    raw_samples = [reader.read(row) for reader in map(ShardReader, shards) for row in range(len(reader))]
    for (_, image, text, record), expected in zip(samples, raw_samples, strict=True):
        assert text == record["captions"][0]
        assert record == expected.record
        assert image.size == (record["width"], record["height"])
        assert np.array_equal(np.asarray(image), np.asarray(decode_image(expected.image, "x")))


def test_webdataset_counts_the_images_of_all_training_shards(emoji_shards):
    manifest = load_manifest(emoji_shards / "train")
    assert len(manifest.shards) > 1
    per_shard = [
        sum(1 for _ in webdataset.WebDataset([str(emoji_shards / "train" / shard.name)], shardshuffle=False))
        for shard in manifest.shards
    ]
    assert per_shard == [shard.samples for shard in manifest.shards]
