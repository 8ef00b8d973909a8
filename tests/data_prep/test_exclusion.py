"""Images of another corpus are dropped by their ids, and copies by their perceptual hashes."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bridgetower.errors import DataError
from bridgetower.shards.index import ShardReader
from data_prep.build_shards import main
from data_prep.convert import convert, perceptual_hash
from data_prep.exclusion import Exclusion, load_exclusion
from data_prep.record import ImageFile, ImagePolicy, Record
from tests.small_corpora import build_records, file_of


def photo(seed: int, size: tuple[int, int] = (320, 240)) -> Image.Image:
    """Draw an image with enough detail for a distinctive hash, a different one for each seed."""
    noise = np.random.default_rng(seed).integers(0, 256, (9, 12, 3), np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def phash(raw: bytes, short_side_px: int = 0) -> int:
    return convert(raw, ImagePolicy(short_side_px=short_side_px), "x").phash


def distance(one: int, other: int) -> int:
    return (one ^ other).bit_count()


@pytest.mark.parametrize("seed", range(8))
def test_copies_of_an_image_have_nearly_the_same_hash(seed):
    original = phash(file_of(photo(seed), "PNG"))
    copies = [
        file_of(photo(seed), "JPEG", quality=60),
        file_of(photo(seed).resize((160, 120)), "JPEG"),
        file_of(photo(seed).resize((900, 675), Image.Resampling.BICUBIC), "WEBP"),
        file_of(photo(seed).convert("CMYK"), "JPEG"),
    ]
    assert max(distance(original, phash(copy)) for copy in copies) <= 4
    assert distance(original, phash(copies[2], short_side_px=304)) <= 4


def test_different_images_have_different_hashes():
    hashes = [phash(file_of(photo(seed))) for seed in range(60)]
    distances = [distance(one, other) for number, one in enumerate(hashes) for other in hashes[:number]]
    assert min(distances) > 10


def test_a_hash_is_the_sign_of_the_low_frequencies():
    wave = 127.5 + 127.5 * np.cos(np.pi * (2 * np.arange(32) + 1) * 3 / 64)  # only the transform's column 3
    pixels = np.broadcast_to(np.rint(wave).astype(np.uint8)[None, :, None], (32, 32, 3)).copy()
    bits = f"{perceptual_hash(pixels):064b}"
    assert bits[0] == bits[3] == "1"


def record(folder: Path, number: int, image_id: str, image: Image.Image, **meta: object) -> Record:
    path = folder / f"{number}.jpg"
    path.parent.mkdir(exist_ok=True)
    image.save(path, quality=90)
    return Record(
        key=f"k{number}", image=ImageFile(path=path), image_id=image_id, captions=(f"image {number}",), meta=meta
    )


@pytest.fixture
def held_out(tmp_path) -> Path:
    """Build a corpus of three images that no training corpus may hold. Returns: its folder."""
    folder = tmp_path / "held_out_raw"
    records = [record(folder, number, f"coco:{number}", photo(number)) for number in range(3)]
    build_records(records, tmp_path / "held_out")
    return tmp_path / "held_out"


def test_images_are_dropped_by_id_and_by_hash_and_counted_separately(held_out, tmp_path):
    folder = tmp_path / "raw"
    records = [
        record(folder, 0, "coco:1", photo(50)),  # only the id
        record(folder, 1, "vg:7", photo(51), coco_id=2),  # only the id in the other data set
        record(folder, 2, "vg:8", photo(0).resize((200, 150))),  # only the look
        record(folder, 3, "vg:9", photo(52), coco_id=None, flickr_id=5),
        record(folder, 4, "", photo(53)),
    ]
    exclusion = load_exclusion([str(held_out), str(held_out / "shards.json")], 4)
    totals = build_records(records, tmp_path / "out", exclusion=exclusion)[""].totals
    assert totals.image_rejects == {
        "excluded: looks like an excluded image": 1,
        "excluded: the id of an excluded image": 2,
    }
    assert (totals.rows, totals.captions) == (5, 2)


def test_visual_genomes_flickr_ids_match_flickr30ks_image_ids(tmp_path):
    build_records([record(tmp_path / "a", 0, "flickr30k:5", photo(0))], tmp_path / "held_out")
    exclusion = load_exclusion([str(tmp_path / "held_out")], 0)
    assert exclusion.has_id("vg:1", {"flickr_id": 5}) and not exclusion.has_id("vg:1", {"flickr_id": 6})


def test_plain_images_do_not_count_as_copies_of_each_other(tmp_path):
    build_records([record(tmp_path / "a", 0, "a:0", Image.new("RGB", (80, 60), "white"))], tmp_path / "held_out")
    exclusion = load_exclusion([str(tmp_path / "held_out")], 10)
    other = record(tmp_path / "b", 1, "b:1", Image.new("RGB", (90, 60), "gray"))
    assert build_records([other], tmp_path / "out", exclusion=exclusion)[""].totals.images == 1


def test_nothing_to_exclude_excludes_nothing():
    assert not Exclusion().has_id("coco:1", {}) and not Exclusion().has_hash(0x5555555555555555)


def test_the_command_drops_what_another_corpus_holds(emoji_shards, tmp_path, capsys):
    image = next(iter_images(emoji_shards / "concept"))
    (tmp_path / "raw").mkdir()
    Image.open(io.BytesIO(image)).save(tmp_path / "raw/copy.png")
    photo(1).save(tmp_path / "raw/own.png")
    (tmp_path / "captions.csv").write_text("image,caption\ncopy.png,a copy\nown.png,our own\n")
    flags = {"raw": str(tmp_path / "raw"), "captions": str(tmp_path / "captions.csv"), "out": str(tmp_path / "out")}
    main("folder", **flags, workers="1", exclude=f"{emoji_shards / 'concept'},{emoji_shards / 'combination'}")
    assert "1 excluded: looks like an excluded image" in capsys.readouterr().out
    with pytest.raises(DataError, match="does not exist"):
        main("folder", **flags, workers="1", exclude="/nowhere")


def iter_images(folder: Path) -> Iterator[bytes]:
    reader = ShardReader(folder / "00000.tar")
    return (reader.read(number).image for number in range(len(reader)))
