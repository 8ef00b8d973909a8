"""Flickr30K with Karpathy's splits: six images in three splits."""

from __future__ import annotations

import json
from pathlib import Path

from tests.data_prep.layouts import Expected, make_image_file, put
from tests.data_prep.layouts.coco import sentences

JSON_FILE = "karpathy/dataset_flickr30k.json"
# split, name of the image, captions
IMAGES: list[tuple[str, str, list[str]]] = [
    (
        "train",
        "1000092795",
        [
            "Two young guys with shaggy hair look at their hands while hanging out in the yard.",
            "Two young, White males are outside near many bushes.",
            "Two young, White males are outside near many bushes.",  # repeated
        ],
    ),
    ("train", "10002456", ["Several men in hard hats are operating a giant pulley system.", "  "]),  # an empty one
    ("train", "1000268201", ["A child in a pink dress is climbing up a set of stairs in an entry way."]),  # missing
    ("val", "1018148011", ["A group of people stand in the back of a truck filled with cotton.", "A truck"]),
    ("test", "1007129816", ["The man with pierced ears is wearing glasses and an orange hat.", "A man"]),  # empty
    ("test", "1009434119", ["A black and white dog is running in a grassy garden.", "A Boston Terrier"]),  # truncated
]
ROWS = 12


def write(folder: Path) -> dict[str, Expected]:
    """Write the files. Returns: the counts that a build should have, by split."""
    entries = [
        {"filename": f"{name}.jpg", "split": split, **sentences(number, captions)}
        for number, (split, name, captions) in enumerate(IMAGES)
    ]
    put(folder / JSON_FILE, json.dumps({"images": entries, "dataset": "flickr30k"}))
    for number, (_, name, _) in enumerate(IMAGES):
        data = make_image_file(200 + number)
        if name == "1007129816":
            data = b""
        elif name == "1009434119":
            data = data[: len(data) // 2]
        if name != "1000268201":
            put(folder / "flickr30k-images" / f"{name}.jpg", data)
    put(folder / "flickr30k-images" / "36979.jpg", make_image_file(299))  # not in the JSON, like 769 of the real ones
    return {
        "train": Expected(
            rows=6,
            images=2,
            captions=3,
            rejects={"empty caption": 1, "image file missing": 1, "repeated caption": 1},
        ),
        "val": Expected(rows=2, images=1, captions=2),
        "test": Expected(rows=4, images=0, captions=0, rejects={"image cannot be decoded": 2, "image file empty": 2}),
    }
