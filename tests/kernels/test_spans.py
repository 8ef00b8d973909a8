"""Attention of packed texts by one kernel: the way to it on the CPU with a plain kernel, and the kernel on a GPU."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from bridgetower.config.compute import PLAIN, ComputeConfig
from bridgetower.kernels.spans import Spans, attend_spans, even_spans, fits
from bridgetower.model import attention, text_tower
from tests.small_models import small_task
from tests.step.test_plan import BATCHES, EVERYTHING, RECOMPUTED, assert_agree, computed


def attend_row_by_row(
    query_THd: Tensor, key_SHd: Tensor, value_SHd: Tensor, query_spans: Spans, key_spans: Spans, dropout: float
) -> Tensor:
    """What the kernel computes, without dropout."""
    starts = zip(query_spans.start_Z.tolist(), key_spans.start_Z.tolist(), strict=True)
    rows = []
    for (first, first_key), (end, end_key) in itertools.pairwise(starts):
        assert end - first <= query_spans.longest and 0 < end_key - first_key <= key_spans.longest
        query_HTd, key_HSd, value_HSd = (
            part.transpose(0, 1)
            for part in (query_THd[first:end], key_SHd[first_key:end_key], value_SHd[first_key:end_key])
        )
        share_HTS = (query_HTd @ key_HSd.transpose(1, 2) / query_HTd.shape[-1] ** 0.5).softmax(dim=-1)
        rows.append((share_HTS @ value_HSd).transpose(0, 1))
    assert (end, end_key) == (len(query_THd), len(key_SHd))  # no token is left out
    return torch.cat(rows)


@pytest.fixture
def calls(monkeypatch):
    """The way that a GPU goes, with a kernel of a CPU. Gives a list with an entry a call."""
    made = []

    def attend(*arguments, kernels):
        made.append(arguments)
        return attend_row_by_row(*arguments)

    for module in (attention, text_tower):
        monkeypatch.setattr(module, "fits", lambda states, num_heads: True)
        monkeypatch.setattr(module, "attend_spans", attend)
    return made


@pytest.mark.parametrize("kind", BATCHES)
def test_kernel_of_packed_rows_changes_no_loss_and_no_gradient(kind, calls):
    task = small_task()
    first_shared = ComputeConfig(share_first_layer=False)
    assert_agree(task, BATCHES[kind], EVERYTHING, RECOMPUTED, first_shared, ComputeConfig(joint_pass=False))
    config = task.model.config
    calls.clear()
    computed(task, BATCHES[kind], EVERYTHING)
    # Texts to themselves in both stacks, texts to images and images to texts.
    assert len(calls) == config.text.num_layers + 3 * config.fusion.num_layers


def test_padded_texts_go_the_other_way(calls):
    computed(small_task(), BATCHES["7 pairs"], PLAIN)
    assert calls == []


def test_a_cpu_has_no_such_kernel():
    assert not fits(torch.zeros(3, 64, dtype=torch.bfloat16), 1)


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
    assert fits(query_THd.flatten(1), 12)
    expected = attend_row_by_row(query_THd.double(), key_SHd.double(), value_SHd.double(), queries, keys, 0.0)
    found = attend_spans(query_THd, key_SHd, value_SHd, queries, keys, 0.0, kernels=False)
    assert float((found.double() - expected).norm() / expected.norm()) < 5e-3
