"""The plan of a build is in the scratch folder, and no other build uses or removes it."""

from __future__ import annotations

import fcntl
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from data_prep.plan import make_plan
from data_prep.record import ImageFile, Record
from tests.conftest import REPO

ROWS = """
from pathlib import Path
from data_prep.plan import make_plan
from data_prep.raw_files import DiskDict
from data_prep.record import ImageFile, Record
def rows(folder, put_aside, count):
    with DiskDict() as table:
        for number in range(put_aside):
            table[number] = "x" * 100_000
        for number in range(count):
            image = ImageFile(path=Path("x"))
            yield Record(key=f"k{number}", image=image, image_id="", captions=("word " * 500,))
            files = [os.readlink(f"/proc/self/fd/{fd}") for fd in range(3, 20) if os.path.islink(f"/proc/self/fd/{fd}")]
            assert all(file.startswith(folder) for file in files if "etilqs" in file), files
    assert put_aside == 0 or any("etilqs" in file for file in files), files
"""


def run_rows(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    whole = f"import os, sys, resource\n{ROWS}\n{code}"
    return subprocess.run([sys.executable, "-c", whole, *arguments], cwd=REPO, capture_output=True, text=True)


def test_temporary_files_of_the_source_and_of_sorting_are_in_the_scratch_folder(tmp_path):
    code = """
with make_plan(rows(sys.argv[1], 1_000, 3), seed=0, scratch=Path(sys.argv[1], "new")) as plan:
    assert len(list(plan.records(0, 3))) == 3
"""
    result = run_rows(code, str(tmp_path))
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(("put_aside", "count"), [(1_000, 1), (0, 30_000)], ids=["of_the_source", "of_the_plan"])
def test_a_full_disk_is_an_error_with_a_suggestion(tmp_path, put_aside, count):
    # A limit on the size of files simulates a full disk.
    code = f"""
from bridgetower.errors import DataError
resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
try:
    with make_plan(rows(sys.argv[1], {put_aside}, {count}), seed=0, scratch=Path(sys.argv[1])):
        pass
except DataError as error:
    print(error)
"""
    result = run_rows(code, str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert "cannot be written to" in result.stdout and "give --scratch a folder on a larger disk" in result.stdout
    assert list(tmp_path.iterdir()) == []


def record() -> Record:
    return Record(key="k", image=ImageFile(path=Path("x")), image_id="", captions=("x",))


def test_a_stale_plan_of_this_machine_is_removed_and_one_of_another_machine_is_kept(tmp_path):
    # On some file systems, another machine's lock is invisible.
    (tmp_path / ".plan-another.machine-x").mkdir()
    (tmp_path / f".plan-{platform.node()}-x").mkdir()
    with make_plan([record()], seed=0, scratch=tmp_path):
        assert not (tmp_path / f".plan-{platform.node()}-x").exists()
    assert [path.name for path in tmp_path.iterdir()] == [".plan-another.machine-x"]


def test_a_plan_is_locked_before_another_build_can_take_it_for_a_stale_one(tmp_path, monkeypatch):
    flock, folder_counts = fcntl.flock, []

    def start_another_first(lock: int, operation: int) -> None:
        monkeypatch.setattr(fcntl, "flock", flock)
        with make_plan([record()], seed=0, scratch=tmp_path):
            folder_counts.append(len(list(tmp_path.iterdir())))
        flock(lock, operation)

    monkeypatch.setattr(fcntl, "flock", start_another_first)
    with make_plan([record()], seed=0, scratch=tmp_path) as plan:
        assert folder_counts == [2]
        assert plan.file.is_file() and len(list(plan.records(0, 1))) == 1
