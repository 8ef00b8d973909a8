"""Starts the ranks of a script on this machine, one process each, as srun does: python launch_ranks.py N SCRIPT ...

Most tests use this instead of the deepspeed launcher, which imports torch twice before it starts anything.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time


def main(num_ranks: int, command: list[str]) -> int:
    """Start the ranks and wait for all. The first that fails ends the others, and its exit code is returned."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    shared = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(num_ranks)}
    ranks = [
        subprocess.Popen(
            [sys.executable, *command],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(num_ranks)},
        )
        for rank in range(num_ranks)
    ]

    def pass_on(signal_number: int, _: object) -> None:
        for rank in ranks:
            rank.send_signal(signal_number)

    for signal_number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(signal_number, pass_on)
    while any(rank.poll() is None for rank in ranks):
        failed = [rank.returncode for rank in ranks if rank.returncode]
        if failed:
            end = time.monotonic() + 5  # the others may be writing their errors
            while any(rank.poll() is None for rank in ranks) and time.monotonic() < end:
                time.sleep(0.05)
            for rank in ranks:
                rank.kill()
            return abs(failed[0])
        time.sleep(0.05)
    return next((abs(rank.returncode) for rank in ranks if rank.returncode), 0)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
