"""Downloads the pictures of a list of URLs with img2dataset, a program of its own, and says which links are dead.

img2dataset needs older versions of webdataset, pandas and OpenCV than this repository: no environment can hold both. It
therefore runs as a command: of an environment that uv makes for it (the extra `download`), or wherever it is installed.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from urllib.parse import quote

from bridgetower.errors import ConfigError, DataError
from bridgetower.io.files import write_atomically
from data_prep.img2dataset_output import Downloads, sum_stats
from data_prep.web_corpora import Row

ROWS_PER_TAR = 10_000
_ROWS_PER_LIST = 50 * ROWS_PER_TAR  # img2dataset holds one list in memory at a time
_THREADS = 64
_TIMEOUT_SECONDS = 15
_RETRIES = 1
_GRACE_SECONDS = 10.0
_COMPLETE = "complete.json"
# All that RFC 3986 lets stand in a URL, and the sign of what is encoded already.
_SIGNS_OF_URLS = "%:/?#[]@!$&'()*+,;=~"
INSTALL = "pip install -e '.[download]'"
_REQUIREMENT = "img2dataset>=1.47,<2"
# Its pyarrow has no wheels for later ones; uv brings this Python where there is none.
_PYTHON = "3.11"


def find_img2dataset(given: str) -> str:
    """The program: the one that was given, or one on the PATH, or one that uv keeps in an environment of its own.

    Raises:
        ConfigError: there is none.
    """
    found = shutil.which(Path(given).expanduser() if given else "img2dataset")
    if found is None and given:
        raise ConfigError(
            f"--img2dataset={given} is not a program. Give the path of img2dataset, or leave it out: with {INSTALL} uv "
            "brings it."
        )
    return found or _kept_by_uv()


def _kept_by_uv() -> str:
    """Install it as a tool of uv, once."""
    uv = shutil.which("uv", path=os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", ""))))
    if uv is None:
        raise ConfigError(
            "img2dataset is not installed; it downloads the pictures. It needs older versions of webdataset and pandas "
            f"than this repository, and therefore an environment of its own, which uv makes: `{INSTALL}`. Or install "
            "it yourself and give --img2dataset=PATH."
        )
    folder = subprocess.run([uv, "tool", "dir", "--bin"], capture_output=True, text=True, check=True).stdout.strip()
    program = Path(folder) / "img2dataset"
    if not program.is_file():
        print("Installing img2dataset into an environment of its own (a minute) ...", file=sys.stderr)
        installed = subprocess.run(
            [uv, "tool", "install", "--quiet", "--python", _PYTHON, _REQUIREMENT], stdin=subprocess.DEVNULL
        )
        if installed.returncode or not program.is_file():
            raise ConfigError(
                f"uv could not install {_REQUIREMENT}, see above. Install it in an environment of its own with Python "
                f"{_PYTHON} and give --img2dataset=PATH."
            )
    return str(program)


def download_images(program: str, rows: Iterator[Row], folder: Path, *, processes: int, max_rows: int) -> Downloads:
    """Download what is not there yet into tars below a folder. Can be stopped at any time and called again.

    Args:
        max_rows: only so many rows from the beginning; 0: all of them.

    Returns: what became of all rows, those of earlier calls too.

    Raises:
        ConfigError: the folder holds another number of rows.
        DataError: img2dataset failed, or left shards out.
    """
    lists, tars = folder.with_name(f"{folder.name}.urls"), folder
    num_rows = _write_lists(rows, lists, max_rows)
    tars.mkdir(parents=True, exist_ok=True)
    command = [
        program,
        f"--url_list={lists}",
        "--input_format=jsonl",
        "--url_col=url",
        "--caption_col=caption",
        "--output_format=webdataset",
        f"--output_folder={tars}",
        # The build scales pictures itself, once, and can be repeated from the originals.
        "--resize_mode=no",
        "--disable_all_reencoding=True",
        f"--number_sample_per_shard={ROWS_PER_TAR}",
        "--incremental_mode=incremental",
        f"--processes_count={processes}",
        f"--thread_count={_THREADS}",
        f"--timeout={_TIMEOUT_SECONDS}",
        f"--retries={_RETRIES}",
        "--enable_wandb=False",
    ]
    code = _run(command)
    done = sum_stats(tars)
    if code:
        raise DataError(
            f"img2dataset ended with code {code}, see above. Run the command again: finished tars are kept."
        )
    if done.rows != num_rows:
        raise DataError(
            f"img2dataset has done {done.rows:,} of {num_rows:,} rows, see above for why. Run the command again: it "
            "goes on with the tars that are missing."
        )
    return done


def _write_lists(rows: Iterator[Row], folder: Path, max_rows: int) -> int:
    """The URLs as img2dataset reads them. Returns: how many rows.

    As JSON lines: it would take quotes in a TSV for quotes, and read rows into each other. With spaces and letters
    beyond ASCII encoded, as browsers do: it would not even ask for such pictures.
    """
    complete = folder / _COMPLETE
    if complete.is_file():
        known = json.loads(complete.read_bytes())
        if known["max_rows"] != max_rows:
            raise ConfigError(
                f"{folder} lists other rows: it was made with --max_rows={known['max_rows']}, now it is {max_rows} "
                "(0: all). The tars beside it would not fit. Use the same number, or another --out."
            )
        return int(known["rows"])
    if folder.exists():
        shutil.rmtree(folder)  # an interrupted beginning
    folder.mkdir(parents=True)
    chosen = islice(rows, max_rows) if max_rows else rows
    total = 0
    while batch := list(islice(chosen, ROWS_PER_TAR)):
        with (folder / f"{total // _ROWS_PER_LIST:05d}.jsonl").open("a", encoding="utf-8") as file:
            lines = ({"url": quote(row.url, _SIGNS_OF_URLS, errors="replace"), "caption": row.caption} for row in batch)
            file.writelines(json.dumps(line) + "\n" for line in lines)
        total += len(batch)
    if not total:
        raise DataError(f"The list for {folder} has no rows. Download it again.")
    write_atomically(complete, json.dumps({"rows": total, "max_rows": max_rows}).encode())
    return total


def _run(command: list[str]) -> int:
    """Run a program with all that it starts. Returns: its exit code."""
    environment = {**os.environ, "NO_ALBUMENTATIONS_UPDATE": "1"}
    # In a session of its own: its processes take Ctrl-C badly, and some of them would stay behind.
    with subprocess.Popen(command, start_new_session=True, env=environment) as process:
        try:
            return process.wait()
        except BaseException:
            for signal_number in (signal.SIGTERM, signal.SIGKILL):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal_number)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_GRACE_SECONDS)
            raise
