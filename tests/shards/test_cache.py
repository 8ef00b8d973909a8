"""Remote shards are fetched once, checked, bounded in size, and read in the order of local ones, whatever fails."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import json
import logging
import os
import pickle
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from gcp_storage_emulator.server import create_server

import bridgetower.io.storage as storage_module
import bridgetower.shards.download as download_module
import bridgetower.shards.prefetch as prefetch_module
from bridgetower.config.data import DataConfig
from bridgetower.data.corpora import Corpora, open_corpora
from bridgetower.data.loader import micro_batches
from bridgetower.data.order import Cut, Order
from bridgetower.data.stream import PretrainStream
from bridgetower.data.text import Tokenizer
from bridgetower.errors import ConfigError, DataError
from bridgetower.io.storage import read_remote, to_path
from bridgetower.shards.cache import ShardCache
from bridgetower.shards.download import RemoteShard
from bridgetower.shards.index import index_path, load_index
from bridgetower.shards.manifest import load_manifest
from bridgetower.shards.prefetch import Prefetcher
from tests.conftest import REPO
from tests.object_store import object_store
from tests.shards.faulty_server import Fault, FaultyServer, serving
from tests.small_corpora import write_corpus

# A program without torch, so that it starts at once.
HOLD = """
import pickle, sys, time
from bridgetower.errors import DataError
cache, shard, seconds = pickle.loads(bytes.fromhex(sys.argv[1]))
try:
    held = cache.hold(shard)
except DataError as error:
    sys.exit(f"DataError: {error}")
time.sleep(seconds)
held.release()
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """24 pairs in eight shards of about 10 kB."""
    return write_corpus(tmp_path_factory.mktemp("corpora"), [1] * 24, samples_per_shard=3)


@pytest.fixture
def server(corpus) -> Iterator[FaultyServer]:
    with serving(corpus.parent) as running:
        yield running


def shards_at(url: str) -> list[RemoteShard]:
    folder = to_path(f"{url}/corpus")
    return [RemoteShard(url=folder / entry.name, entry=entry) for entry in load_manifest(folder).shards]


def small_cache(folder: Path, max_bytes: int = 10**9, **options: Any) -> ShardCache:
    return ShardCache(folder, max_bytes, **{"backoff_seconds": 0.01, "timeout_seconds": 1.0, **options})


def content_of(corpus: Path, shard: RemoteShard) -> tuple[bytes, bytes]:
    local = corpus / shard.entry.name
    return local.read_bytes(), index_path(local).read_bytes()


def holding(cache: ShardCache, shard: RemoteShard, seconds: float = 0.0, *before: str) -> subprocess.Popen[str]:
    """Start another process that holds a shard for some seconds."""
    arguments = pickle.dumps((cache, shard, seconds)).hex()
    return subprocess.Popen(
        [*before, sys.executable, "-c", HOLD, arguments], cwd=REPO, stderr=subprocess.PIPE, text=True
    )


@pytest.fixture
def impatient(server, monkeypatch) -> None:
    """Wait 0.3 s for answers that the server withholds, and as long as a slow machine may take for all others."""
    left: dict[int, int] = {}

    def read(path: Path, timeout_seconds: float, *part: int) -> bytes:
        fault = next((one for one in server.faults if re.search(one.of, str(path))), None)
        if fault is not None and fault.kind in ("hang", "stall") and left.setdefault(id(fault), fault.times) > 0:
            left[id(fault)] -= 1
            return read_remote(path, 0.3, *part)
        return read_remote(path, 60.0, *part)

    monkeypatch.setattr(download_module, "read_remote", read)
    monkeypatch.setattr(storage_module, "read_remote", read)


def count_tar_requests(server: FaultyServer) -> int:
    return len([path for path in server.requests if path.endswith(".tar")])


def cached(path: Path) -> tuple[bytes, bytes]:
    return path.read_bytes(), index_path(path).read_bytes()


