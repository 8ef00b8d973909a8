"""Training targets of labelled pairs, from their annotations. Never imports torch."""

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
    """Return the number of classes of a task; 0 for retrieval, which learns the pairs themselves.

    Args:
        num_answers: size of VQA's vocabulary of answers.
    """
    return num_answers if task == "vqa" else _CLASSES[task]


def make_target(pair: Pair, task: TaskName, classes: int) -> F32:
    """Return the score of each class, float32, shape (C,): 1 for the right class, or VQA's soft scores.

    Args:
        classes: C, as ``count_classes`` returns it.

    Raises:
        DataError: the pair has no label, its label is not a class of the task, or NLVR2's second image is missing.
    """
    target = np.zeros(classes, np.float32)
    if task == "retrieval":
        return target
    if task == "nlvr2" and not pair.second_image:
        raise DataError(f"{pair.where} has one image; NLVR2 needs two. {_suggest_shards(task)}")
    if task == "vqa":
        labels, scores = pair.annotation.get("labels"), pair.annotation.get("scores")
        if not isinstance(labels, list) or not isinstance(scores, list) or len(labels) != len(scores):
            raise DataError(
                f"{pair.where} has no answers to its question {pair.caption!r}. The answers of test and test-dev are "
                f"not published: a server scores predictions. {_suggest_shards(task)}"
            )
    else:
        labels, scores = [pair.annotation.get("label")], [1.0]
    for label, score in zip(labels, scores, strict=True):
        if not isinstance(label, int) or not 0 <= label < classes:
            suggestion = (
                "Give the vocabulary's size as --model.heads.num_answers." if task == "vqa" else _suggest_shards(task)
            )
            raise DataError(f"{pair.where} has the label {label!r}; {task} has 0 to {classes - 1}. {suggestion}")
        target[label] = score
    return target


def check_labels(corpora: Corpora, task: TaskName, classes: int) -> None:
    """Check the first pair of each corpus, so that shards of another task are found before anything starts.

    Raises:
        DataError: as ``make_target``.
    """
    for corpus in range(len(corpora.folders)):
        make_target(corpora.read(*corpora.pair_of_corpus(corpus, 0)), task, classes)


def _suggest_shards(task: TaskName) -> str:
    return f"Give a folder of data_prep/build_shards.py {_SOURCES[task]} with labels."
