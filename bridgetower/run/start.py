"""The first steps of a process that trains."""

from __future__ import annotations

from bridgetower.config.cli import start_logging
from bridgetower.engine.launch import Launch, read_launch
from bridgetower.engine.preemption import StopRequests


def start_process() -> tuple[Launch, StopRequests]:
    """Read how this process was launched, begin to keep requests to stop, and start logging.

    To be called before DeepSpeed is imported, which reads environment variables that ``read_launch`` completes.
    """
    launch = read_launch()
    stop = StopRequests()  # from here on a request to stop is kept until a step is done
    start_logging(launch.rank)
    return launch, stop