def test_a_shard_is_fetched_once_with_its_index(corpus, server, tmp_path):
    shard, cache = shards_at(server.url)[0], small_cache(tmp_path)
    held = cache.hold(shard)
    assert cached(held.path) == content_of(corpus, shard) and held.path.name == f"{shard.entry.sha256}.tar"
    before = len(server.requests)
    assert cache.hold(shard).path == held.path and len(server.requests) == before


@pytest.mark.parametrize(
    ("kind", "of"),
    [(kind, of) for kind in ("drop", "hang", "stall", "truncate", "500", "503") for of in (r"\.tar$", r"\.npy$")]
    # An index has no checksum: a wrong byte that leaves its counts right cannot be detected.
    + [("flip", r"\.tar$")],
)
@pytest.mark.usefixtures("impatient")
def test_a_store_that_fails_twice_is_asked_again(corpus, server, tmp_path, kind, of, caplog, monkeypatch):
    monkeypatch.setattr(download_module, "_BLOCK_BYTES", 4_000)
    logging.getLogger("bridgetower").propagate = True
    shard = shards_at(server.url)[0]
    server.faults = [Fault(kind, of, times=2)]
    with caplog.at_level(logging.WARNING, "bridgetower"):
        held = small_cache(tmp_path).hold(shard)
    assert cached(held.path) == content_of(corpus, shard)
    said = [record.getMessage()[:14] for record in caplog.records]
    # Two blocks with wrong bytes cost one attempt: the checksum is compared at the end.
    assert said == ["attempt 1 of 5", "attempt 2 of 5"][: 1 if kind == "flip" else 2]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("drop", "3 attempts failed"),
        ("hang", "3 attempts failed, the last with: FSTimeoutError"),
        ("stall", "3 attempts failed, the last with: FSTimeoutError"),
        ("truncate", r"were requested, .* came"),
        ("flip", r"its SHA-256 is \w+, its manifest says \w+.* copy the shard there again"),
        ("503", "3 attempts failed.*503"),
    ],
)
@pytest.mark.usefixtures("impatient")
def test_a_store_that_always_fails_is_an_error_that_says_how(server, tmp_path, kind, message):
    shard = shards_at(server.url)[0]
    server.faults, server.hang_seconds = [Fault(kind, times=99)], 60.0
    start = time.monotonic()
    with pytest.raises(DataError, match=rf"00000\.tar cannot be fetched; .*{message}"):
        small_cache(tmp_path, attempts=3).hold(shard)
    assert time.monotonic() - start < server.hang_seconds and not list(tmp_path.glob("*.t*"))


@pytest.mark.parametrize("status", ["401", "403", "404", "410"])
def test_a_shard_that_is_missing_or_forbidden_is_requested_once(server, tmp_path, status):
    shard = shards_at(server.url)[0]
    server.faults = [Fault(status, times=99)]
    with pytest.raises(DataError, match=r"00000\.tar cannot be fetched"):
        small_cache(tmp_path, attempts=5).hold(shard)
    assert count_tar_requests(server) == 1


