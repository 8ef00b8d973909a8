"""The Triton kernels against torch's operators: compiled on a GPU, elsewhere by Triton's interpreter."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bridgetower.config.run import ObjectivesConfig
from bridgetower.engine.loop import to_device
from bridgetower.kernels.flash_ops import FlashOps
from bridgetower.kernels.layout import SharedRows, Spans
from bridgetower.model.bridgetower import BridgeTower
from bridgetower.tasks.pretraining import PretrainTask
from tests.conftest import REPO
from tests.model.test_plain import EVERY_PART, assert_agrees_with_plain, fast_step
from tests.small_models import random_batch, shake, small_config

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
functions = pytest.importorskip("bridgetower.kernels.triton.functions", reason="this build of torch has no Triton")
triton_ops = pytest.importorskip("bridgetower.kernels.triton.ops")
short_attention = pytest.importorskip("bridgetower.kernels.triton.short_attention")
row_attention = pytest.importorskip("bridgetower.kernels.triton.row_attention")
ROWS, WIDTHS = (1, 6, 37), (96, 128)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE).requires_grad_()


def norm_of(width: int) -> nn.LayerNorm:
    layer = nn.LayerNorm(width, eps=1e-5).to(DEVICE)
    shake(layer)
    return layer


def assert_same(
    actual: Sequence[Tensor], expected: Sequence[Tensor], leaves: Sequence[Tensor], *, tolerance: float = 1e-5
) -> None:
    """Compare values, and the gradients of a random weighted sum of them."""
    factors = [torch.randn_like(value) for value in expected]
    torch.testing.assert_close(list(actual), list(expected), rtol=tolerance, atol=tolerance)
    one, other = (
        torch.autograd.grad(values, leaves, factors, retain_graph=True) for values in (list(actual), list(expected))
    )
    torch.testing.assert_close(one, other, rtol=10 * tolerance, atol=10 * tolerance)


def linear_of(width: int, outputs: int) -> nn.Linear:
    layer = nn.Linear(width, outputs).to(DEVICE)
    shake(layer)
    return layer


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("width", WIDTHS)
def test_norm(rows, width):
    states, layer = drawn(rows, width), norm_of(width)
    leaves = [states, *layer.parameters()]
    assert_same(functions.norm(states, layer), (states, layer(states)), leaves)
    assert_same(functions.norm(states, layer)[1:], [layer(states)], leaves)


@pytest.mark.parametrize("rows", ROWS)
def test_norm_of_a_sum(rows):
    states, update, layer = drawn(rows, 96), drawn(rows, 96), norm_of(96)
    assert_same(
        [functions.add_norm(states, update, layer)], [layer(states + update)], [states, update, *layer.parameters()]
    )


@pytest.mark.parametrize("rows", ROWS)
def test_sum_of_a_projection_and_its_norm(rows):
    states, inner, linear, layer = drawn(rows, 96), drawn(rows, 40), linear_of(40, 96), norm_of(96)
    leaves = [states, inner, *linear.parameters(), *layer.parameters()]
    total = states + linear(inner)
    assert_same(functions.project_add_norm(states, inner, linear, layer, 0.0), (total, layer(total)), leaves)
    assert_same(functions.project_add_norm(states, inner, linear, layer, 0.0)[1:], [layer(total)], leaves)


def test_dropout_keeps_the_right_fraction_and_is_drawn_again_in_the_backward_pass():
    states, inner, linear, layer = drawn(100, 96), drawn(100, 40), linear_of(40, 96), norm_of(96)
    results = functions.project_add_norm(states, inner, linear, layer, 0.3)
    is_left = (results[0] != states).float()
    total = states + linear(inner) * is_left / 0.7
    assert_same(results, (total, layer(total)), [states, inner, *linear.parameters(), *layer.parameters()])
    assert float(is_left.mean()) == pytest.approx(0.7, abs=0.02)  # 9,600 draws have a standard deviation of 0.0047
    # Rows and columns vary as chance has it, and neighbours are independent.
    assert float(is_left.mean(dim=1).std()) == pytest.approx((0.21 / 96) ** 0.5, rel=0.2)
    assert float(is_left.mean(dim=0).std()) == pytest.approx((0.21 / 100) ** 0.5, rel=0.3)
    for one, other in ((is_left[1:], is_left[:-1]), (is_left[:, 1:], is_left[:, :-1])):
        assert float((one * other).mean()) == pytest.approx(0.49, abs=0.02)


def test_dropout_depends_on_the_seed_of_torchs_generator_and_differs_between_calls():
    states, linear, layer = drawn(8, 96), linear_of(96, 96), norm_of(96)

    def dropped(seed: int) -> list[Tensor]:
        torch.manual_seed(seed)
        return [functions.project_add_norm(states, states, linear, layer, 0.5)[0] for _ in range(2)]

    first, second = dropped(1)
    assert not torch.equal(first, second)
    assert all(map(torch.equal, dropped(1), (first, second)))
    assert not torch.equal(dropped(2)[0], first)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("quick", [True, False])
def test_activation_of_a_projection(rows, quick):
    states, linear = drawn(rows, 40), linear_of(40, 300)
    value = linear(states)
    outer = value * torch.sigmoid(1.702 * value) if quick else F.gelu(value)
    leaves = [states, *linear.parameters()]
    assert_same(functions.expand(states, linear, quick=quick), (states, outer), leaves)
    assert_same(functions.expand(states, linear, quick=quick)[1:], [outer], leaves)


@pytest.mark.parametrize(("width", "parts"), [(128, 3), (256, 2), (96, 3), (128, 1)])
def test_projections(width, parts):
    states, linear = drawn(2, 37, 40), linear_of(40, parts * width)
    leaves = [states, *linear.parameters()]
    results = functions.project(states, linear.weight, linear.bias, parts)
    projected = linear(states).chunk(parts, dim=-1)
    assert_same(results, (states, *projected), leaves)
    assert_same(results[1:], projected, leaves)


def test_rows_may_be_read_more_than_once_or_never():
    states, index = drawn(6, 5, 2, 96), torch.tensor([3, 0, 0, 5, 3, 1, 3], device=DEVICE)
    order_R = index.argsort(stable=True)
    shared = SharedRows(index, order_R, torch.searchsorted(index[order_R], torch.arange(7, device=DEVICE)))
    taken = functions.take(states[:, :, 1], *shared)  # strided rows
    assert_same([taken], [states[:, :, 1].index_select(0, index)], [states])


def starts(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=DEVICE)


def attend_row_by_row(query: Tensor, key: Tensor, value: Tensor, lengths, is_left=None, dropout=0.0) -> Tensor:
    rows = []
    queries, keys, values = (part.split(n) for part, n in zip((query, key, value), (*lengths, lengths[1]), strict=True))
    for row, parts in enumerate(zip(queries, keys, values, strict=True)):
        query_HTd, key_HSd, value_HSd = (part.transpose(0, 1) for part in parts)
        probability_HTS = (query_HTd @ key_HSd.transpose(1, 2) / query_HTd.shape[-1] ** 0.5).softmax(dim=-1)
        if is_left is not None:
            probability_HTS = probability_HTS * is_left[row] / (1 - dropout)
        rows.append((probability_HTS @ value_HSd).transpose(0, 1))
    return torch.cat(rows)


@pytest.mark.parametrize(
    ("queries", "keys"),
    [([100, 70], [3, 17]), ([3, 0, 17], [90, 70, 90]), ([5, 1, 12], [5, 1, 12]), ([70, 1], [40, 50])],
    ids=["images to texts", "texts to images, one without a query", "texts", "longer texts"],
)
def test_attention_with_a_short_side(queries, keys):
    heads, width, dropout = 2, 16, 0.3
    tolerance = 5e-3 if DEVICE.type == "cuda" else 1e-5  # a GPU's matrix units round float32 to 10 bits
    query, joined = drawn(sum(queries), heads, width), drawn(sum(keys), 2, heads, width)
    key, value = joined.unbind(1)
    spans = Spans(starts(queries), max(queries)), Spans(starts(keys), max(keys))
    leaves, lengths = [query, joined], (queries, keys)
    assert_same(
        [short_attention.attend_short(query, key, value, *spans, 0.0)],
        [attend_row_by_row(query, key, value, lengths)],
        leaves,
        tolerance=tolerance,
    )

    def attend(values: Tensor) -> Tensor:
        torch.manual_seed(1)
        return short_attention.attend_short(query, key, values, *spans, dropout)

    # Values that are 1 for one key and 0 for the others show which probabilities survive dropout.
    is_left = [torch.zeros(heads, *shape, device=DEVICE) for shape in zip(queries, keys, strict=True)]
    for piece in range(0, max(keys), width):
        marks = torch.zeros(sum(keys), heads, width, device=DEVICE)
        for part, count in zip(marks.split(keys), keys, strict=True):
            ones = torch.eye(width, device=DEVICE)[: max(0, count - piece)]
            part[piece : piece + len(ones)] = ones[:, None]
        for row_is_left, part in zip(is_left, attend(marks).split(queries), strict=True):
            columns = row_is_left[:, :, piece : piece + width]
            columns.copy_((part.transpose(0, 1) > 0)[:, :, : columns.shape[2]])
    every_is_left = torch.cat([part.flatten() for part in is_left])
    assert float(every_is_left.mean()) == pytest.approx(0.7, abs=5 * (0.21 / len(every_is_left)) ** 0.5)
    assert_same(
        [attend(value)], [attend_row_by_row(query, key, value, lengths, is_left, dropout)], leaves, tolerance=tolerance
    )


def attend_densely(states: Tensor, weight: Tensor, bias: Tensor, heads: int) -> Tensor:
    parts = F.linear(states, weight, bias).chunk(3, dim=-1)
    query, key, value = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in parts)
    probability = (query @ key.transpose(2, 3) / query.shape[-1] ** 0.5).softmax(dim=-1)
    return (probability @ value).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("length", [5, 37, 64, 71, 131], ids="{} positions".format)
def test_attention_within_rows(length):
    rows, heads, width = 2, 2, 16
    on_gpu = DEVICE.type == "cuda"  # the kernels support only half precision there
    dtype, tolerance = (torch.float16, 5e-3) if on_gpu else (torch.float32, 1e-5)
    linear = linear_of(heads * width, 3 * heads * width).to(dtype)
    weight, bias = linear.weight, linear.bias
    states = torch.randn(rows, length, heads * width, device=DEVICE, dtype=dtype).requires_grad_()
    leaves = [states, weight, bias]
    results = row_attention.attend_within_rows(states, weight, bias, heads)
    attended = attend_densely(states, weight, bias, heads)
    assert_same(results, (states, attended), leaves, tolerance=tolerance)
    assert_same(results[1:], [attended], leaves, tolerance=tolerance)


def test_attention_within_rows_whose_scores_are_all_far_below_zero():
    heads, width, length = 2, 16, 37  # the last tile reaches behind the end of the row
    dtype, scale = (torch.float16, 4.0) if DEVICE.type == "cuda" else (torch.float32, 30.0)
    linear = linear_of(heads * width, 3 * heads * width).to(dtype)
    with torch.no_grad():
        linear.bias[: heads * width] = scale / 4  # bias of queries
        linear.bias[heads * width : 2 * heads * width] = -scale
    weight, bias = linear.weight, linear.bias
    states = torch.randn(2, length, heads * width, device=DEVICE, dtype=dtype).requires_grad_()
    with torch.no_grad():
        query, key, _ = F.linear(states, weight, bias).unflatten(-1, (3, heads, width)).unbind(2)
        scores = query.transpose(1, 2) @ key.permute(0, 2, 3, 1) / width**0.5
    assert scores.max() < (-14 if dtype == torch.float16 else -100)
    attended = row_attention.attend_within_rows(states, weight, bias, heads)[1]
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(attended.sum(), [states, weight, bias]))


def test_every_kernel_compiles_for_gpus(tmp_path):
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "tests.compile_kernels"]
    done = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    compiled = json.loads(done.stdout)
    # Every public function of these files is a kernel.
    files = (REPO / "bridgetower/kernels/triton").glob("*kernels.py")
    sources = [file.read_text() for file in files]
    assert compiled.keys() == {name for source in sources for name in re.findall(r"^def ([a-z]\w+)\(", source, re.M)}
    # What does not fit into registers is spilled to slow memory: a few numbers in one kernel.
    assert {name for name, spilled in compiled.items() if spilled} <= {"few_queries_backward"}
    assert max(compiled.values()) < 300


def test_which_states_the_attention_kernels_support():
    assert short_attention.supports(325, 50, 64) and short_attention.supports(50, 325, 64)
    assert not short_attention.supports(325, 325, 64)  # no side is short
    assert not short_attention.supports(50, 325, 40)  # a tile's width is a power of two
    assert not short_attention.supports(50, 325, 128)  # too much shared memory per program
    assert not short_attention.supports(50, 5000, 64)
    images = torch.zeros(1, 325, 768, dtype=torch.bfloat16)
    assert row_attention.supports(images, 12, 0.0)
    assert not row_attention.supports(images, 12, 0.1)  # with dropout FlashAttention is faster
    assert not row_attention.supports(images.float(), 12, 0.0)  # matrix units would round float32
    assert not row_attention.supports(images, 6, 0.0) and not row_attention.supports(images[:0], 12, 0.0)
    assert not row_attention.supports(torch.zeros(1, 577, 768, dtype=torch.bfloat16), 12, 0.0)


class InterpretedOps(triton_ops.TritonOps):  # type: ignore[name-defined, misc]
    """TritonOps that also run on a CPU, through Triton's interpreter and in float32."""

    def supports(self, states: Tensor) -> bool:
        return super().supports(states) or DEVICE.type == "cpu"

    def reads_spans(self, states: Tensor, num_heads: int) -> bool:
        return super().reads_spans(states, num_heads) or DEVICE.type == "cpu"


