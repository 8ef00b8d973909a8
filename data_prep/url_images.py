"""Downloads the images of a list of URLs with the program img2dataset, and counts the dead links.

img2dataset needs older versions of webdataset, pandas and OpenCV than this repository: no environment can hold both. So
it runs as a command, from an environment that uv makes for it (the extra `download`) or wherever it is installed.
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
_SAFE_IN_URLS = "%:/?#[]@!$&'()*+,;=~"
"""Characters that are not percent-encoded: those that RFC 3986 allows in a URL, and % for what is encoded already."""
INSTALL = "pip install -e '.[download]'"
_REQUIREMENT = "img2dataset>=1.47,<2"
# img2dataset's pyarrow has no wheels for later versions of Python; uv downloads this one where it is missing.
_PYTHON = "3.11"


def find_img2dataset(given: str) -> str:
    """Return the path of the program: the given one, the one on the PATH, or one that uv installs for it.

    Raises:
        ConfigError: there is none.
    """
    program = shutil.which(Path(given).expanduser() if given else "img2dataset")
    if program is None and given:
        raise ConfigError(
            f"--img2dataset={given} is not a program. Give the path of img2dataset, or leave the flag out and let uv "
            f"install it: `{INSTALL}`."
        )
    return program or _install_with_uv()


def _install_with_uv() -> str:
    """Install img2dataset as a tool of uv, unless it is there already. Returns: its path."""
    uv = shutil.which("uv", path=os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", ""))))
    if uv is None:
        raise ConfigError(
            "img2dataset, which downloads the images, is not installed. It needs older versions of webdataset and "
            f"pandas than this repository, and therefore an environment of its own, which uv makes: `{INSTALL}`. Or "
            "install it yourself and give --img2dataset=PATH."
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
    """Download the images that are still missing into tars in a folder. Can be stopped at any time and called again.

    Args:
        max_rows: number of rows from the beginning to read; 0: all.

    Returns: the counts over all rows, those of earlier calls included.

    Raises:
        ConfigError: the folder was made with another max_rows.
        DataError: img2dataset failed, or left rows out.
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
        # The build scales images itself, once, and can be repeated from the originals.
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
            "continues with the missing tars."
        )
    return done


def _write_lists(rows: Iterator[Row], folder: Path, max_rows: int) -> int:
    """Write the lists of URLs that img2dataset reads. Returns: the number of rows.

    They are JSON lines: in a TSV, img2dataset would read quotation marks in captions as quoting and join rows. Spaces
    and characters beyond ASCII in URLs are percent-encoded, as browsers do: img2dataset would not request them as they
    are.
    """
    complete = folder / _COMPLETE
    if complete.is_file():
        known = json.loads(complete.read_bytes())
        if known["max_rows"] != max_rows:
            raise ConfigError(
                f"{folder} lists other rows: it was made with --max_rows={known['max_rows']}, now it is {max_rows} "
                "(0: all), and the tars beside it would not match. Use the same number, or another --out."
            )
        return int(known["rows"])
    if folder.exists():
        shutil.rmtree(folder)  # left by an interrupted run
    folder.mkdir(parents=True)
    chosen = islice(rows, max_rows) if max_rows else rows
    total = 0
    while batch := list(islice(chosen, ROWS_PER_TAR)):
        with (folder / f"{total // _ROWS_PER_LIST:05d}.jsonl").open("a", encoding="utf-8") as file:
            lines = ({"url": quote(row.url, _SAFE_IN_URLS, errors="replace"), "caption": row.caption} for row in batch)
            file.writelines(json.dumps(line) + "\n" for line in lines)
        total += len(batch)
    if not total:
        raise DataError(f"The list for {folder} has no rows. Download it again.")
    write_atomically(complete, json.dumps({"rows": total, "max_rows": max_rows}).encode())
    return total


def _run(command: list[str]) -> int:
    """Run a program; when interrupted, end it with all processes that it started. Returns: its exit code."""
    environment = {**os.environ, "NO_ALBUMENTATIONS_UPDATE": "1"}
    # In a session of its own: if Ctrl-C reached its processes directly, some of them would survive.
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