def test_a_download_continues_after_the_last_byte_before_its_connection_broke(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download_module, "_BLOCK_BYTES", 1_024)
    shard = shards_at(server.url)[0]
    blocks = -(-shard.entry.bytes // 1_024)
    small_cache(tmp_path / "whole").hold(shard)
    assert count_tar_requests(server) == blocks
    server.requests.clear()
    server.faults = [Fault("drop", times=3, after_bytes=700)]
    small_cache(tmp_path / "broken").hold(shard)
    assert count_tar_requests(server) == blocks + 3


def test_a_server_that_ignores_ranges_is_asked_once(corpus, server, tmp_path, monkeypatch):
    monkeypatch.setattr(download_module, "_BLOCK_BYTES", 5_000)
    server.knows_ranges = False
    shard = shards_at(server.url)[1]
    assert cached(small_cache(tmp_path).hold(shard).path) == content_of(corpus, shard)
    assert count_tar_requests(server) == 1  # the whole answer is used, not one block of it


def test_the_index_of_another_shard_is_not_taken(corpus, server, tmp_path):
    shard = shards_at(server.url)[0]
    entry = dataclasses.replace(shard.entry, pairs=shard.entry.pairs + 1)
    with pytest.raises(DataError, match=r"00000\.index\.npy cannot be fetched; 2 attempts.* of another shard"):
        small_cache(tmp_path, attempts=2).hold(RemoteShard(url=shard.url, entry=entry))
    assert not list(tmp_path.glob("*.t*")) and not list(tmp_path.glob("*.npy"))


def test_shards_of_a_store_in_memory_are_cached_too(corpus, tmp_path):
    folder = to_path("memory://cached/corpus")
    for file in corpus.glob("0*"):
        (folder / file.name).write_bytes(file.read_bytes())
    entry = load_manifest(corpus).shards[2]
    shard = RemoteShard(url=folder / entry.name, entry=entry)
    assert cached(small_cache(tmp_path).hold(shard).path) == content_of(corpus, shard)


def test_the_least_recently_used_shard_is_removed_and_a_held_one_is_not(server, tmp_path, caplog):
    logging.getLogger("bridgetower").propagate = True
    shards = shards_at(server.url)
    size = max(shard.entry.bytes for shard in shards)
    cache = small_cache(tmp_path, 3 * size, timeout_seconds=0.2)
    first = cache.hold(shards[0])
    for shard in shards[1:3]:
        cache.hold(shard).release()
        time.sleep(0.02)
    cache.hold(shards[1]).release()  # used again, so no longer the oldest
    cache.hold(shards[3]).release()
    there = {path.stem for path in tmp_path.glob("*.tar")}
    assert there == {shards[number].entry.sha256 for number in (0, 1, 3)}
    assert {path.name.split(".")[0] for path in tmp_path.glob("*.npy")} == there
    others = [cache.hold(shards[number]) for number in (4, 5)]
    with (
        caplog.at_level(logging.WARNING, "bridgetower"),
        pytest.raises(DataError, match=r"full of shards that are being read\. Raise data\.cache_gb="),
    ):
        cache.hold(shards[6])
    assert [record.getMessage()[:16] for record in caplog.records] == ["waiting for spac"]
    first.release()
    assert cache.hold(shards[6]).path.exists() and not first.path.exists() and others[0].path.exists()


def test_a_shard_that_is_renamed_while_the_cache_is_measured_is_counted(tmp_path, monkeypatch):
    cache, temporary, glob = small_cache(tmp_path), tmp_path / "shard.tmp", Path.glob
    temporary.write_bytes(bytes(1_000))

    def rename_after_the_first_glob(folder: Path, pattern: str) -> list[Path]:
        paths = list(glob(folder, pattern))
        if temporary.exists():
            temporary.rename(tmp_path / "shard.tar")
        return paths

    monkeypatch.setattr(Path, "glob", rename_after_the_first_glob)
    assert cache._used_bytes() == 1_000


def test_a_shard_larger_than_the_cache_is_refused(server, tmp_path):
    with pytest.raises(ConfigError, match=r"data\.cache_gb=1e-06"):
        small_cache(tmp_path, 1_000).hold(shards_at(server.url)[0])


def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"data\.cache_dir=.*file/cache cannot be written to"):
        small_cache(tmp_path / "file" / "cache")


def test_a_damaged_file_in_the_cache_is_fetched_again(corpus, server, tmp_path):
    shard, cache = shards_at(server.url)[0], small_cache(tmp_path)
    held = cache.hold(shard)
    held.release()
    os.truncate(held.path, 100)
    assert cached(cache.hold(shard).path) == content_of(corpus, shard)


def test_a_damaged_file_is_removed_only_by_the_process_that_fetches_it_anew(corpus, server, tmp_path):
    shard, cache = shards_at(server.url)[0], small_cache(tmp_path)
    path = cache.hold(shard).path
    os.truncate(path, 100)
    lock = os.open(path.with_suffix(".lock"), os.O_RDWR)
    fcntl.flock(lock, fcntl.LOCK_EX)  # as if this process fetched it
    process = holding(cache, shard)
    try:
        time.sleep(2)
        assert path.exists()
        shutil.copy(corpus / shard.entry.name, tmp_path / "new")
        (tmp_path / "new").rename(path)
        before = count_tar_requests(server), path.stat().st_ino
    finally:
        os.close(lock)
        assert process.wait(30) == 0
    assert (count_tar_requests(server), path.stat().st_ino) == before


