"""index_shards.py makes a corpus of tars that other tools wrote, without changing the tars."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from pathlib import Path

import pytest

from bridgetower.data.corpora import Corpora
from bridgetower.shards.index import ShardReader
from bridgetower.shards.manifest import load_manifest
from tests.conftest import run_script
from tests.small_corpora import draw, file_of

COMMAND = "data_prep/index_shards.py"
CHECK = "data_prep/check_shards.py"


def write_foreign(path: Path, first: int, count: int, **changed: object) -> None:
    """Write a tar as img2dataset does, with jpg, json and txt.

    Args:
        changed: fields to replace in the json of the last sample.
    """
    with tarfile.open(path, "w") as tar:
        for number in range(first, first + count):
            image = file_of(draw(number), "JPEG")
            record: dict[str, object] = {
                "caption": f"image  {number}",
                "url": f"https://example.org/{number}.jpg",
                "key": f"{number:09d}",
                "status": "success",
                "error_message": None,
                "width": 24,
                "height": 24,
                "sha256": hashlib.sha256(image).hexdigest(),
            }
            if number == first + count - 1:
                record = {**record, **changed}
            text = f"image  {number}".encode()
            members = [("jpg", image), ("json", json.dumps(record).encode()), ("txt", text)]
            for suffix, content in members:
                member = tarfile.TarInfo(f"{number:09d}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


@pytest.fixture
def downloads(tmp_path) -> Path:
    write_foreign(tmp_path / "00000.tar", 0, 5)
    write_foreign(tmp_path / "00001.tar", 5, 4, caption=None)
    (tmp_path / "00000_stats.json").write_text("{}")
    return tmp_path


def test_the_tars_of_img2dataset_can_be_trained_on(downloads):
    before = (downloads / "00000.tar").read_bytes()
    output = run_script(COMMAND, str(downloads), "--workers=2")
    assert "8 images in 2 shards; left out: 1 no caption" in output.stdout
    assert (downloads / "00000.tar").read_bytes() == before
    manifest = load_manifest(downloads)
    assert (manifest.totals.rows, manifest.totals.captions, manifest.totals.caption_words) == (9, 8, 16)
    corpora = Corpora([downloads])
    assert corpora.manifests[0].num_pairs == 8
    record = ShardReader(downloads / "00000.tar").read(3).record
    assert record["captions"] == ["image 3"]
    assert record["image_id"] == f"sha256:{hashlib.sha256(file_of(draw(3), 'JPEG')).hexdigest()}"


def test_an_image_that_cannot_be_decoded_is_left_out(tmp_path):
    write_foreign(tmp_path / "00000.tar", 0, 3)
    content, bad = (tmp_path / "00000.tar").read_bytes(), file_of(draw(1), "JPEG")
    (tmp_path / "00000.tar").write_bytes(content.replace(bad, b"\0" * len(bad)))
    assert "2 images in 1 shards; left out: 1 image cannot be decoded" in run_script(COMMAND, str(tmp_path)).stdout
    assert "3 images" in run_script(COMMAND, str(tmp_path), "--decode=false").stdout


def test_the_checker_knows_what_was_left_out_and_repairs_the_index(downloads):
    content, bad = (downloads / "00000.tar").read_bytes(), file_of(draw(1), "JPEG")
    (downloads / "00000.tar").write_bytes(content.replace(bad, b"\0" * len(bad)))
    run_script(COMMAND, str(downloads))
    expected = {path.name: path.read_bytes() for path in downloads.iterdir()}
    assert "2 shards, 7 images, 7 captions: nothing wrong" in run_script(CHECK, str(downloads), "--decode=all").stdout
    (downloads / "00000.index.npy").write_bytes((downloads / "00001.index.npy").read_bytes())
    (downloads / "00001.index.npy").unlink()
    assert "2 wrong" in run_script(CHECK, str(downloads), code=2).stdout
    assert "7 captions: nothing wrong" in run_script(CHECK, str(downloads), "--repair").stdout
    assert {path.name: path.read_bytes() for path in downloads.iterdir()} == expected


def test_a_damaged_tar_is_an_error_that_names_it(downloads):
    content = (downloads / "00001.tar").read_bytes()
    (downloads / "00001.tar").write_bytes(content[:1200])
    error = run_script(COMMAND, str(downloads), code=2).stderr
    assert "00001.tar is not a readable tar file" in error and "Traceback" not in error
    assert not (downloads / "shards.json").exists()


def test_folders_of_build_shards_and_empty_folders_are_refused(emoji_shards, tmp_path):
    assert "was built by build_shards.py" in run_script(COMMAND, str(emoji_shards / "train"), code=2).stderr
    assert "has no *.tar files" in run_script(COMMAND, str(tmp_path), code=2).stderr
    assert "Which folder?" in run_script(COMMAND, code=2).stderr
