"""Shards in an object store are read and written like those in a folder; moto's S3 server on loopback is the store."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from bridgetower.errors import ConfigError, DataError
from bridgetower.io.storage import explain_read_errors, read_part, to_path
from bridgetower.shards.manifest import load_manifest
from tests.conftest import run_script
from tests.object_store import object_store
from tests.small_corpora import draw, file_of

BUCKET = "s3://corpora"


@pytest.fixture(scope="module")
def store() -> Iterator[None]:
    """Start a server with an empty bucket, and set the environment variables that point to it."""
    with object_store():
        to_path(BUCKET).mkdir()
        yield


@pytest.fixture(scope="module")
def raw(tmp_path_factory) -> Path:
    """Make a folder with eight large images, the last of which is damaged, and their captions."""
    folder = tmp_path_factory.mktemp("raw")
    rows = ["image,caption"]
    for number in range(8):
        content = file_of(draw(number, 400, 340), "JPEG")
        (folder / f"{number}.jpg").write_bytes(content if number < 7 else content[:500])
        rows.append(f"{number}.jpg,image {number}")
    rows.append("nowhere.jpg,no image")
    (folder / "captions.csv").write_text("\n".join(rows))
    return folder


def build(raw: object, out: object) -> None:
    flags = [f"--raw={raw}", f"--captions={raw}/captions.csv", f"--out={out}", "--samples_per_shard=3", "--workers=2"]
    run_script("data_prep/build_shards.py", "folder", *flags)


def files_in(folder: Path) -> dict[str, bytes]:
    """Return the content of every file except those of the build's state, which holds local times of change."""
    return {
        path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")
    }


@pytest.mark.usefixtures("store")
def test_a_build_from_and_into_a_store_writes_the_bytes_of_a_local_one(raw, tmp_path):
    for file in raw.iterdir():
        (to_path(f"{BUCKET}/raw") / file.name).write_bytes(file.read_bytes())
    build(raw, tmp_path / "local")
    build(f"{BUCKET}/raw", f"{BUCKET}/shards")
    totals = load_manifest(f"{BUCKET}/shards").totals
    assert totals.rejects == {"image cannot be decoded": 1, "image file missing": 1}
    remote, local = to_path(f"{BUCKET}/shards"), files_in(tmp_path / "local")
    assert files_in(remote) == local
    assert {"00000.tar", "00000.index.npy", "shards.json", "contact_sheet.png"} <= local.keys()
    assert "nothing wrong" in run_script("data_prep/check_shards.py", str(remote)).stdout
    # If a shard is lost, only that one is built again.
    (remote / "00001.tar").unlink()
    before = (remote / "00000.tar").stat().st_mtime
    output = run_script("data_prep/check_shards.py", str(remote), code=2).stdout
    assert "00001.tar: is in the manifest but not in the folder" in output
    build(f"{BUCKET}/raw", f"{BUCKET}/shards")
    assert files_in(remote) == local and (remote / "00000.tar").stat().st_mtime == before
    # A downloaded copy is a corpus as well.
    for name, content in files_in(remote).items():
        (tmp_path / "copy").mkdir(exist_ok=True)
        (tmp_path / "copy" / name).write_bytes(content)
    assert "nothing wrong" in run_script("data_prep/check_shards.py", str(tmp_path / "copy")).stdout


@pytest.mark.usefixtures("store")
def test_tars_of_other_tools_are_indexed_in_the_store(emoji_shards):
    foreign = to_path(f"{BUCKET}/foreign")
    shutil.copyfileobj((emoji_shards / "concept/00000.tar").open("rb"), (foreign / "a.tar").open("wb"))
    assert "131 images in 1 shards" in run_script("data_prep/index_shards.py", str(foreign)).stdout
    assert (foreign / "a.index.npy").read_bytes() == (emoji_shards / "concept/00000.index.npy").read_bytes()


@pytest.mark.usefixtures("store")
def test_a_range_of_an_object_is_read_with_one_request():
    file = to_path(f"{BUCKET}/part")
    file.write_bytes(bytes(range(256)))
    assert read_part(file, 10, 5) == bytes(range(10, 15))
    assert read_part(file, 10, 0) == b""
    with pytest.raises(OSError, match="ends before byte 300"):
        read_part(file, 250, 50)


@pytest.mark.usefixtures("store")
def test_errors_of_a_store_are_explained(raw):
    wrong = {**os.environ, "AWS_ENDPOINT_URL": "http://127.0.0.1:9"}
    error = run_script(
        "data_prep/build_shards.py", "folder", f"--raw={BUCKET}/raw", f"--captions={raw}/captions.csv",
        f"--out={BUCKET}/x", code=2, env=wrong,
    ).stderr  # fmt: skip
    assert "Is the store reachable?" in error and "Traceback" not in error
    error = run_script(
        "data_prep/build_shards.py", "folder", f"--raw={raw}", f"--captions={raw}/captions.csv",
        "--out=s3://no-such-bucket/x", code=2,
    ).stderr  # fmt: skip
    assert "no-such-bucket" in error and "Traceback" not in error


@pytest.mark.parametrize("name", ["pipe:cat /etc/passwd", "ftp://host/file", "zip://a::http://b", "github://x"])
def test_other_protocols_are_refused_or_read_as_plain_names(name):
    if "://" in name:
        with pytest.raises(ConfigError, match="is unknown"):
            to_path(name)
    else:
        assert to_path(name) == Path(name)


def test_errors_of_local_files_name_the_file(tmp_path):
    with pytest.raises(OSError, match="ends before"):
        (tmp_path / "file").write_bytes(b"123")
        read_part(tmp_path / "file", 1, 5)
    with pytest.raises(DataError, match=r"file.*does not exist"), explain_read_errors(tmp_path / "file2"):
        (tmp_path / "file2").read_bytes()
