"""The contact sheet shows pictures of the corpus, each above its own caption."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from bridgetower.shards.index import RawSample, ShardReader
from bridgetower.shards.manifest import Manifest, load_manifest
from data_prep.contact_sheet import draw_contact_sheet
from data_prep.record import ImageFile, Record
from tests.small_corpora import build_records, file_of

# What the sheet is made of, in pixels: six cells a row, a caption below each, gaps between.
COLUMNS, CELL, TEXT, GAP = 6, 200, 66, 12
PAPER, FRAME = (255, 255, 255), (232, 232, 232)

Pixels = npt.NDArray[np.uint8]


def colour_of(number: int) -> tuple[int, int, int]:
    """Another one for each number, none of them gray."""
    return (250, number * 6, 255 - number * 6)


def caption_of(number: int) -> str:
    return f"picture number {number}" + ", and so on" * (number % 3)


def build(folder: Path, count: int, *, second: bool = False) -> tuple[Path, Manifest]:
    """A corpus of pictures of one colour each, 60 x 30."""
    folder.mkdir(exist_ok=True)
    for number in range(count + 1):
        (folder / f"{number}.png").write_bytes(file_of(Image.new("RGB", (60, 30), colour_of(number))))
    records = [
        Record(
            key=f"k{number}",
            image=ImageFile(path=folder / f"{number}.png"),
            second_image=ImageFile(path=folder / f"{number + 1}.png") if second else None,
            image_id=f"test:{number}",
            captions=(caption_of(number),),
        )
        for number in range(count)
    ]
    build_records(records, folder / "out")
    return folder / "out", load_manifest(folder / "out")


def samples_of(out: Path, manifest: Manifest) -> list[RawSample]:
    """All of the corpus, in the order of its shards."""
    readers = [ShardReader(out / shard.name) for shard in manifest.shards]
    return [reader.read(row) for reader in readers for row in range(len(reader))]


def number_of(sample: RawSample) -> int:
    return int(sample.record["image_id"].removeprefix("test:"))


def pixels_of(sheet: bytes) -> Pixels:
    return np.asarray(Image.open(io.BytesIO(sheet)))


def cell_of(sheet: Pixels, place: int) -> tuple[Pixels, Pixels]:
    """The picture and the caption at a place of the sheet."""
    left, top = GAP + place % COLUMNS * (CELL + GAP), GAP + place // COLUMNS * (CELL + TEXT + GAP)
    return sheet[top : top + CELL, left : left + CELL], sheet[top + CELL : top + CELL + TEXT, left : left + CELL + GAP]


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> tuple[Path, Manifest]:
    return build(tmp_path_factory.mktemp("small"), 8)


def test_each_cell_holds_a_whole_picture_in_its_own_colour(small):
    sheet = pixels_of((small[0] / "contact_sheet.png").read_bytes())
    assert sheet.shape == (GAP + 2 * (CELL + TEXT + GAP), GAP + COLUMNS * (CELL + GAP), 3)
    for place, sample in enumerate(samples_of(*small)):
        picture, _ = cell_of(sheet, place)
        is_picture = (picture == colour_of(number_of(sample))).all(axis=-1)
        assert is_picture.sum() == 60 * 30
        rows, columns = np.nonzero(is_picture)
        assert (rows.min(), rows.max(), columns.min(), columns.max()) == (85, 114, 70, 129)  # in the middle
        assert (picture[~is_picture] == FRAME).all()


def test_below_each_picture_is_its_caption_and_nothing_where_there_is_none(small):
    sheet = pixels_of((small[0] / "contact_sheet.png").read_bytes())
    ink = {}
    for place, sample in enumerate(samples_of(*small)):
        _, caption = cell_of(sheet, place)
        ink[number_of(sample)] = int((caption < 128).all(axis=-1).sum())
        assert (caption[:4] == PAPER).all()
    assert ink.keys() == set(range(8)) and min(ink.values()) > 50
    for number in (0, 3):
        assert ink[number] < ink[number + 1] < ink[number + 2]  # as long as their captions
    for place in range(8, 12):
        assert all((part == PAPER).all() for part in cell_of(sheet, place))


def test_a_caption_looks_the_same_wherever_it_stands_and_another_one_does_not(tmp_path):
    folder = tmp_path / "two"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.png").write_bytes(file_of(Image.new("RGB", (60, 30), colour_of(number))))
    captions = ["a dog", "a dog", "a cat"]
    records = [
        Record(key=f"k{n}", image=ImageFile(path=folder / f"{n}.png"), image_id=f"test:{n}", captions=(text,))
        for n, text in enumerate(captions)
    ]
    build_records(records, folder / "out")
    sheet = pixels_of((folder / "out" / "contact_sheet.png").read_bytes())
    samples = samples_of(folder / "out", load_manifest(folder / "out"))
    drawn = {number_of(sample): cell_of(sheet, place)[1] for place, sample in enumerate(samples)}
    assert np.array_equal(drawn[0], drawn[1]) and not np.array_equal(drawn[0], drawn[2])


def test_of_a_larger_corpus_24_different_samples_are_drawn_by_the_seed(tmp_path):
    out, manifest = build(tmp_path / "large", 40)
    found = []
    for seed in (0, 0, 1):
        sheet = pixels_of(draw_contact_sheet(out, manifest, seed))
        middles = [cell_of(sheet, place)[0][CELL // 2, CELL // 2] for place in range(24)]
        found.append([int(middle[1]) // 6 for middle in middles])
        assert all(tuple(middle) == colour_of(number) for middle, number in zip(middles, found[-1], strict=True))
        assert len(set(found[-1])) == 24
    assert found[0] == found[1] != found[2]


def test_two_pictures_of_a_sample_lie_side_by_side(tmp_path):
    out, manifest = build(tmp_path / "pairs", 3, second=True)
    sheet = pixels_of((out / "contact_sheet.png").read_bytes())
    for place, sample in enumerate(samples_of(out, manifest)):
        picture, _ = cell_of(sheet, place)
        number = number_of(sample)
        assert tuple(picture[CELL // 2, CELL // 2 - 5]) == colour_of(number)
        assert tuple(picture[CELL // 2, CELL // 2 + 5]) == colour_of(number + 1)
