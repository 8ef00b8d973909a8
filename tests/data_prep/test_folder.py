"""The source folder reads images with a caption file, and refuses wrong rows with their line."""

from __future__ import annotations

import datetime
import hashlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from bridgetower.errors import ConfigError, DataError
from bridgetower.io.storage import to_path
from bridgetower.shards.index import ShardReader
from data_prep.record import Record, Reject, SourceOptions
from data_prep.sources import folder
from tests.data_prep.layouts import folder as layout
from tests.small_corpora import build_records, draw, file_of


@pytest.fixture
def raw(tmp_path) -> Path:
    """Make a folder with three images, one of them in a subfolder."""
    folder: Path = tmp_path / "raw"
    (folder / "sub").mkdir(parents=True)
    for number, name in enumerate(["a.png", "b.png", "sub/c.png"]):
        (folder / name).write_bytes(file_of(draw(number)))
    return folder


def options_of(raw: Path | None, captions: object) -> SourceOptions:
    return SourceOptions(raw=raw, flags={"captions": str(captions)})


def read(raw: Path, file_name: str, content: str | bytes) -> list[Record]:
    """Write a caption file and read its records, without the rejects."""
    file = raw.parent / file_name
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return [entry for entry in folder.records(options_of(raw, file)) if isinstance(entry, Record)]


def read_parquet(raw: Path, columns: Mapping[str, object]) -> list[Record]:
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.table(columns), raw.parent / "c.parquet")
    return [entry for entry in folder.records(options_of(raw, raw.parent / "c.parquet")) if isinstance(entry, Record)]


def lines(*rows: object) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def captions_by_key(records: list[Record]) -> dict[str, list[str]]:
    """Join the captions of records with the same key, as a build does."""
    joined: dict[str, list[str]] = {}
    for record in records:
        joined.setdefault(record.key, []).extend(record.captions)
    return joined


@pytest.mark.parametrize("kind", layout.LAYOUTS)
def test_a_build_keeps_the_good_rows_and_counts_the_others(tmp_path, kind):
    if kind == "parquet":
        pytest.importorskip("pyarrow")
    expected = layout.write(tmp_path / "in", kind)
    options = options_of(tmp_path / "in" / "raw", layout.captions_file(tmp_path / "in", kind))
    manifests = build_records(folder.records(options), tmp_path / "out")
    assert manifests.keys() == expected.keys()
    for split, manifest in manifests.items():
        totals, counts = manifest.totals, expected[split]
        assert (totals.rows, totals.images, totals.captions) == (counts.rows, counts.images, counts.captions)
        assert totals.rejects == counts.rejects


def test_a_csv_gives_a_record_per_image(raw):
    records = read(raw, "c.csv", 'image,caption\na.png,"one, with a comma"\nsub/c.png,three\n')
    assert captions_by_key(records)["a"] == ["one, with a comma"]
    assert [record.image.path for record in records] == [raw / "a.png", raw / "sub" / "c.png"]


def test_jsonl_gives_a_record_per_image_with_one_caption_or_a_list(raw):
    content = lines({"image": "a.png", "caption": "one"}, {"image": "b.png", "captions": ["two", "zwei"]})
    assert captions_by_key(read(raw, "c.jsonl", content)) == {"a": ["one"], "b": ["two", "zwei"]}


def test_rows_of_the_same_image_are_joined_however_it_is_spelt(raw):
    records = read(raw, "c.csv", f"image,caption\na.png,1\nb.png,2\n./a.png,3\nsub/../a.png,4\n{raw}/a.png,5\n")
    assert captions_by_key(records) == {"a": ["1", "3", "4", "5"], "b": ["2"]}


def test_an_absolute_name_through_a_link_to_the_folder_is_found(raw, tmp_path):
    (tmp_path / "link").symlink_to(raw)
    records = read(tmp_path / "link", "c.csv", f"image,caption\n{tmp_path}/link/a.png,1\na.png,2\n")
    assert captions_by_key(records) == {"a": ["1", "2"]}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize(
    ("file_name", "content"),
    [("c.csv", "image,caption\r\na.png,Ünï ☂\r\n"), ("c.JSONL", '{"image":"a.png","caption":"Ünï ☂"}\n')],
)
def test_files_with_and_without_a_byte_order_mark_are_read(raw, file_name, content, encoding):
    assert captions_by_key(read(raw, file_name, content.encode(encoding))) == {"a": ["Ünï ☂"]}


