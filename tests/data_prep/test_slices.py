"""A corpus that many jobs build together has the bytes of one that a single job builds."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from bridgetower.errors import ConfigError, DataError
from bridgetower.io.files import claim_folder
from bridgetower.shards.manifest import load_manifest
from data_prep.build_shards import main
from tests.small_corpora import draw, file_of


@pytest.fixture(scope="module")
def raw(tmp_path_factory) -> Path:
    """Make a folder with 23 images in two splits."""
    folder = tmp_path_factory.mktemp("raw")
    rows = ["image,caption,split"]
    for number in range(23):
        (folder / f"{number}.png").write_bytes(file_of(draw(number)))
        rows.append(f"{number}.png,image {number},{'val' if number % 4 == 0 else 'train'}")
    (folder / "captions.csv").write_text("\n".join(rows))
    return folder


def build(raw: Path, out: Path, **flags: str) -> None:
    captions = str(raw / "captions.csv")
    main("folder", raw=str(raw), captions=captions, out=str(out), samples_per_shard="3", workers="1", **flags)


def files_in(folder: Path) -> dict[str, bytes]:
    """Return the content of every file except the lock files, which are empty."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock" and path.name != ".lock")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def whole(raw, tmp_path_factory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("whole")
    build(raw, out / "out")
    return files_in(out / "out")


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 1, 0, 2)])
def test_slices_in_any_order_give_the_same_bytes(raw, whole, tmp_path, capsys, order):
    out = tmp_path / "out"
    for number in order:
        with pytest.raises(DataError, match=r"no shards\.json"):
            load_manifest(out / "val" if (out / "val").exists() else tmp_path)
        build(raw, out, slice=f"{number}/4")
        output = capsys.readouterr().out
        assert ("of other slices are missing" in output) == (number != order[-1])
    assert files_in(out) == whole


def test_merge_names_the_shards_of_a_lost_slice_and_it_can_be_built_again(raw, whole, tmp_path):
    out = tmp_path / "out"
    for number in (0, 2):
        build(raw, out, slice=f"{number}/3")
    with pytest.raises(DataError, match=r"3 of 8 shards are missing, or were .* \(.*tar.*run the jobs"):
        build(raw, out, merge="true")
    build(raw, out, slice="1/3")
    (out / "train/shards.json").unlink()
    build(raw, out, merge="true")
    assert files_in(out) == whole


def test_a_build_of_all_shards_completes_slices(raw, whole, tmp_path):
    build(raw, tmp_path / "out", slice="1/2")
    build(raw, tmp_path / "out")
    assert files_in(tmp_path / "out") == whole


def test_a_slice_and_a_whole_build_cannot_run_at_the_same_time(raw, tmp_path):
    build(raw, tmp_path / "out", slice="0/2")
    lock = claim_folder(tmp_path / "out/train/.build", shared=True)  # as the job of another slice would
    try:
        with pytest.raises(DataError, match="Another program is writing"):
            build(raw, tmp_path / "out")
        build(raw, tmp_path / "out", slice="1/2")
    finally:
        os.close(lock)


def test_the_same_slice_twice_at_once_is_refused(raw, tmp_path):
    build(raw, tmp_path / "out", slice="0/2")
    lock = claim_folder(tmp_path / "out/val/.build", name=".slice-1-of-2.lock")
    try:
        with pytest.raises(DataError, match="Another program is writing"):
            build(raw, tmp_path / "out", slice="1/2")
    finally:
        os.close(lock)


@pytest.mark.parametrize("text", ["4/4", "1", "a/b", "-1/3", "1/0", "1/2/3"])
def test_malformed_slices_are_refused(raw, tmp_path, text):
    with pytest.raises(ConfigError, match="is not NUMBER/COUNT"):
        build(raw, tmp_path / "out", slice=text)


def test_slice_and_merge_contradict_each_other(raw, tmp_path):
    with pytest.raises(ConfigError, match="contradict each other"):
        build(raw, tmp_path / "out", slice="0/2", merge="true")
