"""VQA answers have the normal form, vocabulary and soft scores of the published code; the table is checked by hand."""

from __future__ import annotations

import json

import pytest

from bridgetower.errors import DataError
from data_prep.answers import (
    CONTRACTIONS,
    Vocabulary,
    build_vocabulary,
    normalize_answer,
    read_vocabulary,
    score_answers,
)

NORMAL_FORMS = [
    # Results of the published code (reference_spec.md 4.3).
    ("1,000", "1000"),
    ("black/white", "black white"),
    ("U.S.", "us"),
    ("none", "0"),
    ("10:30", "10:30"),
    ("a, b", "b"),
    # Case, white space, articles.
    ("Yes", "yes"),
    ("  stop   sign ", "stop sign"),
    ("stop\tsign\n", "stop sign"),
    ("The U.S.", "us"),
    ("an apple", "apple"),
    ("A", ""),
    ("the", ""),
    ("THE THE a", ""),
    ("", ""),
    ("   ", ""),
    ("another", "another"),
    ("theatre", "theatre"),
    # Numbers as words.
    ("zero", "0"),
    ("Ten", "10"),
    ("the one", "1"),
    ("one hundred", "1 hundred"),
    ("none of the above", "0 of above"),
    ("nobody", "nobody"),
    ("eleven", "eleven"),
    ("twenty two", "twenty 2"),
    ("someone", "someone"),
    # A mark that stands beside a space somewhere is deleted everywhere; any other becomes a space.
    ("yes!", "yes"),
    ("yes ! no!", "yes no"),
    ("yes!no", "yes no"),
    ("yes! no!maybe", "yes nomaybe"),
    ("t-shirt", "t shirt"),
    ("t -shirt", "t shirt"),
    ("a-b- c", "ab c"),
    ("a,b", "b"),
    ("none,one", "0 1"),
    ("none, one", "0 1"),
    ("(red)", "red"),
    ("red (dark)", "red dark"),
    ("red(dark)", "red dark"),
    ("[x]{y}", "x y"),
    ("x_y=z", "x y z"),
    ("<b>", "b"),
    ("a\\b", "b"),
    ("c++", "c"),
    ("me@home.com", "me homecom"),
    ("`x`", "x"),
    ('6"', "6"),
    ("what?", "what"),
    ("yes;no", "yes no"),
    # A number with a comma deletes every mark of the text.
    ("1,000-2,000", "10002000"),
    ("x-y 1,000", "xy 1000"),
    ("1, 000", "1 000"),
    ("1 , 000", "1 000"),
    # Characters that do not count as marks.
    ("7'", "7'"),
    ("$5", "$5"),
    ("5%", "5%"),
    ("#1", "#1"),
    ("black & white", "black & white"),
    ("2:00 pm", "2:00 pm"),
    ("it's: good", "it's: good"),
    # Periods are deleted unless a digit follows, but at most 32 of them, by a slip of the original.
    ("no.", "no"),
    ("p.m.", "pm"),
    ("3.5", "3.5"),
    (".5", ".5"),
    ("1.", "1"),
    ("10 ft.", "10 ft"),
    ("...", ""),
    ("." * 32, ""),
    ("." * 35, "..."),
    # Contractions; the original leaves some out, and one is a slip.
    ("dont", "don't"),
    ("Dont know", "don't know"),
    ("can't", "can't"),
    ("cant", "can't"),
    ("couldnt've", "couldn't've"),
    ("couldn'tve", "couldn't've"),
    ("couldntve", "couldntve"),
    ("6 oclock", "6 o'clock"),
    ("yall", "y'all"),
    ("twas", "'twas"),
    ("somebody'd", "somebodyd"),
    ("lets", "lets"),
    ("let's", "let's"),
    ("its", "its"),
    ("ill", "ill"),
    ("Im", "im"),
    ("I'm", "i'm"),
    ("Ive", "ive"),
    ("dont-know", "don't know"),
    # Beyond ASCII.
    ("Café", "café"),
    ("１,０００", "１０００"),
]


@pytest.mark.parametrize(("answer", "normal"), NORMAL_FORMS)
def test_normal_form(answer, normal):
    assert normalize_answer(answer) == normal


