"""Requests to stop, and how all ranks agree on the step at which they stop."""

from __future__ import annotations

import signal
import time
from types import FrameType

import torch

from bridgetower import dist

_STAY_SECONDS = 24 * 3600


class StopRequests:
    """Remembers SIGUSR1, SIGINT and SIGTERM until the loop asks.

    USR1 (a batch script before its time limit) and INT (Ctrl-C) mean: save, then exit with code 75. TERM (Slurm's
    preemption and scancel) means: save. The caller then decides whether to exit, since Slurm requeues only a job that
    stays until it is killed. A second Ctrl-C ends the program at once.
    """

    def __init__(self) -> None:
        """Handle USR1 and TERM. Ctrl-C still ends a program that has not begun to train."""
        self._received: int | None = None
        for signal_number in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(signal_number, self._note)

    def keep_interrupts(self) -> None:
        """Handle Ctrl-C too."""
        signal.signal(signal.SIGINT, self._note)

    def _note(self, signal_number: int, frame: FrameType | None) -> None:
        if signal_number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        self._received = signal_number

    def agree(self, device: torch.device) -> bool:
        """Return True on all ranks if one of them was asked to stop. Every rank must call it at the same step."""
        return dist.any_rank(self._received is not None, device)

    @property
    def was_terminated(self) -> bool:
        """True if the request was SIGTERM."""
        return self._received == signal.SIGTERM


def stay_until_killed() -> None:
    """Wait for the SIGKILL that follows SIGTERM under Slurm.

    A trainer that exits with 0 in the grace period counts as completed and is not requeued. One whose batch script
    requeues it after every stop cannot be cancelled. Staying leaves the choice to Slurm.
    """
    time.sleep(_STAY_SECONDS)
