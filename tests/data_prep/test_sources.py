"""The sources of published corpora read a miniature of each, and refuse files that are not as published."""

from __future__ import annotations

import importlib
import json
import re
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from bridgetower.errors import ConfigError, DataError
from data_prep.record import ImageFile, ImagePolicy, Record, Reject, SourceOptions
from tests.data_prep.layouts import coco, nlvr2, snli_ve, vg, vgqa, vqav2

SOURCES = ("coco", "coco_retrieval", "flickr30k", "nlvr2", "snli_ve", "vg", "vgqa", "vqav2")
PRETRAINING = ("coco", "vg")
# Sources in which equal texts of an image are separate rows, and each text has an annotation.
TASKS_OF_ROWS = ("nlvr2", "snli_ve", "vgqa", "vqav2")
FLAGS = {"vgqa": {"answers", "images"}, "vqav2": {"answers", "normalize"}}
KARPATHY = ("coco", "coco_retrieval", "flickr30k")
# Files that each source requires.
FILES = {
    "coco": [coco.JSON_FILE],
    "coco_retrieval": [coco.JSON_FILE],
    "flickr30k": ["karpathy/dataset_flickr30k.json"],
    "nlvr2": [f"nlvr2/data/{split}.json" for split in ("train", "dev", "test1")],
    "snli_ve": [f"snli_ve/snli_ve_{split}.jsonl" for split in ("train", "dev", "test")],
    "vg": [vg.REGIONS_FILE, vg.IMAGE_FILE],
    "vgqa": [vgqa.QUESTIONS_FILE, vgqa.IMAGE_FILE],
    "vqav2": [
        *(str(vqav2.questions_file(Path(), split)) for split in ("train", "val", "test", "test-dev")),
        *(str(vqav2.annotations_file(Path(), split)) for split in ("train", "val")),
    ],
}
ALL_FILES = [(source, name) for source, names in FILES.items() for name in names]


def source_of(name: str) -> ModuleType:
    return importlib.import_module(f"data_prep.sources.{name}")


def layout_of(name: str) -> ModuleType:
    return importlib.import_module(f"tests.data_prep.layouts.{name}")


def read(name: str, raw: Path) -> list[Record | Reject]:
    entries: Iterator[Record | Reject] = source_of(name).records(SourceOptions(raw=raw))
    return list(entries)


def records_of(name: str, raw: Path) -> list[Record]:
    return [entry for entry in read(name, raw) if isinstance(entry, Record)]


def num_rows(entries: list[Record | Reject]) -> int:
    """Count rows as the build does: an image without a text is one row."""
    return sum(entry.rows if isinstance(entry, Reject) else max(1, len(entry.captions)) for entry in entries)


@pytest.fixture(params=SOURCES)
def source(request) -> str:
    name: str = request.param
    return name


@pytest.fixture
def miniature(tmp_path) -> Callable[[str], Path]:
    def write(name: str) -> Path:
        layout_of(name).write(tmp_path / name)
        return tmp_path / name

    return write


def edit(file: Path, change: Callable[[Any], object]) -> None:
    """Change the content of a JSON file."""
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def edit_line(file: Path, line: int, **fields: Any) -> None:
    """Change fields of a line of JSON; a field whose new value is ... is deleted."""
    lines = file.read_text().splitlines()
    row = {**json.loads(lines[line - 1]), **fields}
    lines[line - 1] = json.dumps({name: value for name, value in row.items() if value is not ...})
    file.write_text("\n".join(lines) + "\n")


def test_a_source_says_what_it_is_and_which_files_it_needs(source):
    module = source_of(source)
    first, _, rest = (module.__doc__ or "").partition("\n")
    assert first.endswith(".") and "Files below --raw:" in rest
    assert (
        set(module.FLAGS) == FLAGS.get(source, set())
        and module.SAMPLES_PER_SHARD > 0
        and module.ATTRIBUTION.endswith(".")
    )
    assert ImagePolicy(short_side_px=304 if source in PRETRAINING else 0) == module.IMAGES
    assert module.KEEP_REPEATS is (source in TASKS_OF_ROWS)


def test_every_row_of_the_files_is_a_text_or_a_reject(source, miniature):
    entries = read(source, miniature(source))
    assert num_rows(entries) == layout_of(source).ROWS


