"""Operations on a CPU: attention in bfloat16 with matrix units, and which kernel attends for which states."""

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
# Every CPU can run the operator; only the choice of it depends on matrix units.
attend = CpuOps(has_matrix_units=True).attend_heads


def projections(score_deviation: float = 1.0, dtype: torch.dtype = torch.bfloat16) -> Parts:
    """Return queries, keys and values as views of one joint projection."""
    rng = torch.Generator().manual_seed(6)
    joined = torch.randn(R, N, 3 * H * d, generator=rng)
    joined[:, :, : H * d] *= score_deviation
    joined = joined.bfloat16().to(dtype).requires_grad_()
    query, key, value = (part.unflatten(-1, (H, d)).transpose(1, 2) for part in joined.chunk(3, dim=-1))
    return query, key, value


def is_ours(attended: Tensor) -> bool:
    return "bridgetower_attend" in type(attended.grad_fn).__name__


@pytest.mark.parametrize("score_deviation", [1.0, 4.0, 8.0])
def test_our_attention_is_as_exact_as_attention_written_as_matmuls(score_deviation):
    gradient = torch.randn(R, H, N, d, generator=torch.Generator().manual_seed(7)).bfloat16()

    def computed(attention, parts: Parts) -> list[Tensor]:
        attended = attention(*parts)
        return [attended, *torch.autograd.grad(attended, parts, gradient.to(attended.dtype))]

    def as_matmuls(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return ((query * d**-0.5) @ key.transpose(2, 3)).softmax(dim=-1) @ value

    exact = computed(F.scaled_dot_product_attention, projections(score_deviation, torch.float64))
    matmuls = computed(as_matmuls, projections(score_deviation))
    ours = computed(lambda query, key, value: attend(query, key, value, None, 0.0), projections(score_deviation))
    for our_result, matmul_result, exact_result in zip(ours, matmuls, exact, strict=True):
        our_error, matmul_error = (
            (result.double() - exact_result).norm() / exact_result.norm() for result in (our_result, matmul_result)
        )
        assert 0 < our_error < 1.2 * matmul_error


def test_our_attention_is_used_only_for_unmasked_bfloat16_states_with_a_gradient():
    parts = projections()
    assert is_ours(attend(*parts, None, 0.0))
    assert not is_ours(attend(*projections(dtype=torch.float32), None, 0.0))
    assert not is_ours(attend(*parts, torch.ones(R, N, dtype=torch.bool), 0.0))
    assert not is_ours(CpuOps(has_matrix_units=False).attend_heads(*parts, None, 0.0))
    with torch.no_grad():
        assert attend(*parts, None, 0.0).grad_fn is None


def operators(keys: int, dtype: torch.dtype, *, has_matrix_units: bool = False) -> set[str]:
    """Return the names of the operators that attention calls."""
    query, key, value = (torch.randn(1, 2, n, 16, dtype=dtype, requires_grad=True) for n in (8, keys, keys))
    with profile(activities=[ProfilerActivity.CPU]) as record:
        CpuOps(has_matrix_units=has_matrix_units).attend_heads(query, key, value, None, 0.0)
    return {event.key for event in record.key_averages()}


def test_bfloat16_without_matrix_units_uses_matmuls_for_few_keys_and_the_fused_kernel_for_many():
    math, fused = "aten::_scaled_dot_product_attention_math", "aten::_scaled_dot_product_flash_attention_for_cpu"
    assert math in operators(40, torch.bfloat16) and fused not in operators(40, torch.bfloat16)
    assert fused in operators(325, torch.bfloat16)
    assert fused in operators(40, torch.float32) and fused in operators(325, torch.float32)
    assert "bridgetower::attend" in operators(40, torch.bfloat16, has_matrix_units=True)


def test_flops_of_our_attention_are_counted():
    parts, gradient = projections(), torch.ones(R, H, N, d, dtype=torch.bfloat16)
    with FlopCounterMode(display=False) as counter:
        attend(*parts, None, 0.0).backward(gradient)
    assert counter.get_total_flops() == 3 * 4 * R * H * N * N * d


def test_torch_attends_where_channels_are_strided_or_there_is_no_key():
    query, key, value = projections()
    strided = query.transpose(2, 3).contiguous().transpose(2, 3)
    assert not is_ours(attend(strided, key, value, None, 0.0))
    assert not is_ours(attend(query, key[:, :, :0], value[:, :, :0], None, 0.0))


def test_operators_pass_torchs_opcheck():
    parts = [part.detach().requires_grad_() for part in projections()]
    library.opcheck(torch.ops.bridgetower.attend.default, tuple(parts))
    inputs = tuple(part.detach() for part in parts)
    library.opcheck(torch.ops.bridgetower.attend_backward.default, (torch.ones_like(inputs[0]), *inputs))
