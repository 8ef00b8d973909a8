"""Visual Genome's region descriptions, for pretraining: all phrases of an image are its captions.

Files below --raw:
    annotations/region_descriptions.json   the phrases (of version 1.0 or 1.2)
    image_data.json                        which images are COCO's, and in which folder each one is; may also be
                                           annotations/image_data.json
    images/VG_100K/*.jpg                   the images: images.zip and
    images/VG_100K_2/*.jpg                 images2.zip
There are no splits. The boxes of the regions are not kept: pretraining does not read them. Almost half of the images
are COCO's and get COCO's ids, so that --exclude=DIR,DIR with the shards of COCO's val and test drops the images of
these splits.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from bridgetower.errors import DataError
from bridgetower.io.storage import explain_read_errors
from data_prep.fields import get_objects, get_optional_whole_number, get_text, get_whole_number, require_object
from data_prep.raw_files import read_json_items, require_files, require_raw_folder
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
    """A row of image_data.json without its url and size, so that all 108,077 rows take only 20 MB."""

    folder_number: int | None
    """Index in _FOLDERS; None if the url does not name the folder."""
    coco_id: int | None
    flickr_id: int | None


def records(options: SourceOptions) -> Iterator[Record]:
    """Yield one record per image, with all its phrases.

    Raises:
        ConfigError: --raw is missing.
        DataError: one of the two JSON files is missing, or not as published.
    """
    layout = f"{_REGIONS}, {_IMAGE_DATA[0]} and the images in images/VG_100K and images/VG_100K_2"
    raw = require_raw_folder(options, "vg", layout)
    (file,) = require_files(raw, [_REGIONS], "vg")
    images = read_image_table(raw, "vg")
    number = 0
    for number, value in enumerate(read_json_items(file, "item"), 1):
        where = f"{file}, image {number}"
        row = require_object(value, where)
        vg_id = get_image_number(row, where)
        known = images.get(vg_id, Image(None, None, None))
        yield Record(
            key=str(vg_id),
            image=ImageFile(path=find_image_file(raw, vg_id, known)),
            image_id=make_image_id(vg_id, known),
            captions=tuple(get_text(region, "phrase", where) for region in get_objects(row, "regions", where)),
            meta=list_ids(vg_id, known),
        )
    if not number:
        raise DataError(f"{file} is not a list of images with their regions. Copy or download it again.")


def read_image_table(raw: Path, source: str) -> dict[int, Image]:
    """Read image_data.json. Returns: its rows, by Visual Genome's number of the image.

    Raises:
        DataError: the file is missing, or not as published.
    """
    file = _find_image_data(raw, source)
    images = {}
    for number, value in enumerate(read_json_items(file, "item"), 1):
        where = f"{file}, image {number}"
        row = require_object(value, where)
        url = row.get("url")
        match = _FOLDER_IN_URL.search(url) if isinstance(url, str) else None
        images[get_image_number(row, where)] = Image(
            folder_number=None if match is None else _FOLDERS.index(match[1]),
            coco_id=get_optional_whole_number(row, "coco_id", where),
            flickr_id=get_optional_whole_number(row, "flickr_id", where),
        )
    if not images:
        # An empty table would hide which images are COCO's, so that held-out ones could get into training.
        raise DataError(f"{file} is not a list of images. Copy or download it again.")
    return images


def get_image_number(row: dict[str, object], where: str) -> int:
    """Return Visual Genome's number of an image; versions of the files differ in the name of the field."""
    return get_whole_number(row, "id" if "image_id" not in row and "id" in row else "image_id", where)


def make_image_id(vg_id: int, image: Image) -> str:
    """Return the image id for shards: COCO's where the image is COCO's, so that ``--exclude`` recognises it."""
    return f"vg:{vg_id}" if image.coco_id is None else f"coco:{image.coco_id}"


def list_ids(vg_id: int, image: Image) -> dict[str, int]:
    """Return the ids that are known, by field name, for the meta of a record."""
    ids = {"vg_id": vg_id, "coco_id": image.coco_id, "flickr_id": image.flickr_id}
    return {name: value for name, value in ids.items() if value is not None}


def find_image_file(raw: Path, vg_id: int, image: Image) -> Path:
    """Return the path of an image, in the first folder if it is in neither of the two."""
    folder, name = raw / "images", f"{vg_id}.jpg"
    if image.folder_number is not None:
        return folder / _FOLDERS[image.folder_number] / name
    with explain_read_errors(folder):
        paths = [folder / subfolder / name for subfolder in _FOLDERS]
        return next((path for path in paths if path.is_file()), paths[0])


def _find_image_data(raw: Path, source: str) -> Path:
    with explain_read_errors(raw):
        for name in _IMAGE_DATA:
            if (raw / name).is_file():
                return raw / name
    return require_files(raw, _IMAGE_DATA[:1], source)[0]  # raises the error for a missing file