def test_a_disk_without_space_is_an_error_before_anything_is_fetched(server, tmp_path):
    inside = ["unshare", "-rm", "sh", "-c", 'mount -t tmpfs -o size=4k none "$0" && "$@"; code=$?; ls "$0"; exit $code']
    if not shutil.which("unshare") or subprocess.run([*inside, str(tmp_path), "true"]).returncode:
        pytest.skip("no small disk can be mounted here")
    shard = shards_at(server.url)[0]
    process = holding(small_cache(tmp_path), shard, 0.0, *inside, str(tmp_path))
    error = process.communicate(timeout=30)[1]
    assert process.returncode == 1 and "DataError: The disk of data.cache_dir=" in error and "is full" in error
    assert count_tar_requests(server) == 0


# Some file systems do not allocate in advance: there a later write fails.
@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite", "fsync"])
def test_a_full_disk_is_an_error_that_leaves_no_file(server, tmp_path, monkeypatch, call):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, full)
    with pytest.raises(DataError, match=r"The disk of data\.cache_dir=.* is full: .*lower data\.cache_gb"):
        small_cache(tmp_path).hold(shards_at(server.url)[0])
    assert not list(tmp_path.glob("*.t*"))


def test_processes_share_one_copy_that_one_of_them_fetches(corpus, server, tmp_path):
    shard = shards_at(server.url)[0]
    server.faults, server.delay_seconds = [Fault("delay")], 2.0  # long enough for all three to wait for it
    processes = [holding(small_cache(tmp_path, timeout_seconds=20), shard) for _ in range(3)]
    assert [process.wait(60) for process in processes] == [0, 0, 0]
    assert count_tar_requests(server) == 1


def test_a_shard_is_held_before_other_processes_see_it(server, tmp_path, monkeypatch):
    shards = shards_at(server.url)
    size = max(shard.entry.bytes for shard in shards)
    others, replace = small_cache(tmp_path, size, timeout_seconds=0.2), os.replace  # for one shard

    def replace_and_let_another_process_need_space(old: str, new: Path) -> None:
        replace(old, new)
        if new.suffix == ".tar":
            monkeypatch.setattr(os, "replace", replace)
            with pytest.raises(DataError, match="full of shards that are being read"):
                others.hold(shards[1])

    monkeypatch.setattr(os, "replace", replace_and_let_another_process_need_space)
    held = small_cache(tmp_path, size).hold(shards[0])
    assert os.replace is replace and held.path.exists()
    held.release()
    assert others.hold(shards[1]).path.exists()


def test_a_shard_that_another_process_holds_is_not_removed(server, tmp_path):
    shards = shards_at(server.url)
    size = max(shard.entry.bytes for shard in shards)
    process = holding(small_cache(tmp_path), shards[0], 60.0)
    path = tmp_path / f"{shards[0].entry.sha256}.tar"
    try:
        wait_until(path.exists)
        cache = small_cache(tmp_path, 2 * size)
        for shard in shards[1:5]:
            cache.hold(shard).release()
        assert path.exists()
    finally:
        process.kill()
        process.wait()
    for shard in shards[1:3]:
        cache.hold(shard).release()
    assert not path.exists()  # the process that held it has ended


