"""A build says how far it is: with a live display on a terminal, in lines elsewhere."""

from __future__ import annotations

import os
import pty
import re
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest

from tests.conftest import REPO, command_line, run_script, script_environment
from tests.small_corpora import draw, file_of

BUILD = "data_prep/build_shards.py"
RATE = r"\d[\d,]* images/s  \d[\d,]*\.\d MB/s"
REJECTED = "rejected: 2 image cannot be decoded; 1 image file missing"


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Of a build of 12 pictures in 4 shards, and of 3 that are rejected."""
    folder = tmp_path_factory.mktemp("photos")
    for number in range(12):
        (folder / f"{number}.png").write_bytes(file_of(draw(number, 400, 350)))
    for number in (12, 13):
        (folder / f"{number}.png").write_bytes(b"no picture")
    rows = [f"{number}.png,picture {number}" for number in range(15)]
    (folder / "captions.csv").write_text("\n".join(["image,caption", *rows]))
    return ["folder", f"--raw={folder}", f"--captions={folder / 'captions.csv'}", "--samples_per_shard=4"]


def shown_on_a_terminal(arguments: list[str], columns: int) -> list[str]:
    """What a terminal gets, a text for each time the display is drawn."""
    terminal, end = pty.openpty()
    environment = script_environment({"COLUMNS": str(columns), "TERM": "xterm"})
    command = command_line(BUILD, arguments, 0)
    with subprocess.Popen(command, stderr=end, stdout=subprocess.DEVNULL, cwd=REPO, env=environment) as build:
        os.close(end)
        shown = b""
        with suppress(OSError):  # how a terminal ends
            while part := os.read(terminal, 1 << 16):
                shown += part
    os.close(terminal)
    assert build.returncode == 0
    return re.split(r"\r(?!\n)", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode()))


@pytest.mark.parametrize("columns", [80, 140])
def test_a_terminal_shows_a_bar_with_rates_time_left_and_rejects_by_reason(arguments, columns, tmp_path):
    drawn = shown_on_a_terminal([*arguments, f"--out={tmp_path / 'out'}", "--workers=0"], columns)
    assert len(drawn) >= 5  # begun, and a time for each shard
    for part in drawn[-1].strip(), drawn[-2].strip():
        bar, rejects = part.splitlines()
        assert re.fullmatch(rf"folder ━+ 100%  {RATE} \d:\d\d:\d\d left 0:00:00", bar.strip()), bar
        assert rejects.strip() == REJECTED
    assert any(re.search(r"━ +(?:[1-9]|[1-9]\d)%", part) for part in drawn)
    assert all(len(line) <= columns for part in drawn for line in part.splitlines())


def test_elsewhere_lines_say_the_same(arguments, tmp_path):
    result = run_script(BUILD, *arguments, f"--out={tmp_path / 'out'}", "--workers=0", "--progress_seconds=0")
    lines = result.stderr.splitlines()
    assert lines[0] == "folder: 15 rows read"
    shape = rf"folder: (\d) of 4 shards, {RATE}, (time left unknown|\d+ s left)(, rejected: .+)?"
    matches = [re.fullmatch(shape, line) for line in lines[1:]]
    assert all(matches), lines
    done = [int(match[1]) for match in matches if match]
    assert done == sorted(done) and set(done) == {0, 1, 2, 3, 4}
    assert matches[0] and matches[0][2] == "time left unknown"
    assert lines[-1].endswith(f", 0 s left, {REJECTED}")
    assert "\x1b" not in result.stderr


def test_elsewhere_a_build_says_nothing_before_its_time(arguments, tmp_path):
    result = run_script(BUILD, *arguments, f"--out={tmp_path / 'out'}", "--workers=0", "--progress_seconds=1000")
    assert result.stderr == ""


def test_lines_of_progress_cannot_be_negative_seconds_apart(arguments, tmp_path: Path):
    result = run_script(BUILD, *arguments, f"--out={tmp_path / 'out'}", "--progress_seconds=-1", code=2)
    assert "--progress_seconds=-1 must be 0 or more" in result.stderr
