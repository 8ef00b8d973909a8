"""Dropout on a CPU: its rate and independence, and attention with dropout, forward and backward."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from bridgetower.kernels.cpu_ops import CpuOps
from bridgetower.kernels.dropout import draw_dropped, drop

attend = CpuOps(has_matrix_units=False).attend_heads

# Shapes: R rows, H heads, Q queries, N keys, d width of a head.
R, H, Q, N, d = 3, 2, 5, 7, 4
MASK_RN = torch.arange(N) < torch.tensor([[7], [1], [4]])


def projections(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(R, H, rows, d, generator=rng, dtype=dtype).requires_grad_() for rows in (Q, N, N))
    return query, key, value


@pytest.mark.parametrize("dropout", [0.001, 0.1, 0.5, 0.9])
def test_elements_are_dropped_with_the_probability_and_independently_of_their_neighbours(dropout):
    torch.manual_seed(0)
    count = 1_000_001  # odd, and more than one block of draws
    is_dropped = draw_dropped((count,), dropout).double()
    deviation = math.sqrt(dropout * (1 - dropout) / count)
    assert abs(is_dropped.mean() - dropout) < 4 * deviation
    for step in (1, 2, 2**18):  # halves of one word, words, blocks
        both = (is_dropped[step:] * is_dropped[:-step]).mean()
        assert abs(both - dropout**2) < 5 * math.sqrt(dropout**2 / count)


def test_draws_depend_on_torchs_generator_alone():
    torch.manual_seed(1)
    first, second = draw_dropped((3, 5), 0.5), draw_dropped((3, 5), 0.5)
    torch.manual_seed(1)
    assert torch.equal(draw_dropped((3, 5), 0.5), first) and not torch.equal(first, second)
    assert draw_dropped((0, 5), 0.5).shape == (0, 5)


def test_what_survives_is_scaled_and_what_is_dropped_gets_no_gradient():
    states = torch.linspace(1, 2, 1000, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(2)
    left = drop(states, 0.25)
    left.backward(torch.ones_like(left))
    torch.manual_seed(2)
    is_kept = ~draw_dropped((1000,), 0.25)
    torch.testing.assert_close(left, states * is_kept / 0.75)
    torch.testing.assert_close(states.grad, is_kept.double() / 0.75)


def test_without_dropout_nothing_is_dropped_or_copied():
    states = torch.linspace(-1, 1, 50)
    assert drop(states, 0.0) is states


@pytest.mark.parametrize("mask_RN", [None, MASK_RN], ids=["every key", "some keys"])
def test_attention_with_dropout_is_its_formula_with_the_same_draws_forward_and_backward(mask_RN):
    dropout = 0.3
    ours, expected = projections(), projections()
    torch.manual_seed(3)
    attended = attend(*ours, mask_RN, dropout)
    torch.manual_seed(3)
    is_kept = ~draw_dropped((R, H, Q, N), dropout)
    query, key, value = expected
    score = query @ key.transpose(2, 3) / math.sqrt(d)
    if mask_RN is not None:
        score = score.masked_fill(~mask_RN[:, None, None, :], float("-inf"))
    plain = (score.softmax(dim=-1) * is_kept / (1 - dropout)) @ value
    torch.testing.assert_close(attended, plain)
    gradient = torch.randn_like(plain)
    attended.backward(gradient)
    plain.backward(gradient)
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_mean_of_attention_with_dropout_is_attention_without():
    parts = projections()
    torch.manual_seed(4)
    draws = torch.stack([attend(*parts, MASK_RN, 0.2).detach() for _ in range(2000)])
    without = attend(*parts, MASK_RN, 0.0).detach()
    torch.testing.assert_close(without, F.scaled_dot_product_attention(*parts, attn_mask=MASK_RN[:, None, None]))
    assert ((draws.mean(dim=0) - without).abs() < 5 * draws.std(dim=0) / math.sqrt(2000)).all()


def test_row_without_a_key_has_finite_results_and_gradients():
    nothing = torch.zeros(R, N, dtype=torch.bool)
    parts = projections()
    attended = attend(*parts, nothing, 0.1)
    attended.sum().backward()
    assert attended.isfinite().all()
    assert all(part.grad is not None and part.grad.isfinite().all() for part in parts)


def test_recomputed_attention_draws_the_same_dropout():
    gradients = []
    for recompute in (False, True):
        parts = projections()
        torch.manual_seed(5)
        attended = (
            checkpoint(attend, *parts, None, 0.5, use_reentrant=False) if recompute else attend(*parts, None, 0.5)
        )
        attended.square().sum().backward()
        gradients.append([part.grad for part in parts])
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)


def test_attention_in_bfloat16_saves_probabilities_in_bfloat16_and_a_mask_of_bytes():
    saved = []

    def note(tensor):
        saved.append((tensor.dtype, tuple(tensor.shape)))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        attend(*projections(torch.bfloat16), MASK_RN, 0.1)
    probabilities = [dtype for dtype, shape in saved if shape == (R, H, Q, N)]
    assert probabilities == [torch.bfloat16, torch.bool]