def test_a_caption_may_hold_quotes_and_line_ends(raw):
    records = read(raw, "c.csv", 'image,caption\na.png,"a ""quoted"" word\nand a second line"\n')
    assert captions_by_key(records) == {"a": ['a "quoted" word\nand a second line']}


def test_split_image_id_and_other_columns_are_kept(raw):
    (record,) = read(raw, "c.csv", "image,caption,split,image_id,url\na.png,x,val,coco:7,http://a\n")
    assert (record.split, record.image_id, record.annotations) == ("val", "coco:7", ({"url": "http://a"},))


def test_other_columns_stay_with_their_own_caption(raw, tmp_path):
    rows = [
        {"image": "a.png", "captions": ["one", "two"], "by": "x"},
        {"image": "a.png", "caption": "three"},
        {"image": "b.png", "caption": "four"},
        {"image": "a.png", "caption": "five", "by": "y"},
    ]
    build_records(read(raw, "c.jsonl", lines(*rows)), tmp_path / "out")
    reader = ShardReader(tmp_path / "out" / "00000.tar")
    annotations = {reader.read(row).record["captions"][0]: reader.read(row).record["annotations"] for row in range(2)}
    assert annotations == {"one": [{"by": "x"}, {"by": "x"}, {}, {"by": "y"}], "four": [{}]}


def test_without_other_columns_there_are_no_annotations(raw):
    assert [record.annotations for record in read(raw, "c.csv", "image,caption,split\na.png,x,val\n")] == [()]


def test_a_row_with_an_empty_list_is_rejected_also_if_its_image_has_other_rows(raw, tmp_path):
    (raw.parent / "c.jsonl").write_text(lines({"image": "a.png", "captions": []}, {"image": "a.png", "caption": "x"}))
    entries = list(folder.records(options_of(raw, raw.parent / "c.jsonl")))
    assert entries[0] == Reject(reason="no caption")
    totals = build_records(entries, tmp_path / "out")[""].totals
    assert (totals.rows, totals.captions, totals.rejects) == (2, 1, {"no caption": 1})


def test_parquet_is_read_with_lists_dates_and_numbers(raw):
    columns = {
        "image": ["a.png", "b.png"],
        "captions": [["one", "two"], ["three"]],
        "split": ["train", "val"],
        "taken": [datetime.date(2020, 1, 2), None],
        "score": [float("nan"), 0.5],
        "image_id": [0, 7],
    }
    first, second = read_parquet(raw, columns)
    assert (first.captions, second.captions) == (("one", "two"), ("three",))
    assert (first.image_id, second.image_id, second.split) == ("0", "7", "val")
    assert (first.annotations, second.annotations) == (({"taken": "2020-01-02"},) * 2, ({"score": 0.5},))


def test_a_parquet_file_without_its_columns_with_bytes_or_damaged_is_refused(raw):
    with pytest.raises(DataError, match=r"has the columns path, text; it needs image and caption"):
        read_parquet(raw, {"path": ["a"], "text": ["b"]})
    with pytest.raises(DataError, match=r"row 1: the column thumb holds bytes"):
        read_parquet(raw, {"image": ["a.png"], "caption": ["x"], "thumb": [b"1"]})
    with pytest.raises(DataError, match=r"row 2 has image=None"):
        read_parquet(raw, {"image": ["a.png", None], "caption": ["x", "y"]})
    with pytest.raises(DataError, match=r"c\.parquet is not Parquet, or is damaged"):
        read(raw, "c.parquet", "image,caption\n")


def test_parquet_without_its_package_is_refused_with_the_command_that_installs_it(raw, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match="pip install pyarrow"):
        read(raw, "c.parquet", b"PAR1")


@pytest.fixture
def store() -> Path:
    """Put an image into a folder in an object store. Returns: the folder above."""
    root: Path = to_path("memory://photos-of-test-folder")
    (root / "raw" / "sub").mkdir(parents=True, exist_ok=True)
    (root / "raw" / "sub" / "a.png").write_bytes(file_of(draw(1)))
    return root


