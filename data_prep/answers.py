"""VQA answers: their normal form, the vocabulary that a model chooses from, and soft scores.

The rules are those of VQA's evaluation (https://github.com/GT-Vision-Lab/VQA), as BridgeTower's data use them. Its
oddities are kept: the vocabulary of 3,129 answers and every published score depend on them.
"""

from __future__ import annotations

import io
import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bridgetower.errors import DataError
from bridgetower.io.storage import explain_read_errors

MIN_COUNT = 9
"""Number of questions of which an answer has to be the most frequent one, to get into the vocabulary."""
VOCABULARY_NAME = "answers.json"
"""Name of the vocabulary file beside the shards of vqav2."""
NO_ANSWER = "no answer in the vocabulary"
"""Reason for which a question is dropped, as the manifest counts it."""

_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_DIGIT_COMMA_DIGIT = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
# The original passes the flag re.UNICODE, which is 32, where re.sub takes the largest number of replacements.
_MAX_PERIODS = 32
_NUMBERS = {"none": "0"} | {
    word: str(number)
    for number, word in enumerate(
        ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    )
}
_ARTICLES = ("a", "an", "the")
# Score by the number of people who gave an answer. Written out, since 0.3 * 3 is not 0.9 in floating point.
_SCORES = {1: 0.3, 2: 0.6, 3: 0.9, 4: 1.0}

# Words whose spelling without any apostrophe is corrected. Texts are in lower case when they are compared, so the
# original never matches the four spellings with a capital I.
_WITHOUT_APOSTROPHES = """
    ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's I'm
    I've isn't it'd it'll ma'am might've mightn't must've mustn't needn't not've o'clock oughtn't shan't should've
    shouldn't somebody'll somebody's someone'd someone'll someone's something'd something'll that's there'd there're
    there's they'd they'll they're they've 'twas wasn't we've weren't what'll what're what's what've when's where'd
    where's where've who'd who'll who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're
    you've
"""
# Words whose spellings with one of the apostrophes missing are corrected.
_WITH_ONE_MISSING = """
    couldn't've hadn't've he'd've I'd've it'd've mightn't've 'ow's'at she'd've shouldn't've somebody'd've someone'd've
    something'd've there'd've they'd've we'd've who'd've wouldn't've y'all'd've y'all'll you'd've
"""


def _list_contractions() -> dict[str, str]:
    # The original lists these three like the others: the first is a slip, the other two change nothing.
    corrections = {"somebody'd": "somebodyd", "let's": "let's", "she's": "she's"}
    corrections |= {word.replace("'", ""): word for word in _WITHOUT_APOSTROPHES.split()}
    for word in _WITH_ONE_MISSING.split():
        corrections |= {word[:at] + word[at + 1 :]: word for at, letter in enumerate(word) if letter == "'"}
    return corrections


CONTRACTIONS = _list_contractions()
"""The 120 spellings that are corrected. Others that seem to be missing (shed, ill, were, its) are words themselves."""


