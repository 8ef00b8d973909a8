"""A build shows its progress in a live display on a terminal, and in lines elsewhere."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
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
    """Return the arguments of a build of 12 images, in 4 shards, and of 3 that are rejected."""
    folder = tmp_path_factory.mktemp("photos")
    for number in range(12):
        (folder / f"{number}.png").write_bytes(file_of(draw(number, 400, 350)))
    for number in (12, 13):
        (folder / f"{number}.png").write_bytes(b"no image")
    rows = [f"{number}.png,image {number}" for number in range(15)]
    (folder / "captions.csv").write_text("\n".join(["image,caption", *rows]))
    return ["folder", f"--raw={folder}", f"--captions={folder / 'captions.csv'}", "--samples_per_shard=4"]


def shown_on_a_terminal(command: list[str], columns: int) -> list[str]:
    """Run a command on a terminal. Returns: the text of each time that the display was drawn."""
    terminal, end = pty.openpty()
    environment = script_environment({"COLUMNS": str(columns), "TERM": "xterm"})
    with subprocess.Popen(command, stderr=end, stdout=subprocess.DEVNULL, cwd=REPO, env=environment) as process:
        os.close(end)
        shown = b""
        with suppress(OSError):  # raised when the other end of a terminal is closed
            while block := os.read(terminal, 1 << 16):
                shown += block
    os.close(terminal)
    assert process.returncode == 0
    drawn = re.split(r"\r(?!\n)", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode()))
    assert all(len(line) <= columns for text in drawn for line in text.splitlines())
    return [text.strip() for text in drawn if text.strip()]


@pytest.mark.parametrize("columns", [80, 140])
def test_a_terminal_shows_a_full_bar_with_rates_and_rejects_by_reason_at_the_end(arguments, columns, tmp_path):
    command = command_line(BUILD, [*arguments, f"--out={tmp_path / 'out'}", "--workers=0"], 0)
    bar, rejects = shown_on_a_terminal(command, columns)[-1].splitlines()
    assert re.fullmatch(rf"folder ━+ 100%  {RATE} \d:\d\d:\d\d left 0:00:00", bar.strip()), bar
    assert rejects.strip() == REJECTED


HALFWAY = """
import time
from data_prep.build import State
from data_prep.progress import ProgressLine
with ProgressLine("cc3m", 10) as progress:
    progress.show_rows(2_000_000)
    for n in range(6):
        time.sleep(0.2)
        progress.show(State(
            shards=n, all_shards=100, samples=n * 10_000, all_samples=1_000_000, images=n * 8_000,
            bytes=n * 300_000_000, rejects={"download failed: HTTP 404": n * 1_500, "no caption": n * 500},
        ))
"""


@pytest.mark.parametrize("columns", [80, 140])
def test_a_terminal_shows_progress_and_the_time_left_during_a_build(columns):
    drawn = shown_on_a_terminal([sys.executable, "-c", HALFWAY], columns)
    bar, rejects = drawn[-1].splitlines()
    assert re.fullmatch(rf"cc3m [━╸╺]+ +5%  {RATE} \d:\d\d:\d\d left \d:\d\d:\d\d", bar.strip()), bar
    assert not bar.strip().endswith("left 0:00:00")
    assert rejects.strip() == "rejected: 7,500 download failed: HTTP 404; 2,500 no caption"


def test_without_a_terminal_the_progress_is_printed_in_lines(arguments, tmp_path):
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


def test_without_a_terminal_nothing_is_printed_before_the_interval_is_over(arguments, tmp_path):
    result = run_script(BUILD, *arguments, f"--out={tmp_path / 'out'}", "--workers=0", "--progress_seconds=1000")
    assert result.stderr == ""


def test_a_negative_interval_of_progress_lines_is_refused(arguments, tmp_path: Path):
    result = run_script(BUILD, *arguments, f"--out={tmp_path / 'out'}", "--progress_seconds=-1", code=2)
    assert "--progress_seconds=-1 must be 0 or more" in result.stderr
