"""The command lines of data_prep stop at anything that is not exactly right, with exit code 2 and a suggestion."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from bridgetower.shards.manifest import load_manifest
from tests.conftest import run_script
from tests.small_corpora import draw, file_of, write_corpus

BUILD = "data_prep/build_shards.py"
TOKENIZER = "data_prep/build_tokenizer.py"


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """A folder of two images with a caption file."""
    root: Path = tmp_path_factory.mktemp("photos")
    (root / "raw").mkdir()
    for number in range(2):
        (root / "raw" / f"{number}.png").write_bytes(file_of(draw(number, 400, 350)))
    (root / "photos.csv").write_text("image,caption\n0.png,zero\n1.png,one\n2.png,missing\n")
    return root


def folder_arguments(photos: Path, *more: str) -> list[str]:
    return ["folder", f"--raw={photos / 'raw'}", f"--captions={photos / 'photos.csv'}", "--workers=0", *more]


def assert_refused(result: subprocess.CompletedProcess[str], *words: str) -> None:
    for word in words:
        assert word in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stderr.startswith("error: ")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["Which source?", "emoji", "folder", "--out=DIR"]),
        (["emojy", "--out=OUT"], ["Unknown source emojy", "Did you mean emoji?"]),
        (["emoji"], ["Where to? Give --out=DIR"]),
        (["emoji", "--out=OUT", "--sed=1"], ["Unknown flag --sed", "Did you mean --seed?"]),
        (["emoji", "--out=OUT", "--samples-per-shards=5"], ["Did you mean --samples_per_shard?"]),
        (["emoji", "--out=OUT", "extra"], ["Unexpected word(s) 'extra'"]),
        (["emoji", "--out=OUT", "--seed=one"], ["--seed=one is not a whole number, e.g. --seed=1"]),
        (["emoji", "--out=OUT", "--workers=-1"], ["--workers=-1 must be 0 or more"]),
        (["emoji", "--out=OUT", "--samples_per_shard=0"], ["--samples_per_shard=0 must be 1 or more"]),
        (["emoji", "--out=OUT", "--jpeg_quality=101"], ["--jpeg_quality=101 must be at most 100"]),
        (["emoji", "--out=OUT", "--keep_original=perhaps"], ["--keep_original=perhaps is neither true nor false"]),
        (["emoji", "--out=OUT", "--keep_original", "--short_side_px=30"], ["contradict each other: give one"]),
        (["emoji", "--out=OUT", "--raw=photos"], ["The source emoji does not read --raw=photos"]),
        (["folder", "--out=OUT"], ["needs --raw=DIR", "--captions=FILE"]),
        (["folder", "--out=OUT", "--raw=/nowhere", "--captions=/nowhere.csv"], ["--raw=/nowhere is not a folder"]),
        (["folder", "--out=OUT", "--raw=.", "--captions=/nowhere.csv"], ["/nowhere.csv cannot be read"]),
        (["folder", "--out=OUT", "--raw=.", "--captions=a.txt"], ["must end in .csv, .jsonl or .parquet"]),
        (["folder", "--out=OUT", "--raw=.", "--captions="], ["needs --raw=DIR"]),
    ],
)
def test_a_wrong_build_command_stops_with_a_suggestion_and_writes_nothing(tmp_path, arguments, words):
    out = tmp_path / "out"
    result = run_script(BUILD, *[argument.replace("OUT", str(out)) for argument in arguments], code=2)
    assert_refused(result, *words)
    assert not out.exists()


def test_an_output_folder_that_cannot_be_written_is_refused(photos):
    out = photos / "photos.csv" / "out"  # below a file, where not even root can make a folder
    result = run_script(BUILD, *folder_arguments(photos, f"--out={out}"), code=2)
    assert_refused(result, str(out), "cannot be written to (Not a directory)", "Use another folder")


@pytest.mark.parametrize("arguments", [["--help"], ["emoji", "--help"], ["folder", "--out=x", "--help"]])
def test_help_shows_sources_and_flags_and_does_nothing(arguments, tmp_path):
    result = run_script(BUILD, *arguments, cwd=tmp_path)
    for word in ("Usage: ", "emoji", "folder", "--raw", "--captions", "--out", "--workers", "--seed"):
        assert word in result.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_build_writes_shards_and_prints_a_table_with_the_rejects(photos, tmp_path):
    result = run_script(BUILD, *folder_arguments(photos, f"--out={tmp_path / 'out'}", "--jpeg_quality=80"))
    assert "1 image file missing" in result.stdout
    assert "Traceback" not in result.stderr
    manifest = load_manifest(tmp_path / "out")
    assert (manifest.totals.images, manifest.totals.rows) == (2, 3)
    assert manifest.settings == {
        "seed": 0,
        "samples_per_shard": 10_000,
        "short_side_px": 304,
        "jpeg_quality": 80,
        "lossless": False,
        "keep_repeats": False,
        "exclusion": "",
    }


def test_the_same_folder_with_another_flag_is_refused_with_what_changed(photos, tmp_path):
    run_script(BUILD, *folder_arguments(photos, f"--out={tmp_path / 'out'}"))
    result = run_script(BUILD, *folder_arguments(photos, f"--out={tmp_path / 'out'}", "--keep_original"), code=2)
    assert_refused(result, "short_side_px: 304 -> 0", "Use another --out")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("tokenizer"), [2] * 8)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["SHARDS, --vocabulary_size and --out are all needed", "Usage: "]),
        (["CORPUS", "--vocabulary_size=300"], ["are all needed"]),
        (["CORPUS", "--vocabulary_size=300", "--outt=OUT"], ["Unknown flag --outt", "Did you mean --out?"]),
        (["CORPUS", "--vocabulary_size=many", "--out=OUT"], ["--vocabulary_size=many is not a whole number"]),
        (["CORPUS", "--vocabulary_size=100", "--out=OUT"], ["--vocabulary_size=100 must be 261 or more"]),
        (["CORPUS", "more", "--vocabulary_size=300", "--out=OUT"], ["Unexpected word(s) 'more'"]),
        (["/nowhere", "--vocabulary_size=300", "--out=OUT"], ["The shard folder /nowhere does not exist"]),
        (["CORPUS", "--vocabulary_size=9000", "--out=OUT"], ["give no more than", "Use --vocabulary_size="]),
        (["CORPUS", "--vocabulary_size=270", "--out=CORPUS/shards.json/x"], ["cannot be written to", "Use another"]),
    ],
)
def test_a_wrong_tokenizer_command_stops_with_a_suggestion_and_writes_nothing(corpus, tmp_path, arguments, words):
    out = tmp_path / "out"
    arguments = [argument.replace("CORPUS", str(corpus)).replace("OUT", str(out)) for argument in arguments]
    assert_refused(run_script(TOKENIZER, *arguments, code=2), *words)
    assert not out.exists()


def test_the_help_of_the_tokenizer_command_shows_its_usage():
    assert "Usage: python data_prep/build_tokenizer.py" in run_script(TOKENIZER, "--help").stdout


def test_the_vocabulary_size_that_an_error_names_is_the_largest_that_works(corpus, tmp_path):
    refused = run_script(TOKENIZER, str(corpus), "--vocabulary_size=9000", f"--out={tmp_path / 'out'}", code=2)
    size = int(refused.stderr.rpartition("--vocabulary_size=")[2].split(".")[0])
    run_script(TOKENIZER, str(corpus), f"--vocabulary_size={size}", f"--out={tmp_path / 'out'}")
    vocabulary = json.loads((tmp_path / "out" / "vocab.json").read_text())
    assert len(vocabulary) == size
    assert [token for token, number in sorted(vocabulary.items(), key=lambda item: item[1])][:4] == [
        "<s>",
        "<pad>",
        "</s>",
        "<unk>",
    ]