@pytest.fixture
def kernel_task(monkeypatch) -> PretrainTask:
    """Return a task with TritonOps, in float32 and with heads that the kernels support."""
    if DEVICE.type == "cpu":
        monkeypatch.setattr(row_attention, "supports", lambda states, num_heads, dropout: not dropout)  # float32, too
    config = small_config(dropout=0.0)
    config = dataclasses.replace(
        config,
        vision=dataclasses.replace(config.vision, num_layers=2),
        text=dataclasses.replace(config.text, num_layers=2),
        fusion=dataclasses.replace(config.fusion, width=128, num_heads=2, num_layers=2),
    )
    model = BridgeTower(config, ("mlm", "itm"), ops=InterpretedOps())
    shake(model)
    return PretrainTask(model.to(DEVICE).train(), ObjectivesConfig(mlm=True, itm=True, itc=False))


def test_a_step_with_kernels_has_the_losses_and_gradients_of_the_plain_model(kernel_task, monkeypatch):
    within_rows = row_attention.attend_within_rows
    calls: list[Tensor] = []

    def noted(states: Tensor, *arguments) -> tuple[Tensor, Tensor]:
        calls.append(states)
        return within_rows(states, *arguments)

    monkeypatch.setattr(row_attention, "attend_within_rows", noted)
    # With recomputation each kernel runs once more.
    assert_agrees_with_plain(kernel_task, to_device(random_batch(2), DEVICE), EVERY_PART)
    assert calls or DEVICE.type == "cuda"  # where this kernel does not support float32


