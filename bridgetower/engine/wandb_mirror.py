"""Copies the lines of ``metrics.jsonl`` to Weights & Biases, in a process of its own.

Training writes a file and never waits for a server: a W&B that is slow or unreachable, at any time of the run, holds up
only this process. The trainer starts it and holds the other end of its standard input. When that closes, however the
trainer ended, no more lines come. A resumed run does not send lines again.
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
# How long a run waits at its end for the last lines to be sent.
_PATIENCE_SECONDS = 20.0

Mode = Literal["auto", "online", "offline"]


class Mirror:
    """The trainer's handle of the process."""

    def __init__(
        self, run_folder: Path, metrics: Path, *, mode: Mode, project: str, entity: str, run_config: dict[str, Any]
    ) -> None:
        """Start the process.

        Args:
            metrics: the file that training appends to.
            run_config: shown with the run in W&B.

        Raises:
            ConfigError: mode is online, and there is no key.
        """
        if mode == "online" and not has_key():
            raise ConfigError(
                "tracker.wandb=online, but there is no W&B key. Run `wandb login`, set WANDB_API_KEY, or use "
                "--tracker.wandb=auto, which writes offline files if there is no key."
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
        except BrokenPipeError:  # the process has ended, and has logged why
            pass

    def close(self) -> None:
        """Let the process send the last lines, but not for long."""
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
    """Return True if W&B would find a key, without asking its server."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    return get_netrc_auth(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai") is not None


def main() -> None:
    """Copy the metrics that the request on standard input describes."""
    # Slurm and terminals signal every process of a job. This one ends after the trainer.
    for signal_number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(signal_number, signal.SIG_IGN)
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", level=logging.WARNING)
    request = json.loads(_read_request())
    mode = request["mode"]
    if mode == "auto":
        mode = os.environ.get("WANDB_MODE") or ("online" if has_key() else "offline")
    if mode == "disabled":
        return
    folder = Path(request["folder"])
    lock = _claim(folder)
    lines = _follow(Path(request["metrics"]), _read_sent_step(folder))
    run = _start_run(request, mode)
    for line in lines:
        step = int(line.pop("step"))
        run.log(line, step=step)
        write_atomically(folder / _SENT_NAME, str(step).encode())
    run.finish()
    os.close(lock)


def _claim(folder: Path) -> int:
    """Wait until the process of the run before its resumption has ended."""
    while True:
        try:
            return claim_folder(folder, name=".wandb_lock")
        except DataError:
            time.sleep(_POLL_SECONDS)


def _read_request() -> bytes:
    """Read the first line of standard input, byte by byte: select() would not see what a buffer has read ahead."""
    line = b""
    while not line.endswith(b"\n") and (byte := os.read(0, 1)):
        line += byte
    return line


def _trainer_ended(seconds: float) -> bool:
    """Wait for the end of standard input. Return False if it has not come in time."""
    return bool(select.select([0], [], [], seconds)[0])


def _start_run(request: dict[str, Any], mode: Literal["online", "offline"]) -> Any:
    """Start or resume the run in W&B. Try again while training runs; once it has ended, write offline files."""
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
            logger.warning("W&B cannot be reached (%s). Training goes on; trying again.", " ".join(str(error).split()))
            has_ended = _trainer_ended(_POLL_SECONDS)


def _read_sent_step(folder: Path) -> int:
    """Read the last step that was sent before the run was resumed; -1 if there is none."""
    path = folder / _SENT_NAME
    return int(path.read_text()) if path.exists() else -1


def _follow(path: Path, sent_step: int) -> Iterator[dict[str, Any]]:
    """Yield the lines of later steps as they are written, until the trainer has ended."""
    while not path.exists():
        time.sleep(_POLL_SECONDS)
    with path.open() as file:
        text, has_ended = "", False
        while True:
            text += file.readline()  # which may be half a line, while the trainer writes it
            if text.endswith("\n"):
                line = json.loads(text)
                if line["step"] > sent_step:
                    yield line
                text = ""
            elif has_ended:
                return
            else:
                has_ended = _trainer_ended(_POLL_SECONDS)


if __name__ == "__main__":
    main()
