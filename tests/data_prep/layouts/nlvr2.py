"""NLVR2: eight pairs of images in three splits, and four files with subsets of their sentences."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.data_prep.layouts import Expected, make_image_file, put

# identifier, label, sentence
ROWS_OF: dict[str, list[tuple[str, str, str]]] = {
    "train": [
        ("train-10171-0-0", "False", "An image shows one leather pencil case, displayed open."),
        ("train-10171-0-1", "True", "There are two pencil cases."),
        ("train-10171-1-0", "True", "An image shows one leather pencil case, displayed open."),  # right one missing
        ("train-10171-1-1", "False", "There are two pencil cases."),
        ("train-4100-2-0", "True", "A dog is to the left of a cat."),  # left one an empty file
        ("train-4100-3-0", "False", "A dog is to the left of a cat."),  # right one truncated
    ],
    "dev": [
        ("dev-850-0-0", "False", "The right image shows a curving walkway of dark glass circles."),
        (
            "dev-850-0-1",
            "True",
            "The right image shows a curving walkway of dark glass circles.",
        ),  # equal, counted
        ("dev-850-1-0", "True", ""),  # empty, and the only sentence of its pair
    ],
    "test1": [
        ("test1-0-1-0", "True", "There is an empty glass."),
        ("test1-28-1-0", "False", "Each image contains one wolf."),
        ("test1-28-1-1", "True", "The left wolf is lying down."),
    ],
}
SUBSETS = {
    "balanced_dev": ["dev-850-0-0", "dev-850-0-1"],
    "unbalanced_dev": ["dev-850-1-0", "dev-850-0-0"],
    "balanced_test1": ["test1-0-1-0"],
    "unbalanced_test1": ["test1-28-1-0", "test1-28-1-1"],
}
ROWS = 19
DIRECTORIES = {"train-10171": 63, "train-4100": 7}


def write(folder: Path) -> dict[str, Expected]:
    """Write the files. Returns: the counts that a build should have, by split."""
    rows = {split: [_row(split, *row) for row in split_rows] for split, split_rows in ROWS_OF.items()}
    for split, json_rows in rows.items():
        put(file(folder, split), _lines(json_rows))
    for subset, identifiers in SUBSETS.items():
        by_id = {row["identifier"]: row for row in rows[subset.split("_")[1]]}
        put(file(folder, subset), _lines([by_id[identifier] for identifier in identifiers]))
    pairs = sorted({row[0].rpartition("-")[0] for split_rows in ROWS_OF.values() for row in split_rows})
    for number, pair in enumerate([*pairs, "dev-999-0"]):  # dev-999-0 is in no file
        for side in (0, 1):
            # Some of the real files are JPEGs in spite of their names.
            data = make_image_file(500 + 2 * number + side, format_name="JPEG" if pair == "test1-28-1" else "PNG")
            if (pair, side) == ("train-4100-2", 0):
                data = b""
            elif (pair, side) == ("train-4100-3", 1):
                data = data[: len(data) // 2]
            if (pair, side) != ("train-10171-1", 1):
                put(image_folder(folder, pair) / f"{pair}-img{side}.png", data)
    return {
        "train": Expected(
            rows=6,
            images=1,
            captions=2,
            rejects={"image cannot be decoded": 1, "image file empty": 1, "image file missing": 2},
        ),
        "dev": Expected(rows=3, images=1, captions=2, rejects={"empty caption": 1}),
        "test1": Expected(rows=3, images=2, captions=3),
        "balanced_dev": Expected(rows=2, images=1, captions=2),
        "unbalanced_dev": Expected(rows=2, images=1, captions=1, rejects={"empty caption": 1}),
        "balanced_test1": Expected(rows=1, images=1, captions=1),
        "unbalanced_test1": Expected(rows=2, images=1, captions=2),
    }


def file(folder: Path, split: str) -> Path:
    return folder / "nlvr2" / "data" / split.rpartition("_")[0] / f"{split}.json"


def image_folder(folder: Path, pair: str) -> Path:
    split, _, _ = pair.partition("-")
    directory = DIRECTORIES.get(pair.rpartition("-")[0])
    return folder / split if directory is None else folder / "images" / "train" / str(directory)


def _lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def _row(split: str, identifier: str, label: str, sentence: str) -> dict[str, Any]:
    row: dict[str, Any] = {
        "validation": {"61": label},
        "sentence": sentence,
        "left_url": "https://i.kinja-img.com/gawker-media/image/upload/s--UyhVSznS--/18iy0hwo5wdrpjpg.jpg",
        "writer": "61",
        "label": label,
        "right_url": "https://cdn.pixabay.com/photo/2015/09/21/12/57/beer-bottles-949793_960_720.jpg",
        "synset": "beer bottle",
        "query": "some beer bottles38",
        "identifier": identifier,
    }
    if split == "train":
        row["directory"] = DIRECTORIES["-".join(identifier.split("-")[:2])]
    else:
        row["extra_validations"] = {"154": label, "139": label, "149": label, "62": label}
    return row
