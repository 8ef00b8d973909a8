"""CC3M, CC12M and SBU are read in each layout without losing, shifting or joining rows; wrong files are refused."""

from __future__ import annotations

import importlib
import io
import json
import tarfile
from pathlib import Path
from types import ModuleType

import pytest

from bridgetower.errors import ConfigError, DataError
from bridgetower.io.storage import read_part, to_path
from bridgetower.shards.index import ShardReader
from data_prep.img2dataset_output import classify_failure
from data_prep.record import Record, Reject, SourceOptions
from data_prep.sources import cc3m, cc12m, sbu
from tests.data_prep.layouts import cc3m as cc3m_layout
from tests.data_prep.layouts import make_image_file, put
from tests.data_prep.layouts import sbu as sbu_layout
from tests.data_prep.layouts.web import LAYOUTS, Row, write_tar
from tests.small_corpora import build_records

SOURCES = ("cc3m", "cc12m", "sbu")


def source_and_layout(name: str) -> tuple[ModuleType, ModuleType]:
    return importlib.import_module(f"data_prep.sources.{name}"), importlib.import_module(
        f"tests.data_prep.layouts.{name}"
    )


def entries(source: ModuleType, raw: Path) -> list[Record | Reject]:
    return list(source.records(SourceOptions(raw=raw)))


def records(source: ModuleType, raw: Path) -> list[Record]:
    return [entry for entry in entries(source, raw) if isinstance(entry, Record)]


def copy_to_store(folder: Path, name: str) -> Path:
    """Copy the files of a folder to an object store in memory. Returns: the folder there."""
    root: Path = to_path(f"memory://{name}")
    for file in folder.rglob("*"):
        if file.is_file():
            target = root / file.relative_to(folder).as_posix()
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())
    return root