def test_what_a_killed_process_left_is_removed_and_fetched_anew(corpus, server, tmp_path):
    shards = shards_at(server.url)
    server.faults, server.hang_seconds = [Fault("stall", times=99)], 60.0
    process = holding(small_cache(tmp_path, timeout_seconds=60), shards[0])
    try:
        wait_until(lambda: count_tar_requests(server) == 1)
    finally:
        process.kill()  # SIGKILL
        process.wait()
    assert list(tmp_path.glob("*.tmp"))
    (tmp_path / f".{shards[2].entry.sha256}.index.npy.1.tmp").write_bytes(bytes(5_000))  # of another killed process
    in_use = tmp_path / f".{shards[3].entry.sha256}.index.npy.2.tmp"  # of a process that is at work
    in_use.write_bytes(bytes(50))
    lock = os.open(tmp_path / f"{shards[3].entry.sha256}.lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(lock, fcntl.LOCK_EX)
    server.faults = []
    # Another shard needs the space of what was left; then the same shard is fetched again.
    tight = small_cache(tmp_path, shards[1].entry.bytes + 100)
    tight.hold(shards[1]).release()
    assert list(tmp_path.glob("*.tmp")) == [in_use]
    os.close(lock)
    assert cached(small_cache(tmp_path).hold(shards[0]).path) == content_of(corpus, shards[0])


def wait_until(is_true: Any) -> None:
    deadline = time.monotonic() + 30
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_shards_are_fetched_ahead_and_released(server, tmp_path):
    shards = shards_at(server.url)
    size = max(shard.entry.bytes for shard in shards)
    prefetcher = Prefetcher(small_cache(tmp_path, 4 * size), [None, *shards])
    try:
        for upcoming in ([1, 2, 3], [3, 4, 5, 0], [6, 7]):
            prefetcher.advance(upcoming, keep=upcoming[:1])
            names = [f"{shards[number - 1].entry.sha256}.tar" for number in upcoming if number]
            wait_until(lambda names=names: all((tmp_path / name).exists() for name in names))
    finally:
        prefetcher.close()


def test_fetching_ahead_ends_at_once_and_its_errors_are_left_to_the_reader(server, tmp_path):
    server.faults = [Fault("404", times=99)]
    prefetcher = Prefetcher(small_cache(tmp_path), shards_at(server.url))
    prefetcher.advance([0, 1])
    wait_until(lambda: count_tar_requests(server) == 2)
    server.faults = [Fault("503", times=99)]
    prefetcher.advance([2])
    start = time.monotonic()
    prefetcher.close()
    assert time.monotonic() - start < 3


def test_fetching_ahead_ends_at_once_while_another_process_fetches_the_same(server, tmp_path):
    shard, cache = shards_at(server.url)[0], small_cache(tmp_path)
    lock = os.open(tmp_path / f"{shard.entry.sha256}.lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(lock, fcntl.LOCK_EX)
    prefetcher = Prefetcher(cache, [shard])
    prefetcher.advance([0])
    time.sleep(0.2)
    start = time.monotonic()
    prefetcher.close()
    os.close(lock)
    assert time.monotonic() - start < 1 and not list(tmp_path.glob("*.tar"))


def test_a_shard_that_comes_after_the_prefetcher_is_closed_is_released(server, tmp_path, monkeypatch):
    monkeypatch.setattr(prefetch_module, "_MAX_CLOSE_SECONDS", 0.1)
    shards = shards_at(server.url)
    cache = small_cache(tmp_path, max(shard.entry.bytes for shard in shards), timeout_seconds=5)
    server.faults = [Fault("delay", r"\.npy$")]
    prefetcher = Prefetcher(cache, shards)
    prefetcher.advance([0])
    wait_until(lambda: any(path.endswith(".npy") for path in server.requests))
    prefetcher.close()  # before the store answers
    wait_until((tmp_path / f"{shards[0].entry.sha256}.tar").exists)
    assert cache.hold(shards[1]).path.exists()  # the cache has space for one shard


def stream_of(folder: str, data: DataConfig) -> PretrainStream:
    corpora = open_corpora([folder], data)
    return PretrainStream(
        corpora,
        Order(corpora.pairs_per_shard, corpora.corpus_of_shard, seed=0, shards_per_window=2),
        Cut(8, 4, 2),
        data,
        rank=0,
        seed=0,
        tokenizer=Tokenizer("emoji"),
        image_size_px=16,
        max_text_tokens=32,
        mlm_probability=0.15,
    )


def given(stream: PretrainStream) -> list[list[dict[str, Any]]]:
    batches = micro_batches(stream, 0, 9)
    lines = [[json.loads(line) for line in batch.lines] for batch in batches]
    return [[{k: v for k, v in line.items() if k != "shard"} for line in batch] for batch in lines]


def settings(folder: str, cache: Path, num_bytes: int, workers: int = 0) -> DataConfig:
    return DataConfig(
        train_shards=(folder,),
        workers=workers,
        prefetch_batches=1,
        record_pairs=True,
        negative_group_size=4,
        shards_per_window=2,
        cache_dir=str(cache),
        cache_gb=num_bytes / 1e9,
    )


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stream_over_a_web_server_that_fails_now_and_then_is_that_of_the_folder(corpus, server, tmp_path, workers):
    size = max(entry.bytes for entry in load_manifest(corpus).shards)
    local = given(stream_of(str(corpus), settings(str(corpus), tmp_path / "unused", size)))
    server.faults = [Fault("503"), Fault("drop"), Fault("truncate"), Fault("flip")]
    url = f"{server.url}/corpus"
    # Space for three windows of two shards, and for the one other shard that may be open.
    assert given(stream_of(url, settings(url, tmp_path / "cache", 7 * size, workers))) == local
    assert 0 < sum(path.stat().st_size for path in (tmp_path / "cache").glob("*.tar")) <= 7 * size


def test_a_stream_over_s3_that_fails_now_and_then_is_that_of_the_folder(corpus, tmp_path):
    with object_store() as address, serving(upstream=address) as proxy, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", proxy.url)
        bucket = to_path("s3://cached-corpora")
        bucket.mkdir()
        for file in sorted(corpus.iterdir()):
            if file.is_file():
                (bucket / "corpus" / file.name).write_bytes(file.read_bytes())
        proxy.requests.clear()
        load_manifest("s3://cached-corpora/corpus")
        assert not [path for path in proxy.requests if path.endswith((".tar", ".npy"))]
        assert len(proxy.requests) <= 5  # for eight shards and their indexes
        proxy.faults = [Fault("503"), Fault("drop"), Fault("stall"), Fault("flip")]
        proxy.hang_seconds = 0.5
        url = "s3://cached-corpora/corpus"
        size = max(entry.bytes for entry in load_manifest(corpus).shards)
        remote = given(stream_of(url, settings(url, tmp_path / "cache", 7 * size)))
        assert all(fault.times == 0 for fault in proxy.faults)
    assert remote == given(stream_of(str(corpus), settings(str(corpus), tmp_path / "unused", size)))


def test_a_stream_over_google_cloud_storage_is_that_of_the_folder(corpus, tmp_path, monkeypatch):
    """Google's client works against an emulator of the service."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("GCSFS_DEFAULT_TOKEN", "anon")
    monkeypatch.setenv("GOOGLE_CLOUD_PROJECT", "tests")
    with create_server("127.0.0.1", port, in_memory=True, default_bucket="corpora"):
        url = "gs://corpora/corpus"
        for file in sorted(corpus.iterdir()):
            if file.is_file():
                (to_path(url) / file.name).write_bytes(file.read_bytes())
        size = max(entry.bytes for entry in load_manifest(url).shards)
        remote = given(stream_of(url, settings(url, tmp_path / "cache", 7 * size)))
        with pytest.raises(DataError, match=r"gs://corpora/nowhere does not exist"):
            load_manifest("gs://corpora/nowhere")
    assert remote == given(stream_of(str(corpus), settings(str(corpus), tmp_path / "unused", size)))


def test_a_shard_that_cannot_be_fetched_is_requested_once_and_not_for_each_of_its_pairs(server, tmp_path):
    corpora = Corpora([f"{server.url}/corpus"], small_cache(tmp_path, attempts=2))
    corpora.keep_open([0, 1])
    server.faults = [Fault("flip", r"00001\.tar$", times=99)]
    for number in range(3):
        with pytest.raises(DataError, match=r"00001\.tar cannot be fetched; 2 attempts failed, .*SHA-256"):
            corpora.read(1, number)
    assert count_tar_requests(server) == 2
    # When the window comes up again, the shard is requested again: the store may have recovered.
    server.faults = []
    corpora.keep_open([2, 3])
    corpora.keep_open([0, 1])
    assert corpora.read(1, 0).caption


@pytest.mark.parametrize(
    ("kind", "file"),
    [(kind, "00005.tar") for kind in ("flip", "404", "503", "truncate", "drop", "hang")] + [("404", "00005.index.npy")],
)
@pytest.mark.usefixtures("impatient")
def test_pairs_of_a_shard_that_a_store_does_not_deliver_are_replaced_and_named(server, tmp_path, kind, file):
    url = f"{server.url}/corpus"
    options = dataclasses.replace(
        settings(url, tmp_path, 10**9), on_bad_sample="replace", max_bad_fraction=0.01, workers=0
    )
    stream = stream_of(url, options)
    stream.corpora.cache = small_cache(tmp_path, attempts=2)
    server.faults = [Fault(kind, file, times=999)]
    batches = list(micro_batches(stream, 0, 6))  # half of the positions of two epochs
    lines = [json.loads(line) for batch in batches for line in batch.lines]
    replaced = [line["replaced"] for line in lines if "replaced" in line]
    assert replaced and all(f"{file} cannot be fetched" in why for why in replaced)
    assert not any(line["shard"].endswith("00005.tar") for line in lines)
    located = stream.order.locate([line["position"] for line in lines])
    assert [shard == 5 for shard in located.shard.tolist()] == ["replaced" in line for line in lines]


def test_remote_shards_without_a_cache_are_refused_with_the_setting(server):
    with pytest.raises(ConfigError, match=r"is remote: give --data\.cache_dir=DIR"):
        Corpora([f"{server.url}/corpus"])


def test_negatives_from_a_whole_remote_corpus_are_refused(server, tmp_path):
    url = f"{server.url}/corpus"
    with pytest.raises(ConfigError, match=r"data\.itm_negatives=corpus reads images from a whole corpus"):
        open_corpora([url], DataConfig(train_shards=(url,), cache_dir=str(tmp_path), itm_negatives="corpus"))


def test_a_missing_remote_folder_is_named(server, tmp_path):
    url = f"{server.url}/none"
    with pytest.raises(DataError, match=r"http.*none"):
        open_corpora([url], DataConfig(train_shards=(url,), cache_dir=str(tmp_path)))


def test_only_the_manifest_is_requested_from_a_web_server_at_first(server):
    assert len(shards_at(server.url)) == 8 and server.requests == ["/corpus/shards.json"]


@pytest.mark.parametrize("kind", ["403", "503", "drop"])
def test_a_manifest_that_a_web_server_does_not_deliver_is_an_error_with_its_reason(server, kind, monkeypatch):
    monkeypatch.setattr(storage_module, "_BACKOFF_SECONDS", 0.01)
    server.faults = [Fault(kind, "json", times=99)]
    with pytest.raises(DataError, match=r"shards\.json cannot be read .*Is the store reachable"):
        load_manifest(f"{server.url}/corpus")


@pytest.mark.parametrize("kind", ["503", "drop", "hang", "stall"])
@pytest.mark.usefixtures("impatient")
def test_a_store_that_fails_when_a_run_starts_is_asked_again(corpus, server, monkeypatch, kind):
    monkeypatch.setattr(storage_module, "_BACKOFF_SECONDS", 0.01)
    server.faults = [Fault(kind, r"\.json$", times=2), Fault(kind, r"\.npy$", times=2)]
    assert load_manifest(f"{server.url}/corpus") == load_manifest(corpus)
    assert load_index(to_path(f"{server.url}/corpus/00000.tar")).tobytes() == load_index(corpus / "00000.tar").tobytes()
    assert all(fault.times == 0 for fault in server.faults)
