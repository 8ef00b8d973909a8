"""Visual Genome's questions with their answers, as further training data for VQAv2.

Files below --raw:
    annotations/question_answers.json                     the questions
    image_data.json                                       which images are COCO's; may also be
                                                          annotations/image_data.json
    coco_splits/karpathy_{train,val,test}_images.txt      Karpathy's splits of COCO, a line per image: file name, id
    answers.json                                          the vocabulary, which a build of vqav2 writes beside its
                                                          shards; --answers=FILE names another file
    images/VG_100K/*.jpg                                  the images: images.zip and
    images/VG_100K_2/*.jpg                                images2.zip
The corpus folders are train and val; models are trained on both. COCO's images are split as Karpathy split them, with
his val and test both in val. The other images are shuffled with a fixed seed and fill his val and test up to 5,000
images each; the rest is train. The published code drew as many, but which ones is not known.

Three kinds of questions are dropped and counted: those whose answer is not in the vocabulary, those that an image
answers in contradictory ways, and repetitions. Questions of an image without a split (one that is unknown, or COCO's
but not in Karpathy's splits) are dropped too and counted in train.
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
from data_prep.fields import get_objects, get_text, get_whole_number, require_object
from data_prep.raw_files import read_json_items, require_files, require_raw_folder
from data_prep.record import ImageFile, ImagePolicy, Record, Reject, SourceOptions
from data_prep.sources import vg

FLAGS = {
    "answers": f"file with the vocabulary: a JSON list, or one answer per line (default: {VOCABULARY_NAME} in --raw)",
    "images": "coco: only questions about COCO's images, or all (default all)",
}
# In the published data, questions that differ in white space alone are different rows.
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
    """Yield one record per image, with its questions.

    Raises:
        ConfigError: --raw or the vocabulary is missing, or a flag is not as described.
        DataError: a file is missing, or not as published.
    """
    only_coco = _parse_only_coco(options)
    raw = require_raw_folder(options, "vgqa", f"{_QUESTIONS}, {_IMAGE_DATA}, coco_splits and the images in images")
    questions, *karpathy = require_files(raw, [_QUESTIONS, *_KARPATHY.values()], "vgqa")
    vocabulary = _load_vocabulary(options, raw)
    images = vg.read_image_table(raw, "vgqa")
    splits = split_images(
        {vg_id: image.coco_id for vg_id, image in images.items()},
        {split: _read_coco_ids(file) for split, file in zip(_KARPATHY, karpathy, strict=True)},
    )
    number = 0
    for number, value in enumerate(read_json_items(questions, "item"), 1):
        where = f"{questions}, image {number}"
        row = require_object(value, where)
        vg_id = vg.get_image_number(row, where)
        qas = get_objects(row, "qas", where)
        image, split = images.get(vg_id), splits.get(vg_id)
        if image is None:
            reason = "image not in image_data.json"
        elif only_coco and image.coco_id is None:
            reason = "image not of COCO"
        elif split is None:
            reason = "image of COCO in none of Karpathy's splits"
        else:
            yield from _read_questions(vg_id, image, split, qas, vocabulary, raw, where)
            continue
        if qas:
            yield Reject(reason=reason, rows=len(qas), split=split or "train")
    if not number:
        raise DataError(f"{questions} is not a list of images with their questions. Copy or download it again.")


def split_images(
    coco_ids: Mapping[int, int | None], karpathy: Mapping[str, Sequence[int]], held_out: int = _HELD_OUT
) -> dict[int, str]:
    """Assign each image of Visual Genome to a corpus folder, ``train`` or ``val``.

    Args:
        coco_ids: COCO id of each image, by Visual Genome's number; None if the image is not COCO's.
        karpathy: COCO ids in Karpathy's train, val and test.
        held_out: number of images in val and in test.

    Returns: the folder by Visual Genome's number, without COCO's images that are in none of Karpathy's splits.
    Source: microsoft/BridgeTower, src/utils/vgqa_split.py, for the numbers and the seed; the generator is another one.
    """
    karpathy_split = {coco_id: split for split, ids in karpathy.items() for coco_id in ids}
    splits = {
        vg_id: karpathy_split[coco_id]
        for vg_id, coco_id in coco_ids.items()
        if coco_id is not None and coco_id in karpathy_split
    }
    others = sorted(vg_id for vg_id, coco_id in coco_ids.items() if coco_id is None)
    order = iter(rng.shuffled(rng.key(_SEED, "vgqa split"), len(others)))
    for split in ("val", "test"):
        num_missing = held_out - sum(name == split for name in splits.values())
        splits |= {others[index]: split for index in islice(order, max(0, num_missing))}
    splits |= {others[index]: "train" for index in order}
    return {vg_id: "train" if split == "train" else "val" for vg_id, split in splits.items()}


def _read_questions(
    vg_id: int,
    image: vg.Image,
    split: str,
    qas: list[dict[str, Any]],
    vocabulary: Vocabulary,
    raw: Path,
    where: str,
) -> Iterator[Record | Reject]:
    """Yield the record of an image, and a reject for each question that is dropped."""
    labels = [vocabulary.find_label(normalize_answer(get_text(qa, "answer", where))) for qa in qas]
    answers: dict[str, set[int]] = {}
    for qa, label in zip(qas, labels, strict=True):
        if label is not None:
            answers.setdefault(get_text(qa, "question", where), set()).add(label)
    kept: dict[str, dict[str, Any]] = {}
    for qa, label in zip(qas, labels, strict=True):
        question = get_text(qa, "question", where)
        if label is None:
            yield Reject(reason=NO_ANSWER, split=split)
        elif len(answers[question]) > 1:
            yield Reject(reason="question with contradictory answers", split=split)
        elif question in kept:
            yield Reject(reason="repeated question", split=split)
        else:
            kept[question] = {
                "question_id": get_whole_number(qa, "qa_id", where),
                "answers": [qa["answer"]],
                "labels": [label],
                "scores": [1.0],
            }
    if kept:
        yield Record(
            key=safe_key(str(vg_id)),
            image=ImageFile(path=vg.find_image_file(raw, vg_id, image)),
            image_id=vg.make_image_id(vg_id, image),
            captions=tuple(kept),
            annotations=tuple(kept.values()),
            split=split,
            meta=vg.list_ids(vg_id, image),
        )


def _parse_only_coco(options: SourceOptions) -> bool:
    images = options.flags.get("images", "all")
    if images not in ("coco", "all"):
        raise ConfigError(f"--images={images} is neither coco nor all.")
    return images == "coco"


def _load_vocabulary(options: SourceOptions, raw: Path) -> Vocabulary:
    if options.flags.get("answers"):
        return read_vocabulary(to_path(options.flags["answers"]))
    file = raw / VOCABULARY_NAME
    with explain_read_errors(file):
        exists = file.is_file()
    if not exists:
        raise ConfigError(
            "The source vgqa needs the vocabulary of VQAv2, so that both have the same labels. Build vqav2 first, "
            f"which writes {VOCABULARY_NAME} into its --out, and give --answers=FILE; or put the file into --raw={raw}."
        )
    return read_vocabulary(file)


def _read_coco_ids(file: Path) -> list[int]:
    """Read the second column of lines such as ``val2014/COCO_val2014_000000011169.jpg 11169``."""
    coco_ids = []
    with explain_read_errors(file):
        lines = file.read_bytes().decode("utf-8", "replace").splitlines()
    for number, line in enumerate(lines, 1):
        _, _, coco_id = line.strip().rpartition(" ")
        if not (coco_id.isascii() and coco_id.isdigit()):
            raise DataError(
                f"{file}, line {number} is {line[:80]!r}; it has to be the file name of a COCO image and its id, such "
                "as val2014/COCO_val2014_000000011169.jpg 11169. Copy or download the file again."
            )
        coco_ids.append(int(coco_id))
    if not coco_ids:
        raise DataError(f"{file} is empty. Copy or download it again.")
    return coco_ids
