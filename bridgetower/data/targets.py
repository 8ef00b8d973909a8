"""What is to be learned of a labelled pair, read from its annotation. Never imports torch."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from bridgetower.config.finetune import TaskName
from bridgetower.data.corpora import Corpora, Pair
from bridgetower.errors import DataError

F32 = npt.NDArray[np.float32]

_SOURCES: Mapping[str, str] = {"vqa": "vqav2 or vgqa", "snli_ve": "snli_ve", "nlvr2": "nlvr2"}
_CLASSES: Mapping[str, int] = {"snli_ve": 3, "nlvr2": 2, "retrieval": 0}


def count_classes(task: TaskName, num_answers: int) -> int:
    """Right and wrong answers that a task knows; 0 where pairs themselves are what is learned.

    Args:
        num_answers: of VQA's vocabulary.
    """
    return num_answers if task == "vqa" else _CLASSES[task]


def make_target(pair: Pair, task: TaskName, classes: int) -> F32:
    """The score of each class, shape (C,): 1 for the right one, or VQA's soft scores.

    Args:
        classes: of ``num_classes``.

    Raises:
        DataError: the pair has no label, or one that the task does not know; or NLVR2's second picture is missing.
    """
    target = np.zeros(classes, np.float32)
    if task == "retrieval":
        return target
    if task == "nlvr2" and not pair.second_image:
        raise DataError(f"{pair.where} has one picture; NLVR2 reads two. {_cure(task)}")
    if task == "vqa":
        labels, scores = pair.annotation.get("labels"), pair.annotation.get("scores")
        if not isinstance(labels, list) or not isinstance(scores, list) or len(labels) != len(scores):
            raise DataError(
                f"{pair.where} has no answers to its question {pair.caption!r}. Those of test and test-dev are not "
                f"published: a server scores them. {_cure(task)}"
            )
    else:
        labels, scores = [pair.annotation.get("label")], [1.0]
    for label, score in zip(labels, scores, strict=True):
        if not isinstance(label, int) or not 0 <= label < classes:
            cure = "Give the vocabulary's size as --model.heads.num_answers." if task == "vqa" else _cure(task)
            raise DataError(f"{pair.where} has the label {label!r}; {task} knows 0 to {classes - 1}. {cure}")
        target[label] = score
    return target


def check_labels(corpora: Corpora, task: TaskName, classes: int) -> None:
    """Look at the first pair of each corpus, so that shards of another task are found before anything starts.

    Raises:
        DataError: as ``target_of``.
    """
    for corpus in range(len(corpora.folders)):
        make_target(corpora.read(*corpora.pair_of_corpus(corpus, 0)), task, classes)


def _cure(task: TaskName) -> str:
    return f"Give a folder of data_prep/build_shards.py {_SOURCES[task]} with labels."
