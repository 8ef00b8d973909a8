"""A miniature of each corpus's official files gives shards with the right counts, and a reason for every other row."""

from __future__ import annotations

import importlib
import pkgutil
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import open_clip_train.data
import pytest
import webdataset
from torchvision.transforms.functional import to_tensor

from bridgetower.shards.index import ShardReader
from bridgetower.shards.manifest import Manifest, load_manifest
from data_prep import sources
from data_prep.build_shards import main
from data_prep.check_shards import main as check_shards
from tests.data_prep import layouts
from tests.data_prep.layouts import Expected

SOURCES = sorted(module.name for module in pkgutil.iter_modules(sources.__path__))
WITH_LAYOUT = sorted({module.name for module in pkgutil.iter_modules(layouts.__path__)} & set(SOURCES))
CASES = [
    (name, layout)
    for name in WITH_LAYOUT
    for layout in getattr(importlib.import_module(f"tests.data_prep.layouts.{name}"), "LAYOUTS", ("",))
]


@dataclass(frozen=True)
class Built:
    """Folder of a miniature's shards, and the counts that it should have."""

    out: Path
    expected: dict[str, Expected]

    def manifests(self) -> Iterator[tuple[Path, Manifest]]:
        """Yield folder and manifest of each split that has a shard."""
        for split in self.expected:
            manifest = load_manifest(self.out / split)
            if manifest.shards:
                yield self.out / split, manifest


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join(part for part in case if part))
def built(request, tmp_path_factory) -> Built:
    name, layout = request.param
    module = importlib.import_module(f"tests.data_prep.layouts.{name}")
    root = tmp_path_factory.mktemp(name)
    expected = module.write(root / "raw", layout) if layout else module.write(root / "raw")
    flags = {"raw": str(root / "raw")}
    if name == "folder":
        flags = {"raw": str(root / "raw/raw"), "captions": str(module.captions_file(root / "raw", layout))}
    elif hasattr(module, "flags"):
        flags |= module.flags(root / "raw")
    main(name, out=str(root / "out"), workers="1", samples_per_shard="2", **flags)
    return Built(root / "out", expected)


def test_every_source_but_the_demos_has_a_miniature():
    assert set(SOURCES) - set(WITH_LAYOUT) == {"emoji"}


def test_every_row_is_a_caption_or_has_a_reason(built):
    for split, expected in built.expected.items():
        totals = load_manifest(built.out / split).totals
        assert (totals.rows, totals.images, totals.captions) == (expected.rows, expected.images, expected.captions)
        assert totals.rejects == expected.rejects
        assert totals.rows == totals.captions + sum(totals.rejects.values())
        assert totals.images_in == totals.images + sum(totals.image_rejects.values())


def test_the_checker_finds_nothing_wrong(built):
    folders = [str(folder) for folder, _ in built.manifests()]
    check_shards(*folders, decode="all", duplicates="report", workers="1")


def test_plain_webdataset_opens_every_shard(built):
    for folder, manifest in built.manifests():
        urls = [str(folder / shard.name) for shard in manifest.shards]
        samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode("pil"))
        assert len(samples) == manifest.totals.images
        assert sum(len(sample["json"]["captions"]) for sample in samples) == manifest.totals.captions
        expected = [reader.read(row) for reader in map(ShardReader, map(Path, urls)) for row in range(len(reader))]
        for sample, raw in zip(samples, expected, strict=True):
            assert sample["json"] == raw.record and sample["txt"] == raw.record["captions"][0]
            assert bool(raw.second_image) == any(name.startswith("right.") for name in sample)


@pytest.mark.parametrize("is_train", [False, True])
def test_the_training_pipeline_of_open_clip_opens_every_shard(built, is_train, monkeypatch):
    # open_clip 3.3 cannot read the end-of-file marks that webdataset 1.0 puts between the members of two tars.
    no_marks = partial(open_clip_train.data.tar_file_expander, eof_value=None)
    monkeypatch.setattr(open_clip_train.data, "tar_file_expander", no_marks)
    for folder, manifest in built.manifests():
        shards = "::".join(str(folder / shard.name) for shard in manifest.shards)
        args = Namespace(
            train_data=shards,
            val_data=shards,
            train_num_samples=manifest.totals.images,
            val_num_samples=manifest.totals.images,
            train_data_upsampling_factors=None,
            seed=0,
            batch_size=1,
            workers=0,
            world_size=1,
        )
        data = open_clip_train.data.get_wds_dataset(args, to_tensor, is_train, tokenizer=lambda text: [text])
        batches = [batch for batch, _ in zip(data.dataloader, range(1000), strict=False)]
        assert len(batches) == manifest.totals.images
        assert {len(texts) for _, texts in batches} == {1}
