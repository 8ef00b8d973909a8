"""Hands the lines of ``metrics.jsonl`` to Weights & Biases, in a process of its own.

Training writes a file and never waits for a server: a W&B that is slow, or away when the run starts, ends or is in the
middle, holds up this process alone. The trainer starts it and holds its standard input; its end is the sign that no
more lines come, however the trainer ended. What was sent before is not sent again when a run is resumed.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from requests.utils import get_netrc_auth

from bridgetower.errors import ConfigError, DataError
from bridgetower.io.files import claim_folder, write_atomically

logger = logging.getLogger("bridgetower.wandb")

_ID_NAME, _SENT_NAME = "wandb_id", "wandb_sent"
_POLL_SECONDS = 2.0
# How long the end of a run waits for the last lines to be sent.
_PATIENCE_SECONDS = 20.0

Mode = Literal["auto", "online", "offline"]


class Mirror:
    """The process, as the trainer holds it."""

    def __init__(
        self, run_folder: Path, metrics: Path, *, mode: Mode, project: str, entity: str, run_config: dict[str, Any]
    ) -> None:
        """Start it.

        Args:
            metrics: the file that training appends to.
            run_config: shown with the run.

        Raises:
            ConfigError: mode is online, and there is no key.
        """
        if mode == "online" and not has_key():
            raise ConfigError(
                "tracker.wandb=online, but there is no W&B key. Run `wandb login`, set WANDB_API_KEY, or use "
                "--tracker.wandb=auto, which keeps offline files where there is none."
            )
        self._folder, self._metrics = run_folder, metrics
        request = {
            "folder": str(run_folder), "metrics": str(metrics), "mode": mode, "project": project, "entity": entity,
            "run_config": run_config,
        }  # fmt: skip
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bridgetower.engine.wandb_mirror"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
        assert self._process.stdin is not None
        self._stdin = self._process.stdin
        try:
            self._stdin.write(json.dumps(request).encode() + b"\n")
            self._stdin.flush()
        except BrokenPipeError:  # it says itself why it ended
            pass

    def close(self) -> None:
        """Let it send the last lines, but do not wait for long."""
        with suppress(BrokenPipeError):
            self._stdin.close()
        try:
            self._process.wait(_PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            logger.warning(
                "W&B did not answer for %.0f s. %s has every line; `wandb sync %s/wandb/*run-*` sends the rest.",
                _PATIENCE_SECONDS,
                self._metrics,
                self._folder,
            )


def has_key() -> bool:
    """Whether there is one where W&B looks, without asking its server."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    return get_netrc_auth(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai") is not None


def main() -> None:
    """Mirror what the request on standard input describes."""
    # Slurm and terminals signal every process of a job; this one ends when the trainer has.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", level=logging.WARNING)
    request = json.loads(_first_line())
    mode = request["mode"]
    if mode == "auto":
        mode = os.environ.get("WANDB_MODE") or ("online" if has_key() else "offline")
    if mode == "disabled":
        return
    folder = Path(request["folder"])
    lock = _claim(folder)
    lines = _lines(Path(request["metrics"]), _sent(folder))
    run = _start(request, mode)
    for line in lines:
        step = int(line.pop("step"))
        run.log(line, step=step)
        write_atomically(folder / _SENT_NAME, str(step).encode())
    run.finish()
    os.close(lock)


def _claim(folder: Path) -> int:
    """Wait until the mirror of an earlier life of the run has ended."""
    while True:
        try:
            return claim_folder(folder, name=".wandb_lock")
        except DataError:
            time.sleep(_POLL_SECONDS)


def _first_line() -> bytes:
    """The first line of standard input, without reading on, so that its end can be waited for."""
    line = b""
    while not line.endswith(b"\n") and (byte := os.read(0, 1)):
        line += byte
    return line


def _trainer_ended(seconds: float) -> bool:
    """Wait for the end of standard input, for so long at most."""
    return bool(select.select([0], [], [], seconds)[0])


def _start(request: dict[str, Any], mode: Literal["online", "offline"]) -> Any:
    """Begin or go on with the dashboard's run; without an answer, again until training has ended, then offline."""
    import wandb
    from wandb.errors import Error

    folder = Path(request["folder"])
    id_file = folder / _ID_NAME
    if not id_file.exists():
        write_atomically(id_file, secrets.token_hex(4).encode())
    has_ended = False
    while True:
        try:
            return wandb.init(
                dir=str(folder),
                project=request["project"],
                entity=request["entity"] or None,
                name=folder.name,
                id=id_file.read_text().strip(),
                resume="allow",
                mode="offline" if has_ended else mode,
                config=request["run_config"],
                settings=wandb.Settings(console="off", silent=True, init_timeout=60),
            )
        except Error as error:
            logger.warning("W&B is not reached (%s). Training goes on; trying again.", " ".join(str(error).split()))
            has_ended = _trainer_ended(_POLL_SECONDS)


def _sent(folder: Path) -> int:
    """The last step that an earlier life of the run handed over."""
    path = folder / _SENT_NAME
    return int(path.read_text()) if path.exists() else -1


def _lines(path: Path, sent: int) -> Iterator[dict[str, Any]]:
    """The lines of later steps, as they are written, until the trainer has ended."""
    while not path.exists():
        time.sleep(_POLL_SECONDS)
    with path.open() as file:
        begun, has_ended = "", False
        while True:
            begun += file.readline()
            if begun.endswith("\n"):
                line = json.loads(begun)
                if line["step"] > sent:
                    yield line
                begun = ""
            elif has_ended:
                return
            else:
                has_ended = _trainer_ended(_POLL_SECONDS)


if __name__ == "__main__":
    main()