def normalize_answer(answer: str) -> str:
    """Return the form in which answers are compared: ``The U.S.`` and ``us`` are equal.

    A punctuation mark becomes a space, but is deleted everywhere if it stands beside a space anywhere in the given
    text; if the text has a number such as 1,000, every mark is deleted. The result may be empty (for ``a``); the empty
    answer is treated like any other.

    Source: GT-Vision-Lab/VQA, PythonEvaluationTools/vqaEvaluation/vqaEval.py, processPunctuation and
        processDigitArticle. BridgeTower's code then removes commas, of which none are left.
    """
    has_number_with_comma = _DIGIT_COMMA_DIGIT.search(answer) is not None
    text = answer
    for mark in _MARKS:
        is_beside_space = f"{mark} " in answer or f" {mark}" in answer
        text = text.replace(mark, "" if is_beside_space or has_number_with_comma else " ")
    text = _PERIOD.sub("", text, count=_MAX_PERIODS)
    words = [_NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


class Vocabulary:
    """Answers that a model chooses from; the index of an answer is its label."""

    def __init__(self, answers: Iterable[str]) -> None:
        """Number the answers in their order. No answer may occur twice."""
        self.answers = tuple(answers)
        self._labels = {answer: label for label, answer in enumerate(self.answers)}
        assert len(self._labels) == len(self.answers)

    def __len__(self) -> int:
        return len(self.answers)

    def find_label(self, answer: str) -> int | None:
        """Return the label of an answer, spelled exactly so; None if it is not in the vocabulary."""
        return self._labels.get(answer)

    def to_json(self) -> bytes:
        """Return a JSON list in the order of labels, with one answer per line."""
        return (json.dumps(self.answers, ensure_ascii=False, indent=1) + "\n").encode("utf-8", "replace")


def build_vocabulary(answers: Iterable[str]) -> Vocabulary:
    """Choose the frequent answers, in the order in which they first occur.

    Args:
        answers: ``multiple_choice_answer`` of every annotation, as published. VQAv2's train followed by val gives 3,129
            answers.

    Source: microsoft/BridgeTower, src/utils/write_vqa.py.
    """
    counts = Counter(map(normalize_answer, answers))  # a Counter keeps the order of first occurrence
    return Vocabulary(answer for answer, count in counts.items() if count >= MIN_COUNT)


def read_vocabulary(file: Path) -> Vocabulary:
    """Read a vocabulary: a JSON list of texts, or a text file with one answer per line, in the order of labels.

    Raises:
        DataError: the file cannot be read, is neither of the two, is empty, or has an answer twice.
    """
    with explain_read_errors(file):
        raw = file.read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"The vocabulary {file} is not UTF-8 ({error}). Convert it first.") from error
    # Answers in their normal form have no brackets, so a file that begins with one is JSON.
    answers = _parse_json(text, file) if text.lstrip()[:1] in ("[", "{") else _split_lines(text)
    if not answers:
        raise DataError(f"The vocabulary {file} has no answers. It needs a JSON list of answers, or one per line.")
    repeated = [answer for answer, count in Counter(answers).items() if count > 1]
    if repeated:
        raise DataError(
            f"The vocabulary {file} has the answer {repeated[0]!r} twice, which would give it two labels. Delete one."
        )
    return Vocabulary(answers)


def score_answers(answers: Iterable[str], vocabulary: Vocabulary, *, normalize: bool = True) -> dict[int, float]:
    """Score the answers of a question: 0.3, 0.6 or 0.9 if one, two or three people gave it, 1 if more did.

    Args:
        answers: the answers of the ten people, as published.
        normalize: False compares answers as they are, as ViLT, METER and BridgeTower's first data did by mistake.

    Returns: score by label, in the order in which the answers first occur; empty if none is in the vocabulary.
    Source: microsoft/BridgeTower, src/utils/write_vqa.py.
    """
    counts = Counter(normalize_answer(answer) if normalize else answer for answer in answers)
    labels = {answer: vocabulary.find_label(answer) for answer in counts}
    return {label: _SCORES[min(counts[answer], 4)] for answer, label in labels.items() if label is not None}


def _parse_json(text: str, file: Path) -> list[str]:
    try:
        answers: Any = json.loads(text)
    except ValueError as error:
        raise DataError(f"The vocabulary {file} is not JSON, or was cut short ({error}). Copy it again.") from error
    if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
        raise DataError(
            f"The vocabulary {file} is JSON, but not a list of texts. Write the answers as a list in the order of "
            'their labels: ["yes", "no"].'
        )
    return answers


def _split_lines(text: str) -> list[str]:
    # Not splitlines(), which also ends lines at characters that an answer may hold. A line may be the empty answer.
    lines = io.StringIO(text, newline=None).read().removesuffix("\n").split("\n")
    return [] if lines == [""] else [line.strip() for line in lines]
