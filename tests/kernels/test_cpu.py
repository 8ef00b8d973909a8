"""Attention in bfloat16 on CPUs with matrix units, whose backward pass is products; every CPU can compute it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, library
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from bridgetower.kernels import cpu as cpu_attention
from bridgetower.kernels.cpu import attend

# Shapes: R rows, H heads, N positions, d width of a head.
R, H, N, d = 3, 2, 40, 16
Parts = tuple[Tensor, Tensor, Tensor]


@pytest.fixture(autouse=True)
def has_matrix_units(monkeypatch):
    monkeypatch.setattr(cpu_attention, "_HAS_AMX", True)


def projections(score_deviation: float = 1.0, dtype: torch.dtype = torch.bfloat16) -> Parts:
    """Heads as projections give them: beside each other."""
    rng = torch.Generator().manual_seed(6)
    joined = torch.randn(R, N, 3 * H * d, generator=rng)
    joined[:, :, : H * d] *= score_deviation
    joined = joined.bfloat16().to(dtype).requires_grad_()
    query, key, value = (part.unflatten(-1, (H, d)).transpose(1, 2) for part in joined.chunk(3, dim=-1))
    return query, key, value


def is_ours(attended: Tensor) -> bool:
    return "bridgetower_attend" in type(attended.grad_fn).__name__


@pytest.mark.parametrize("score_deviation", [1.0, 4.0, 8.0])
@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_it_is_as_exact_as_attention_written_as_products(backend, score_deviation):
    attend_here = attend if backend is None else torch.compile(attend, backend=backend)
    gradient = torch.randn(R, H, N, d, generator=torch.Generator().manual_seed(7)).bfloat16()

    def computed(way, parts: Parts) -> list[Tensor]:
        attended = way(*parts)
        return [attended, *torch.autograd.grad(attended, parts, gradient.to(attended.dtype))]

    def as_products(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return ((query * d**-0.5) @ key.transpose(2, 3)).softmax(dim=-1) @ value

    exact = computed(F.scaled_dot_product_attention, projections(score_deviation, torch.float64))
    products = computed(as_products, projections(score_deviation))
    ours = computed(lambda query, key, value: attend_here(query, key, value, None, 0.0), projections(score_deviation))
    for found, other, best in zip(ours, products, exact, strict=True):
        off, off_of_other = ((part.double() - best).norm() / best.norm() for part in (found, other))
        assert 0 < off < 1.2 * off_of_other


def test_it_is_taken_for_bfloat16_with_a_gradient_alone():
    parts = projections()
    assert is_ours(attend(*parts, None, 0.0))
    assert not is_ours(attend(*projections(dtype=torch.float32), None, 0.0))
    assert not is_ours(attend(*parts, torch.ones(R, N, dtype=torch.bool), 0.0))
    with torch.no_grad():
        assert attend(*parts, None, 0.0).grad_fn is None
    with sdpa_kernel(SDPBackend.MATH):  # as who counts operations asks for
        assert not is_ours(attend(*parts, None, 0.0))


def test_it_leaves_to_torch_what_its_kernel_would_not_look_at():
    query, key, value = projections()
    apart = query.transpose(2, 3).contiguous().transpose(2, 3)
    assert not is_ours(attend(apart, key, value, None, 0.0))
    assert not is_ours(attend(query, key[:, :, :0], value[:, :, :0], None, 0.0))


def test_operators_are_what_they_say():
    parts = [part.detach().requires_grad_() for part in projections()]
    library.opcheck(torch.ops.bridgetower.attend.default, tuple(parts))
    kept = tuple(part.detach() for part in parts)
    library.opcheck(torch.ops.bridgetower.attend_backward.default, (torch.ones_like(kept[0]), *kept))
