"""Miniatures of VQAv2 and of Visual Genome's questions give the right answers, labels and splits, and drop the rest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bridgetower.errors import ConfigError, DataError
from bridgetower.shards.index import ShardReader
from bridgetower.shards.manifest import load_manifest
from data_prep.build_shards import main
from data_prep.record import Record, Reject, SourceOptions
from data_prep.sources import vgqa, vqav2
from tests.data_prep.layouts import vgqa as vgqa_layout
from tests.data_prep.layouts import vqav2 as vqav2_layout


@pytest.fixture
def vqa_raw(tmp_path) -> Path:
    vqav2_layout.write(tmp_path / "raw")
    return tmp_path / "raw"


@pytest.fixture
def vg_raw(tmp_path) -> Path:
    vgqa_layout.write(tmp_path / "raw")
    return tmp_path / "raw"


def read_vqav2(raw: Path, **flags: str) -> dict[int, Record]:
    """Read the records of train, val and test, by question id."""
    entries = vqav2.records(SourceOptions(raw=raw, flags=flags))
    return {
        entry.annotations[0]["question_id"]: entry
        for entry in entries
        if isinstance(entry, Record) and entry.split != "test-dev"
    }


def read_vgqa(raw: Path, **flags: str) -> dict[str, Record]:
    """Read the records, by key."""
    entries = vgqa.records(SourceOptions(raw=raw, flags=flags))
    return {entry.key: entry for entry in entries if isinstance(entry, Record)}


def rejects_of(raw: Path, **flags: str) -> dict[str, int]:
    counts: dict[str, int] = {}
    for entry in vgqa.records(SourceOptions(raw=raw, flags=flags)):
        if isinstance(entry, Reject):
            counts[entry.reason] = counts.get(entry.reason, 0) + entry.rows
    return counts


def edit(file: Path, name: str, row: int, **fields: Any) -> None:
    """Change fields of a row of a list in a JSON file."""
    content = json.loads(file.read_text())
    content[name][row].update(fields)
    file.write_text(json.dumps(content))


def test_a_question_has_its_answers_labels_and_scores(vqa_raw):
    record = read_vqav2(vqa_raw)[9000]
    assert (record.key, record.image_id, record.split) == ("COCO_train2014_000000000009", "coco:9", "train")
    assert record.captions == ("How many cookies are on plate 0?",)
    assert record.annotations == (
        {
            "question_id": 9000,
            "question_type": "how many",
            "answer_type": "number",
            "answers": ["2", "2", "2", "two", "two", "3", "3", "3", "3", "3"],
            "labels": [0],
            "scores": [1.0],
        },
    )


def test_without_normal_form_two_is_not_2_and_its_questions_are_dropped(vqa_raw):
    records = read_vqav2(vqa_raw, normalize="false")
    assert records[9000].annotations[0]["scores"] == [0.9]
    assert 42000 in read_vqav2(vqa_raw) and 42000 not in records


def test_a_vocabulary_file_replaces_the_vocabulary_of_the_annotations(vqa_raw, tmp_path):
    (tmp_path / "own.txt").write_text("no\nblue\n")
    records = read_vqav2(vqa_raw, answers=str(tmp_path / "own.txt"))
    assert records[25009].annotations[0]["labels"] == [0]
    annotation = records[73001].annotations[0]
    assert (annotation["labels"], annotation["scores"]) == ([1], [1.0])
    assert 9000 not in records


def test_questions_of_test_have_ids_and_no_answers(vqa_raw):
    record = read_vqav2(vqa_raw)[16000]
    assert record.image.path == vqa_raw / "test2015" / "COCO_test2015_000000000016.jpg"
    assert record.annotations == ({"question_id": 16000},)


def test_test_dev_has_the_images_of_test(vqa_raw):
    (record,) = [r for r in vqav2.records(SourceOptions(raw=vqa_raw)) if r.split == "test-dev"]
    assert isinstance(record, Record)
    assert record.image.path == vqa_raw / "test2015" / "COCO_test2015_000000000001.jpg"


def test_a_build_writes_the_vocabulary_and_one_sample_per_image(vqa_raw, tmp_path):
    main("vqav2", raw=str(vqa_raw), out=str(tmp_path / "out"), workers="1")
    assert json.loads((tmp_path / "out" / "answers.json").read_text()) == vqav2_layout.VOCABULARY
    folder = tmp_path / "out" / "val"
    (shard,) = load_manifest(folder).shards
    reader = ShardReader(folder / shard.name)
    by_id = {sample.record["image_id"]: sample.record for sample in map(reader.read, range(len(reader)))}
    shoes = by_id["coco:42"]
    assert shoes["captions"] == [f"How many shoes are in row {number}?" for number in range(4)]
    assert [a["question_id"] for a in shoes["annotations"]] == [42000, 42001, 42002, 42003]


def test_the_vocabulary_of_a_build_is_what_vgqa_reads(vqa_raw, tmp_path):
    main("vqav2", raw=str(vqa_raw), out=str(tmp_path / "vqa"), workers="1")
    vgqa_layout.write(tmp_path / "vg")
    (tmp_path / "vg" / "answers.json").unlink()
    record = read_vgqa(tmp_path / "vg", answers=str(tmp_path / "vqa" / "answers.json"))["2412114"]
    assert [annotation["labels"] for annotation in record.annotations] == [[0], [1]]


def test_annotations_of_another_image_are_refused(vqa_raw):
    edit(vqav2_layout.annotations_file(vqa_raw, "val"), "annotations", 0, image_id=43)
    with pytest.raises(DataError, match=r"question 2 is about another image than its annotation in .*val2014_anno"):
        read_vqav2(vqa_raw)


def test_annotations_of_another_split_are_refused(vqa_raw):
    own_vocabulary = vqa_raw / "answers.txt"
    own_vocabulary.write_text("yes\n")
    other = vqav2_layout.annotations_file(vqa_raw, "val").read_text()
    vqav2_layout.annotations_file(vqa_raw, "train").write_text(other)
    with pytest.raises(DataError, match=r"None of the \d+ questions of .*train2014_questions.json has its annotation"):
        read_vqav2(vqa_raw, answers=str(own_vocabulary))


def test_a_second_annotation_is_counted(vqa_raw):
    edit(vqav2_layout.annotations_file(vqa_raw, "val"), "annotations", 1, question_id=42001)
    rejects = [e for e in vqav2.records(SourceOptions(raw=vqa_raw)) if isinstance(e, Reject) and e.split == "val"]
    assert [r.reason for r in rejects] == ["second annotation of a question", "question without an annotation"]


def test_files_in_which_no_answer_is_frequent_are_refused(vqa_raw):
    for split in ("train", "val"):
        file = vqav2_layout.annotations_file(vqa_raw, split)
        content = json.loads(file.read_text())
        content["annotations"] = content["annotations"][:4]
        file.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"No answer is the most frequent one of 9 questions.*--answers=FILE"):
        read_vqav2(vqa_raw)


def test_a_wrong_flag_is_refused(vqa_raw, vg_raw):
    with pytest.raises(ConfigError, match="--normalize=perhaps is neither true nor false"):
        read_vqav2(vqa_raw, normalize="perhaps")
    with pytest.raises(ConfigError, match="--images=flickr is neither coco nor all"):
        read_vgqa(vg_raw, images="flickr")


def test_kept_questions_of_vg_have_one_answer_of_the_vocabulary(vg_raw):
    record = read_vgqa(vg_raw)["1"]
    assert record.captions == ("Is it day?", "Is it  day?", "What is on the ground?")
    assert record.annotations == (
        {"question_id": 986000, "answers": ["Yes."], "labels": [0], "scores": [1.0]},
        {"question_id": 986005, "answers": ["Yes!"], "labels": [0], "scores": [1.0]},
        {"question_id": 986006, "answers": ["Grass."], "labels": [2], "scores": [1.0]},
    )


def test_images_of_coco_are_split_as_karpathy_split_them(vg_raw):
    records = read_vgqa(vg_raw)
    splits = {key: records[key].split for key in ("2412112", "2412113", "2412114")}
    assert splits == {"2412112": "train", "2412113": "val", "2412114": "val"}
    assert "2412115" not in records
    assert records["2412112"].image_id == "coco:547168" and records["1"].image_id == "vg:1"
    assert records["2412112"].meta == {"vg_id": 2412112, "coco_id": 547168}


def test_a_flag_leaves_out_images_that_are_not_coco_s(vg_raw):
    assert set(read_vgqa(vg_raw, images="coco")) == {"2412112", "2412113", "2412114"}
    assert rejects_of(vg_raw, images="coco")["image not of COCO"] == 8 + 1 + 1
    assert "image not of COCO" not in rejects_of(vg_raw, images="all")


def test_other_images_fill_val_and_test_by_a_seed_and_the_rest_is_train():
    # 10 images of COCO (6, 2 and 1 in Karpathy's splits, one in none) and 20 others; val and test have 5 each.
    coco_ids: dict[int, int | None] = {number: 100 + number for number in range(10)}
    coco_ids |= dict.fromkeys(range(10, 30))
    karpathy = {"train": [100, 101, 102, 103, 104, 105], "val": [106, 107, 7_000], "test": [108]}
    splits = vgqa.split_images(coco_ids, karpathy, held_out=5)
    assert splits == vgqa.split_images(dict(reversed(coco_ids.items())), karpathy, held_out=5)
    assert 9 not in splits and {splits[number] for number in range(6)} == {"train"}
    assert {splits[number] for number in (6, 7, 8)} == {"val"}
    others = [splits[number] for number in range(10, 30)]
    assert (others.count("val"), others.count("train")) == (3 + 4, 13)
    assert others != sorted(others) and others != sorted(others, reverse=True)


def test_the_splits_have_the_sizes_of_the_paper():
    """Source: reference_spec.md 4.4: 108,077 images, 51,208 of them COCO's; 5,000 in val, 5,000 in test, rest train."""
    karpathy = {
        "train": range(46_944),
        "val": range(46_944, 46_944 + 2_126),
        "test": range(46_944 + 2_126, 46_944 + 2_126 + 2_138),
    }
    coco_ids = {number: number if number < 51_208 else None for number in range(108_077)}
    splits = list(vgqa.split_images(coco_ids, karpathy).values())
    assert (splits.count("train"), splits.count("val")) == (98_077, 10_000)


def test_the_error_for_a_missing_vocabulary_says_how_to_get_it(vg_raw):
    (vg_raw / "answers.json").unlink()
    with pytest.raises(ConfigError, match=r"needs the vocabulary of VQAv2.*Build vqav2 first.*--answers=FILE"):
        read_vgqa(vg_raw)


@pytest.mark.parametrize("split", ["train", "val", "test"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ("COCO_val2014_000000011169.jpg\n", "line 1 is 'COCO_val2014_000000011169.jpg'"),
        ("a.jpg 7\nb.jpg x\n", "line 2 is 'b.jpg x'"),
    ],
)
def test_a_wrong_file_of_karpathy_s_splits_is_refused(split, content, message, vg_raw):
    file = vgqa_layout.karpathy_file(vg_raw, split)
    file.write_text(content)
    with pytest.raises(DataError, match=rf"{file}.*{message}"):
        read_vgqa(vg_raw)


def test_a_missing_file_of_karpathy_s_splits_is_named(vg_raw):
    vgqa_layout.karpathy_file(vg_raw, "val").unlink()
    with pytest.raises(DataError, match=r"does not find coco_splits/karpathy_val_images\.txt"):
        read_vgqa(vg_raw)