@pytest.mark.parametrize("file_name", ["c.csv", "c.jsonl"])
def test_images_and_captions_may_be_in_an_object_store(store, tmp_path, file_name):
    content = "image,caption\nsub/a.png,x\n./sub/a.png,y\n"
    if file_name == "c.jsonl":
        content = lines({"image": "sub/a.png", "caption": "x"}, {"image": "./sub/a.png", "caption": "y"})
    (store / file_name).write_bytes(content.encode())
    build_records(folder.records(options_of(store / "raw", store / file_name)), tmp_path / "out")
    assert ShardReader(tmp_path / "out" / "00000.tar").read(0).record["captions"] == ["x", "y"]


@pytest.mark.parametrize("name", ["/etc/passwd", "../a.png", "sub/../../a.png", "s3://other/a.png", ".", "a\0b"])
def test_a_name_that_leaves_a_store_is_refused(store, name):
    (store / "c.jsonl").write_bytes(lines({"image": name, "caption": "x"}).encode())
    with pytest.raises(DataError, match=r"line 1 names the image .*Names in a store start at --raw"):
        list(folder.records(options_of(store / "raw", store / "c.jsonl")))


def test_an_image_without_a_text_is_rejected_and_counted(raw, tmp_path):
    records = read(raw, "c.csv", "image,caption\na.png,\nb.png, \t \nsub/c.png,three\nmissing.png,four\n")
    manifest = build_records(records, tmp_path / "out")[""]
    assert manifest.totals.rejects == {"empty caption": 2, "image file missing": 1}
    reader = ShardReader(tmp_path / "out" / "00000.tar")
    assert [reader.read(row).record["captions"] for row in range(len(reader))] == [["three"]]


@pytest.mark.parametrize(
    "name",
    [
        "with space.png",
        "dots.in.name.png",
        "ünï☂.png",
        "-dash.png",
        "a" * 120 + ".png",
        "no_suffix",
        "émoji 🎉 (1).JPEG",
    ],
)
def test_unusual_file_names_become_keys_without_a_dot_that_fit_into_a_tar_header(raw, tmp_path, name):
    (raw / name).write_bytes(file_of(draw(9)))
    (record,) = read(raw, "c.jsonl", lines({"image": name, "caption": "x"}))
    build_records([record], tmp_path / "out")
    sample = ShardReader(tmp_path / "out" / "00000.tar").read(0)
    expected = f"sha256:{hashlib.sha256(file_of(draw(9))).hexdigest()[:32]}"
    assert (sample.image, sample.record["image_id"]) == (file_of(draw(9)), expected)
    assert "." not in record.key and record.key.isascii()


def image_ids(raw, out, **images):
    """Build a corpus of images without given ids. Returns: the ids that the build gave them."""
    raw.mkdir()
    for name, content in images.items():
        (raw / f"{name}.png").write_bytes(content)
    records = read(raw, "c.jsonl", lines(*({"image": f"{name}.png", "caption": "x"} for name in images)))
    build_records(records, out)
    return set(ShardReader(out / "00000.tar").image_ids().tolist())


def test_images_in_two_corpora_have_the_same_id_exactly_if_their_files_are_equal(tmp_path):
    first = image_ids(tmp_path / "a", tmp_path / "out_a", one=file_of(draw(1)), two=file_of(draw(2)))
    second = image_ids(tmp_path / "b", tmp_path / "out_b", one=file_of(draw(3)), three=file_of(draw(2)))
    assert len(first) == len(second) == 2 and len(first & second) == 1


def test_names_that_differ_only_in_special_characters_have_different_keys(raw):
    names = ["a b.png", "a_b.png", "a.b.png", "ä_b.png", "sub/a b.png", "sub_a b.png"]
    records = read(raw, "c.jsonl", lines(*({"image": name, "caption": "x"} for name in names)))
    assert len({record.key for record in records}) == len(names)


def test_two_files_whose_names_differ_only_in_the_suffix_are_refused(raw, tmp_path):
    records = read(raw, "c.csv", "image,caption\na.png,x\na.jpg,y\n")
    with pytest.raises(DataError, match=r"Two images have the key 'a'.*rename one"):
        build_records(records, tmp_path / "out")