def test_rows_of_each_split_are_those_that_the_build_expects(source, tmp_path):
    expected = layout_of(source).write(tmp_path)
    entries = read(source, tmp_path)
    rows = {split: num_rows([entry for entry in entries if entry.split == split]) for split in expected}
    assert rows == {split: one.rows for split, one in expected.items()}
    assert {entry.split for entry in entries} == set(expected)


def test_keys_are_valid_and_name_one_image_of_a_split(source, miniature):
    images: dict[tuple[str, str], Any] = {}
    for record in records_of(source, miniature(source)):
        assert re.fullmatch(r"[A-Za-z0-9_-]+", record.key)
        image = (record.image, record.second_image, record.image_id, record.meta)
        assert images.setdefault((record.split, record.key), image) == image
    assert len({image[0] for image in images.values()}) == len({key for _, key in images})


def test_every_text_has_its_annotation_or_none_has(source, miniature):
    for record in records_of(source, miniature(source)):
        assert len(record.annotations) == (len(record.captions) if source in TASKS_OF_ROWS else 0)


def test_a_source_yields_records_of_missing_images(source, miniature):
    raw = miniature(source)
    before = records_of(source, raw)
    missing = [record for record in before if not record.image.path.is_file()]
    assert len(missing) == (0 if source == "nlvr2" else 1)
    for record in before:
        record.image.path.unlink(missing_ok=True)
    after = records_of(source, raw)
    assert [r.captions for r in after] == [r.captions for r in before]
    assert {r.image.path.name for r in after} == {r.image.path.name for r in before}


def test_coco_gives_the_captions_of_an_image_as_published(miniature):
    raw = miniature("coco")
    assert records_of("coco", raw)[0] == Record(
        key="COCO_val2014_000000391895",
        image=ImageFile(path=raw / "val2014" / "COCO_val2014_000000391895.jpg"),
        image_id="coco:391895",
        captions=(
            "A man with a red helmet on a small moped on a dirt road. ",
            "Man riding a motor bike on a dirt road on the countryside.",
            "A man riding on the back of a motorcycle.",
        ),
        split="test",
        meta={"coco_id": 391895},
    )


def test_restval_is_a_split_of_its_own_and_keeps_text_beyond_ascii(miniature):
    (record,) = [record for record in records_of("coco", miniature("coco")) if record.split == "restval"]
    assert record.captions[1] == 'Café ½ \U0001f370 "quoted"'


def test_coco_for_retrieval_has_the_same_rows(miniature):
    raw = miniature("coco")
    assert records_of("coco_retrieval", raw) == records_of("coco", raw)


def test_flickr30k_has_the_ids_that_snli_ve_has(miniature):
    raw = miniature("flickr30k")
    record = records_of("flickr30k", raw)[3]
    assert (record.key, record.image_id, record.split) == ("1018148011", "flickr30k:1018148011", "val")
    assert record.image.path == raw / "flickr30k-images" / "1018148011.jpg" and record.meta == {}


def test_vg_gives_all_phrases_of_an_image_without_boxes(miniature):
    raw = miniature("vg")
    first = records_of("vg", raw)[0]
    assert first == Record(
        key="1",
        image=ImageFile(path=raw / "images" / "VG_100K_2" / "1.jpg"),
        image_id="vg:1",
        captions=("the clock is green in colour", "shade is along the street ", "the clock is  green in colour"),
        meta={"vg_id": 1},
    )


def test_an_image_of_vg_that_is_coco_s_has_coco_s_id(miniature):
    record = records_of("vg", miniature("vg"))[4]
    assert record.image_id == "coco:547168"
    assert record.meta == {"vg_id": 2412112, "coco_id": 547168, "flickr_id": 8505158818}


def test_an_image_of_vg_without_a_known_url_is_searched_in_both_folders(miniature):
    raw = miniature("vg")
    edit(raw / vg.IMAGE_FILE, lambda rows: rows[0].update(url=None))
    paths = {record.key: record.image.path for record in records_of("vg", raw)}
    assert paths["1"] == raw / "images" / "VG_100K_2" / "1.jpg"
    assert paths["2412115"] == raw / "images" / "VG_100K_2" / "2412115.jpg"  # not in image_data.json at all
    paths["1"].unlink()
    assert records_of("vg", raw)[0].image.path == raw / "images" / "VG_100K" / "1.jpg"


