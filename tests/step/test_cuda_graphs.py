"""Steps as CUDA graphs, and the padded slots that let batches of other lengths share one.

Without a GPU a step is computed each time where a recorded one would be run. Of base, that both are the same is
measured on a GPU by benchmarks/gpu (agreement).
"""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bridgetower.config.compute import ComputeConfig
from bridgetower.config.run import ObjectivesConfig
from bridgetower.kernels.keys import draw_key
from bridgetower.step import cuda_graphs as recorded
from bridgetower.step.cuda_graphs import RecordedStep, Stages, can_be_recorded
from bridgetower.step.plan import fit_bucket
from tests.kernels.test_triton import DEVICE, kernel_task
from tests.model.test_plain import with_masks
from tests.ranks import run_on_ranks
from tests.small_models import EVERY_OBJECTIVE, random_batch, small_task

__all__ = ["kernel_task"]
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
    # Some of a shape that is new when there is a sum already.
    batches = [drawn(3), drawn(5), drawn(3, seed=1), drawn(3, seed=2), drawn(7)]
    for order in (batches, batches[::-1]):
        torch.testing.assert_close(net.gradients(step, *order), net.gradients(net.plain, *order))


def test_results_of_a_step_outlive_the_next(step):
    first, metrics = step(drawn(3))
    before = float(first.detach()), metrics["loss"].tolist()
    step(drawn(3, seed=1))
    assert before == (float(first.detach()), metrics["loss"].tolist())


@pytest.mark.parametrize("rows", [3, 5], ids=["the same shape", "another shape"])
def test_a_backward_pass_whose_states_are_gone_is_an_error(step, rows):
    first, _ = step(drawn(3))
    second, _ = step(drawn(rows))
    with pytest.raises(RuntimeError, match=r"run again before the backward pass.*compute\.cuda_graphs=false"):
        first.backward()
    second.backward()
    with pytest.raises(RuntimeError, match=r"or that pass was run twice"):
        second.backward()


def test_a_shape_is_recorded_once_and_each_kind_apart(net, step, monkeypatch):
    made = []
    record = recorded._Recording.record

    def note(self, *arguments, warm_up):
        made.append(warm_up)
        record(self, *arguments, warm_up=warm_up)

    monkeypatch.setattr(recorded._Recording, "record", note)
    for rows in (3, 5, 3, 5, 3):
        net.gradients(step, drawn(rows))
    assert made == [True, False]  # libraries are set up at the first one
    step(drawn(3), "another")
    assert made == [True, False, False]
    # Of other weights, of the same elsewhere, and in another mode it is another step.
    for change in (
        lambda: setattr(net.last.weight, "data", net.last.weight.data.clone()),
        lambda: setattr(net.frozen.weight, "data", net.frozen.weight.data * 2),
        lambda: net.frozen.requires_grad_(True),
        lambda: net.shared.eval(),
    ):
        change()
        torch.testing.assert_close(net.gradients(step, drawn(3)), net.gradients(net.plain, drawn(3)))
        assert made.pop() and len(made) == 3
    assert "frozen.weight" in net.gradients(step, drawn(3))


def test_a_copy_records_anew(net):
    net.step = RecordedStep(net, Stages(net.encode, net.finish))
    expected = net.gradients(lambda batch: net.step((batch, "")), drawn(3))
    other = copy.deepcopy(net)
    with torch.no_grad():
        net.last.weight.zero_()
    torch.testing.assert_close(other.gradients(lambda batch: other.step((batch, "")), drawn(3)), expected)


def test_the_oldest_recordings_are_given_up(net, step, monkeypatch):
    monkeypatch.setattr(recorded, "_MOST_RECORDINGS", 2)
    for rows in (1, 2, 3, 2, 1, 2):
        torch.testing.assert_close(net.gradients(step, drawn(rows)), net.gradients(net.plain, drawn(rows)))


def test_after_an_error_parameters_are_in_their_places_and_steps_can_be_recorded(net):
    names = [name for name, _ in net.named_parameters()]

    def fail(inputs: Any, states: Any) -> tuple[Tensor, dict[str, Tensor]]:
        raise ValueError(inputs)

    made = RecordedStep(net, Stages(net.encode, fail))
    with pytest.raises(ValueError):
        made((drawn(3), ""))
    assert [name for name, _ in net.named_parameters()] == names
    assert all(isinstance(parameter, nn.Parameter) for parameter in net.parameters())
    made._stages = Stages(net.encode, net.finish)
    torch.testing.assert_close(
        net.gradients(lambda batch: made((batch, "")), drawn(3)), net.gradients(net.plain, drawn(3))
    )


@pytest.mark.skipif(DEVICE.type == "cuda", reason="a recorded step shows no numbers to the host")
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

    first = keys(0, 3)
    assert first[0] != first[1] and all(2**61 <= word < 2**62 and number >= 2**61 for word, number in first)
    assert keys(0, 3) == first  # now it was there already
    assert keys(0, 5) == first
    other = keys(1, 3)
    assert other[0][0] != first[0][0] and [number for _, number in other] == [number for _, number in first]