@pytest.mark.parametrize("where", ["on disk", "in a store"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", SOURCES)
def test_a_build_keeps_every_good_row_and_counts_the_rest(tmp_path, name, layout, where):
    source, miniature = source_and_layout(name)
    expected = miniature.write(tmp_path / "in", layout)
    raw = tmp_path / "in" if where == "on disk" else copy_to_store(tmp_path / "in", f"{tmp_path.name}-{name}-{layout}")
    manifests = build_records(source.records(SourceOptions(raw=raw)), tmp_path / "out")
    assert manifests.keys() == expected.keys()
    for split, manifest in manifests.items():
        totals, counts = manifest.totals, expected[split]
        assert (totals.rows, totals.images, totals.captions) == (counts.rows, counts.images, counts.captions)
        assert totals.rejects == counts.rejects


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_image_keeps_its_own_caption(tmp_path, layout):
    cc3m_layout.write(tmp_path / "in", layout)
    build_records(cc3m.records(SourceOptions(raw=tmp_path / "in")), tmp_path / "out")
    captions = {make_image_file(number): row.caption for number, row in enumerate(cc3m_layout.TRAIN)}
    num_compared = 0
    for shard in sorted((tmp_path / "out" / "train").glob("*.tar")):
        reader = ShardReader(shard)
        for number in range(len(reader)):
            sample = reader.read(number)
            if sample.image in captions:  # JPEG files go into the shard as they are
                assert sample.record["captions"] == [" ".join(captions[sample.image].split())]
                num_compared += 1
    assert num_compared == 4


def test_urls_are_kept_where_the_layout_has_them(tmp_path):
    for layout, is_known in (("bridgetower", True), ("vilt", False), ("img2dataset", True)):
        sbu_layout.write(tmp_path / layout, layout)
        for record in records(sbu, tmp_path / layout):
            assert ("url" in record.meta) == is_known, layout


def test_a_missing_image_becomes_a_record(tmp_path):
    put(tmp_path / "cc12m.tsv", "http://a/0\tone\nhttp://a/1\ttwo\n")
    (tmp_path / "image").mkdir()
    assert [record.image.path.name for record in records(cc12m, tmp_path)] == ["0.jpg", "1.jpg"]


# BridgeTower's layout


def test_rows_of_a_table_never_shift(tmp_path):
    rows = ['"a\thttp://a/0', "", 'b"\thttp://a/2', "no url", "c\td\thttp://a/4", '"\thttp://a/5', "é\thttp://a/6"]
    put(tmp_path / "utils" / "Train_GCC-training.tsv", "\n".join(rows))
    put(tmp_path / "train_image" / "6.jpg", make_image_file(0))
    found = records(cc3m, tmp_path)
    assert [record.captions[0] for record in found] == ['"a', "", 'b"', "no url", "c d", '"', "é"]
    assert [record.meta.get("url", "")[-1:] for record in found] == ["0", "", "2", "", "4", "5", "6"]
    assert [record.key for record in found] == [f"{number:08d}" for number in range(7)]


def test_an_image_is_found_under_any_extension_and_of_two_the_likelier_is_used(tmp_path):
    put(tmp_path / "cc12m.tsv", "".join(f"http://a/{number}\tx\n" for number in range(9)))
    names = ["0", "1.JPEG", "2.png", "3.gif", "3.jpg", "4.webp", "0005.jpg", "6.txt", "7.jpg.part", "x.jpg", "-8.jpg"]
    for name in names:
        put(tmp_path / "image" / name, b"x")
    found = [record.image.path.name for record in records(cc12m, tmp_path)]
    assert found == ["0", "1.JPEG", "2.png", "3.jpg", "4.webp", "0005.jpg", "6.jpg", "7.jpg", "8.jpg"]


def test_a_split_without_its_image_folder_is_left_out(tmp_path):
    cc3m_layout.write(tmp_path, "bridgetower")
    (tmp_path / "train_image").rename(tmp_path / "elsewhere")
    assert {record.split for record in records(cc3m, tmp_path)} == {"val"}


def test_rows_of_sbu_whose_urls_end_in_the_same_name_are_separate_samples(tmp_path):
    sbu_layout.write(tmp_path, "bridgetower")
    first, _, third, *_ = records(sbu, tmp_path)
    assert first.image == third.image
    assert (first.key, third.key) == ("00000000", "00000002")
    assert (first.captions, third.captions) == ((sbu_layout.ROWS[0].caption,), (sbu_layout.ROWS[2].caption,))


def test_a_url_of_sbu_without_a_file_name_is_counted(tmp_path):
    put(
        tmp_path / "sbu-captions-all.json",
        json.dumps({"image_urls": ["http://a/", "http://a/.."], "captions": ["x", "y"]}),
    )
    (tmp_path / "SBU").mkdir()
    assert entries(sbu, tmp_path) == [Reject(reason="URL without a file name")] * 2


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ('{"image_urls": ["a", "b"], "captions": ["x"]}', "differ in length after row 0"),
        ('{"image_urls": ["a"], "captions": [7]}', "row 0 has image_urls='a' and captions=7"),
        ("{}", "has no rows"),
        ('{"image_urls": ["a", "b"', "is not JSON, or was cut short"),
    ],
)
def test_columns_of_sbu_that_do_not_match_are_refused(tmp_path, content, problem):
    put(tmp_path / "sbu-captions-all.json", content)
    (tmp_path / "SBU").mkdir()
    with pytest.raises(DataError, match=problem):
        entries(sbu, tmp_path)


# ViLT's layout


def test_an_image_of_vilt_is_in_the_folder_of_its_first_four_letters_whatever_its_path(tmp_path):
    put(tmp_path / "train_annot.json", json.dumps([["/x/0012/00123456", "a"], ["00129999.jpg", "b"], ["ab", "c"]]))
    (tmp_path / "images_train").mkdir()
    found = [record.image.path.relative_to(tmp_path).as_posix() for record in records(cc3m, tmp_path)]
    assert found == ["images_train/0012/00123456", "images_train/0012/00129999.jpg", "images_train/ab/ab"]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ([["a"]], r"entry 0 is .*it has to be \[path, caption\]"),
        ([["a", "b"], {"image": "a"}], "entry 1 is"),
        ([["a/..", "b"]], "does not name a file"),
        ([["a/", "b"]], "does not name a file"),
        ([], "is empty"),
        ({"a": "b"}, r"is not a list of \[path, caption\]"),
    ],
)
def test_a_malformed_list_of_vilt_is_refused(tmp_path, content, problem):
    put(tmp_path / "annot.json", json.dumps(content))
    (tmp_path / "images_train").mkdir()
    with pytest.raises(DataError, match=problem):
        entries(sbu, tmp_path)


