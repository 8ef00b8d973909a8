"""SNLI-VE: twelve pairs, with six images, in three splits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.data_prep.layouts import Expected, make_image_file, put

# split, image, caption number, gold label, premise, hypothesis
PAIRS: list[tuple[str, str, int, str, str, str]] = [
    ("dev", "4705552913", 2, "neutral", "Two women are embracing.", "The sisters are hugging goodbye."),
    ("dev", "4705552913", 2, "entailment", "Two women are embracing.", "Two woman are holding packages."),
    ("dev", "4705552913", 2, "contradiction", "Two women are embracing.", "The men are fighting outside a deli."),
    ("dev", "4705552913", 2, "-", "Two women are embracing.", "They have just met."),
    ("test", "3116769029", 0, "entailment", "This church choir sings.", "The church is filled with song."),
    # The same hypothesis for another caption of the image, which is a separate row.
    ("test", "3116769029", 1, "neutral", "A choir in a church.", "The church is filled with song."),
    ("test", "2407214681", 0, "contradiction", "A woman with a green headscarf.", ""),  # an empty hypothesis
    ("test", "2407214681", 0, "entailment", "A woman with a green headscarf.", "A woman wears blue."),
    ("train", "3416050480", 4, "neutral", "A person on a horse jumps.", "A person is training his horse."),  # missing
    ("train", "2267923837", 2, "neutral", "Children smiling at camera", "They are smiling at their parents"),  # empty
    ("train", "3691670743", 0, "entailment", "A boy is jumping.", "The boy does a skateboarding trick."),  # truncated
    ("train", "3691670743", 0, "-", "A boy is jumping.", "The boy is wearing safety equipment."),
]
ROWS = len(PAIRS)


def write(folder: Path) -> dict[str, Expected]:
    """Write the files. Returns: the counts that a build should have, by split."""
    for split in ("train", "dev", "test"):
        rows = [_row(number, *pair) for number, pair in enumerate(PAIRS) if pair[0] == split]
        put(file(folder, split), "".join(json.dumps(row, sort_keys=True) + "\n" for row in rows))
    for number, name in enumerate(sorted({pair[1] for pair in PAIRS} | {"36979"})):  # 36979 is in no file
        data = make_image_file(400 + number)
        if name == "2267923837":
            data = b""
        elif name == "3691670743":
            data = data[: len(data) // 2]
        if name != "3416050480":
            put(folder / "flickr30k-images" / f"{name}.jpg", data)
    return {
        "train": Expected(
            rows=4,
            images=0,
            captions=0,
            rejects={
                "image cannot be decoded": 1,
                "image file empty": 1,
                "image file missing": 1,
                "no gold label": 1,
            },
        ),
        "dev": Expected(rows=4, images=1, captions=3, rejects={"no gold label": 1}),
        "test": Expected(rows=4, images=2, captions=3, rejects={"empty caption": 1}),
    }


def file(folder: Path, split: str) -> Path:
    return folder / "snli_ve" / f"snli_ve_{split}.jsonl"


def _row(
    number: int, split: str, name: str, caption_number: int, label: str, premise: str, hypothesis: str
) -> dict[str, Any]:
    # The generator that the authors published writes one field name, and their parser reads the other.
    image_field = {"Flikr30kID": f"{name}.jpg"} if split == "test" else {"Flickr30K_ID": name}
    return {
        **image_field,
        "annotator_labels": [label] if label != "-" else ["neutral", "entailment", "neutral", "entailment", ""],
        "captionID": f"{name}.jpg#{caption_number}",
        "gold_label": label,
        "pairID": f"{name}.jpg#{caption_number}r{number}{label[0]}",
        "sentence1": premise,
        "sentence1_binary_parse": f"( {premise} )",
        "sentence1_parse": f"(ROOT (S {premise}))",
        "sentence2": hypothesis,
        "sentence2_binary_parse": f"( {hypothesis} )",
        "sentence2_parse": f"(ROOT (S {hypothesis}))",
    }
