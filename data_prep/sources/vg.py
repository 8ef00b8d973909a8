"""Visual Genome's region descriptions, for pretraining: all phrases of an image are its captions.

Files below --raw:
    annotations/region_descriptions.json   the phrases (of version 1.0 or 1.2)
    image_data.json                        which images are COCO's, and in which folder they are; accepted as
                                           annotations/image_data.json, too
    images/VG_100K/*.jpg                   the pictures: images.zip and
    images/VG_100K_2/*.jpg                 images2.zip
There are no splits. Boxes of the regions are not kept: pretraining does not read them. Almost half of the images are
COCO's and have its ids, so that --exclude=DIR,DIR with the shards of COCO's val and test drops theirs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from bridgetower.errors import DataError
from bridgetower.storage import reading
from data_prep.fields import as_object, objects_of, text_of, whole_of, whole_or_none_of
from data_prep.raw_files import json_items, raw_folder, require_files
from data_prep.record import ImageFile, ImagePolicy, Record, SourceOptions

FLAGS: dict[str, str] = {}
KEEP_REPEATS = False
SAMPLES_PER_SHARD = 10_000
# A little above the 294 px that the large model reads: pretraining crops the centre and never augments.
IMAGES = ImagePolicy(short_side_px=304)
ATTRIBUTION = (
    "Visual Genome (https://homes.cs.washington.edu/~ranjay/visualgenome/), Ranjay Krishna et al., CC BY 4.0. Pictures "
    "from COCO and YFCC100M belong to their Flickr users."
)

_REGIONS = "annotations/region_descriptions.json"
_IMAGE_DATA = ("image_data.json", "annotations/image_data.json")
_FOLDERS = ("VG_100K", "VG_100K_2")
_FOLDER_IN_URL = re.compile(r"/(VG_100K(?:_2)?)/[^/]*$")


class _Image(NamedTuple):
    """A row of image_data.json without its url and size: all 108,077 take 20 MB."""

    folder_number: int | None
    """In _FOLDERS; None where the url does not tell."""
    coco_id: int | None
    flickr_id: int | None


def records(options: SourceOptions) -> Iterator[Record]:
    """One record per image, with all its phrases.

    Raises:
        ConfigError: --raw is missing.
        DataError: one of the two JSON files is missing, or not as published.
    """
    raw = raw_folder(options, "vg", f"{_REGIONS}, {_IMAGE_DATA[0]} and the pictures in images/VG_100K and VG_100K_2")
    (file,) = require_files(raw, [_REGIONS], "vg")
    images = _images(_image_data_file(raw))
    number = 0
    for number, value in enumerate(json_items(file, "item"), 1):
        where = f"{file}, image {number}"
        row = as_object(value, where)
        vg_id = _id_of(row, where)
        known = images.get(vg_id, _Image(None, None, None))
        ids = {"vg_id": vg_id, "coco_id": known.coco_id, "flickr_id": known.flickr_id}
        yield Record(
            key=str(vg_id),
            image=ImageFile(path=_picture(raw / "images", vg_id, known.folder_number)),
            image_id=f"vg:{vg_id}" if known.coco_id is None else f"coco:{known.coco_id}",
            captions=tuple(text_of(region, "phrase", where) for region in objects_of(row, "regions", where)),
            meta={name: value for name, value in ids.items() if value is not None},
        )
    if not number:
        raise DataError(f"{file} is not a list of images with their regions. Copy or download it again.")


def _image_data_file(raw: Path) -> Path:
    with reading(raw):
        for name in _IMAGE_DATA:
            if (raw / name).is_file():
                return raw / name
    return require_files(raw, _IMAGE_DATA[:1], "vg")[0]  # says that it is missing


def _images(file: Path) -> dict[int, _Image]:
    found = {}
    for number, value in enumerate(json_items(file, "item"), 1):
        where = f"{file}, image {number}"
        row = as_object(value, where)
        url = row.get("url")
        match = _FOLDER_IN_URL.search(url) if isinstance(url, str) else None
        found[_id_of(row, where)] = _Image(
            folder_number=None if match is None else _FOLDERS.index(match[1]),
            coco_id=whole_or_none_of(row, "coco_id", where),
            flickr_id=whole_or_none_of(row, "flickr_id", where),
        )
    if not found:
        # Without it, no image of COCO could be told from the others.
        raise DataError(f"{file} is not a list of images. Copy or download it again.")
    return found


def _id_of(row: dict[str, object], where: str) -> int:
    """The image's number, under the name that the version of the file has for it."""
    return whole_of(row, "id" if "image_id" not in row and "id" in row else "image_id", where)


def _picture(folder: Path, vg_id: int, folder_number: int | None) -> Path:
    name = f"{vg_id}.jpg"
    if folder_number is not None:
        return folder / _FOLDERS[folder_number] / name
    with reading(folder):
        places = [folder / part / name for part in _FOLDERS]
        return next((place for place in places if place.is_file()), places[0])
