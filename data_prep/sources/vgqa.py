"""Visual Genome's questions with their answers, as more training data for VQAv2.

Files below --raw:
    annotations/question_answers.json                     the questions
    image_data.json                                       which images are COCO's; accepted as
                                                          annotations/image_data.json, too
    coco_splits/karpathy_{train,val,test}_images.txt      Karpathy's splits of COCO, a line per picture: file name, id
    answers.json                                          the vocabulary, which a build of vqav2 leaves beside its
                                                          shards; or anywhere, with --answers=FILE
    images/VG_100K/*.jpg                                  the pictures: images.zip and
    images/VG_100K_2/*.jpg                                images2.zip
The corpus folders are train and val (models are trained on both). Images of COCO are where Karpathy has them, his val
and test in val; others are drawn from, with a fixed seed, until val and test would have 5,000 images each. Which ones
the published code drew is not known, but how many.

Dropped and counted are questions whose answer is not in the vocabulary, all that an image answers in different ways,
and repetitions of a question of an image. Those of an image without a split (unknown, or COCO's but not Karpathy's) are
counted in train.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from bridgetower import rng
from bridgetower.errors import ConfigError, DataError
from bridgetower.io.storage import explain_read_errors, to_path
from bridgetower.shards.sample import safe_key
from data_prep.answers import NO_ANSWER, VOCABULARY_NAME, Vocabulary, normalize_answer, read_vocabulary
from data_prep.fields import as_object, objects_of, text_of, whole_of
from data_prep.raw_files import json_items, raw_folder, require_files
from data_prep.record import ImageFile, ImagePolicy, Record, Reject, SourceOptions
from data_prep.sources import vg

FLAGS = {
    "answers": f"file with the vocabulary: a JSON list, or an answer per line (default: {VOCABULARY_NAME} in --raw)",
    "images": "coco: questions about COCO's pictures only, or all (default all)",
}
# Questions that differ by white space alone are different ones in the published data.
KEEP_REPEATS = True
SAMPLES_PER_SHARD = 2_000
IMAGES = ImagePolicy(short_side_px=0)
ATTRIBUTION = vg.ATTRIBUTION

_QUESTIONS = "annotations/question_answers.json"
_IMAGE_DATA = "image_data.json"
_KARPATHY = {split: f"coco_splits/karpathy_{split}_images.txt" for split in ("train", "val", "test")}
_HELD_OUT = 5_000
_SEED = 0


def records(options: SourceOptions) -> Iterator[Record | Reject]:
    """One record per image, with its questions.

    Raises:
        ConfigError: --raw or the vocabulary is missing, or a flag is not as described.
        DataError: a file is missing, or not as published.
    """
    only_coco = _only_coco(options)
    raw = raw_folder(options, "vgqa", f"{_QUESTIONS}, {_IMAGE_DATA}, coco_splits and the pictures in images")
    questions, *karpathy = require_files(raw, [_QUESTIONS, *_KARPATHY.values()], "vgqa")
    vocabulary = _vocabulary(options, raw)
    images = vg.image_table(raw, "vgqa")
    splits = split_images(
        {vg_id: image.coco_id for vg_id, image in images.items()},
        {split: _coco_ids(file) for split, file in zip(_KARPATHY, karpathy, strict=True)},
    )
    number = 0
    for number, value in enumerate(json_items(questions, "item"), 1):
        where = f"{questions}, image {number}"
        row = as_object(value, where)
        vg_id = vg.image_number(row, where)
        qas = objects_of(row, "qas", where)
        image, split = images.get(vg_id), splits.get(vg_id)
        if image is None:
            reason = "image not in image_data.json"
        elif only_coco and image.coco_id is None:
            reason = "image not of COCO"
        elif split is None:
            reason = "image of COCO in none of Karpathy's splits"
        else:
            yield from _questions(vg_id, image, split, qas, vocabulary, raw, where)
            continue
        if qas:
            yield Reject(reason=reason, rows=len(qas), split=split or "train")
    if not number:
        raise DataError(f"{questions} is not a list of images with their questions. Copy or download it again.")


def split_images(
    coco_ids: Mapping[int, int | None], karpathy: Mapping[str, Sequence[int]], held_out: int = _HELD_OUT
) -> dict[int, str]:
    """The corpus folder of each image of Visual Genome: ``train`` or ``val``.

    Args:
        coco_ids: the COCO id of each image, None where it has none.
        karpathy: COCO ids of Karpathy's train, val and test.
        held_out: images in each of val and test.

    Returns: no entry for images of COCO that Karpathy does not have.
    Source: microsoft/BridgeTower, src/utils/vgqa_split.py: numbers and seed, not the generator.
    """
    karpathy_split = {coco_id: split for split, ids in karpathy.items() for coco_id in ids}
    found = {
        vg_id: karpathy_split[coco_id]
        for vg_id, coco_id in coco_ids.items()
        if coco_id is not None and coco_id in karpathy_split
    }
    others = sorted(vg_id for vg_id, coco_id in coco_ids.items() if coco_id is None)
    order = iter(rng.shuffled(rng.key(_SEED, "vgqa split"), len(others)))
    for split in ("val", "test"):
        missing = held_out - sum(one == split for one in found.values())
        found |= {others[at]: split for at in islice(order, max(0, missing))}
    found |= {others[at]: "train" for at in order}
    return {vg_id: "train" if split == "train" else "val" for vg_id, split in found.items()}


def _questions(
    vg_id: int,
    image: vg.Image,
    split: str,
    qas: list[dict[str, Any]],
    vocabulary: Vocabulary,
    raw: Path,
    where: str,
) -> Iterator[Record | Reject]:
    """The record of an image, and what is dropped of it."""
    labels = [vocabulary.label(normalize_answer(text_of(qa, "answer", where))) for qa in qas]
    answers: dict[str, set[int]] = {}
    for qa, label in zip(qas, labels, strict=True):
        if label is not None:
            answers.setdefault(text_of(qa, "question", where), set()).add(label)
    kept: dict[str, dict[str, Any]] = {}
    for qa, label in zip(qas, labels, strict=True):
        question = text_of(qa, "question", where)
        if label is None:
            yield Reject(reason=NO_ANSWER, split=split)
        elif len(answers[question]) > 1:
            yield Reject(reason="question with contradictory answers", split=split)
        elif question in kept:
            yield Reject(reason="repeated question", split=split)
        else:
            kept[question] = {
                "question_id": whole_of(qa, "qa_id", where),
                "answers": [qa["answer"]],
                "labels": [label],
                "scores": [1.0],
            }
    if kept:
        yield Record(
            key=safe_key(str(vg_id)),
            image=ImageFile(path=vg.picture(raw, vg_id, image)),
            image_id=vg.image_id(vg_id, image),
            captions=tuple(kept),
            annotations=tuple(kept.values()),
            split=split,
            meta=vg.ids(vg_id, image),
        )


def _only_coco(options: SourceOptions) -> bool:
    images = options.flags.get("images", "all")
    if images not in ("coco", "all"):
        raise ConfigError(f"--images={images} is neither coco nor all.")
    return images == "coco"


def _vocabulary(options: SourceOptions, raw: Path) -> Vocabulary:
    if options.flags.get("answers"):
        return read_vocabulary(to_path(options.flags["answers"]))
    file = raw / VOCABULARY_NAME
    with explain_read_errors(file):
        is_there = file.is_file()
    if not is_there:
        raise ConfigError(
            "The source vgqa needs the vocabulary of VQAv2, so that its labels mean the same. Build vqav2 first, which "
            f"writes {VOCABULARY_NAME} into its --out, and give --answers=FILE; or put the file into --raw={raw}."
        )
    return read_vocabulary(file)


def _coco_ids(file: Path) -> list[int]:
    """The second column of lines such as ``val2014/COCO_val2014_000000011169.jpg 11169``."""
    found = []
    with explain_read_errors(file):
        lines = file.read_bytes().decode("utf-8", "replace").splitlines()
    for number, line in enumerate(lines, 1):
        _, _, coco_id = line.strip().rpartition(" ")
        if not (coco_id.isascii() and coco_id.isdigit()):
            raise DataError(
                f"{file}, line {number} is {line[:80]!r}; it has to be the file name of a picture of COCO and its id, "
                "such as val2014/COCO_val2014_000000011169.jpg 11169. Copy or download the file again."
            )
        found.append(int(coco_id))
    if not found:
        raise DataError(f"{file} has no line. Copy or download it again.")
    return found
