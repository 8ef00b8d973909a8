"""Visual Genome's questions: nine images, five of them COCO's, with Karpathy's splits and a vocabulary."""

from __future__ import annotations

import json
from pathlib import Path

from tests.data_prep.layouts import Expected, make_image_file, put

QUESTIONS_FILE = "annotations/question_answers.json"
IMAGE_FILE = "image_data.json"
VOCABULARY = ["yes", "2", "grass"]
KARPATHY = {"train": [547168], "val": [547169, 600001], "test": [547170]}
# number, folder, COCO id, questions with their answers
IMAGES: list[tuple[int, str, int | None, list[tuple[str, str]]]] = [
    (
        1,
        "VG_100K_2",
        None,
        [
            ("Is it day?", "Yes."),
            ("What colour is the clock?", "Green."),  # not in the vocabulary
            ("How many men are there?", "Two."),
            ("How many men are there?", "Yes."),  # contradicts the answer before
            ("Is it day?", "yes"),
            ("Is it  day?", "Yes!"),  # another text because of its white space, as published
            ("What is on the ground?", "Grass."),
            ("What is on the ground?", "Dirt."),  # not in the vocabulary, so it contradicts nothing
        ],
    ),
    (2, "VG_100K", None, []),
    (61512, "VG_100K", None, [("Is it wet?", "Yes.")]),  # missing
    (61513, "VG_100K", None, [("Is it a bench?", "Yes.")]),  # an empty file
    (2412112, "VG_100K", 547168, [("Where is the cat?", "On the grass."), ("What is green?", "The grass.")]),
    (2412113, "VG_100K_2", 547169, [("How many wheels are there?", "2")]),  # truncated
    (2412114, "VG_100K_2", 547170, [("How many helmets are there?", "Two."), ("Is this a man?", "Yes.")]),
    (2412115, "VG_100K", 555555, [("Is this a dog?", "Yes."), ("Is this a cat?", "No.")]),  # not Karpathy's
    (2412116, "VG_100K", None, [("Does image_data.json tell of it?", "No.")]),
]
ROWS = 18


def write(folder: Path) -> dict[str, Expected]:
    """Write the files. Returns: the counts that a build should have, by split."""
    questions, images = [], []
    for number, (vg_id, part, coco_id, texts) in enumerate(IMAGES):
        qas = [
            {
                "a_objects": [],
                "question": question,
                "image_id": vg_id,
                "qa_id": 986000 + 100 * number + at,
                "answer": answer,
                "q_objects": [],
            }
            for at, (question, answer) in enumerate(texts)
        ]
        questions.append({"id": vg_id, "qas": qas})
        url = f"https://cs.stanford.edu/people/rak248/{part}/{vg_id}.jpg"
        row = {"width": 64, "url": url, "height": 48, "image_id": vg_id, "coco_id": coco_id, "flickr_id": None}
        if vg_id != 2412116:
            images.append(row)
        data = make_image_file(700 + number)
        if vg_id == 61513:
            data = b""
        elif vg_id == 2412113:
            data = data[: len(data) // 2]
        if vg_id != 61512:
            put(folder / "images" / part / f"{vg_id}.jpg", data)
    put(folder / QUESTIONS_FILE, json.dumps(questions))
    put(folder / IMAGE_FILE, json.dumps(images))
    put(folder / "answers.json", json.dumps(VOCABULARY))
    for split, ids in KARPATHY.items():
        lines = [f"val2014/COCO_val2014_{coco_id:012d}.jpg {coco_id}\n" for coco_id in ids]
        put(karpathy_file(folder, split), "".join(lines))
    return {
        "train": Expected(
            rows=5,
            images=1,
            captions=1,
            rejects={
                "image not in image_data.json": 1,
                "image of COCO in none of Karpathy's splits": 2,
                "no answer in the vocabulary": 1,
            },
        ),
        # The images that are not COCO's are in val as well: there are too few to fill it.
        "val": Expected(
            rows=13,
            images=2,
            captions=5,
            rejects={
                "image cannot be decoded": 1,
                "image file empty": 1,
                "image file missing": 1,
                "no answer in the vocabulary": 2,
                "question with contradictory answers": 2,
                "repeated question": 1,
            },
        ),
    }


def karpathy_file(folder: Path, split: str) -> Path:
    return folder / "coco_splits" / f"karpathy_{split}_images.txt"
