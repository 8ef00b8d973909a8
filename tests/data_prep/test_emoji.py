"""The demo corpus has known counts, and two held-out splits that do not leak."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from bridgetower.shards.index import ShardReader
from bridgetower.shards.manifest import load_manifest

SPLITS = ("train", "combination", "concept")
TONES = ("1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff")
# Code points in which the variants of a concept differ: skin tones, genders and joiners; then the person shown.
VARIANTS = {*TONES, "2640", "2642", "200d", "fe0f"}
PERSONS = {"1f468", "1f469", "1f9d1"}


@pytest.fixture(scope="module")
def rows(emoji_shards) -> dict[str, list[tuple[bytes, dict[str, Any]]]]:
    """Return image and record of every sample, by split."""
    rows: dict[str, list[tuple[bytes, dict[str, Any]]]] = {}
    for split in SPLITS:
        folder: Path = emoji_shards / split
        readers = [ShardReader(folder / shard.name) for shard in load_manifest(folder).shards]
        samples = [reader.read(row) for reader in readers for row in range(len(reader))]
        rows[split] = [(sample.image, sample.record) for sample in samples]
    return rows


def files_of(rows, split) -> set[str]:
    """Return every file name whose image is in a split."""
    return {file for _, record in rows[split] for file in record["code_points"]}


def captions_of(rows, split) -> set[str]:
    return {caption.casefold() for _, record in rows[split] for caption in record["captions"]}


def family_of(file: str) -> frozenset[str]:
    parts = ["1f9d1" if part in PERSONS else part for part in file.split("-")]
    return frozenset(part for part in parts if part not in VARIANTS)


def test_it_has_3918_distinct_images_in_three_splits(rows):
    assert {split: len(samples) for split, samples in rows.items()} == {
        "train": 3457,
        "combination": 330,
        "concept": 131,
    }
    assert len({image for samples in rows.values() for image, _ in samples}) == 3918
    assert len({record["image_id"] for samples in rows.values() for _, record in samples}) == 3918


def test_it_has_5019_captions_that_differ_within_an_image(rows):
    # 5,026 names, less those of held-out images that are also names of a training image.
    assert {split: sum(len(r["captions"]) for _, r in samples) for split, samples in rows.items()} == {
        "train": 4510,
        "combination": 330,
        "concept": 179,
    }
    for samples in rows.values():
        for _, record in samples:
            assert len({caption.casefold() for caption in record["captions"]}) == len(record["captions"])


@pytest.mark.parametrize("split", ["combination", "concept"])
def test_no_held_out_image_is_in_training(rows, split):
    assert {image for image, _ in rows[split]}.isdisjoint(image for image, _ in rows["train"])
    assert files_of(rows, split).isdisjoint(files_of(rows, "train"))


@pytest.mark.parametrize("split", ["combination", "concept"])
def test_no_held_out_caption_is_in_training(rows, split):
    assert captions_of(rows, split).isdisjoint(captions_of(rows, "train"))


def test_the_held_out_splits_share_nothing(rows):
    assert captions_of(rows, "combination").isdisjoint(captions_of(rows, "concept"))
    assert files_of(rows, "combination").isdisjoint(files_of(rows, "concept"))


def test_training_has_the_other_four_tones_of_every_concept_of_the_combination_split(rows):
    trained = files_of(rows, "train")
    concepts = set()
    for _, record in rows["combination"]:
        (file,) = record["code_points"]
        (tone,) = {part for part in file.split("-") if part in TONES}  # both persons of a couple may have it
        concepts.add(file.replace(tone, "tone"))
        assert {file.replace(tone, other) for other in TONES if other != tone} <= trained
    assert len(concepts) == 330  # one tone per concept


def test_every_tone_is_held_out_about_as_often(rows):
    counts: dict[str, int] = defaultdict(int)
    for _, record in rows["combination"]:
        (tone,) = {part for part in record["code_points"][0].split("-") if part in TONES}
        counts[tone] += 1
    assert len(counts) == 5 and all(40 < count < 95 for count in counts.values())  # 66 expected


def test_no_member_of_a_family_of_the_concept_split_is_in_training(rows):
    trained = {family_of(file) for file in files_of(rows, "train") | files_of(rows, "combination")}
    assert {family_of(file) for file in files_of(rows, "concept")}.isdisjoint(trained)


def test_captions_carry_the_punctuation_of_unicodes_names(rows):
    captions = {caption for samples in rows.values() for _, record in samples for caption in record["captions"]}
    assert {"man: medium-dark skin tone, beard", "flag of France", "grinning face", "dark skin tone"} <= captions
    # The caption of a flag is not just the country's name, and aliases lose their underscores and colons.
    assert "France" not in captions
    assert [caption for caption in captions if re.search(r"_|^:|:$|\s{2}", caption)] == []


@pytest.mark.parametrize("split", SPLITS)
def test_the_manifest_attributes_images_and_names(emoji_shards, split):
    manifest = load_manifest(emoji_shards / split)
    assert manifest.source == "emoji"
    for words in ("Twitter, Inc. and other contributors", "CC-BY 4.0", "creativecommons.org/licenses/by/4.0", "BSD"):
        assert words in manifest.attribution


def test_images_are_opaque_pngs_of_72_pixels(rows):
    for samples in rows.values():
        for image, record in samples:
            assert image[:8] == b"\x89PNG\r\n\x1a\n" and image[25] == 2  # colour type RGB
            assert (record["width"], record["height"]) == (72, 72)
