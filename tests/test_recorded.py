"""Recorded steps, and the empty places that let batches of other lengths share one.

Without a GPU a step is computed each time where a recorded one would be run. Of base, that both are the same is
measured on a GPU by benchmarks/gpu (agreement).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bridgetower import recorded
from bridgetower.config.schema import ComputeConfig
from bridgetower.model.dropout import draw_key
from bridgetower.recorded import RecordedStep, Stages
from bridgetower.rows import room_for
from tests.small_models import random_batch
from tests.test_kernels import DEVICE, kernel_task
from tests.test_step import EVERYTHING, assert_agree, with_masks

__all__ = ["kernel_task"]
EAGER = ComputeConfig(cuda_graphs=False)
needs_no_gpu = pytest.mark.skipif(DEVICE.type == "cuda", reason="a GPU records half precision alone")


class Net(nn.Module):
    """Two stages that share a weight, one that is frozen and one that nobody reads."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.shared, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 1)
        self.frozen, self.unread = nn.Linear(4, 4), nn.Linear(4, 4)
        self.frozen.requires_grad_(False)
        self.calls = 0
        self.to(DEVICE)

    def encode(self, inputs: tuple[Tensor, str]) -> list[Tensor]:
        self.calls += 1
        states = self.shared(self.frozen(self.first(inputs[0]))).tanh()
        return [states, inputs[0] * 2]

    def finish(self, inputs: tuple[Tensor, str], states: Any) -> tuple[Tensor, dict[str, Tensor]]:
        loss = (self.last(self.shared(states[0]) + states[1])).square().mean()
        return loss, {"loss": torch.stack([loss.detach(), torch.ones_like(loss)])}

    def plain(self, batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        inputs = batch, ""
        return self.finish(inputs, self.encode(inputs))

    def gradients(self, run: Callable[[Tensor], tuple[Tensor, Any]], *batches: Tensor) -> dict[str, Tensor]:
        """Of several batches, added up."""
        self.zero_grad()
        for batch in batches:
            (run(batch)[0] / len(batches)).backward()
        return {name: p.grad.clone() for name, p in self.named_parameters() if p.grad is not None}


def drawn(rows: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, 4, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


@pytest.fixture
def net() -> Net:
    return Net()


@pytest.fixture
def step(net: Net) -> Callable[..., tuple[Tensor, dict[str, Tensor]]]:
    made = RecordedStep(net, Stages(net.encode, net.finish))
    return lambda batch, kind="": made((batch, "plain value"), kind)


def test_loss_metrics_and_gradients_are_those_of_the_stages(net, step):
    batches = [drawn(3, seed) for seed in range(3)]
    expected = [net.gradients(net.plain, batch) for batch in batches]
    for batch, gradients in zip(batches, expected, strict=True):
        found = net.gradients(step, batch)
        assert found.keys() == gradients.keys() and not any("frozen" in name or "unread" in name for name in found)
        torch.testing.assert_close(found, gradients)
        (loss, metrics), (one, other) = step(batch), net.plain(batch)
        torch.testing.assert_close((loss, metrics), (one, other))


def test_gradients_of_several_steps_are_added_up(net, step):
    batches = [drawn(3, seed) for seed in range(4)] + [drawn(5)]
    for order in (batches, batches[::-1]):
        torch.testing.assert_close(net.gradients(step, *order), net.gradients(net.plain, *order))


def test_results_of_a_step_outlive_the_next(step):
    first, metrics = step(drawn(3))
    before = float(first.detach()), metrics["loss"].tolist()
    step(drawn(3, seed=1))
    assert before == (float(first.detach()), metrics["loss"].tolist())


def test_a_backward_pass_whose_states_are_gone_is_an_error(step):
    first, _ = step(drawn(3))
    second, _ = step(drawn(3))
    with pytest.raises(RuntimeError, match=r"run again before the backward pass.*compute\.cuda_graphs=false"):
        first.backward()
    second.backward()


def test_a_shape_is_recorded_once_and_each_kind_apart(net, step, monkeypatch):
    made = []
    record = recorded._Recording.made
    monkeypatch.setattr(
        recorded._Recording, "made", lambda self, *arguments: made.append(arguments[2]) or record(self, *arguments)
    )
    for rows in (3, 5, 3, 5, 3):
        net.gradients(step, drawn(rows))
    assert made == [True, False]  # kernels are compiled at the first one of a kind
    step(drawn(3), "another")
    assert made == [True, False, True]
    # Other weights, or the same elsewhere, are others.
    net.last.weight.data = net.last.weight.data.clone()
    torch.testing.assert_close(net.gradients(step, drawn(3)), net.gradients(net.plain, drawn(3)))
    net.frozen.requires_grad_(True)
    assert "frozen.weight" in net.gradients(step, drawn(3))
    assert made == [True, False, True, True, True]


def test_the_oldest_recordings_are_given_up(net, step, monkeypatch):
    monkeypatch.setattr(recorded, "_MOST_RECORDINGS", 2)
    for rows in (1, 2, 3, 2, 1, 2):
        torch.testing.assert_close(net.gradients(step, drawn(rows)), net.gradients(net.plain, drawn(rows)))


def test_parameters_are_back_in_their_places_also_after_an_error(net, monkeypatch):
    names = [name for name, _ in net.named_parameters()]
    made = RecordedStep(net, Stages(net.encode, lambda inputs, states: 1 / 0))
    with pytest.raises(ZeroDivisionError):
        made((drawn(3), ""))
    assert [name for name, _ in net.named_parameters()] == names
    assert all(isinstance(parameter, nn.Parameter) for parameter in net._parameters.values())


def test_draws_are_those_of_the_seed_whatever_was_recorded_before(net):
    seen = []

    def finish(inputs, states):
        keys = [draw_key(DEVICE) for _ in range(2)]
        seen.append([(int(key.word), key.number) for key in keys])
        return net.finish(inputs, states)

    made = RecordedStep(net, Stages(net.encode, finish))

    def keys(seed: int, rows: int) -> list[tuple[int, int]]:
        torch.manual_seed(seed)
        made((drawn(rows), ""))
        return seen[-1]

    if DEVICE.type == "cuda":
        pytest.skip("a recorded step shows no numbers to the host")
    first = keys(0, 3)
    assert first[0] != first[1] and all(2**61 <= word < 2**62 and number >= 2**61 for word, number in first)
    assert keys(0, 3) == first  # now it was there already
    assert keys(0, 5) == first
    other = keys(1, 3)
    assert other[0][0] != first[0][0] and [number for _, number in other] == [number for _, number in first]


@pytest.fixture
def nothing_is_zero_by_chance() -> Iterator[None]:
    """Memory that nobody has written holds no numbers."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = before


@needs_no_gpu
@pytest.mark.parametrize("masks", [[0, 1], [0, 0]], ids=["one masked", "none masked"])
def test_empty_places_change_no_loss_no_metric_and_no_gradient(
    kernel_task, nothing_is_zero_by_chance, monkeypatch, masks
):
    counted: list[Any] = []
    step = kernel_task._recorded
    monkeypatch.setattr(kernel_task, "_recorded", lambda *arguments: counted.append(arguments) or step(*arguments))
    batch = with_masks(random_batch(2), masks)._replace(corpus_B=torch.tensor([0, 1]))
    room = room_for(batch)
    assert room.tokens > sum(batch.num_tokens) and room.masked > sum(batch.num_masked)
    assert_agree(kernel_task, batch, EVERYTHING)
    assert len(counted) == 1
    kernel_task.corpora = ("one", "other")
    found = []
    for compute in (EAGER, EVERYTHING):
        kernel_task.model.compute = compute
        found.append(kernel_task(batch)[1])
    assert "corpus/other/accuracy/mlm" in found[0]
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-5)


def test_most_batches_of_a_size_share_a_room():
    lengths = [
        tuple(map(int, torch.randint(5, 20, (64,), generator=torch.Generator().manual_seed(n)))) for n in range(50)
    ]
    batches = [random_batch(2)._replace(num_tokens=found, num_masked=(1,) * 30 + (2,) * 34) for found in lengths]
    assert len(set(lengths)) == 50 and len({room_for(batch) for batch in batches}) <= 4
    for batch in batches:
        assert sum(batch.num_tokens) <= room_for(batch).tokens < sum(batch.num_tokens) + 64
        assert max(batch.num_tokens) <= room_for(batch).longest <= 32