def test_an_identity_in_place_of_a_norm_returns_the_states():
    states = drawn(3, 40)
    assert InterpretedOps().norm(states, nn.Identity())[1] is states


def test_states_that_the_kernels_do_not_support_go_to_torch(monkeypatch):
    ops = triton_ops.TritonOps()
    states, layer = torch.randn(3, 96, dtype=torch.float64, device=DEVICE), norm_of(96).double()
    monkeypatch.setattr(functions, "norm", lambda *arguments: pytest.fail("a kernel"))
    assert torch.equal(ops.norm(states, layer)[1], layer(states))
    assert not ops.supports_buckets(states, 2, 16, 16)


def test_a_step_uses_the_kernels_only_with_triton_ops(kernel_task, monkeypatch):
    names = ("norm", "add_norm", "project_add_norm", "expand", "project", "take")
    for name in names:
        monkeypatch.setattr(functions, name, lambda *arguments, **settings: pytest.fail("a kernel"))
    batch = to_device(random_batch(2), DEVICE)
    torch_model = BridgeTower(kernel_task.model.config, ("mlm", "itm"), ops=FlashOps())
    fast_step(PretrainTask(torch_model.to(DEVICE).train(), ObjectivesConfig()), batch)
    with pytest.raises(pytest.fail.Exception):
        fast_step(kernel_task, batch)