def test_files_of_vg_may_name_images_by_either_field_and_be_in_one_folder(miniature):
    raw = miniature("vg")
    before = records_of("vg", raw)
    edit(raw / vg.REGIONS_FILE, lambda rows: [row.update(image_id=row.pop("id")) for row in rows])
    edit(raw / vg.IMAGE_FILE, lambda rows: [row.update(id=row.pop("image_id")) for row in rows])
    (raw / vg.IMAGE_FILE).rename(raw / "annotations" / "image_data.json")
    assert records_of("vg", raw) == before


def test_snli_ve_gives_a_record_per_hypothesis_with_premise_label_and_id(miniature):
    raw = miniature("snli_ve")
    records = [record for record in records_of("snli_ve", raw) if record.split == "dev"]
    assert records[0] == Record(
        key="4705552913",
        image=ImageFile(path=raw / "flickr30k-images" / "4705552913.jpg"),
        image_id="flickr30k:4705552913",
        captions=("The sisters are hugging goodbye.",),
        annotations=({"premise": "Two women are embracing.", "label": 1, "pair_id": "4705552913.jpg#2r0n"},),
        split="dev",
    )
    assert [record.annotations[0]["label"] for record in records] == [1, 2, 0]


def test_both_spellings_of_the_image_s_field_name_the_same_image(miniature):
    raw = miniature("snli_ve")
    before = records_of("snli_ve", raw)
    file = snli_ve.file(raw, "dev")
    edit_line(file, 1, Flickr30K_ID=..., Flikr30kID="4705552913.jpg")
    edit_line(file, 2, Flickr30K_ID="4705552913.jpg")
    assert records_of("snli_ve", raw) == before


def test_pairs_without_a_gold_label_are_counted_in_their_split(miniature):
    rejects = [entry for entry in read("snli_ve", miniature("snli_ve")) if isinstance(entry, Reject)]
    assert rejects == [Reject(reason="no gold label", split="train"), Reject(reason="no gold label", split="dev")]


def test_nlvr2_gives_both_images_and_joins_sentences_of_a_pair_by_key(miniature):
    raw = miniature("nlvr2")
    first, second = records_of("nlvr2", raw)[:2]
    folder = raw / "images" / "train" / "63"
    assert first == Record(
        key="train-10171-0",
        image=ImageFile(path=folder / "train-10171-0-img0.png"),
        second_image=ImageFile(path=folder / "train-10171-0-img1.png"),
        image_id="nlvr2:train-10171-0",
        captions=("An image shows one leather pencil case, displayed open.",),
        annotations=({"identifier": "train-10171-0-0", "label": 0},),
        split="train",
    )
    assert (second.key, second.annotations) == (first.key, ({"identifier": "train-10171-0-1", "label": 1},))


def test_subsets_of_nlvr2_have_the_images_of_the_whole_split(miniature):
    raw = miniature("nlvr2")
    folders = {record.split: record.image.path.parent for record in records_of("nlvr2", raw) if record.split != "train"}
    assert folders == {
        f"{kind}{split}": raw / split for kind in ("", "balanced_", "unbalanced_") for split in ("dev", "test1")
    }


def test_subsets_of_nlvr2_may_be_missing_but_only_all_of_them(miniature):
    raw = miniature("nlvr2")
    nlvr2.file(raw, "balanced_dev").unlink()
    with pytest.raises(DataError, match=r"nlvr2/data/balanced/balanced_dev\.json"):
        read("nlvr2", raw)
    for subset in ("unbalanced_dev", "balanced_test1", "unbalanced_test1"):
        nlvr2.file(raw, subset).unlink()
    assert {record.split for record in records_of("nlvr2", raw)} == {"train", "dev", "test1"}


def test_the_error_for_a_missing_flag_says_what_the_folder_has_to_hold(source):
    with pytest.raises(ConfigError, match=rf"{source} needs --raw=DIR, a folder with"):
        list(source_of(source).records(SourceOptions(raw=None)))


def test_a_missing_folder_is_named(source, tmp_path):
    with pytest.raises(DataError, match=rf"--raw={re.escape(str(tmp_path / 'none'))} is not a folder"):
        read(source, tmp_path / "none")


