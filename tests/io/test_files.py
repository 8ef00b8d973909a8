"""Files appear whole or not at all, and a folder has one writer at a time."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys

import pytest

from bridgetower.errors import DataError
from bridgetower.io.files import claim_folder, sha256_of, write_atomically
from tests.conftest import REPO


def test_a_file_is_replaced_by_its_new_content_and_nothing_else_is_left(tmp_path):
    path = tmp_path / "file"
    for content in (b"old", b"", b"new" * 1000):
        write_atomically(path, content)
        assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_fails_leaves_the_old_content_and_no_temporary_file(tmp_path):
    # A limit on the size of files stands for a full disk.
    (tmp_path / "file").write_bytes(b"old")
    code = (
        "import pathlib, resource; from bridgetower.io.files import write_atomically\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        f"write_atomically(pathlib.Path({str(tmp_path / 'file')!r}), bytes(2000))"
    )
    failed = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True)
    assert failed.returncode == 1 and "File too large" in failed.stderr
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"file": b"old"}


def test_the_checksum_is_the_sha256_of_the_whole_file(tmp_path):
    content = os.urandom(3_000_000)  # more than it reads at a time
    (tmp_path / "file").write_bytes(content)
    assert sha256_of(tmp_path / "file") == hashlib.sha256(content).hexdigest()


def test_a_claimed_folder_is_refused_to_another_program_until_the_first_one_ends(tmp_path):
    code = (
        "import pathlib, sys; from bridgetower.io.files import claim_folder\n"
        f"claim_folder(pathlib.Path({str(tmp_path)!r}) / 'new' / 'run'); print('claimed', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=REPO, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == "claimed\n"
        with pytest.raises(DataError, match=r"Another program is writing to .*run\. Wait for it, or use another"):
            claim_folder(tmp_path / "new" / "run")
        other.kill()
    os.close(claim_folder(tmp_path / "new" / "run"))


def test_closing_the_descriptor_gives_a_folder_free(tmp_path):
    os.close(claim_folder(tmp_path))
    os.close(claim_folder(tmp_path))


def test_a_folder_that_cannot_be_made_is_an_error_with_its_cure(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cannot be written to \(Not a directory\)\. Use another folder"):
        claim_folder(tmp_path / "file" / "run")
