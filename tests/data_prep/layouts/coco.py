"""COCO 2014 with Karpathy's splits: nine images in four splits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.data_prep.layouts import Expected, make_image_file, put

JSON_FILE = "karpathy/dataset_coco.json"
# split, folder, COCO id, captions
IMAGES: list[tuple[str, str, int, list[str]]] = [
    (
        "test",
        "val2014",
        391895,
        [
            "A man with a red helmet on a small moped on a dirt road. ",
            "Man riding a motor bike on a dirt road on the countryside.",
            "A man riding on the back of a motorcycle.",
        ],
    ),
    ("test", "val2014", 60623, ["A young girl inhales with the intent of blowing out a candle.  ", "A girl, a candle"]),
    # A repeated caption, which differs in white space alone, and an empty one.
    (
        "train",
        "train2014",
        57870,
        ["A restaurant has modern wooden tables.", "A restaurant has modern  wooden tables. "],
    ),
    ("train", "train2014", 384029, ["A man preparing desserts in a kitchen.", ""]),
    (
        "train",
        "train2014",
        222016,
        ["a big red telephone booth", "a person standing inside of a phone booth"],
    ),  # missing
    ("train", "train2014", 520950, ["the kitchen is full of spices on the rack"]),  # an empty file
    ("restval", "val2014", 522418, ["A woman wearing a net on her head cutting a cake.", 'Café ½ \U0001f370 "quoted"']),
    ("val", "val2014", 184613, ["A child holding a flowered umbrella and petting a yak.", "a boy"]),  # truncated
    ("val", "val2014", 318219, []),
]
ROWS = 17


def write(folder: Path) -> dict[str, Expected]:
    """Write the files. Returns: the counts that a build should have, by split."""
    content = {"images": [_entry(number, *image) for number, image in enumerate(IMAGES)], "dataset": "coco"}
    put(folder / JSON_FILE, json.dumps(content))
    for number, (_, part, coco_id, _) in enumerate(IMAGES):
        data = make_image_file(100 + number)
        if coco_id == 520950:
            data = b""
        elif coco_id == 184613:
            data = data[: len(data) // 2]
        if coco_id != 222016:
            put(folder / part / file_name(part, coco_id), data)
    put(folder / "val2014" / file_name("val2014", 999999), make_image_file(199))  # not in the JSON
    return {
        "train": Expected(
            rows=7,
            images=2,
            captions=2,
            rejects={"empty caption": 1, "image file empty": 1, "image file missing": 2, "repeated caption": 1},
        ),
        "restval": Expected(rows=2, images=1, captions=2),
        "val": Expected(rows=3, images=0, captions=0, rejects={"image cannot be decoded": 2, "no caption": 1}),
        "test": Expected(rows=5, images=2, captions=5),
    }


def file_name(part: str, coco_id: int) -> str:
    return f"COCO_{part}_{coco_id:012d}.jpg"


def sentences(imgid: int, captions: list[str]) -> dict[str, Any]:
    """Make the fields of an image that hold its captions, as in both of Karpathy's files."""
    sentids = [10 * imgid + number for number in range(len(captions))]
    return {
        "sentids": sentids,
        "imgid": imgid,
        "sentences": [
            {"tokens": caption.lower().rstrip(". ").split(), "raw": caption, "imgid": imgid, "sentid": sentid}
            for caption, sentid in zip(captions, sentids, strict=True)
        ],
    }


def _entry(imgid: int, split: str, part: str, coco_id: int, captions: list[str]) -> dict[str, Any]:
    return {
        "filepath": part,
        "filename": file_name(part, coco_id),
        "split": split,
        "cocoid": coco_id,
        **sentences(imgid, captions),
    }
