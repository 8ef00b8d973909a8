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
from bridgetower.io.storage import explain_read_errors
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


class Image(NamedTuple):
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
    images = image_table(raw, "vg")
    number = 0
    for number, value in enumerate(json_items(file, "item"), 1):
        where = f"{file}, image {number}"
        row = as_object(value, where)
        vg_id = image_number(row, where)
        known = images.get(vg_id, Image(None, None, None))
        yield Record(
            key=str(vg_id),
            image=ImageFile(path=picture(raw, vg_id, known)),
            image_id=image_id(vg_id, known),
            captions=tuple(text_of(region, "phrase", where) for region in objects_of(row, "regions", where)),
            meta=ids(vg_id, known),
        )
    if not number:
        raise DataError(f"{file} is not a list of images with their regions. Copy or download it again.")


def image_table(raw: Path, source: str) -> dict[int, Image]:
    """Read image_data.json: each image by its number.

    Raises:
        DataError: the file is missing, or not as published.
    """
    file = _image_data_file(raw, source)
    found = {}
    for number, value in enumerate(json_items(file, "item"), 1):
        where = f"{file}, image {number}"
        row = as_object(value, where)
        url = row.get("url")
        match = _FOLDER_IN_URL.search(url) if isinstance(url, str) else None
        found[image_number(row, where)] = Image(
            folder_number=None if match is None else _FOLDERS.index(match[1]),
            coco_id=whole_or_none_of(row, "coco_id", where),
            flickr_id=whole_or_none_of(row, "flickr_id", where),
        )
    if not found:
        # Without it, no image of COCO could be told from the others.
        raise DataError(f"{file} is not a list of images. Copy or download it again.")
    return found


def image_number(row: dict[str, object], where: str) -> int:
    """The image's number in a row of one of the files, under the name that the version of the file has for it."""
    return whole_of(row, "id" if "image_id" not in row and "id" in row else "image_id", where)


def image_id(vg_id: int, image: Image) -> str:
    """What the picture is called in shards: by COCO's id where it is COCO's, so that ``--exclude`` sees it."""
    return f"vg:{vg_id}" if image.coco_id is None else f"coco:{image.coco_id}"


def ids(vg_id: int, image: Image) -> dict[str, int]:
    """The ids that are known, for the meta of a record."""
    known = {"vg_id": vg_id, "coco_id": image.coco_id, "flickr_id": image.flickr_id}
    return {name: value for name, value in known.items() if value is not None}


def picture(raw: Path, vg_id: int, image: Image) -> Path:
    """The file of the picture; the first of the two places if it is in neither."""
    folder, name = raw / "images", f"{vg_id}.jpg"
    if image.folder_number is not None:
        return folder / _FOLDERS[image.folder_number] / name
    with explain_read_errors(folder):
        places = [folder / part / name for part in _FOLDERS]
        return next((place for place in places if place.is_file()), places[0])


def _image_data_file(raw: Path, source: str) -> Path:
    with explain_read_errors(raw):
        for name in _IMAGE_DATA:
            if (raw / name).is_file():
                return raw / name
    return require_files(raw, _IMAGE_DATA[:1], source)[0]  # says that it is missing
