"""The reported speed, memory and waiting for data."""

from __future__ import annotations

import logging
import mmap
import time
from collections.abc import Iterator

import pytest
import torch

from bridgetower.engine.throughput import DataAdvice, ReferenceSpeed, Throughput, measure_memory


def test_utilisation_is_counted_work_over_the_peak():
    throughput = Throughput(ReferenceSpeed(flops_per_pair=lambda tokens: 1e9 * tokens, peak_flops=4e12))
    time.sleep(0.02)
    throughput.count_step(64)
    figures = throughput.report(world_size=2, tokens_per_pair=10.0)
    per_rank = figures["speed/pairs_per_second_per_rank"]
    assert figures["speed/pairs_per_second"] == pytest.approx(2 * per_rank)
    assert figures["speed/tflops_per_rank"] == pytest.approx(1e10 * per_rank / 1e12)
    assert figures["speed/mfu"] == pytest.approx(1e10 * per_rank / 4e12)


def test_without_a_peak_there_is_no_utilisation():
    figures = Throughput(ReferenceSpeed(flops_per_pair=lambda tokens: tokens, peak_flops=None)).report(1, 10.0)
    assert "speed/tflops_per_rank" in figures and "speed/mfu" not in figures


def test_pauses_are_reported_and_not_counted():
    throughput = Throughput()
    with throughput.pause("checkpoint"):
        time.sleep(0.2)
    throughput.count_step(1)
    figures = throughput.report(1, 10.0)
    assert figures["checkpoint/pause_seconds"] >= 0.2 > figures["speed/step_seconds"]
    assert "checkpoint/pause_seconds" not in throughput.report(1, 10.0)


def test_memory_of_this_process():
    before = measure_memory(torch.device("cpu"))["memory/host_gb"]
    # A tensor could get memory that another test has freed, so map new memory.
    with mmap.mmap(-1, 100_000_000) as block:
        block.write(b"\1" * len(block))
        after = measure_memory(torch.device("cpu"))["memory/host_gb"]
        assert after == pytest.approx(before + len(block) / 1e9, abs=0.02)


def slow_batches(seconds: float) -> Iterator[int]:
    for batch in range(4):
        time.sleep(seconds)
        yield batch


def test_the_fraction_of_time_spent_waiting_for_batches_is_reported():
    throughput = Throughput()
    for _ in throughput.watch(slow_batches(0.05)):
        time.sleep(0.05)
        throughput.count_step(8)
    figures = throughput.report(1, 10.0)
    assert 0.3 < figures["data/wait_fraction"] < 0.7
    assert figures["data/wait_fraction_of_slowest"] == figures["data/wait_fraction"]
    assert figures["speed/pairs_per_second"] == pytest.approx(32 / (4 * figures["speed/step_seconds"]), rel=1e-6)
    assert throughput.report(1, 10.0)["data/wait_fraction"] == 0.0


def test_a_loader_that_holds_up_steps_is_logged_with_a_suggestion_but_not_at_every_report(caplog):
    logging.getLogger("bridgetower").propagate = True
    advice = DataAdvice("Raise --data.workers=2 to 7.")
    with caplog.at_level(logging.INFO, "bridgetower"):
        advice.check(0.9)  # the first report, while the workers start
        advice.check(0.05)
        assert not caplog.records
        for _ in range(20):
            advice.check(0.4)
    (record,) = caplog.records
    assert record.getMessage() == (
        "data is the bottleneck: steps wait for it 40% of their time. Raise --data.workers=2 to 7."
    )
