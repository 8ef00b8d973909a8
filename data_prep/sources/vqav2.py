"""VQAv2: questions about COCO's pictures, with the answers of ten people each.

Files below --raw:
    vqav2/v2_OpenEnded_mscoco_{train,val}2014_questions.json
    vqav2/v2_mscoco_{train,val}2014_annotations.json                the answers
    vqav2/v2_OpenEnded_mscoco_{test,test-dev}2015_questions.json    no answers: they are scored by a server
    {train,val}2014/COCO_{train,val}2014_*.jpg                      COCO's pictures
    test2015/COCO_test2015_*.jpg
Each of train, val, test and test-dev (questions that are in test, too) becomes a corpus folder. Beside each question
stand its id and, where they are known, its type, the ten answers as published, and labels and scores of those in the
vocabulary. Questions of train and val with no such answer are dropped and counted.

The vocabulary is written to answers.json in --out: a JSON list of answers, in the order of their labels. Built from the
official annotations it has 3,129 (data_prep/answers.py says how). --normalize=false gives the data of ViLT and METER,
which by mistake compare the answers as they were typed, with a vocabulary in normal form.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bridgetower.config.cli import parse_bool
from bridgetower.errors import DataError
from bridgetower.io.storage import to_path
from bridgetower.shards.sample import safe_key
from data_prep.answers import (
    MIN_COUNT,
    NO_ANSWER,
    VOCABULARY_NAME,
    Vocabulary,
    build_vocabulary,
    read_vocabulary,
    soft_scores,
)
from data_prep.fields import as_object, objects_of, text_of, whole_of
from data_prep.raw_files import DiskDict, json_items, raw_folder, require_files
from data_prep.record import ImageFile, ImagePolicy, Record, Reject, SourceOptions

FLAGS = {
    "answers": "file with the vocabulary: a JSON list, or an answer per line (default: built from the annotations)",
    "normalize": "compare answers in their normal form (default true); false: as ViLT and METER did by mistake",
}
# Each question has an id and is scored, even where another one of the picture reads the same.
KEEP_REPEATS = True
SAMPLES_PER_SHARD = 2_000
IMAGES = ImagePolicy(short_side_px=0)
ATTRIBUTION = (
    "VQA v2.0 (https://visualqa.org), Yash Goyal et al., CC BY 4.0. Pictures: COCO Consortium "
    "(https://cocodataset.org/#termsofuse); they belong to their Flickr users, under Flickr's terms of use."
)

# split -> the name that COCO's pictures and VQA's files have for it
_ANSWERED = {"train": "train2014", "val": "val2014"}
_QUESTIONS = {**_ANSWERED, "test": "test2015", "test-dev": "test-dev2015"}
_PICTURES = {**_QUESTIONS, "test-dev": "test2015"}


def records(options: SourceOptions) -> Iterator[Record | Reject]:
    """One record per question; those of the same picture are joined by their key.

    Raises:
        ConfigError: --raw is missing, or a flag is not as described.
        DataError: a file is missing, or not as published.
    """
    normalize = parse_bool("normalize", options.flags.get("normalize", "true"))
    raw, questions, annotations = _files(options)
    vocabulary = _vocabulary(options, annotations)
    for split, file in questions.items():
        pictures = raw / _PICTURES[split]
        if split in annotations:
            yield from _answered(split, file, annotations[split], pictures, vocabulary, normalize=normalize)
        else:
            for row, where in _rows(file, "questions"):
                yield _record(row, where, pictures, split, {})


def extra_files(options: SourceOptions) -> dict[str, bytes]:
    """The vocabulary, which the build writes beside the shards.

    Raises:
        ConfigError: --raw is missing.
        DataError: a file is missing, or not as published.
    """
    return {VOCABULARY_NAME: _vocabulary(options, _files(options)[2]).to_json()}


def _files(options: SourceOptions) -> tuple[Path, dict[str, Path], dict[str, Path]]:
    """The folder of --raw, and below it the files of questions and of annotations, by split."""
    questions = [f"vqav2/v2_OpenEnded_mscoco_{name}_questions.json" for name in _QUESTIONS.values()]
    annotations = [f"vqav2/v2_mscoco_{name}_annotations.json" for name in _ANSWERED.values()]
    layout = "vqav2/v2_*.json (questions and annotations) and the pictures in train2014, val2014, test2015"
    raw = raw_folder(options, "vqav2", layout)
    paths = require_files(raw, questions + annotations, "vqav2")
    return (
        raw,
        dict(zip(_QUESTIONS, paths[: len(questions)], strict=True)),
        dict(zip(_ANSWERED, paths[len(questions) :], strict=True)),
    )


def _vocabulary(options: SourceOptions, annotations: Mapping[str, Path]) -> Vocabulary:
    if options.flags.get("answers"):
        return read_vocabulary(to_path(options.flags["answers"]))
    vocabulary = build_vocabulary(
        text_of(row, "multiple_choice_answer", where)
        for file in annotations.values()
        for row, where in _rows(file, "annotations")
    )
    if not len(vocabulary):
        names = " and ".join(str(file) for file in annotations.values())
        raise DataError(
            f"No answer is the most frequent one of {MIN_COUNT} questions in {names}, so that there is no vocabulary. "
            f"Are the files whole? For a part of VQAv2, give --answers=FILE, such as the {VOCABULARY_NAME} of a build "
            "of all of it."
        )
    return vocabulary


def _answered(
    split: str, questions: Path, annotations: Path, pictures: Path, vocabulary: Vocabulary, *, normalize: bool
) -> Iterator[Record | Reject]:
    """Join the two files of a split, which need not be in the same order."""
    num_questions = num_joined = 0
    with DiskDict() as found:
        for row, where in _rows(annotations, "annotations"):
            question_id = whole_of(row, "question_id", where)
            if question_id in found:
                yield Reject(reason="second annotation of a question", split=split)
            else:
                found[question_id] = _annotation(row, where, vocabulary, normalize=normalize)
        for row, where in _rows(questions, "questions"):
            num_questions += 1
            annotation = found.pop(whole_of(row, "question_id", where))
            if annotation is None:
                yield Reject(reason="question without an annotation", split=split)
                continue
            num_joined += 1
            if annotation.pop("image_id") != whole_of(row, "image_id", where):
                raise DataError(
                    f"{where} is about another image than its annotation in {annotations}. Copy or download both again."
                )
            if annotation["labels"]:
                yield _record(row, where, pictures, split, annotation)
            else:
                yield Reject(reason=NO_ANSWER, split=split)
        if not num_joined:
            raise DataError(
                f"None of the {num_questions:,} questions of {questions} has its annotation in {annotations}. Are both "
                "of the same split, and of version 2 of VQA?"
            )
        if len(found):
            yield Reject(reason="annotation without a question", rows=len(found), split=split)


def _annotation(row: dict[str, Any], where: str, vocabulary: Vocabulary, *, normalize: bool) -> dict[str, Any]:
    answers = [text_of(answer, "answer", where) for answer in objects_of(row, "answers", where)]
    scores = soft_scores(answers, vocabulary, normalize=normalize)
    return {
        "image_id": whole_of(row, "image_id", where),
        "question_type": text_of(row, "question_type", where),
        "answer_type": text_of(row, "answer_type", where),
        "answers": answers,
        "labels": list(scores),
        "scores": list(scores.values()),
    }


def _record(row: dict[str, Any], where: str, pictures: Path, split: str, annotation: dict[str, Any]) -> Record:
    coco_id = whole_of(row, "image_id", where)
    name = f"COCO_{pictures.name}_{coco_id:012d}"
    return Record(
        key=safe_key(name),
        image=ImageFile(path=pictures / f"{name}.jpg"),
        image_id=f"coco:{coco_id}",
        captions=(text_of(row, "question", where),),
        annotations=({"question_id": whole_of(row, "question_id", where), **annotation},),
        split=split,
        meta={"coco_id": coco_id},
    )


def _rows(file: Path, name: str) -> Iterator[tuple[dict[str, Any], str]]:
    """The objects of the file's list of that name, each with its place for errors."""
    number = 0
    for number, value in enumerate(json_items(file, f"{name}.item"), 1):
        where = f"{file}, {name[:-1]} {number}"
        yield as_object(value, where), where
    if not number:
        raise DataError(
            f"{file} has no list `{name}` with a row in it, so it is not VQA's file. Copy or download it again."
        )