@pytest.fixture
def nothing_is_zero_by_chance() -> Iterator[None]:
    """Memory that nobody has written holds no numbers."""
    before = torch._C._get_deterministic_fill_uninitialized_memory()
    torch.use_deterministic_algorithms(True)
    torch._C._set_deterministic_fill_uninitialized_memory(True)
    yield
    torch.use_deterministic_algorithms(False)
    torch._C._set_deterministic_fill_uninitialized_memory(before)


@needs_no_gpu
def test_padded_slots_change_no_loss_no_metric_and_no_gradient(kernel_task, nothing_is_zero_by_chance, monkeypatch):
    kernel_task.corpora = ("one", "other")
    # One caption has no masked token, and the other the image of neither.
    batch = with_masks(random_batch(2), [0, 1])._replace(
        pixels_N3SS=random_batch(3).pixels_N3SS, itm_image_B=torch.tensor([2, 1]), corpus_B=torch.tensor([0, 1])
    )
    bucket = fit_bucket(batch)
    assert bucket.tokens > sum(batch.num_tokens) and bucket.masked > sum(batch.num_masked)
    results = []
    for is_recorded in (False, True):
        monkeypatch.setattr(kernel_task, "_may_record", is_recorded)
        kernel_task.zero_grad()
        loss, metrics = kernel_task(batch)
        loss.backward()
        results.append({"loss": loss, **metrics, **{name: p.grad for name, p in kernel_task.named_parameters()}})
    assert len(kernel_task._recorded._recordings) == 1
    (eager, recorded), scale = results, max(float(p.grad.norm()) for p in kernel_task.parameters())
    assert "corpus/other/accuracy/mlm" in eager and eager.keys() == recorded.keys()
    for name, value in eager.items():
        if not name.endswith("key.bias"):  # whose gradient is nothing but rounding
            assert (
                float((recorded[name] - value).detach().norm()) < 1e-4 * float(value.detach().norm()) + 1e-6 * scale
            ), name


def test_most_batches_of_a_size_share_a_bucket():
    lengths = [
        tuple(map(int, torch.randint(5, 20, (64,), generator=torch.Generator().manual_seed(n)))) for n in range(50)
    ]
    batches = [random_batch(2)._replace(num_tokens=found, num_masked=(1,) * 30 + (2,) * 34) for found in lengths]
    assert len(set(lengths)) == 50 and len({fit_bucket(batch) for batch in batches}) <= 4
    for batch in batches:
        assert sum(batch.num_tokens) <= fit_bucket(batch).tokens < sum(batch.num_tokens) + 64
        assert max(batch.num_tokens) <= fit_bucket(batch).longest <= 32


def test_what_is_recorded_is_a_rule_of_the_run(kernel_task, monkeypatch):
    assert kernel_task.records_steps() == (DEVICE.type == "cpu")  # the kernels are said to take float32 there
    settings = ObjectivesConfig(), ComputeConfig()
    assert can_be_recorded(*settings)
    for change in ({"cuda_graphs": False}, {"recompute": ("text",)}, {"compile": True}, {"fuse_kernels": False}):
        assert not can_be_recorded(ObjectivesConfig(), ComputeConfig(**change))
    for objectives in (EVERY_OBJECTIVE, ObjectivesConfig(itm=False), ObjectivesConfig(mlm=False)):
        assert not can_be_recorded(objectives, ComputeConfig())
    with torch.no_grad():
        assert not kernel_task.records_steps()
    longer = dataclasses.replace(kernel_task.model.config.text, max_tokens=77, num_positions=79)
    monkeypatch.setattr(kernel_task.model, "config", dataclasses.replace(kernel_task.model.config, text=longer))
    kernel_task._agreed.clear()
    assert not kernel_task.records_steps()  # not even batches of short captions
    assert not small_task(EVERY_OBJECTIVE).records_steps()
    assert not small_task(ObjectivesConfig()).records_steps()  # a CPU computes on a grid


def _ask(rank: int, folder: Path) -> None:
    found = []
    for able in ((True, True), (True, False)):
        task = small_task(ObjectivesConfig())
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(task.model, "supports_buckets", lambda longest, able=able: able[rank])
            found.append(task.records_steps())
    (folder / f"{rank}.json").write_text(json.dumps(found))


def test_ranks_record_only_together(tmp_path):
    run_on_ranks(_ask, 2, tmp_path)
    for rank in range(2):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == [True, False]


def test_evaluation_gets_the_memory_of_recorded_steps(kernel_task, monkeypatch):
    forgotten = []
    monkeypatch.setattr(kernel_task._recorded, "forget", lambda: forgotten.append(True))
    kernel_task.train()
    assert not forgotten
    kernel_task.eval()
    assert forgotten