# img2dataset's layout

ROWS = (Row("one", "http://a/1"), Row("two", "http://a/2", "missing"), Row("three", "http://a/3", "png"))


def test_images_are_read_from_their_offset_in_the_tar(tmp_path):
    write_tar(tmp_path, 3, ROWS)
    first, second = records(cc12m, tmp_path)
    assert [first.key, second.key] == ["000030000", "000030002"]
    image = first.image
    assert image.path == tmp_path / "00003.tar"
    assert read_part(image.path, image.offset, image.num_bytes) == make_image_file(3000)


@pytest.mark.parametrize("below", ["", "webdataset"])
def test_tars_of_cc3m_without_a_split_are_train(tmp_path, below):
    write_tar(tmp_path / below, 0, ROWS)
    assert {entry.split for entry in entries(cc3m, tmp_path)} == {"train"}


def tar_of(file: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(file, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def test_tars_of_other_programs_are_read_with_whatever_members_they_have(tmp_path):
    tar_of(
        tmp_path / "a.tar",
        {
            "./1.txt": b"only text",
            "./2.txt": b"no json",
            "./2.png": make_image_file(0),
            "./deep/2.jpg": make_image_file(1),
            "./deep/2.json": b'{"caption": "json wins", "url": null}',
            "./deep/2.txt": b"text",
            "./3.jpg": make_image_file(2),
        },
    )
    first, *others = entries(cc12m, tmp_path)
    assert first == Reject(reason="no picture in its tar")
    captions = [record.captions for record in others if isinstance(record, Record)]
    assert captions == [("no json",), ("json wins",), ("",)]
    assert len({record.key for record in others if isinstance(record, Record)}) == 3


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5, 0.9])
def test_a_tar_cut_short_is_refused_wherever_it_was_cut(tmp_path, fraction):
    write_tar(tmp_path, 0, ROWS, has_stats=False)
    content = (tmp_path / "00000.tar").read_bytes()
    (tmp_path / "00000.tar").write_bytes(content[: int(fraction * len(content.rstrip(b"\0")))])
    with pytest.raises(DataError, match=r"00000\.tar is damaged or was cut short.*downloads that shard once more"):
        entries(cc12m, tmp_path)


def test_a_tar_cut_between_two_members_is_refused(tmp_path):
    write_tar(tmp_path, 0, ROWS, has_stats=False)
    with tarfile.open(tmp_path / "00000.tar") as tar:
        end = tar.getmembers()[2].offset_data + 512
    content = (tmp_path / "00000.tar").read_bytes()
    (tmp_path / "00000.tar").write_bytes(content[:end])
    with pytest.raises(DataError, match="does not end as a tar does"):
        entries(cc12m, tmp_path)


def test_a_damaged_header_is_not_mistaken_for_the_end(tmp_path):
    write_tar(tmp_path, 0, ROWS, has_stats=False)
    with tarfile.open(tmp_path / "00000.tar") as tar:
        header = tar.getmembers()[3].offset
    content = bytearray((tmp_path / "00000.tar").read_bytes())
    content[header : header + 100] = b"\xff" * 100
    (tmp_path / "00000.tar").write_bytes(content)
    with pytest.raises(DataError, match="damaged or was cut short"):
        entries(cc12m, tmp_path)


def test_statistics_without_their_tar_are_refused(tmp_path):
    write_tar(tmp_path, 0, ROWS)
    write_tar(tmp_path, 1, ROWS)
    (tmp_path / "00001.tar").unlink()
    with pytest.raises(DataError, match=r"has 00001_stats\.json, but not 00001\.tar"):
        entries(cc12m, tmp_path)


def test_statistics_of_another_run_are_refused(tmp_path):
    write_tar(tmp_path, 0, ROWS)
    stats = json.loads((tmp_path / "00000_stats.json").read_text())
    (tmp_path / "00000_stats.json").write_text(json.dumps({**stats, "count": 2, "successes": 1}))
    with pytest.raises(DataError, match="they are from different runs"):
        entries(cc12m, tmp_path)


