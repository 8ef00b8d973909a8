"""Speed as it is reported."""

from __future__ import annotations

import time

import pytest
import torch

from bridgetower.engine.throughput import Throughput, Yardstick, memory_figures


def test_utilisation_is_counted_work_over_the_peak():
    throughput = Throughput(Yardstick(flops_of_pair=lambda tokens: 1e9 * tokens, peak_flops=4e12))
    time.sleep(0.02)
    throughput.step_done(64)
    figures = throughput.report(world_size=2, tokens_per_pair=10.0)
    per_rank = figures["speed/pairs_per_second_per_rank"]
    assert figures["speed/pairs_per_second"] == pytest.approx(2 * per_rank)
    assert figures["speed/tflops_per_rank"] == pytest.approx(1e10 * per_rank / 1e12)
    assert figures["speed/mfu"] == pytest.approx(1e10 * per_rank / 4e12)


def test_without_a_peak_there_is_no_utilisation():
    figures = Throughput(Yardstick(flops_of_pair=lambda tokens: tokens, peak_flops=None)).report(1, 10.0)
    assert "speed/tflops_per_rank" in figures and "speed/mfu" not in figures


def test_pauses_are_reported_and_not_counted():
    throughput = Throughput()
    with throughput.paused("checkpoint"):
        time.sleep(0.2)
    throughput.step_done(1)
    figures = throughput.report(1, 10.0)
    assert figures["checkpoint/pause_seconds"] >= 0.2 > figures["speed/step_seconds"]
    assert "checkpoint/pause_seconds" not in throughput.report(1, 10.0)


def test_memory_of_this_process():
    before = memory_figures(torch.device("cpu"))["memory/host_gb"]
    block = torch.ones(100_000_000, dtype=torch.uint8)
    assert memory_figures(torch.device("cpu"))["memory/host_gb"] == pytest.approx(before + len(block) / 1e9, abs=0.02)
