"""Attention of packed rows: with a stand-in for the kernel in plain torch, and with the kernel itself on a GPU."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from bridgetower.config.model import ModelConfig
from bridgetower.kernels.flash_ops import FlashOps
from bridgetower.kernels.layout import Spans, even_spans
from bridgetower.model.bridgetower import BridgeTower
from bridgetower.tasks.pretraining import PretrainTask
from tests.model.test_plain import BATCHES, EVERY_PART, assert_agrees_with_plain, fast_step, variants
from tests.small_models import EVERY_OBJECTIVE, shake, small_config


def attend_row_by_row(
    query_THd: Tensor, key_SHd: Tensor, value_SHd: Tensor, query_spans: Spans, key_spans: Spans, dropout: float
) -> Tensor:
    """Compute what the kernel computes without dropout, one row at a time."""
    starts = zip(query_spans.start_Z.tolist(), key_spans.start_Z.tolist(), strict=True)
    rows = []
    for (first, first_key), (end, end_key) in itertools.pairwise(starts):
        assert end - first <= query_spans.longest and 0 < end_key - first_key <= key_spans.longest
        query_HTd, key_HSd, value_HSd = (
            part.transpose(0, 1)
            for part in (query_THd[first:end], key_SHd[first_key:end_key], value_SHd[first_key:end_key])
        )
        probability_HTS = (query_HTd @ key_HSd.transpose(1, 2) / query_HTd.shape[-1] ** 0.5).softmax(dim=-1)
        rows.append((probability_HTS @ value_HSd).transpose(0, 1))
    assert (end, end_key) == (len(query_THd), len(key_SHd))  # no token is left out
    return torch.cat(rows)


class RowByRowOps(FlashOps):
    """FlashOps with a stand-in for the kernel that runs on every device."""

    def __init__(self) -> None:
        self.calls = 0

    def reads_spans(self, states: Tensor, num_heads: int) -> bool:
        return True

    def attend_spans(self, query_THd, key_SHd, value_SHd, query_spans, key_spans, dropout) -> Tensor:
        self.calls += 1
        return attend_row_by_row(query_THd, key_SHd, value_SHd, query_spans, key_spans, dropout)


def flash_task(ops: RowByRowOps, config: ModelConfig | None = None) -> PretrainTask:
    task = PretrainTask(BridgeTower(config or small_config(), EVERY_OBJECTIVE.heads, ops=ops), EVERY_OBJECTIVE)
    shake(task)
    nn.init.constant_(task.model.itc_head.temperature, 0.07)
    return task.train()


@pytest.mark.parametrize("name", BATCHES)
def test_a_kernel_for_packed_rows_changes_no_loss_and_no_gradient(name):
    ops = RowByRowOps()
    task = flash_task(ops)
    assert_agrees_with_plain(task, BATCHES[name])
    assert_agrees_with_plain(task, BATCHES[name], EVERY_PART)
    config, ops.calls = task.model.config, 0
    fast_step(task, BATCHES[name])
    # Self-attention of texts in the text tower and in the cross-modal layers, and cross-attention in both directions.
    assert ops.calls == config.text.num_layers + 3 * config.fusion.num_layers


def test_padded_texts_are_not_attended_to_as_packed_rows():
    ops = RowByRowOps()
    task = flash_task(ops, variants()["cross_attention, padding seen"])
    fast_step(task, BATCHES["7 pairs"])
    assert ops.calls == 1  # only the tokens that are read from the last layer are packed when they attend to images


def test_a_cpu_has_no_kernel_for_packed_rows():
    assert not FlashOps().reads_spans(torch.zeros(3, 64, dtype=torch.bfloat16), 1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_kernel_agrees_with_row_by_row():
    device = torch.device("cuda")
    lengths, keys = torch.tensor([3, 0, 5, 1]), even_spans(4, 325, device)
    start = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).to(device, torch.int32)
    queries = Spans(start, 5)
    generator = torch.Generator(device).manual_seed(0)
    query_THd, key_SHd, value_SHd = (
        torch.randn(n, 12, 64, device=device, generator=generator, dtype=torch.bfloat16) for n in (9, 1300, 1300)
    )
    assert FlashOps().reads_spans(query_THd.flatten(1), 12)
    expected = attend_row_by_row(query_THd.double(), key_SHd.double(), value_SHd.double(), queries, keys, 0.0)
    attended = FlashOps().attend_spans(query_THd, key_SHd, value_SHd, queries, keys, 0.0)
    assert float((attended.double() - expected).norm() / expected.norm()) < 5e-3
