"""Visual Genome's questions are kept or dropped by the rules of tables checked by hand, VQA's normal form included."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from data_prep.record import Record, Reject, SourceOptions
from data_prep.sources import vgqa
from tests.data_prep.layouts import put
from tests.data_prep.layouts.vgqa import IMAGE_FILE, QUESTIONS_FILE, karpathy_file

VOCABULARY = [
    *("yes", "no", "2", "0", "1000", "black white", "black and white", "us", "10:30", "grass", "on grass", "t shirt"),
    *("don't know", "3.5", "stop sign", "man", "y'all", ""),
]
DROPPED = "no answer in the vocabulary"
CONTRADICTORY = "question with contradictory answers"
REPEATED = "repeated question"

# An answer as it was typed, and the answer of the vocabulary that it matches; None: the question is dropped.
ANSWERS: list[tuple[str, str | None]] = [
    # Case, white space and the period that ends most of VG's answers.
    ("yes", "yes"),
    ("Yes.", "yes"),
    ("YES!", "yes"),
    ("yes?", "yes"),
    ("  Yes  ", "yes"),
    ("Yes\n", "yes"),
    ("(yes)", "yes"),
    ('"Yes"', "yes"),
    ("Yes, it is.", None),
    ("yes;no", None),
    ("No.", "no"),
    ("No, thanks", None),
    ("Stop sign.", "stop sign"),
    ("stop  sign", "stop sign"),
    ("stop-sign", "stop sign"),
    ("Stopsign.", None),
    # Articles are deleted, other words stay.
    ("The grass.", "grass"),
    ("A grass", "grass"),
    ("Grasses.", None),
    ("On the grass.", "on grass"),
    ("In the grass.", None),
    ("A man.", "man"),
    ("The Man", "man"),
    ("A man and a woman.", None),
    ("Another man", None),
    # An answer that is only an article becomes the empty answer, which is treated like any other.
    ("A", ""),
    ("The.", ""),
    (".", ""),
    ("", ""),
    # Numbers.
    ("2", "2"),
    ("Two.", "2"),
    ("the two", "2"),
    ("2.", "2"),
    ("2nd", None),
    ("Three.", None),
    ("None.", "0"),
    ("zero", "0"),
    ("0.", "0"),
    ("0.0", None),
    ("nothing", None),
    ("1,000", "1000"),
    ("1,000.", "1000"),
    ("1000", "1000"),
    ("1, 000", None),
    ("1,000 people", None),
    ("$1,000", None),
    ("3.5", "3.5"),
    ("3.5.", "3.5"),
    ("3. 5", None),
    ("10:30.", "10:30"),
    ("10:30 PM", None),
    ("ten thirty", None),
    # Marks become a space, or are deleted if a space is beside them.
    ("Black/white", "black white"),
    ("Black / white", "black white"),
    ("Black,white.", "black white"),
    ("Black and white.", "black and white"),
    ("Black & white.", None),
    ("T-shirt.", "t shirt"),
    ("A t-shirt", "t shirt"),
    ("T - shirt", "t shirt"),
    ("T- shirt", "t shirt"),
    ("T-shirts.", None),
    ("Tshirt", None),
    ("The U.S.", "us"),
    ("U.S", "us"),
    ("U S", None),
    ("USA", None),
    # Contractions.
    ("Dont know.", "don't know"),
    ("Don't know", "don't know"),
    ("I don't know.", None),
    ("Do not know.", None),
    ("yall", "y'all"),
    ("Y'all.", "y'all"),
]

# Questions of an image with their answers, the indices of those that are kept, and the reasons for dropping the others.
IMAGES: list[tuple[list[tuple[str, str]], list[int], dict[str, int]]] = [
    ([], [], {}),
    ([("Is it day?", "Yes."), ("Is it night?", "No.")], [0, 1], {}),
    ([("Is it day?", "Dirt."), ("Is it day?", "Sand.")], [], {DROPPED: 2}),
    # A question with several answers of the vocabulary is dropped with all of them.
    ([("Is it day?", "Yes."), ("Is it day?", "No.")], [], {CONTRADICTORY: 2}),
    ([("Is it day?", "Yes."), ("Is it day?", "No."), ("Is it day?", "Yes.")], [], {CONTRADICTORY: 3}),
    ([("Is it day?", "Yes."), ("Is it day?", "yes"), ("Is it day?", "No.")], [], {CONTRADICTORY: 3}),
    ([("Who?", "Man."), ("Is it day?", "Yes."), ("Who?", "No."), ("How?", "Two.")], [1, 3], {CONTRADICTORY: 2}),
    ([("What?", "The."), ("What?", "Grass.")], [], {CONTRADICTORY: 2}),
    ([("Where?", "On the grass."), ("Where?", "The grass.")], [], {CONTRADICTORY: 2}),
    ([("What?", "Black and white."), ("What?", "Black/white.")], [], {CONTRADICTORY: 2}),
    # Answers that are not in the vocabulary contradict nothing.
    ([("What?", "Grass."), ("What?", "Dirt.")], [0], {DROPPED: 1}),
    ([("What?", "Dirt."), ("What?", "Grass.")], [1], {DROPPED: 1}),
    ([("What?", "Dirt."), ("What?", "Yes."), ("What?", "No.")], [], {DROPPED: 1, CONTRADICTORY: 2}),
    # The same answer again, however it is written: the first is kept.
    ([("Is it day?", "Yes."), ("Is it day?", "Yes.")], [0], {REPEATED: 1}),
    ([("How many?", "Two."), ("How many?", "2"), ("How many?", "the two")], [0], {REPEATED: 2}),
    ([("How many?", "0"), ("How many?", "None.")], [0], {REPEATED: 1}),
    ([("What?", "Black/white."), ("What?", "black white")], [0], {REPEATED: 1}),
    ([("What?", "Dirt."), ("What?", "Grass."), ("What?", "The grass.")], [1], {DROPPED: 1, REPEATED: 1}),
    ([("What?", "The."), ("What?", "")], [0], {REPEATED: 1}),
    # Questions are compared letter by letter, and only with those of the same image.
    ([("Is it day?", "Yes."), ("is it day?", "No.")], [0, 1], {}),
    ([("Is it day?", "Yes."), ("Is it day", "No.")], [0, 1], {}),
    ([("Is it day?", "Yes."), ("Is it day? ", "Yes.")], [0, 1], {}),
    ([("Is it day?", "Yes."), ("Is it  day?", "No.")], [0, 1], {}),
    ([("Is it day?", "No.")], [0], {}),
]

UNKNOWN, NOT_COCO = "image not in image_data.json", "image not of COCO"
OF_NO_SPLIT = "image of COCO in none of Karpathy's splits"
# Origin of an image, and its corpus folder or the reason why its questions are dropped, with --images=all and coco.
ORIGINS = {
    "train of Karpathy": ("train", "train"),
    "val of Karpathy": ("val", "val"),
    "test of Karpathy": ("val", "val"),
    "COCO alone": (OF_NO_SPLIT, OF_NO_SPLIT),
    "not of COCO": ("val", NOT_COCO),  # among the 5,000 that fill val and test
    "not in image_data.json": (UNKNOWN, UNKNOWN),
}


def write(folder: Path, images: list[list[tuple[str, str]]], origins: list[str]) -> SourceOptions:
    """Write the files for images 1, 2, ...; question n of image i gets the id 100 i + n."""
    questions = [
        {
            "id": number,
            "qas": [
                {"question": question, "answer": answer, "qa_id": 100 * number + n, "image_id": number}
                for n, (question, answer) in enumerate(qas)
            ],
        }
        for number, qas in enumerate(images, 1)
    ]
    url = "https://cs.stanford.edu/people/rak248/VG_100K/1.jpg"
    rows = [
        {"image_id": number, "coco_id": None if origin == "not of COCO" else 1000 + number, "url": url}
        for number, origin in enumerate(origins, 1)
        if origin != "not in image_data.json"
    ]
    put(folder / QUESTIONS_FILE, json.dumps(questions))
    put(folder / IMAGE_FILE, json.dumps(rows))
    put(folder / "answers.json", json.dumps(VOCABULARY))
    for split in ("train", "val", "test"):
        ids = [1000 + number for number, origin in enumerate(origins, 1) if origin == f"{split} of Karpathy"] or [7]
        lines = [f"val2014/COCO_val2014_{coco_id:012d}.jpg {coco_id}\n" for coco_id in ids]
        put(karpathy_file(folder, split), "".join(lines))
    return SourceOptions(raw=folder)


@pytest.mark.parametrize(("answer", "expected"), ANSWERS)
def test_an_answer_matches_the_vocabulary_in_its_normal_form(answer, expected, tmp_path):
    (entry,) = vgqa.records(write(tmp_path, [[("What?", answer)]], ["train of Karpathy"]))
    if expected is None:
        assert entry == Reject(reason=DROPPED, split="train")
    else:
        label = VOCABULARY.index(expected)
        assert isinstance(entry, Record) and entry.captions == ("What?",)
        assert entry.annotations == ({"question_id": 100, "answers": [answer], "labels": [label], "scores": [1.0]},)


@pytest.mark.parametrize(("qas", "kept", "dropped"), IMAGES)
def test_contradictory_and_repeated_questions_are_dropped(qas, kept, dropped, tmp_path):
    other = [("Is it day?", "Yes."), ("What?", "Man.")]
    entries = list(vgqa.records(write(tmp_path, [qas, other], ["train of Karpathy"] * 2)))
    records = {entry.key: entry for entry in entries if isinstance(entry, Record)}
    assert len(records.pop("2").captions) == 2
    questions = [annotation["question_id"] for record in records.values() for annotation in record.annotations]
    assert questions == [100 + index for index in kept]
    assert [caption for record in records.values() for caption in record.captions] == [qas[index][0] for index in kept]
    counts: Counter[str] = Counter()
    for entry in entries:
        if isinstance(entry, Reject):
            counts[entry.reason] += entry.rows
    assert counts == dropped
    assert len(qas) == len(kept) + counts.total()


@pytest.mark.parametrize("images", ["all", "coco"])
@pytest.mark.parametrize("origin", ORIGINS)
def test_the_image_decides_the_corpus_folder(origin, images, tmp_path):
    questions = [("Is it day?", "Yes."), ("What?", "Grass.")]
    options = write(tmp_path, [questions, []], [origin, "train of Karpathy"])
    (entry,) = vgqa.records(SourceOptions(raw=options.raw, flags={"images": images}))
    expected = ORIGINS[origin][images == "coco"]
    if isinstance(entry, Record):
        assert (entry.split, len(entry.captions)) == (expected, 2)
    else:
        assert (entry.reason, entry.rows) == (expected, 2)


def test_the_tables_are_long_and_have_no_case_twice():
    assert len({answer for answer, _ in ANSWERS}) == len(ANSWERS) >= 60
    assert len({tuple(qas) for qas, _, _ in IMAGES}) == len(IMAGES) >= 20
