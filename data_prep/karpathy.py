"""Reads the JSON files of Andrej Karpathy's splits, which have the same form for COCO and Flickr30K."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from bridgetower.errors import DataError
from bridgetower.shards.sample import safe_key
from data_prep.fields import field_error, get_file_name, get_objects, get_text, get_whole_number, require_object
from data_prep.raw_files import read_json_items, require_files, require_raw_folder
from data_prep.record import ImageFile, Record, SourceOptions

_COCO_FILE = "karpathy/dataset_coco.json"
_COCO_SPLITS = ("train", "restval", "val", "test")
COCO_ATTRIBUTION = (
    "Captions: COCO Consortium, CC BY 4.0 (https://cocodataset.org/#termsofuse). Pictures belong to their Flickr "
    "users, under Flickr's terms of use. Splits: Andrej Karpathy, "
    "https://cs.stanford.edu/people/karpathy/deepimagesent."
)


@dataclass(frozen=True, kw_only=True)
class KarpathyImage:
    """One image of a file of Karpathy's."""

    row: dict[str, Any]
    """The image's JSON object."""
    where: str
    """Name of the image in errors: its file and number."""
    file_name: str
    split: str
    captions: tuple[str, ...]

    @property
    def stem(self) -> str:
        """The file name without its suffix."""
        return PurePosixPath(self.file_name).stem


def read_karpathy_images(file: Path, splits: Sequence[str]) -> Iterator[KarpathyImage]:
    """Yield the images of a file, one at a time.

    Args:
        splits: the splits that the file may name.

    Raises:
        DataError: the file is not JSON, has no images, or an image is not as published.
    """
    number = 0
    for number, value in enumerate(read_json_items(file, "images.item"), 1):
        where = f"{file}, image {number}"
        row = require_object(value, where)
        split = get_text(row, "split", where)
        if split not in splits:
            raise field_error(row, "split", where, f"one of {', '.join(splits)}")
        yield KarpathyImage(
            row=row,
            where=where,
            file_name=get_file_name(row, "filename", where),
            split=split,
            captions=tuple(get_text(sentence, "raw", where) for sentence in get_objects(row, "sentences", where)),
        )
    if not number:
        raise DataError(
            f"{file} has no list `images` with an image in it, so it is not Karpathy's file. Copy or download it again."
        )


def read_coco_records(options: SourceOptions, source: str) -> Iterator[Record]:
    """Yield COCO's images with their captions.

    Args:
        source: name of the source, for errors.

    Raises:
        ConfigError: --raw is missing.
        DataError: a file is missing, or not as published.
    """
    raw = require_raw_folder(options, source, f"{_COCO_FILE} and the images in train2014 and val2014")
    (file,) = require_files(raw, [_COCO_FILE], source)
    for image in read_karpathy_images(file, _COCO_SPLITS):
        coco_id = get_whole_number(image.row, "cocoid", image.where)
        yield Record(
            key=safe_key(image.stem),
            image=ImageFile(path=raw / get_file_name(image.row, "filepath", image.where) / image.file_name),
            image_id=f"coco:{coco_id}",
            captions=image.captions,
            split=image.split,
            meta={"coco_id": coco_id},
        )