@pytest.mark.parametrize("content", ["", "[]", '{"count": 3}', '{"count": 1, "successes": 1, "status_dict": []}'])
def test_malformed_statistics_are_refused(tmp_path, content):
    write_tar(tmp_path, 0, ROWS)
    (tmp_path / "00000_stats.json").write_text(content)
    with pytest.raises(DataError, match="is not a statistics file of img2dataset"):
        entries(cc12m, tmp_path)


def test_rows_that_the_statistics_leave_out_are_counted(tmp_path):
    write_tar(tmp_path, 0, ROWS)
    stats = json.loads((tmp_path / "00000_stats.json").read_text())
    (tmp_path / "00000_stats.json").write_text(json.dumps({**stats, "count": 10}))
    rejects = [entry for entry in entries(cc12m, tmp_path) if isinstance(entry, Reject)]
    assert {entry.reason: entry.rows for entry in rejects} == {
        "download failed: HTTP 404": 1,
        "download failed: other": 7,
    }


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        ("HTTP Error 404: Not Found", "HTTP 404"),
        ("HTTP Error 302: The HTTP server returned a redirect error that would lead to an infinite loop.", "HTTP 302"),
        ("<urlopen error timed out>", "timeout"),
        ("The read operation timed out", "timeout"),
        ("<urlopen error _ssl.c:1112: The handshake operation timed out>", "timeout"),
        ("<urlopen error [Errno -2] Name or service not known>", "no such host"),
        ("<urlopen error [Errno -3] Temporary failure in name resolution>", "no such host"),
        ("<urlopen error [Errno -5] No address associated with hostname>", "no such host"),
        ("<urlopen error [Errno 111] Connection refused>", "no connection"),
        ("[Errno 104] Connection reset by peer", "no connection"),
        ("Remote end closed connection without response", "no connection"),
        ("<urlopen error [SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed>", "TLS error"),
        ("IncompleteRead(8192 bytes read, 100 more expected)", "connection lost"),
        ("Use of image disallowed by X-Robots-Tag directive", "forbidden by X-Robots-Tag"),
        ("Image decoding error", "not an image"),
        ("unknown url type: ''", "not a URL"),
        ("<urlopen error no host given>", "not a URL"),
        ("'ascii' codec can't encode character '\\xfc' in position 5: ordinal not in range(128)", "not a URL"),
        ("a message that nobody has seen", "other"),
    ],
)
def test_messages_are_classified_into_few_reasons(status, reason):
    assert classify_failure(status) == reason


# Choice of the layout


@pytest.mark.parametrize("name", SOURCES)
def test_a_folder_without_any_layout_is_refused_with_all_three(tmp_path, name):
    source, _ = source_and_layout(name)
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(DataError) as refused:
        entries(source, tmp_path)
    for word in (
        "BridgeTower's:",
        "ViLT's:",
        "img2dataset's:",
        "fetch_corpus.py",
        *source.CORPUS.parts[0].table.split(),
    ):
        assert word in str(refused.value)


@pytest.mark.parametrize("name", SOURCES)
def test_two_layouts_in_a_folder_are_refused_with_both(tmp_path, name):
    source, miniature = source_and_layout(name)
    miniature.write(tmp_path, "vilt")
    miniature.write(tmp_path, "img2dataset")
    with pytest.raises(DataError, match=r"more than once: ViLT's layout .* and img2dataset's tars .*one of them"):
        entries(source, tmp_path)


@pytest.mark.parametrize("name", SOURCES)
def test_images_without_their_captions_are_refused(tmp_path, name):
    source, _ = source_and_layout(name)
    part = source.CORPUS.parts[0]
    (tmp_path / part.image_folder).mkdir()
    with pytest.raises(DataError, match=f"does not find {part.table}"):
        entries(source, tmp_path)


@pytest.mark.parametrize("name", SOURCES)
def test_a_missing_or_wrong_folder_is_refused(tmp_path, name):
    source, _ = source_and_layout(name)
    with pytest.raises(ConfigError, match=f"The source {name} needs --raw=DIR"):
        list(source.records(SourceOptions(raw=None)))
    with pytest.raises(DataError, match="nowhere is not a folder"):
        entries(source, tmp_path / "nowhere")
