"""VQAv2: nine images with questions in four splits, two of which have answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from tests.data_prep.layouts import Expected, make_image_file, put

VOCABULARY = ["2", "yes"]
"""Answers of at least 9 annotations: 9 say 2 or two, 13 say yes; no and blue are too rare."""


class Question(NamedTuple):
    """A question, with its most frequent answer and all ten where they are published."""

    split: str
    coco_id: int
    number: int
    text: str
    answer: str = ""
    answers: tuple[str, ...] = ()

    @property
    def question_id(self) -> int:
        """Id as published: the image's number and three digits."""
        return 1000 * self.coco_id + self.number


TWO = ("2",) * 3 + ("two",) * 2 + ("3",) * 5
YES = ("yes",) * 9 + ("no",)
QUESTIONS: list[Question] = [
    *(Question("train", 9, number, f"How many cookies are on plate {number}?", "2", TWO) for number in range(5)),
    *(Question("train", 25, number, f"Is giraffe {number} walking?", "yes", YES) for number in range(9)),
    Question("train", 25, 9, "Is it night?", "no", ("no",) * 10),
    Question("train", 25, 10, "Is giraffe 0 walking?", "yes", YES),  # asked before; a separate row
    Question("train", 30, 0, "Is this a vase?", "yes", YES),  # the image is missing
    Question("train", 34, 0, "Is this a zebra?", "Yes.", YES),  # an empty file
    Question("train", 36, 0, "Is this a woman?", "yes", YES),  # truncated
    *(Question("val", 42, number, f"How many shoes are in row {number}?", "two", ("two",) * 10) for number in range(4)),
    Question("val", 73, 0, "Is this a car?", "no", ("no",) * 9 + ("yes",)),
    Question("val", 73, 1, "", "blue", ("blue",) * 8 + ("yes", "Yes!")),
    Question("test", 1, 0, "Is the ball flying towards the batter?"),
    Question("test", 1, 1, "What sport is this?"),
    Question("test", 16, 0, "Where is he looking?"),
    Question("test-dev", 1, 1, "What sport is this?"),
]
WITHOUT_ANNOTATION = Question("train", 36, 1, "Where is she looking?")
WITHOUT_QUESTION = Question("train", 36, 2, "", "no", ("no",) * 10)
ROWS = len(QUESTIONS) + 2
_FOLDERS = {"train": "train2014", "val": "val2014", "test": "test2015", "test-dev": "test-dev2015"}


def write(folder: Path) -> dict[str, Expected]:
    """Write the files. Returns: the counts that a build should have, by split."""
    for split in _FOLDERS:
        rows = [question for question in QUESTIONS if question.split == split]
        questions = [*rows, WITHOUT_ANNOTATION] if split == "train" else rows
        put(questions_file(folder, split), json.dumps(_head(split) | {"questions": list(map(_question, questions))}))
        if rows[0].answers:
            # The annotations are in another order than the questions.
            annotations = [*([WITHOUT_QUESTION] if split == "train" else []), *rows[1:], rows[0]]
            content = _head(split) | {"annotations": list(map(_annotation, annotations))}
            put(annotations_file(folder, split), json.dumps(content))
    images = sorted({("test" if row.split == "test-dev" else row.split, row.coco_id) for row in QUESTIONS})
    for number, (split, coco_id) in enumerate([*images, ("val", 999999)]):  # 999999 is in no file
        data = make_image_file(600 + number)
        if coco_id == 34:
            data = b""
        elif coco_id == 36:
            data = data[: len(data) // 2]
        if coco_id != 30:
            part = _FOLDERS[split]
            put(folder / part / f"COCO_{part}_{coco_id:012d}.jpg", data)
    return {
        "train": Expected(
            rows=21,
            images=2,
            captions=15,
            rejects={
                "annotation without a question": 1,
                "image cannot be decoded": 1,
                "image file empty": 1,
                "image file missing": 1,
                "no answer in the vocabulary": 1,
                "question without an annotation": 1,
            },
        ),
        "val": Expected(rows=6, images=2, captions=5, rejects={"empty caption": 1}),
        "test": Expected(rows=3, images=2, captions=3),
        "test-dev": Expected(rows=1, images=1, captions=1),
    }


def questions_file(folder: Path, split: str) -> Path:
    return folder / "vqav2" / f"v2_OpenEnded_mscoco_{_FOLDERS[split]}_questions.json"


def annotations_file(folder: Path, split: str) -> Path:
    return folder / "vqav2" / f"v2_mscoco_{_FOLDERS[split]}_annotations.json"


def _head(split: str) -> dict[str, Any]:
    return {
        "info": {"description": "This is v2.0 of the VQA dataset.", "version": "2.0", "year": 2017},
        "license": {"name": "Creative Commons Attribution 4.0 International License"},
        "data_type": "mscoco",
        "data_subtype": _FOLDERS[split],
    }


def _question(row: Question) -> dict[str, Any]:
    return {"image_id": row.coco_id, "question": row.text, "question_id": row.question_id}


def _annotation(row: Question) -> dict[str, Any]:
    return {
        "question_type": "how many" if row.text.startswith("How many") else "is this",
        "multiple_choice_answer": row.answer,
        "answers": [
            {"answer": answer, "answer_confidence": "maybe" if number % 3 else "yes", "answer_id": number}
            for number, answer in enumerate(row.answers, 1)
        ],
        "image_id": row.coco_id,
        "answer_type": "number" if row.text.startswith("How many") else "yes/no",
        "question_id": row.question_id,
    }
