"""Visual Genome 1.2: eight images in two folders."""

from __future__ import annotations

import json
from pathlib import Path

from tests.data_prep.layouts import Expected, make_image_file, put

REGIONS_FILE = "annotations/region_descriptions.json"
IMAGE_FILE = "image_data.json"
# number, folder, COCO id, Flickr id, phrases
IMAGES: list[tuple[int, str, int | None, int | None, list[str]]] = [
    (
        1,
        "VG_100K_2",
        None,
        None,
        ["the clock is green in colour", "shade is along the street ", "the clock is  green in colour"],
    ),
    (2, "VG_100K", None, None, ["road with cars", "", "a tree"]),
    (61512, "VG_100K", None, None, ["a white car", "wet road"]),  # missing
    (61513, "VG_100K", None, None, ["a bench"]),  # an empty file
    (2412112, "VG_100K", 547168, 8505158818, ["a cat sitting on a table.", "a white cat with a tan tail"]),
    (2412113, "VG_100K_2", 547169, 8505158819, ["man on a bike", "red helmet"]),  # truncated
    (2412114, "VG_100K_2", None, None, []),
    (2412115, "VG_100K_2", None, None, ["an image that is not in image_data.json"]),
]
ROWS = 15


def write(folder: Path) -> dict[str, Expected]:
    """Write the files. Returns: the counts that a build should have."""
    regions, images = [], []
    for number, (vg_id, part, coco_id, flickr_id, phrases) in enumerate(IMAGES):
        regions.append(
            {
                "regions": [
                    {
                        "region_id": 1382 + at,
                        "width": 82,
                        "height": 139,
                        "image_id": vg_id,
                        "phrase": phrase,
                        "y": 57,
                        "x": 421,
                    }
                    for at, phrase in enumerate(phrases)
                ],
                "id": vg_id,
            }
        )
        url = f"https://cs.stanford.edu/people/rak248/{part}/{vg_id}.jpg"
        row = {"width": 64, "url": url, "height": 48, "image_id": vg_id, "coco_id": coco_id, "flickr_id": flickr_id}
        if vg_id != 2412115:
            images.append(row)
        data = make_image_file(300 + number)
        if vg_id == 61513:
            data = b""
        elif vg_id == 2412113:
            data = data[: len(data) // 2]
        if vg_id != 61512:
            put(folder / "images" / part / f"{vg_id}.jpg", data)
    put(folder / "images" / "VG_100K" / "107899.jpg", make_image_file(399))  # in no file
    put(folder / REGIONS_FILE, json.dumps(regions))
    put(folder / IMAGE_FILE, json.dumps(images))
    return {
        "": Expected(
            rows=ROWS,
            images=4,
            captions=7,
            rejects={
                "empty caption": 1,
                "image cannot be decoded": 2,
                "image file empty": 1,
                "image file missing": 2,
                "no caption": 1,
                "repeated caption": 1,
            },
        )
    }
