"""A held-out split holds each of its images and captions once, in the order of the shards."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest
import torch

from bridgetower.data.held_out import HeldOutSplit
from bridgetower.data.images import load_image
from bridgetower.data.text import Tokenizer
from bridgetower.errors import DataError
from bridgetower.rng import hash64
from tests.small_corpora import write_corpus

COUNTS = [1, 3, 2, 1, 2, 1, 4]


def open_split(folder: Path, max_images: int = 0) -> HeldOutSplit:
    return HeldOutSplit(
        folder,
        tokenizer=Tokenizer("emoji"),
        image_size_px=20,
        max_text_tokens=24,
        mlm_probability=0.15,
        max_images=max_images,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("held_out"), COUNTS, samples_per_shard=3)


@pytest.fixture(scope="module")
def split(folder) -> HeldOutSplit:
    return open_split(folder)


@pytest.fixture(scope="module")
def plain(folder) -> list[tuple[bytes, list[str], str]]:
    """Image, captions and image id of each sample, read with tarfile alone, shard after shard."""
    samples = []
    for shard in sorted(folder.glob("*.tar")):
        with tarfile.open(shard) as tar:
            content = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
        for name in content:
            if name.endswith(".json"):
                record = json.loads(content[name])
                samples.append((content[name.replace(".json", ".png")], record["captions"], record["image_id"]))
    return samples


def test_a_split_holds_every_image_and_caption_once_in_the_order_of_the_shards(split, plain):
    assert split.num_images == 7 and split.num_captions == 14
    assert split.captions == [caption for _, captions, _ in plain for caption in captions]
    assert [split.image_bytes(number) for number in range(7)] == [image for image, _, _ in plain]


def test_a_split_knows_the_image_of_each_caption_and_the_id_of_each_image(split, plain):
    expected = [number for number, (_, captions, _) in enumerate(plain) for _ in captions]
    assert split.image_of_caption_T.tolist() == expected
    ids = [hash64(image_id) for _, _, image_id in plain]
    assert [number % 2**64 for number in split.image_id_N.tolist()] == ids


@pytest.mark.parametrize("size", [1, 3, 7, 100])
def test_image_batches_of_any_size_together_are_all_images(split, plain, size):
    batches = [split.image_batch(first, size) for first in range(0, split.num_images, size)]
    assert [batch.first for batch in batches] == list(range(0, 7, size))
    pixels_N3SS = torch.cat([batch.pixels_N3SS for batch in batches])
    assert torch.equal(pixels_N3SS, torch.stack([load_image(image, 20, "x") for image, _, _ in plain]))


@pytest.mark.parametrize("size", [1, 4, 5])
def test_captions_and_their_masks_do_not_depend_on_the_size_of_the_batches(split, size):
    whole = split.text_batch(0, 100, seed=3)
    length = whole.clean_ids_TL.shape[1]
    labels = []
    for first in range(0, split.num_captions, size):
        batch = split.text_batch(first, size, seed=3)
        width = batch.clean_ids_TL.shape[1]
        rows = slice(first, first + size)
        assert torch.equal(batch.clean_ids_TL, whole.clean_ids_TL[rows, :width])
        assert torch.equal(batch.masked_ids_TL, whole.masked_ids_TL[rows, :width])
        assert torch.equal(batch.attention_mask_TL, whole.attention_mask_TL[rows, :width])
        indices = (first + batch.mlm_index_M // width) * length + batch.mlm_index_M % width
        labels += list(zip(indices.tolist(), batch.mlm_label_M.tolist(), strict=True))
    assert labels == list(zip(whole.mlm_index_M.tolist(), whole.mlm_label_M.tolist(), strict=True))
    assert len(labels) > 10


def test_another_seed_masks_other_tokens(split):
    one, other = split.text_batch(0, 100, seed=3), split.text_batch(0, 100, seed=4)
    assert torch.equal(one.clean_ids_TL, other.clean_ids_TL)
    assert not torch.equal(one.masked_ids_TL, other.masked_ids_TL)


@pytest.mark.parametrize("max_images", [1, 3, 4, 7, 50])
def test_a_split_can_be_limited_to_its_first_images_with_all_their_captions(folder, split, max_images):
    limited = open_split(folder, max_images)
    assert limited.num_images == min(max_images, 7)
    assert limited.captions == split.captions[: len(limited.captions)]
    assert limited.image_of_caption_T.tolist() == [i for i in split.image_of_caption_T.tolist() if i < max_images]
    assert torch.equal(limited.image_id_N, split.image_id_N[:max_images])


def test_an_image_that_cannot_be_decoded_is_an_error_and_not_skipped(tmp_path):
    folder = write_corpus(tmp_path, [1, 1, 1])
    shard = folder / "00000.tar"
    raw = bytearray(shard.read_bytes())
    start = raw.index(b"\x89PNG")
    raw[start : start + 40] = bytes(40)
    shard.write_bytes(raw)
    with pytest.raises(DataError, match="The image of corpus, image 0 cannot be decoded"):
        open_split(folder).image_batch(0, 3)


def test_a_missing_folder_is_an_error(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        open_split(tmp_path / "nowhere")
