"""Any sample of a shard is one read, and equals what a plain reader of the tar finds."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bridgetower.errors import DataError
from bridgetower.rng import hash64
from bridgetower.shards.index import INDEX_DTYPE, ShardReader, index_path, scan_tar
from tests.small_corpora import draw, file_of, write_corpus

IMAGE = file_of(draw(0))


@pytest.fixture
def shard(tmp_path) -> Path:
    """Three samples with 1, 3 and 2 captions, in the order of their keys' hashes."""
    return write_corpus(tmp_path, [1, 3, 2]) / "00000.tar"


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def record(image_id: str, *captions: str) -> bytes:
    return json.dumps({"image_id": image_id, "captions": captions}).encode()


def plain_samples(shard: Path) -> list[tuple[bytes, dict[str, Any]]]:
    """Image and record of each sample, read with tarfile alone."""
    samples: dict[str, dict[str, bytes]] = {}
    with tarfile.open(shard) as tar:
        for member in tar:
            stem, _, suffix = member.name.partition(".")
            file = tar.extractfile(member)
            assert file is not None
            samples.setdefault(stem, {})[suffix] = file.read()
    return [(members.get("png") or members["jpg"], json.loads(members["json"])) for members in samples.values()]


@pytest.mark.parametrize("split", ["combination", "concept"])
def test_indexed_reads_equal_a_plain_read_of_the_tar(emoji_shards, split):
    shard = emoji_shards / split / "00000.tar"
    reader, plain = ShardReader(shard), plain_samples(shard)
    assert len(reader) == len(plain) > 100
    for number in reversed(range(len(reader))):  # the order does not matter
        sample = reader.read(number)
        assert (sample.image, sample.record) == plain[number]
        assert sample.image_id == hash64(sample.record["image_id"])
    assert reader.image_ids().tolist() == [hash64(row["image_id"]) for _, row in plain]


def test_a_pair_is_a_caption_of_a_sample_in_the_order_of_the_shard(shard):
    reader = ShardReader(shard)
    counts = [len(content["captions"]) for _, content in plain_samples(shard)]
    assert sorted(counts) == [1, 2, 3]
    assert [len(reader.read(sample).record["captions"]) for sample in range(len(reader))] == counts
    assert reader.num_pairs == 6
    expected = [(sample, caption) for sample, count in enumerate(counts) for caption in range(count)]
    assert [reader.locate(pair) for pair in range(6)] == expected


def test_shards_of_other_tools_are_indexed_with_their_members_in_any_order(tmp_path):
    shard = write_tar(
        tmp_path / "other.tar",
        [
            ("README", b"not a member of a sample: no dot in its name"),
            ("part/.hidden", b"not a member of a sample: no key in its name"),
            ("part/a.json", record("one", "a caption")),
            ("part/a.JPG", IMAGE),
            ("part/a.txt", b"a caption"),
            ("part/b.png", IMAGE + b"more"),
            ("part/b.cls.txt", b"5"),
            ("part/b.json", record("two", "x", "y")),
        ],
    )
    np.save(index_path(shard), scan_tar(shard))
    reader = ShardReader(shard)
    assert [reader.read(number).record["captions"] for number in range(len(reader))] == [["a caption"], ["x", "y"]]
    assert [reader.read(number).image for number in range(len(reader))] == [IMAGE, IMAGE + b"more"]


def test_a_closed_reader_fails_and_a_new_one_reads_on(shard):
    reader = ShardReader(shard)
    first = reader.read(0)
    reader.close()
    with pytest.raises(DataError, match="Bad file descriptor"):
        reader.read(0)
    assert ShardReader(shard).read(0) == first


# Ways in which the file of an index can be damaged.


def delete(sidecar: Path) -> None:
    sidecar.unlink()


def empty(sidecar: Path) -> None:
    sidecar.write_bytes(b"")


def cut_short(sidecar: Path) -> None:
    sidecar.write_bytes(sidecar.read_bytes()[:-10])


def overwrite(sidecar: Path) -> None:
    sidecar.write_text("not an array at all")


def make_zip(sidecar: Path) -> None:
    stream = io.BytesIO()
    np.savez(stream, index=np.zeros(3))
    sidecar.write_bytes(stream.getvalue())


def pickle_objects(sidecar: Path) -> None:
    np.save(sidecar, np.array([{"a": 1}], dtype=object), allow_pickle=True)


@pytest.mark.parametrize("damage", [delete, empty, cut_short, overwrite, make_zip, pickle_objects])
def test_an_index_that_cannot_be_read_is_an_error_that_says_what_to_do(shard, damage):
    damage(index_path(shard))
    with pytest.raises(DataError, match=r"00000\.index\.npy cannot be read .* Run the command that built the shards"):
        ShardReader(shard)


def test_an_index_of_another_version_is_an_error_that_names_its_fields(shard):
    older = [field for field in INDEX_DTYPE.descr if field[0] != "image_id"]
    np.save(index_path(shard), np.zeros(3, np.dtype(older)))
    with pytest.raises(DataError, match=r"has the fields .*num_captions.* Build the shards again"):
        ShardReader(shard)


