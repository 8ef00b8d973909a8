"""Operations on a CPU: attention in bfloat16 with matrix units, and which way is taken for which states."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, library
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from bridgetower.kernels.cpu_ops import CpuOps

# Shapes: R rows, H heads, N positions, d width of a head.
R, H, N, d = 3, 2, 40, 16
Parts = tuple[Tensor, Tensor, Tensor]
# Every CPU can compute the operator; only its choice depends on the matrix units.
attend = CpuOps(has_matrix_units=True).attend_heads


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
def test_it_is_as_exact_as_attention_written_as_matmuls(score_deviation):
    gradient = torch.randn(R, H, N, d, generator=torch.Generator().manual_seed(7)).bfloat16()

    def computed(way, parts: Parts) -> list[Tensor]:
        attended = way(*parts)
        return [attended, *torch.autograd.grad(attended, parts, gradient.to(attended.dtype))]

    def as_matmuls(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return ((query * d**-0.5) @ key.transpose(2, 3)).softmax(dim=-1) @ value

    exact = computed(F.scaled_dot_product_attention, projections(score_deviation, torch.float64))
    matmuls = computed(as_matmuls, projections(score_deviation))
    ours = computed(lambda query, key, value: attend(query, key, value, None, 0.0), projections(score_deviation))
    for found, other, best in zip(ours, matmuls, exact, strict=True):
        off, off_of_other = ((part.double() - best).norm() / best.norm() for part in (found, other))
        assert 0 < off < 1.2 * off_of_other


def test_it_is_taken_for_bfloat16_with_a_gradient_alone():
    parts = projections()
    assert is_ours(attend(*parts, None, 0.0))
    assert not is_ours(attend(*projections(dtype=torch.float32), None, 0.0))
    assert not is_ours(attend(*parts, torch.ones(R, N, dtype=torch.bool), 0.0))
    assert not is_ours(CpuOps(has_matrix_units=False).attend_heads(*parts, None, 0.0))
    with torch.no_grad():
        assert attend(*parts, None, 0.0).grad_fn is None


def operators(keys: int, dtype: torch.dtype, *, has_matrix_units: bool = False) -> set[str]:
    """The operators that attention calls."""
    query, key, value = (torch.randn(1, 2, n, 16, dtype=dtype, requires_grad=True) for n in (8, keys, keys))
    with profile(activities=[ProfilerActivity.CPU]) as record:
        CpuOps(has_matrix_units=has_matrix_units).attend_heads(query, key, value, None, 0.0)
    return {event.key for event in record.key_averages()}


def test_bfloat16_without_matrix_units_is_matmuls_for_few_keys_and_fused_for_many():
    math, fused = "aten::_scaled_dot_product_attention_math", "aten::_scaled_dot_product_flash_attention_for_cpu"
    assert math in operators(40, torch.bfloat16) and fused not in operators(40, torch.bfloat16)
    assert fused in operators(325, torch.bfloat16)
    assert fused in operators(40, torch.float32) and fused in operators(325, torch.float32)
    assert "bridgetower::attend" in operators(40, torch.bfloat16, has_matrix_units=True)


def test_its_operations_are_counted_as_those_of_any_attention():
    parts, gradient = projections(), torch.ones(R, H, N, d, dtype=torch.bfloat16)
    with FlopCounterMode(display=False) as counter:
        attend(*parts, None, 0.0).backward(gradient)
    assert counter.get_total_flops() == 3 * 4 * R * H * N * N * d


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