@pytest.mark.parametrize(("source", "name"), ALL_FILES)
def test_a_missing_file_is_named(source, name, miniature):
    raw = miniature(source)
    (raw / name).unlink()
    with pytest.raises(DataError, match=rf"does not find {re.escape(name)} below"):
        read(source, raw)


@pytest.mark.parametrize(("source", "name"), ALL_FILES)
def test_a_file_that_is_not_json_is_named(source, name, miniature):
    raw = miniature(source)
    (raw / name).write_text("<html>404 Not Found</html>")
    with pytest.raises(DataError, match=rf"{re.escape(str(raw / name))}.* is not JSON"):
        read(source, raw)


@pytest.mark.parametrize(("source", "name"), ALL_FILES)
def test_a_truncated_file_is_named(source, name, miniature):
    raw = miniature(source)
    content = (raw / name).read_bytes()
    (raw / name).write_bytes(content[: len(content) - 20])
    with pytest.raises(DataError, match=rf"{re.escape(str(raw / name))}.* is not JSON"):
        read(source, raw)


@pytest.mark.parametrize(("source", "name"), ALL_FILES)
@pytest.mark.parametrize("content", ["[]", "{}", '{"images": []}', ""])
def test_a_file_without_a_row_is_refused(source, name, content, miniature):
    raw = miniature(source)
    if source in TASKS_OF_ROWS:
        content = "\n"  # JSON lines
    (raw / name).write_text(content)
    with pytest.raises(DataError, match=re.escape(str(raw / name))):
        read(source, raw)


@pytest.mark.parametrize("source", KARPATHY)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda image: image.update(split="dev"),
            r"image 2 has split='dev'; it has to be one of train, .*val, test\. ",
        ),
        (
            lambda image: image.update(filename="../b.jpg"),
            r"has filename='\.\./b\.jpg'; it has to be the name of a file",
        ),
        (lambda image: image.pop("filename"), r"image 2 has no filename; it has to be the name"),
        (lambda image: image.update(sentences="a dog"), r"has sentences='a dog'; it has to be a list of JSON objects"),
        (lambda image: image.update(sentences=["a dog"]), r"has sentences=\['a dog'\]; it has to be a list of JSON"),
        (
            lambda image: image["sentences"][0].update(raw=7),
            r"image 2 has raw=7; it has to be a text\. Correct the row",
        ),
        (lambda image: image["sentences"][0].pop("raw"), r"image 2 has no raw; it has to be a text"),
    ],
)
def test_a_wrong_field_of_karpathy_s_file_is_shown(source, change, message, miniature):
    raw = miniature(source)
    edit(raw / FILES[source][0], lambda content: change(content["images"][1]))
    with pytest.raises(DataError, match=message):
        read(source, raw)


def test_an_image_that_is_not_an_object_is_shown(miniature):
    raw = miniature("coco")
    edit(raw / coco.JSON_FILE, lambda content: content["images"].insert(0, "x" * 1000))
    with pytest.raises(DataError, match=r"image 1 is 'x{70,80}\.\.\.; it has to be a JSON object"):
        read("coco", raw)