@pytest.mark.parametrize(
    "other",
    [
        ([("a.json", record("one", "x,y")), ("a.png", IMAGE)], "captions"),
        ([("a.json", record("two", "x", "y")), ("a.png", IMAGE)], "another image"),
    ],
    ids=lambda case: case[1],
)
def test_an_index_of_another_build_is_an_error(tmp_path, other):
    # Tars are padded to 10,240 bytes, so neither the file's size nor the members' offsets differ.
    shard = write_tar(tmp_path / "00000.tar", [("a.json", record("one", "x", "y")), ("a.png", IMAGE)])
    np.save(index_path(shard), scan_tar(shard))
    before = shard.stat().st_size
    write_tar(shard, [(name, content.ljust(43) if name == "a.json" else content) for name, content in other[0]])
    index = np.load(index_path(shard))
    index["record_bytes"] = 43
    np.save(index_path(shard), index)
    assert shard.stat().st_size == before
    with pytest.raises(DataError, match="shard and index come from different builds"):
        ShardReader(shard).read(0)


def test_an_index_whose_offsets_lead_elsewhere_is_an_error(shard):
    index = np.load(index_path(shard))
    index["record_offset"] += 512
    np.save(index_path(shard), index)
    with pytest.raises(DataError, match=r"00000\.tar:0\.json .*"):
        ShardReader(shard).read(0)


def test_a_missing_shard_is_an_error_that_says_what_to_do(shard):
    shard.unlink()
    with pytest.raises(DataError, match=r"00000\.tar cannot be read \(No such file or directory\)\. Copy or build"):
        ShardReader(shard)


def test_a_shard_that_was_cut_short_is_an_error_with_the_byte(shard):
    reader = ShardReader(shard)
    shard.write_bytes(shard.read_bytes()[:1500])
    with pytest.raises(DataError, match=r"ends before byte .* the file was cut short"):
        reader.read(2)


SAMPLE = [("a.json", record("a", "x")), ("a.png", IMAGE)]


@pytest.mark.parametrize(
    ("members", "problem"),
    [
        ([SAMPLE[0]], r"bad\.tar:a has the members \['json'\]"),
        ([SAMPLE[1]], r"bad\.tar:a has the members \['png'\]"),
        ([*SAMPLE, ("a.jpg", IMAGE)], r"it needs one image"),
        ([("a.json", b"{"), SAMPLE[1]], r"bad\.tar:a\.json is not JSON"),
        ([("a.json", b"[]"), SAMPLE[1]], r"a\.json holds a list"),
        ([("a.json", b'{"image_id": "a"}'), SAMPLE[1]], r"captions=None; it needs a list"),
        ([("a.json", record("a")), SAMPLE[1]], r"captions=\[\]; it needs a list"),
        ([("a.json", record("a", "x", "")), SAMPLE[1]], r"it needs a list"),
        ([("a.json", b'{"image_id": 7, "captions": ["x"]}'), SAMPLE[1]], r"image_id=7; it needs a text"),
        ([*SAMPLE, ("b.json", record("b", "x")), ("b.png", IMAGE), *SAMPLE], r"holds the key 'a' twice"),
        ([*SAMPLE, ("a.PNG", IMAGE)], r"holds a\.png twice"),
    ],
)
def test_a_tar_that_is_not_a_shard_is_an_error_that_names_the_sample(tmp_path, members, problem):
    with pytest.raises(DataError, match=problem):
        scan_tar(write_tar(tmp_path / "bad.tar", members))


def test_what_is_not_a_tar_is_an_error(tmp_path):
    (tmp_path / "bad.tar").write_bytes(b"<html>404</html>" * 100)
    with pytest.raises(DataError, match=r"bad\.tar is not a readable tar file"):
        scan_tar(tmp_path / "bad.tar")


def test_a_tar_that_was_cut_short_is_an_error(shard, tmp_path):
    short = tmp_path / "short.tar"
    short.write_bytes(shard.read_bytes()[:3000])
    with pytest.raises(DataError, match=r"short\.tar is not a readable tar file"):
        scan_tar(short)


def test_a_damaged_header_in_the_middle_is_an_error_and_not_the_end(shard, tmp_path):
    # tarfile takes the damaged header for the end of the file: all later samples would be lost silently.
    with tarfile.open(shard) as tar:
        headers = [member.offset for member in tar]
    damaged, raw = tmp_path / "damaged.tar", bytearray(shard.read_bytes())
    raw[headers[3]] ^= 0xFF
    damaged.write_bytes(raw)
    with tarfile.open(damaged) as tar:
        assert len(list(tar)) == 3
    with pytest.raises(DataError, match=rf"damaged header at byte {headers[3]}"):
        scan_tar(damaged)


def test_scanning_a_copy_gives_the_index_that_was_written(shard, tmp_path):
    shutil.copy(shard, tmp_path / "copy.tar")
    assert scan_tar(tmp_path / "copy.tar").tobytes() == np.load(index_path(shard)).tobytes()
