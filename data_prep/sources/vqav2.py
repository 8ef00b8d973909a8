"""VQAv2: questions about COCO's images, each with the answers of ten people.

Files below --raw:
    vqav2/v2_OpenEnded_mscoco_{train,val}2014_questions.json
    vqav2/v2_mscoco_{train,val}2014_annotations.json                the answers
    vqav2/v2_OpenEnded_mscoco_{test,test-dev}2015_questions.json    no answers: a server scores them
    {train,val}2014/COCO_{train,val}2014_*.jpg                      COCO's images
    test2015/COCO_test2015_*.jpg
Each of train, val, test and test-dev (a subset of test) becomes a corpus folder. The annotation of a question is its id
and, in train and val, its type, the ten answers as published, and the labels and scores of those that are in the
vocabulary. Questions of train and val without an answer in the vocabulary are dropped and counted.

The vocabulary is written to answers.json in --out: a JSON list of answers, in the order of their labels. From the
official annotations it gets 3,129 answers (data_prep/answers.py says how). --normalize=false gives the data of ViLT and
METER, which by mistake compare the answers as they were typed with a vocabulary in normal form.
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
    score_answers,
)
from data_prep.fields import get_objects, get_text, get_whole_number, require_object
from data_prep.raw_files import DiskDict, read_json_items, require_files, require_raw_folder
from data_prep.record import ImageFile, ImagePolicy, Record, Reject, SourceOptions

FLAGS = {
    "answers": "file with the vocabulary: a JSON list, or one answer per line (default: built from the annotations)",
    "normalize": "compare answers in their normal form (default true); false: as ViLT and METER did by mistake",
}
# Every question has its own id and is scored, also if an image has two questions of the same wording.
KEEP_REPEATS = True
SAMPLES_PER_SHARD = 2_000
IMAGES = ImagePolicy(short_side_px=0)
ATTRIBUTION = (
    "VQA v2.0 (https://visualqa.org), Yash Goyal et al., CC BY 4.0. Pictures: COCO Consortium "
    "(https://cocodataset.org/#termsofuse); they belong to their Flickr users, under Flickr's terms of use."
)

# The names of the splits in VQA's files and COCO's folders.
_ANSWERED = {"train": "train2014", "val": "val2014"}
_QUESTIONS = {**_ANSWERED, "test": "test2015", "test-dev": "test-dev2015"}
_IMAGE_FOLDERS = {**_QUESTIONS, "test-dev": "test2015"}


def records(options: SourceOptions) -> Iterator[Record | Reject]:
    """Yield one record per question; the plan joins the records of an image by their key.

    Raises:
        ConfigError: --raw is missing, or a flag is not as described.
        DataError: a file is missing, or not as published.
    """
    normalize = parse_bool("normalize", options.flags.get("normalize", "true"))
    raw, questions, annotations = _find_files(options)
    vocabulary = _load_vocabulary(options, annotations)
    for split, file in questions.items():
        image_folder = raw / _IMAGE_FOLDERS[split]
        if split in annotations:
            yield from _join_annotations(split, file, annotations[split], image_folder, vocabulary, normalize=normalize)
        else:
            for row, where in _read_rows(file, "questions"):
                yield _make_record(row, where, image_folder, split, {})


def extra_files(options: SourceOptions) -> dict[str, bytes]:
    """Return the vocabulary as a file, by name, which the build writes beside the shards.

    Raises:
        ConfigError: --raw is missing.
        DataError: a file is missing, or not as published.
    """
    return {VOCABULARY_NAME: _load_vocabulary(options, _find_files(options)[2]).to_json()}


def _find_files(options: SourceOptions) -> tuple[Path, dict[str, Path], dict[str, Path]]:
    """Return the folder of --raw, and its files of questions and of annotations, by split."""
    questions = [f"vqav2/v2_OpenEnded_mscoco_{name}_questions.json" for name in _QUESTIONS.values()]
    annotations = [f"vqav2/v2_mscoco_{name}_annotations.json" for name in _ANSWERED.values()]
    layout = "vqav2/v2_*.json (questions and annotations) and the images in train2014, val2014, test2015"
    raw = require_raw_folder(options, "vqav2", layout)
    paths = require_files(raw, questions + annotations, "vqav2")
    return (
        raw,
        dict(zip(_QUESTIONS, paths[: len(questions)], strict=True)),
        dict(zip(_ANSWERED, paths[len(questions) :], strict=True)),
    )


def _load_vocabulary(options: SourceOptions, annotations: Mapping[str, Path]) -> Vocabulary:
    if options.flags.get("answers"):
        return read_vocabulary(to_path(options.flags["answers"]))
    vocabulary = build_vocabulary(
        get_text(row, "multiple_choice_answer", where)
        for file in annotations.values()
        for row, where in _read_rows(file, "annotations")
    )
    if not len(vocabulary):
        names = " and ".join(str(file) for file in annotations.values())
        raise DataError(
            f"No answer is the most frequent one of {MIN_COUNT} questions in {names}, so that there is no vocabulary. "
            f"Are the files complete? For a subset of VQAv2, give --answers=FILE, such as the {VOCABULARY_NAME} of a "
            "build of the whole."
        )
    return vocabulary


def _join_annotations(
    split: str, questions: Path, annotations: Path, image_folder: Path, vocabulary: Vocabulary, *, normalize: bool
) -> Iterator[Record | Reject]:
    """Join the questions and annotations of a split, which need not be in the same order."""
    num_questions = num_joined = 0
    with DiskDict() as unused:
        for row, where in _read_rows(annotations, "annotations"):
            question_id = get_whole_number(row, "question_id", where)
            if question_id in unused:
                yield Reject(reason="second annotation of a question", split=split)
            else:
                unused[question_id] = _make_annotation(row, where, vocabulary, normalize=normalize)
        for row, where in _read_rows(questions, "questions"):
            num_questions += 1
            annotation = unused.pop(get_whole_number(row, "question_id", where))
            if annotation is None:
                yield Reject(reason="question without an annotation", split=split)
                continue
            num_joined += 1
            if annotation.pop("image_id") != get_whole_number(row, "image_id", where):
                raise DataError(
                    f"{where} is about another image than its annotation in {annotations}. Copy or download both again."
                )
            if annotation["labels"]:
                yield _make_record(row, where, image_folder, split, annotation)
            else:
                yield Reject(reason=NO_ANSWER, split=split)
        if not num_joined:
            raise DataError(
                f"None of the {num_questions:,} questions of {questions} has its annotation in {annotations}. Are both "
                "files from the same split, and from version 2 of VQA?"
            )
        if len(unused):
            yield Reject(reason="annotation without a question", rows=len(unused), split=split)


def _make_annotation(row: dict[str, Any], where: str, vocabulary: Vocabulary, *, normalize: bool) -> dict[str, Any]:
    answers = [get_text(answer, "answer", where) for answer in get_objects(row, "answers", where)]
    scores = score_answers(answers, vocabulary, normalize=normalize)
    return {
        "image_id": get_whole_number(row, "image_id", where),
        "question_type": get_text(row, "question_type", where),
        "answer_type": get_text(row, "answer_type", where),
        "answers": answers,
        "labels": list(scores),
        "scores": list(scores.values()),
    }


def _make_record(row: dict[str, Any], where: str, image_folder: Path, split: str, annotation: dict[str, Any]) -> Record:
    coco_id = get_whole_number(row, "image_id", where)
    name = f"COCO_{image_folder.name}_{coco_id:012d}"
    return Record(
        key=safe_key(name),
        image=ImageFile(path=image_folder / f"{name}.jpg"),
        image_id=f"coco:{coco_id}",
        captions=(get_text(row, "question", where),),
        annotations=({"question_id": get_whole_number(row, "question_id", where), **annotation},),
        split=split,
        meta={"coco_id": coco_id},
    )


def _read_rows(file: Path, name: str) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield the objects of the list of this name, each with its file and number for error messages."""
    number = 0
    for number, value in enumerate(read_json_items(file, f"{name}.item"), 1):
        where = f"{file}, {name[:-1]} {number}"
        yield require_object(value, where), where
    if not number:
        raise DataError(
            f"{file} has no list `{name}` with a row in it, so it is not VQA's file. Copy or download it again."
        )
