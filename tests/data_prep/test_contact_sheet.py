"""The contact sheet shows images of the corpus, each one with its own caption below."""

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

# Sizes in pixels: a row of six cells, with a caption below each and gaps between.
COLUMNS, CELL, TEXT, GAP = 6, 200, 66, 12
PAPER, FRAME = (255, 255, 255), (232, 232, 232)

Pixels = npt.NDArray[np.uint8]


def colour_of(number: int) -> tuple[int, int, int]:
    """Return a different colour for each number, never gray."""
    return (250, number * 6, 255 - number * 6)


def caption_of(number: int) -> str:
    return f"image number {number}" + ", and so on" * (number % 3)


def build(folder: Path, count: int, *, second: bool = False) -> tuple[Path, Manifest]:
    """Build a corpus of images of one colour each, 60 x 30 pixels. Returns: its folder and manifest."""
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
    """Read all samples of a corpus, in the order of its shards."""
    readers = [ShardReader(out / shard.name) for shard in manifest.shards]
    return [reader.read(row) for reader in readers for row in range(len(reader))]


def number_of(sample: RawSample) -> int:
    return int(sample.record["image_id"].removeprefix("test:"))


def pixels_of(sheet: bytes) -> Pixels:
    return np.asarray(Image.open(io.BytesIO(sheet)))


def cell_of(sheet: Pixels, number: int) -> tuple[Pixels, Pixels]:
    """Return the image and the caption of a cell of the sheet."""
    left, top = GAP + number % COLUMNS * (CELL + GAP), GAP + number // COLUMNS * (CELL + TEXT + GAP)
    return sheet[top : top + CELL, left : left + CELL], sheet[top + CELL : top + CELL + TEXT, left : left + CELL + GAP]


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> tuple[Path, Manifest]:
    return build(tmp_path_factory.mktemp("small"), 8)


def test_each_cell_holds_a_whole_image_in_its_own_colour(small):
    sheet = pixels_of((small[0] / "contact_sheet.png").read_bytes())
    assert sheet.shape == (GAP + 2 * (CELL + TEXT + GAP), GAP + COLUMNS * (CELL + GAP), 3)
    for cell, sample in enumerate(samples_of(*small)):
        image, _ = cell_of(sheet, cell)
        is_image = (image == colour_of(number_of(sample))).all(axis=-1)
        assert is_image.sum() == 60 * 30
        rows, columns = np.nonzero(is_image)
        assert (rows.min(), rows.max(), columns.min(), columns.max()) == (85, 114, 70, 129)  # in the middle
        assert (image[~is_image] == FRAME).all()


def test_each_image_has_its_caption_below_and_empty_cells_stay_blank(small):
    sheet = pixels_of((small[0] / "contact_sheet.png").read_bytes())
    ink = {}
    for cell, sample in enumerate(samples_of(*small)):
        _, caption = cell_of(sheet, cell)
        ink[number_of(sample)] = int((caption < 128).all(axis=-1).sum())
        assert (caption[:4] == PAPER).all()
    assert ink.keys() == set(range(8)) and min(ink.values()) > 50
    for number in (0, 3):
        assert ink[number] < ink[number + 1] < ink[number + 2]  # longer captions take more ink
    for cell in range(8, 12):
        assert all((pixels == PAPER).all() for pixels in cell_of(sheet, cell))


def test_equal_captions_are_drawn_alike_in_every_cell_and_others_differ(tmp_path):
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
    drawn = {number_of(sample): cell_of(sheet, cell)[1] for cell, sample in enumerate(samples)}
    assert np.array_equal(drawn[0], drawn[1]) and not np.array_equal(drawn[0], drawn[2])


def test_the_seed_chooses_24_different_samples_of_a_larger_corpus(tmp_path):
    out, manifest = build(tmp_path / "large", 40)
    numbers = []
    for seed in (0, 0, 1):
        sheet = pixels_of(draw_contact_sheet(out, manifest, seed))
        middles = [cell_of(sheet, cell)[0][CELL // 2, CELL // 2] for cell in range(24)]
        numbers.append([int(middle[1]) // 6 for middle in middles])
        assert all(tuple(middle) == colour_of(number) for middle, number in zip(middles, numbers[-1], strict=True))
        assert len(set(numbers[-1])) == 24
    assert numbers[0] == numbers[1] != numbers[2]


def test_the_two_images_of_a_sample_are_side_by_side(tmp_path):
    out, manifest = build(tmp_path / "pairs", 3, second=True)
    sheet = pixels_of((out / "contact_sheet.png").read_bytes())
    for cell, sample in enumerate(samples_of(out, manifest)):
        image, _ = cell_of(sheet, cell)
        number = number_of(sample)
        assert tuple(image[CELL // 2, CELL // 2 - 5]) == colour_of(number)
        assert tuple(image[CELL // 2, CELL // 2 + 5]) == colour_of(number + 1)
