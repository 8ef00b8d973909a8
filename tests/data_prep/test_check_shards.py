"""check_shards.py finds each kind of damage and names it; --repair leaves a corpus that can be read."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from bridgetower.errors import DataError
from bridgetower.io.files import claim_folder
from bridgetower.shards.index import ShardReader
from bridgetower.shards.manifest import load_manifest
from data_prep.check_shards import main
from data_prep.record import ImageFile, Record
from tests.conftest import run_script
from tests.small_corpora import build_records, file_of, write_corpus

COMMAND = "data_prep/check_shards.py"
Check = Callable[..., str]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A corpus of three shards with four images each."""
    return write_corpus(tmp_path_factory.mktemp("whole"), [1, 2] * 6)


@pytest.fixture
def corpus(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "corpus"))


@pytest.fixture
def check(capsys) -> Check:
    """Run the command in this process, assert its exit code and return its output."""

    def run(*folders: Path, code: int = 0, **flags: str) -> str:
        try:
            main(*map(str, folders), workers="1", **flags)
            ended = 0
        except SystemExit as end:
            ended = int(str(end.code))
        output: str = capsys.readouterr().out
        assert ended == code, output
        return output

    return run


def flip_byte(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def change_manifest(corpus: Path, **totals: int) -> None:
    path = corpus / "shards.json"
    content = json.loads(path.read_text())
    content["totals"].update(totals)
    path.write_text(json.dumps(content))


def test_a_whole_corpus_has_nothing_wrong(check, whole):
    assert "3 shards, 12 images, 18 captions: nothing wrong" in check(whole, decode="all")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda c: (c / "00001.tar").unlink(), "00001.tar: is in the manifest but not in the folder"),
        (lambda c: shutil.copy(c / "00001.tar", c / "new.tar"), "new.tar: is not in the manifest"),
        (lambda c: flip_byte(c / "00001.tar", 600), "has the SHA-256"),
        (lambda c: (c / "00001.tar").write_bytes((c / "00001.tar").read_bytes()[:1500]), "is not a readable tar"),
        (lambda c: (c / "00001.index.npy").unlink(), "00001.index.npy does not exist"),
        (lambda c: shutil.copy(c / "00002.index.npy", c / "00001.index.npy"), "00001.index.npy that does not match"),
        (lambda c: (c / "00001.index.npy").write_bytes(b"no index"), "00001.index.npy is damaged"),
        (lambda c: (c / "shards.json").unlink(), "shards.json does not exist"),
        (lambda c: (c / "shards.json").write_text("{"), "shards.json: is damaged"),
        (lambda c: change_manifest(c, captions=19), "says captions=19, but there are 18"),
        (lambda c: change_manifest(c, rows=20), "says rows=20, but there are 18"),
        (lambda c: (c / ".00001.tar.7.tmp").write_bytes(b"half"), "is a temporary file of an interrupted build"),
        (lambda c: (c / "00001.tar").rename(c / "a b.tar"), "a b.tar: has a name with characters other than"),
    ],
    ids=[
        "lost", "stray", "flipped", "cut", "no_index", "wrong_index", "bad_index", "no_manifest", "bad_manifest",
        "captions", "rows", "leftover", "name",
    ],
)  # fmt: skip
def test_each_damage_is_named_and_repaired(check, corpus, damage, message):
    damage(corpus)
    assert message in check(corpus, code=2)
    check(corpus, repair="true")
    manifest = load_manifest(corpus)
    assert manifest.num_pairs == sum(ShardReader(corpus / shard.name).num_pairs for shard in manifest.shards)
    assert "nothing wrong" in check(corpus)


def test_an_image_that_cannot_be_decoded_is_found_and_its_shard_goes_into_quarantine(check, corpus):
    row = ShardReader(corpus / "00001.tar")._index[2]
    flip_byte(corpus / "00001.tar", int(row["image_offset"]) + 1)  # in PNG's signature
    output = check(corpus, decode="none", code=2)  # the checksum is wrong anyway
    assert "cannot be decoded" not in output
    assert "cannot be decoded" in check(corpus, decode="all", code=2)
    check(corpus, repair="true")
    assert (corpus / "quarantine/00001.tar").is_file() and not (corpus / "00001.tar").exists()
    assert [shard.name for shard in load_manifest(corpus).shards] == ["00000.tar", "00002.tar"]


def test_images_that_two_corpora_share_are_counted(check, whole, corpus, tmp_path):
    output = check(whole, corpus, code=2)
    assert "share 12 images with the same image id" in output
    assert "that look the same" in output
    check(whole, corpus, duplicates="report")
    other = write_corpus(tmp_path, [1, 1], name="other", first_image=50)
    assert "same image id" not in check(whole, other, duplicates="report")


def test_what_repair_cannot_mend_is_reported_and_ends_with_2(check, corpus):
    for suffix in (".tar", ".index.npy"):
        (corpus / f"00001{suffix}").rename(corpus / f"a b{suffix}")
    content = (corpus / "shards.json").read_text()
    (corpus / "shards.json").write_text(content.replace("00001.tar", "a b.tar"))
    output = check(corpus, code=2, repair="true")
    assert "a b.tar: has a name with characters other than" in output.partition("After the repair")[2]


def test_a_shard_whose_json_is_not_as_documented_goes_into_quarantine(check, corpus):
    shard = corpus / "00001.tar"
    shard.write_bytes(shard.read_bytes().replace(b'"width":', b'"Width":'))
    (corpus / "shards.json").unlink()  # otherwise the checksum would reveal it
    assert "has width=None in its json" in check(corpus, code=2)
    check(corpus, repair="true")
    assert (corpus / "quarantine/00001.tar").is_file()


def test_nothing_is_repaired_while_a_build_is_running(check, corpus):
    (corpus / ".00001.tar.7.tmp").write_bytes(b"being written")
    lock = claim_folder(corpus / ".build")
    try:
        with pytest.raises(DataError, match="Another program is writing"):
            check(corpus, repair="true")
    finally:
        os.close(lock)
    assert (corpus / ".00001.tar.7.tmp").is_file()


def test_plain_images_do_not_look_the_same(check, tmp_path):
    for colour in ("white", "gray"):
        (tmp_path / f"{colour}.png").write_bytes(file_of(Image.new("RGB", (40, 30), colour)))
        image = ImageFile(path=tmp_path / f"{colour}.png")
        record = Record(key="k", image=image, image_id=colour, captions=(f"all {colour}",))
        build_records([record], tmp_path / colour)
    assert "share" not in check(tmp_path / "white", tmp_path / "gray")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Which folder?"),
        (["/nowhere"], "/nowhere is not a folder"),
        (["--decode=some", "."], "--decode=some is not a whole number"),
        (["--duplicates=maybe", "."], "--duplicates=maybe is neither"),
        (["--fix", "."], "Unknown flag --fix"),
    ],
)
def test_wrong_usage_is_refused(arguments, message):
    assert message in run_script(COMMAND, *arguments, code=2).stderr
