"""Fetching a corpus keeps bytes that have arrived, refuses wrong files, and unpacks archives only into their folder."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import signal
import stat
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from bridgetower.errors import ConfigError, DataError
from data_prep.catalogue import CATALOGUE
from data_prep.http_files import download_file, open_session
from data_prep.record import SourceOptions
from data_prep.sources import cc3m
from data_prep.unpack import unpack
from data_prep.url_images import download_images, find_img2dataset
from data_prep.web_corpora import Row
from tests.conftest import REPO, command_line, run_script
from tests.data_prep.file_server import FileServer, file_server
from tests.data_prep.layouts import make_image_file
from tests.small_corpora import build_records

FETCH = "data_prep/fetch_corpus.py"
CONTENT = bytes(range(256)) * 4096  # 1 MiB


@pytest.fixture
def server():
    with file_server() as state:
        yield state


def fetch(server: FileServer, target: Path, **facts: Any) -> bytes:
    download_file(open_session(), f"{server.url}/a.zip", target, wait_seconds=0.01, **facts)
    return target.read_bytes()


def zip_of(members: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return stream.getvalue()


# Downloads


def test_a_download_continues_after_each_drop_of_the_connection_and_no_byte_is_sent_twice(server, tmp_path):
    server.files["/a.zip"] = CONTENT
    server.hang_up_after["/a.zip"] = [300_000, 1, 400_000]
    assert fetch(server, tmp_path / "a.zip") == CONTENT
    assert server.sent_bytes == len(CONTENT)
    ranges = [requested_range for _, requested_range in server.requests]
    assert ranges == ["", "bytes=300000-", "bytes=300001-", "bytes=700001-"]
    assert [file.name for file in tmp_path.iterdir()] == ["a.zip"]


def test_a_later_call_continues_where_an_earlier_one_was_killed(server, tmp_path):
    server.files["/a.zip"] = CONTENT

    def stop(done_bytes: int, total_bytes: int | None) -> None:
        if done_bytes > 500_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch(server, tmp_path / "a.zip", show=stop)
    kept = (tmp_path / "a.zip.part").stat().st_size
    assert kept > 500_000 and not (tmp_path / "a.zip").exists()
    assert fetch(server, tmp_path / "a.zip") == CONTENT
    assert server.requests[-1] == ("/a.zip", f"bytes={kept}-")


def test_an_existing_file_is_not_requested(server, tmp_path):
    (tmp_path / "a.zip").write_bytes(b"here")
    assert fetch(server, tmp_path / "a.zip") == b"here"
    assert server.requests == []


def test_a_complete_part_that_was_not_renamed_is_used(server, tmp_path):
    server.files["/a.zip"] = CONTENT
    (tmp_path / "a.zip.part").write_bytes(CONTENT)
    (tmp_path / "a.zip.part.of").write_text(f'"{len(CONTENT)}"')
    assert fetch(server, tmp_path / "a.zip") == CONTENT
    assert server.sent_bytes == 0


@pytest.mark.parametrize("cause", ["the file changed", "the server knows no ranges", "nobody knows of which file"])
def test_a_part_of_another_file_is_never_continued(server, tmp_path, cause):
    server.files["/a.zip"] = CONTENT
    (tmp_path / "a.zip.part").write_bytes(b"x" * 1000)
    if cause != "nobody knows of which file":
        etag = "old" if cause == "the file changed" else len(CONTENT)
        (tmp_path / "a.zip.part.of").write_text(f'"{etag}"')
    server.knows_ranges = cause != "the server knows no ranges"
    assert fetch(server, tmp_path / "a.zip") == CONTENT


def test_a_request_to_a_busy_server_is_repeated(server, tmp_path):
    server.files["/a.zip"] = CONTENT
    server.statuses["/a.zip"] = [503]
    assert fetch(server, tmp_path / "a.zip") == CONTENT


def test_a_missing_file_is_an_error_with_its_address(server, tmp_path):
    with pytest.raises(DataError, match=r"/a\.zip cannot be downloaded: the server answers 404.*browser"):
        fetch(server, tmp_path / "a.zip")


def test_a_download_without_progress_is_given_up(server, tmp_path):
    server.files["/a.zip"] = CONTENT
    server.hang_up_after["/a.zip"] = [100] + [0] * 20
    with pytest.raises(DataError, match=r"6 attempts failed.*run the command again later: it continues"):
        fetch(server, tmp_path / "a.zip")
    assert (tmp_path / "a.zip.part").stat().st_size == 100


def test_a_right_checksum_is_accepted(server, tmp_path):
    server.files["/a.zip"] = CONTENT
    assert fetch(server, tmp_path / "a.zip", size_bytes=len(CONTENT), md5=hashlib.md5(CONTENT).hexdigest()) == CONTENT


@pytest.mark.parametrize(("facts", "problem"), [({"size_bytes": 7}, "not 7"), ({"md5": "0" * 32}, "its MD5 is not")])
def test_a_file_of_another_size_or_checksum_is_refused_and_deleted(server, tmp_path, facts, problem):
    server.files["/a.zip"] = CONTENT
    with pytest.raises(DataError, match=problem):
        fetch(server, tmp_path / "a.zip", **facts)
    assert list(tmp_path.iterdir()) == []


# Archives


def test_unpacking_again_writes_only_missing_files(tmp_path):
    (tmp_path / "a.zip").write_bytes(zip_of({"train/1.jpg": b"one", "train/2.jpg": b"two", "__MACOSX/x": b"-"}))
    assert unpack(tmp_path / "a.zip", tmp_path / "out") == 2
    (tmp_path / "out/train/1.jpg").write_bytes(b"own")
    (tmp_path / "out/train/2.jpg").unlink()
    unpack(tmp_path / "a.zip", tmp_path / "out")
    contents = {file.name: file.read_bytes() for file in (tmp_path / "out").rglob("*") if file.is_file()}
    assert contents == {"1.jpg": b"own", "2.jpg": b"two"}


@pytest.mark.parametrize("name", ["../evil", "/tmp/evil", "a/../../evil", "..\\evil", "C:/evil"])
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_a_member_outside_the_folder_is_refused(tmp_path, name, kind):
    archive = tmp_path / "in" / "a.zip"
    archive.parent.mkdir()
    if kind == "zip":
        archive.write_bytes(zip_of({"good": b"1", name: b"2"}))
        # zipfile replaces the system's separator by /, but an attacker's archive may hold any name.
    else:
        with tarfile.open(archive, "w:gz") as tar:
            member = tarfile.TarInfo(name)
            member.size = 1
            tar.addfile(member, io.BytesIO(b"2"))
    with pytest.raises(DataError, match=r"would be written outside its folder.*Do not use this archive"):
        unpack(archive, tmp_path / "in" / "out")
    assert not list(tmp_path.rglob("evil"))


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_a_link_is_refused(tmp_path, kind):
    archive = tmp_path / "a"
    if kind == "zip":
        with zipfile.ZipFile(archive, "w") as packed:
            info = zipfile.ZipInfo("link")
            info.external_attr = (stat.S_IFLNK | 0o777) << 16
            packed.writestr(info, "/etc")
    else:
        with tarfile.open(archive, "w:gz") as tar:
            member = tarfile.TarInfo("link")
            member.type, member.linkname = tarfile.SYMTYPE, "/etc"
            tar.addfile(member)
    with pytest.raises(DataError, match="is a link or a device"):
        unpack(archive, tmp_path / "out")


def test_a_zip_bomb_is_refused_before_it_fills_the_disk(tmp_path):
    (tmp_path / "a.zip").write_bytes(zip_of({"zeros": bytes(50_000_000)}))
    with pytest.raises(DataError, match="more than 200 times its size"):
        unpack(tmp_path / "a.zip", tmp_path / "out")
    assert not [file for file in (tmp_path / "out").rglob("*") if file.is_file()]


def test_a_damaged_archive_is_refused_with_a_suggestion(tmp_path):
    content = bytearray(zip_of({"a": bytes(range(256)) * 40}))
    content[60] ^= 255
    (tmp_path / "a.zip").write_bytes(content)
    with pytest.raises(DataError, match=r"cannot be unpacked .*Delete it and run the command again"):
        unpack(tmp_path / "a.zip", tmp_path / "out")
    assert not [file for file in (tmp_path / "out").rglob("*") if file.is_file()]


# The command


def serve(server: FileServer, url: str, content: bytes) -> str:
    path = f"/{url.partition('://')[2]}"
    server.files[path] = content
    return path


def serve_nlvr2(server: FileServer) -> list[str]:
    return [serve(server, file.url, file.path.encode()) for file in CATALOGUE["nlvr2"].files]


@pytest.mark.parametrize("source", sorted(CATALOGUE))
def test_without_download_every_file_is_listed_and_nothing_is_written(source, tmp_path):
    result = run_script(FETCH, source, f"--out={tmp_path / 'new'}")
    corpus = CATALOGUE[source]
    assert all(file.url in result.stdout and file.path in result.stdout for file in corpus.files)
    assert all(request.what in result.stdout and request.how in result.stdout for request in corpus.by_hand)
    assert ("--download" in result.stdout) == bool(corpus.files)
    assert not (tmp_path / "new").exists()


def test_files_are_put_where_the_source_reads_them_and_fetched_once(server, tmp_path):
    serve_nlvr2(server)
    arguments = ("nlvr2", f"--out={tmp_path}", "--download", f"--mirror={server.url}/")
    result = run_script(FETCH, *arguments)
    for file in CATALOGUE["nlvr2"].files:
        assert (tmp_path / file.path).read_text() == file.path
    assert "Still to be fetched by hand: images/train/" in result.stdout
    before = len(server.requests)
    run_script(FETCH, *arguments)
    assert len(server.requests) == before


def test_archives_are_unpacked_where_the_source_reads_them_and_may_then_be_deleted(server, tmp_path):
    names = {"images": "VG_100K/1.jpg", "images2": "VG_100K_2/2.jpg"}
    for file in CATALOGUE["vg"].files:
        stem = file.url.rsplit("/", 1)[-1].partition(".")[0]
        serve(server, file.url, zip_of({names.get(stem, f"{stem}.json"): stem.encode()}))
    arguments = ("vg", f"--out={tmp_path}", "--download", f"--mirror={server.url}")
    run_script(FETCH, *arguments)
    files = sorted(
        str(file.relative_to(tmp_path)) for file in tmp_path.rglob("[!.]*") if file.suffix in (".json", ".jpg")
    )
    assert files == [
        "annotations/region_descriptions.json",
        "image_data.json",
        "images/VG_100K/1.jpg",
        "images/VG_100K_2/2.jpg",
    ]
    for archive in (tmp_path / "downloads").glob("*.zip"):
        archive.unlink()
    before = len(server.requests)
    run_script(FETCH, *arguments)
    assert len(server.requests) == before


def test_sbu_comes_in_a_tar(server, tmp_path):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as tar:
        member = tarfile.TarInfo("sbu-captions-all.json")
        member.size = 2
        tar.addfile(member, io.BytesIO(b"{}"))
    serve(server, CATALOGUE["sbu"].files[0].url, stream.getvalue())
    result = run_script(FETCH, "sbu", f"--out={tmp_path}", "--download", f"--mirror={server.url}")
    assert (tmp_path / "sbu-captions-all.json").read_text() == "{}"
    assert "run the command with --images" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["Which source?"]),
        (["coca", "--out=OUT"], ["Unknown source coca", "Did you mean coco?"]),
        (["coco"], ["Where to? Give --out=DIR"]),
        (["coco", "--out=OUT", "--downlaod"], ["Unknown flag --downlaod", "Did you mean --download?"]),
        (["coco", "--out=OUT", "more"], ["Unexpected word(s) 'more'"]),
        (["coco", "--out=OUT", "--download=perhaps"], ["neither true nor false"]),
        (["coco", "--out=OUT", "--images"], ["come with --download", "cc3m, cc12m, sbu"]),
        (["cc3m", "--out=OUT", "--max_rows=-1"], ["must be 0 or more"]),
        (["cc3m", "--out=OUT", "--images", "--processes=0"], ["must be 1 or more"]),
        (["cc3m", "--out=OUT", "--images", "--img2dataset=/nowhere"], ["/nowhere is not a program", "pip install"]),
        (["cc3m", "--out=s3://bucket/x", "--download"], ["is not on this machine"]),
        (["coco", "--out=OUT", "--download", "--mirror=ftp://x"], ["must begin with http://"]),
    ],
)
def test_a_wrong_command_stops_with_a_suggestion_and_writes_nothing(tmp_path, arguments, words):
    result = run_script(FETCH, *[argument.replace("OUT", str(tmp_path / "out")) for argument in arguments], code=2)
    for word in words:
        assert word in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()


def test_images_cannot_be_fetched_without_the_list_of_urls(tmp_path):
    result = run_script(FETCH, "cc3m", f"--out={tmp_path}", "--images", f"--img2dataset={shutil.which('true')}", code=2)
    assert "does not find utils/Train_GCC-training.tsv" in result.stderr


# Images from URLs


def test_the_list_keeps_every_row_whatever_its_caption(tmp_path):
    captions = ['"', "a\tb", "line\u2028end", "2021-01-01", "", "\\", "x" * 3000]
    rows = [Row(caption, f"http://a.example/{number}") for number, caption in enumerate(captions)]
    with pytest.raises(DataError, match="has done 0 of 7 rows"):
        download_images(str(shutil.which("true")), iter(rows), tmp_path / "tars", processes=1, max_rows=0)
    lines = (tmp_path / "tars.urls" / "00000.jsonl").read_bytes().split(b"\n")[:-1]
    assert [json.loads(line) for line in lines] == [{"url": row.url, "caption": row.caption} for row in rows]


@pytest.mark.parametrize(
    ("published", "listed"),
    [
        ("http://a.example/two words.jpg", "http://a.example/two%20words.jpg"),
        ("http://a.example/größe/日.jpg", "http://a.example/gr%C3%B6%C3%9Fe/%E6%97%A5.jpg"),
        ("http://a.example/two%20words.jpg", "http://a.example/two%20words.jpg"),
        ("https://u:p@[::1]:80/a;b,c~d/(1)!?q='x'&r=+$*#part", "https://u:p@[::1]:80/a;b,c~d/(1)!?q='x'&r=+$*#part"),
    ],
)
def test_characters_that_a_url_cannot_have_are_encoded_once(published, listed, tmp_path):
    with pytest.raises(DataError, match="has done 0 of 1 rows"):
        download_images(
            str(shutil.which("true")), iter([Row("a", published)]), tmp_path / "tars", processes=1, max_rows=0
        )
    assert json.loads((tmp_path / "tars.urls" / "00000.jsonl").read_text())["url"] == listed


def test_a_failing_program_is_reported(tmp_path):
    with pytest.raises(DataError, match="ended with code 1"):
        download_images(str(shutil.which("false")), iter([Row("a", "b")]), tmp_path / "tars", processes=1, max_rows=0)


def test_another_max_rows_in_the_same_folder_is_refused(tmp_path):
    rows = [Row("a", "b"), Row("c", "d")]
    for max_rows, problem in ((1, "has done 0 of 1 rows"), (2, r"made with --max_rows=1, now it is 2")):
        with pytest.raises(Exception, match=problem):
            download_images(str(shutil.which("true")), iter(rows), tmp_path / "tars", processes=1, max_rows=max_rows)


def test_ctrl_c_ends_the_program_and_all_that_it_started(tmp_path):
    program = tmp_path / "img2dataset"
    program.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pids\nsleep 600 &\necho $! >> {tmp_path}/pids\nwait\n")
    program.chmod(0o755)
    for part in cc3m.CORPUS.parts:
        (tmp_path / "cc" / part.table).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "cc" / part.table).write_text("a\thttp://a.example/a.jpg\n")
    arguments = ["cc3m", f"--out={tmp_path / 'cc'}", "--images", f"--img2dataset={program}"]
    command = subprocess.Popen(
        command_line(FETCH, arguments, 0),
        cwd=REPO,
        stderr=subprocess.PIPE,
        text=True,
        # A shell that starts the tests in the background makes them ignore SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 60
    while not ((tmp_path / "pids").exists() and len((tmp_path / "pids").read_text().split()) == 2):
        assert time.monotonic() < deadline and command.poll() is None
        time.sleep(0.05)
    command.send_signal(signal.SIGINT)
    _, errors = command.communicate(timeout=60)
    assert (command.returncode, "it continues" in errors, "Traceback" in errors) == (130, True, False)
    time.sleep(0.2)
    assert [pid for pid in (tmp_path / "pids").read_text().split() if is_running(int(pid))] == []


def is_running(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


def test_uv_keeps_img2dataset_in_an_environment_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin/python"))
    with pytest.raises(ConfigError, match=r"pip install -e '\.\[download\]'"):
        find_img2dataset("")
    uv, tools = tmp_path / "bin/uv", tmp_path / "tools"
    uv.parent.mkdir()
    uv.write_text(
        f'#!/bin/sh\nif [ "$2" = dir ]; then echo {tools}; exit; fi\n'
        f'echo "$@" >> {tmp_path}/installed; mkdir {tools}; touch {tools}/img2dataset\n'
    )
    uv.chmod(0o755)
    assert [find_img2dataset(""), find_img2dataset("")] == [str(tools / "img2dataset")] * 2
    assert (tmp_path / "installed").read_text() == "tool install --quiet --python 3.11 img2dataset>=1.47,<2\n"
    (tools / "img2dataset").unlink()
    uv.write_text(f'#!/bin/sh\n[ "$2" = dir ] && echo {tools} || exit 1\n')
    with pytest.raises(ConfigError, match=r"uv could not install img2dataset.*--img2dataset=PATH"):
        find_img2dataset("")


PROGRAM = shutil.which("img2dataset")


@pytest.mark.skipif(PROGRAM is None, reason="img2dataset is not on the PATH")
def test_img2dataset_fetches_images_that_a_build_reads_and_continues_when_run_again(server, tmp_path):
    train = [
        ("a bus", "bus.jpg", 0),
        ('a " quote', "quote.png", 1),
        ("dead", "dead.jpg", None),
        ("no image", "page.html", -1),
        ("space", "two words.jpg", 2),
        ("umlaut", "größe.jpg", 3),
    ]
    for _, name, number in train:
        if number is not None:
            server.files[f"/{quote(name)}"] = b"<html>" if number < 0 else make_image_file(number)
    server.files["/coffee.jpg"] = make_image_file(9)
    tables = (
        "".join(f"{text}\t{server.url}/{name}\n" for text, name, _ in train),
        f"coffee\t{server.url}/coffee.jpg\n",
    )
    for file, table in zip(CATALOGUE["cc3m"].files, tables, strict=True):
        serve(server, file.url, table.encode())
    arguments = ("cc3m", f"--out={tmp_path / 'cc'}", "--processes=1", f"--img2dataset={PROGRAM}")
    result = run_script(FETCH, *arguments, "--download", "--images", f"--mirror={server.url}")
    assert "1 HTTP 404" in result.stdout
    manifests = build_records(cc3m.records(SourceOptions(raw=tmp_path / "cc")), tmp_path / "out")
    totals = manifests["train"].totals
    assert (totals.rows, totals.images) == (6, 4)
    assert totals.rejects == {"download failed: HTTP 404": 1, "image cannot be decoded": 1}
    assert (manifests["val"].totals.rows, manifests["val"].totals.images) == (1, 1)
    before = len(server.requests)
    run_script(FETCH, *arguments, "--images")
    assert len(server.requests) == before