@pytest.mark.parametrize(
    ("header", "named"),
    [("image,text", "image, text"), ("caption", "caption"), ("image;caption", "image;caption"), ("", "none")],
)
def test_a_csv_without_its_columns_is_refused_with_those_it_has(raw, header, named):
    with pytest.raises(DataError, match=f"has the columns {named}; it needs image,caption"):
        read(raw, "c.csv", f"{header}\na.png,x\n" if header else "")


@pytest.mark.parametrize(
    ("file_name", "content", "problem"),
    [
        ("c.csv", "image,caption\na.png,one, two\n", r"line 2 does not have 2 columns.*double quotes"),
        ("c.csv", "image,caption\na.png\n", r"line 2 does not have 2 columns"),
        ("c.csv", 'image,caption\na.png,"never closed\n', r"line 2 is not CSV"),
        ("c.csv", 'image,"caption\na.png,x\n', r"is not CSV"),
        ("c.csv", "image,caption,caption\na.png,x,y\n", r"two columns with the same name"),
        ("c.csv", "image,caption\n,x\n", r"line 2 has image=''"),
        ("c.jsonl", '{"image": "a.png"\n', r"line 1 is not JSON"),
        ("c.jsonl", '\n\n["a.png", "x"]\n', r"line 3 is not a JSON object"),
        ("c.jsonl", lines({"caption": "x"}), r"line 1 has image=None"),
        ("c.jsonl", lines({"image": 7, "caption": "x"}), r"line 1 has image=7"),
        ("c.jsonl", lines({"image": "a.png"}), r"line 1 has caption=None"),
        ("c.jsonl", lines({"image": "a.png", "captions": ["x", None]}), r"caption=\['x', None\]"),
        ("c.jsonl", lines({"image": "a.png", "caption": {"en": "x"}}), r"caption=\{'en': 'x'\}"),
        ("c.jsonl", '{"image": "a\\u0000.png", "caption": "x"}', r"cannot be the name of a file"),
        ("c.jsonl", '{"image": "\\ud83d.png", "caption": "x"}', r"cannot be the name of a file"),
        ("c.csv", b"image,caption\na.png,\xff\n", r"is not UTF-8"),
        ("c.jsonl", '{"image": "a.png", "caption": "x"}'.encode("utf-16"), r"is not UTF-8"),
    ],
)
def test_a_row_that_is_not_as_described_is_refused_with_its_line(raw, file_name, content, problem):
    with pytest.raises(DataError, match=problem):
        read(raw, file_name, content)


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "sub/../../x.png", ".", "sub/..", "link.png"])
def test_a_file_outside_the_folder_is_refused(raw, name):
    (raw / "link.png").symlink_to("/etc/passwd")
    with pytest.raises(DataError, match=r"line 1 names the image .*, which is not a file below --raw="):
        read(raw, "c.jsonl", lines({"image": name, "caption": "x"}))


def test_an_image_in_two_splits_is_refused_as_a_leak(raw):
    with pytest.raises(DataError, match=r"line 3: the image a\.png is in the splits 'train' and 'val'.*leak"):
        read(raw, "c.csv", "image,caption,split\na.png,x,train\na.png,y,val\n")


@pytest.mark.parametrize("file_name", ["c.txt", "c.parquet.gz", "captions"])
def test_another_kind_of_caption_file_is_refused_with_the_known_ones(raw, file_name):
    with pytest.raises(ConfigError, match=r"must end in \.csv, \.jsonl or \.parquet"):
        read(raw, file_name, "image,caption\n")


def test_a_missing_caption_file_is_refused(raw):
    with pytest.raises(DataError, match=r"nowhere\.csv cannot be read \(No such file or directory\)"):
        list(folder.records(options_of(raw, raw / "nowhere.csv")))


def test_a_missing_folder_is_refused(raw):
    with pytest.raises(DataError, match="nowhere is not a folder"):
        list(folder.records(options_of(raw / "nowhere", raw / "c.csv")))


@pytest.mark.parametrize("given", [{"raw": None}, {"flags": {}}, {"flags": {"captions": ""}}])
def test_if_a_flag_is_missing_the_error_names_both(raw, given):
    options = SourceOptions(**{"raw": raw, "flags": {"captions": "c.csv"}, **given})
    with pytest.raises(ConfigError, match=r"needs --raw=DIR .* and --captions=FILE"):
        list(folder.records(options))