@pytest.mark.parametrize("wrong", ["391895", None, True, 1.5])
def test_a_coco_id_has_to_be_a_whole_number(wrong, miniature):
    raw = miniature("coco")
    edit(raw / coco.JSON_FILE, lambda content: content["images"][0].update(cocoid=wrong))
    with pytest.raises(DataError, match=rf"image 1 has cocoid={wrong!r}; it has to be a whole number"):
        read("coco", raw)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (vg.REGIONS_FILE, lambda row: row.update(id="2"), r"image 2 has id='2'; it has to be a whole number"),
        (vg.REGIONS_FILE, lambda row: row.pop("id"), r"image 2 has no image_id; it has to be a whole number"),
        (vg.REGIONS_FILE, lambda row: row.update(regions=None), r"image 2 has regions=None; it has to be a list"),
        (vg.REGIONS_FILE, lambda row: row["regions"][0].update(phrase=None), r"has phrase=None; it has to be a text"),
        (vg.IMAGE_FILE, lambda row: row.update(coco_id="7"), r"image 2 has coco_id='7'; it has to be a whole number"),
        (vg.IMAGE_FILE, lambda row: row.update(flickr_id=[]), r"image 2 has flickr_id=\[\]; it has to be a whole"),
        (vg.IMAGE_FILE, lambda row: row.update(image_id=None), r"image 2 has image_id=None; it has to be a whole"),
    ],
)
def test_a_wrong_field_of_vg_is_shown(name, change, message, miniature):
    raw = miniature("vg")
    edit(raw / name, lambda rows: change(rows[1]))
    with pytest.raises(DataError, match=message):
        read("vg", raw)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"gold_label": "maybe"},
            r"dev\.jsonl, line 2 has gold_label='maybe'; it has to be one of contradiction, neutral, entailment, or -",
        ),
        ({"gold_label": 1}, r"line 2 has gold_label=1; it has to be a text"),
        ({"sentence2": None}, r"line 2 has sentence2=None; it has to be a text"),
        ({"sentence1": ...}, r"line 2 has no sentence1; it has to be a text"),
        ({"pairID": 3}, r"line 2 has pairID=3; it has to be a text"),
        ({"Flickr30K_ID": ...}, r"line 2 has no Flickr30K_ID; it has to be the name of a file"),
        ({"Flickr30K_ID": "a/b"}, r"line 2 has Flickr30K_ID='a/b'; it has to be the name of a file or folder, without"),
        ({"Flickr30K_ID": ".jpg"}, r"line 2 has Flickr30K_ID='\.jpg'; it has to be the name of an image"),
    ],
)
def test_a_wrong_field_of_snli_ve_is_shown_with_its_line(fields, message, miniature):
    raw = miniature("snli_ve")
    edit_line(snli_ve.file(raw, "dev"), 2, **fields)
    with pytest.raises(DataError, match=message):
        read("snli_ve", raw)


@pytest.mark.parametrize(
    ("split", "fields", "message"),
    [
        ("dev", {"label": "true"}, r"dev\.json, line 2 has label='true'; it has to be True or False\. Correct"),
        ("dev", {"label": True}, r"line 2 has label=True; it has to be a text"),
        ("dev", {"sentence": None}, r"line 2 has sentence=None; it has to be a text"),
        (
            "dev",
            {"identifier": "dev"},
            r"line 2 has identifier='dev'; it has to be of the form split-set-pair-sentence",
        ),
        ("dev", {"identifier": "../dev-0-0-0"}, r"line 2 has identifier='\.\./dev-0-0-0'; it has to be the name"),
        ("dev", {"identifier": ...}, r"line 2 has no identifier; it has to be the name"),
        (
            "train",
            {"directory": ...},
            r"train\.json, line 2 has no directory; it has to be the name of a file or folder",
        ),
        ("train", {"directory": ".."}, r"line 2 has directory='\.\.'; it has to be the name of a file or folder"),
        ("train", {"directory": True}, r"line 2 has directory=True; it has to be the name of a file or folder"),
    ],
)
def test_a_wrong_field_of_nlvr2_is_shown_with_its_line(split, fields, message, miniature):
    raw = miniature("nlvr2")
    edit_line(nlvr2.file(raw, split), 2, **fields)
    with pytest.raises(DataError, match=message):
        read("nlvr2", raw)


def test_a_directory_of_nlvr2_may_be_a_text(miniature):
    raw = miniature("nlvr2")
    before = records_of("nlvr2", raw)
    edit_line(nlvr2.file(raw, "train"), 2, directory="63")
    assert records_of("nlvr2", raw) == before


@pytest.mark.parametrize(("source", "name"), [("coco", coco.JSON_FILE), ("vg", vg.REGIONS_FILE)])
def test_images_are_read_one_at_a_time_in_constant_memory(source, name, miniature):
    """Visual Genome's file has 700 MB."""
    raw = miniature(source)
    content = json.loads((raw / name).read_text())
    images = content if source == "vg" else content["images"]
    for text in (text for image in images for text in image["regions" if source == "vg" else "sentences"]):
        text["phrase" if source == "vg" else "raw"] = "a dog " * 1_500
    images *= 100
    (raw / name).write_text(json.dumps(content))
    size_bytes = (raw / name).stat().st_size
    entries = source_of(source).records(SourceOptions(raw=raw))
    next(entries)
    tracemalloc.start()
    try:
        assert sum(1 for _ in entries) == len(images) - 1
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < 1e6 < 10e6 < size_bytes