def test_the_table_is_long_and_has_no_case_twice():
    assert len({answer for answer, _ in NORMAL_FORMS}) == len(NORMAL_FORMS) > 80


def test_there_are_120_contractions_and_four_never_match_lower_case_text():
    assert len(CONTRACTIONS) == 120
    assert {wrong for wrong in CONTRACTIONS if wrong != wrong.lower()} == {"Im", "Ive", "Id've", "I'dve"}


@pytest.mark.parametrize(
    ("answers", "scores"),
    [
        (["yes"] * 10, {0: 1.0}),
        (["yes"] * 4 + ["no"] * 6, {0: 1.0, 1: 1.0}),
        (["no"] * 3 + ["yes"] * 7, {1: 0.9, 0: 1.0}),
        (["yes"] * 2 + ["blue"] * 8, {0: 0.6}),
        (["yes"] + ["no"] * 3 + ["2"] * 2 + ["blue"] * 4, {0: 0.3, 1: 0.9, 2: 0.6}),
        (["Yes", "yes.", "YES!", "yes", "Two", "2", "two."], {0: 1.0, 2: 0.9}),
        (["blue"] * 10, {}),
        ([], {}),
    ],
)
def test_soft_scores_by_the_number_of_people(answers, scores):
    actual = score_answers(answers, Vocabulary(["yes", "no", "2"]))
    assert actual == scores and list(actual) == list(scores)


def test_without_normal_form_answers_count_as_they_were_typed():
    assert score_answers(["Yes", "yes", "two", "2", "2"], Vocabulary(["yes", "2"]), normalize=False) == {0: 0.3, 1: 0.6}


def test_a_vocabulary_has_answers_of_nine_questions_or_more_in_order_of_first_occurrence():
    answers = ["no", "Two", "yes"] + ["yes"] * 8 + ["no"] * 7 + ["2"] * 4 + ["two."] * 4
    assert build_vocabulary(answers).answers == ("2", "yes")  # "no" occurs eight times
    assert build_vocabulary([*answers, "No!"]).answers == ("no", "2", "yes")


def test_the_empty_answer_is_treated_like_any_other():
    vocabulary = build_vocabulary(["a"] * 9)
    assert vocabulary.answers == ("",) and score_answers(["the", "A"], vocabulary) == {0: 0.6}


@pytest.mark.parametrize("answers", [["yes", "no", "2", "café", 'a "b"'], ["", "yes"]])
def test_a_vocabulary_is_the_same_after_writing_and_reading(answers, tmp_path):
    file = tmp_path / "answers.json"
    file.write_bytes(Vocabulary(answers).to_json())
    assert read_vocabulary(file).answers == tuple(answers) and json.loads(file.read_text()) == answers


def test_a_vocabulary_may_be_a_text_file_of_any_system(tmp_path):
    file = tmp_path / "answers.txt"
    file.write_bytes("\ufeffyes\r\nno\r\nred wine\r\n".encode())
    vocabulary = read_vocabulary(file)
    assert vocabulary.answers == ("yes", "no", "red wine") and len(vocabulary) == 3
    assert (vocabulary.find_label("red wine"), vocabulary.find_label("Yes")) == (2, None)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has no answers"),
        (b"[]", "has no answers"),
        (b'{"yes": 0}', "is JSON, but not a list of texts"),
        (b"[1, 2]", "is JSON, but not a list of texts"),
        (b'["yes", ', "is not JSON, or was cut short"),
        (b"yes\nno\nyes\n", "has the answer 'yes' twice"),
        (b"caf\xe9\n", "is not UTF-8"),
    ],
)
def test_a_wrong_vocabulary_is_refused_with_its_file_name(content, message, tmp_path):
    (tmp_path / "answers").write_bytes(content)
    with pytest.raises(DataError, match=f"{tmp_path / 'answers'} {message}"):
        read_vocabulary(tmp_path / "answers")


def test_a_missing_vocabulary_is_named(tmp_path):
    with pytest.raises(DataError, match=r"none\.json"):
        read_vocabulary(tmp_path / "none.json")
