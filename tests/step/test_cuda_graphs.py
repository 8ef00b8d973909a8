"""Steps captured as CUDA graphs, and the padded slots that let batches of different lengths share a graph.

Without a GPU the passes of a recorded step are computed anew each time instead of being replayed. That both agree for
the base model is measured on a GPU: benchmarks/gpu/measure.py --sections=agreement.
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
from bridgetower.step import cuda_graphs
from bridgetower.step.cuda_graphs import RecordedStep, Stages, can_be_recorded
from bridgetower.step.plan import fit_bucket
from tests.kernels.test_triton import DEVICE, kernel_task
from tests.model.test_plain import with_masks
from tests.ranks import run_on_ranks
from tests.small_models import EVERY_OBJECTIVE, random_batch, small_task

__all__ = ["kernel_task"]
needs_no_gpu = pytest.mark.skipif(DEVICE.type == "cuda", reason="on a GPU only half precision is recorded")


class Net(nn.Module):
    """A module whose two stages share a layer; another layer is frozen, and another is never used."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.shared, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 1)
        self.frozen, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)
        self.frozen.requires_grad_(False)
        self.to(DEVICE)

    def encode(self, inputs: tuple[Tensor, str]) -> list[Tensor]:
        states = self.shared(self.frozen(self.first(inputs[0]))).tanh()
        return [states, inputs[0] * 2]

    def finish(self, inputs: tuple[Tensor, str], states: Any) -> tuple[Tensor, dict[str, Tensor]]:
        loss = (self.last(self.shared(states[0]) + states[1])).square().mean()
        return loss, {"loss": torch.stack([loss.detach(), torch.ones_like(loss)])}

    def plain(self, batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        inputs = batch, ""
        return self.finish(inputs, self.encode(inputs))

    def gradients(self, run: Callable[[Tensor], tuple[Tensor, Any]], *batches: Tensor) -> dict[str, Tensor]:
        """Return the gradients of the mean loss of several batches, by parameter name."""
        self.zero_grad()
        for batch in batches:
            (run(batch)[0] / len(batches)).backward()
        return {name: p.grad.clone() for name, p in self.named_parameters() if p.grad is not None}


def random_rows(rows: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, 4, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


@pytest.fixture
def net() -> Net:
    return Net()


@pytest.fixture
def step(net: Net) -> Callable[..., tuple[Tensor, dict[str, Tensor]]]:
    recorded_step = RecordedStep(net, Stages(net.encode, net.finish))
    return lambda batch, kind="": recorded_step((batch, "plain value"), kind)


def test_loss_metrics_and_gradients_are_those_of_the_stages(net, step):
    batches = [random_rows(3, seed) for seed in range(3)]
    expected = [net.gradients(net.plain, batch) for batch in batches]
    for batch, gradients in zip(batches, expected, strict=True):
        recorded = net.gradients(step, batch)
        assert recorded.keys() == gradients.keys()
        assert not any("frozen" in name or "unused" in name for name in recorded)
        torch.testing.assert_close(recorded, gradients)
        torch.testing.assert_close(step(batch), net.plain(batch))


def test_gradients_of_several_steps_are_accumulated(net, step):
    # Some shapes are recorded only when gradients have been accumulated already.
    batches = [
        random_rows(3),
        random_rows(5),
        random_rows(3, seed=1),
        random_rows(3, seed=2),
        random_rows(7),
    ]
    for order in (batches, batches[::-1]):
        torch.testing.assert_close(net.gradients(step, *order), net.gradients(net.plain, *order))


def test_results_of_a_step_outlive_the_next(step):
    first, metrics = step(random_rows(3))
    before = float(first.detach()), metrics["loss"].tolist()
    step(random_rows(3, seed=1))
    assert before == (float(first.detach()), metrics["loss"].tolist())


@pytest.mark.parametrize("rows", [3, 5], ids=["the same shape", "another shape"])
def test_backward_after_the_next_step_or_for_the_second_time_is_an_error(step, rows):
    first, _ = step(random_rows(3))
    second, _ = step(random_rows(rows))
    with pytest.raises(RuntimeError, match=r"after the next step had begun.*compute\.cuda_graphs=false"):
        first.backward()
    second.backward()
    with pytest.raises(RuntimeError, match=r"twice on the same loss"):
        second.backward()


def test_each_shape_and_kind_is_recorded_once(net, step, monkeypatch):
    warm_ups = []
    record = cuda_graphs._Recording.record

    def note(self, *arguments, warm_up):
        warm_ups.append(warm_up)
        record(self, *arguments, warm_up=warm_up)

    monkeypatch.setattr(cuda_graphs._Recording, "record", note)
    for rows in (3, 5, 3, 5, 3):
        net.gradients(step, random_rows(rows))
    assert warm_ups == [True, False]  # the first recording sets up the libraries
    step(random_rows(3), "another")
    assert warm_ups == [True, False, False]
    # Weights at another address, another set of trained weights, or another mode require a new recording.
    for change in (
        lambda: setattr(net.last.weight, "data", net.last.weight.data.clone()),
        lambda: setattr(net.frozen.weight, "data", net.frozen.weight.data * 2),
        lambda: net.frozen.requires_grad_(True),
        lambda: net.shared.eval(),
    ):
        change()
        torch.testing.assert_close(net.gradients(step, random_rows(3)), net.gradients(net.plain, random_rows(3)))
        assert warm_ups.pop() and len(warm_ups) == 3
    assert "frozen.weight" in net.gradients(step, random_rows(3))


def test_a_copy_of_a_module_makes_its_own_recordings(net):
    net.step = RecordedStep(net, Stages(net.encode, net.finish))
    expected = net.gradients(lambda batch: net.step((batch, "")), random_rows(3))
    other = copy.deepcopy(net)
    with torch.no_grad():
        net.last.weight.zero_()
    torch.testing.assert_close(other.gradients(lambda batch: other.step((batch, "")), random_rows(3)), expected)


def test_the_least_recently_used_recordings_are_dropped(net, step, monkeypatch):
    monkeypatch.setattr(cuda_graphs, "_MOST_RECORDINGS", 2)
    for rows in (1, 2, 3, 2, 1, 2):
        torch.testing.assert_close(net.gradients(step, random_rows(rows)), net.gradients(net.plain, random_rows(rows)))


def test_after_an_error_the_module_has_its_parameters_and_steps_can_be_recorded(net):
    names = [name for name, _ in net.named_parameters()]

    def fail(inputs: Any, states: Any) -> tuple[Tensor, dict[str, Tensor]]:
        raise ValueError(inputs)

    recorded_step = RecordedStep(net, Stages(net.encode, fail))
    with pytest.raises(ValueError):
        recorded_step((random_rows(3), ""))
    assert [name for name, _ in net.named_parameters()] == names
    assert all(isinstance(parameter, nn.Parameter) for parameter in net.parameters())
    recorded_step._stages = Stages(net.encode, net.finish)
    torch.testing.assert_close(
        net.gradients(lambda batch: recorded_step((batch, "")), random_rows(3)),
        net.gradients(net.plain, random_rows(3)),
    )


@pytest.mark.skipif(DEVICE.type == "cuda", reason="the host cannot read numbers while a graph is captured")
def test_random_keys_depend_on_the_seed_and_not_on_earlier_recordings(net):
    keys_of_runs = []

    def finish(inputs, states):
        keys = [draw_key(DEVICE) for _ in range(2)]
        keys_of_runs.append([(int(key.word), key.number) for key in keys])
        return net.finish(inputs, states)

    recorded_step = RecordedStep(net, Stages(net.encode, finish))

    def keys(seed: int, rows: int) -> list[tuple[int, int]]:
        torch.manual_seed(seed)
        recorded_step((random_rows(rows), ""))
        return keys_of_runs[-1]

    first = keys(0, 3)
    assert first[0] != first[1] and all(2**61 <= word < 2**62 and number >= 2**61 for word, number in first)
    assert keys(0, 3) == first  # this time without recording
    assert keys(0, 5) == first
    other = keys(1, 3)
    assert other[0][0] != first[0][0] and [number for _, number in other] == [number for _, number in first]


@pytest.fixture
def uninitialized_memory_is_nan() -> Iterator[None]:
    """Fill uninitialized memory with NaN, so that a read of it shows."""
    before = torch._C._get_deterministic_fill_uninitialized_memory()
    torch.use_deterministic_algorithms(True)
    torch._C._set_deterministic_fill_uninitialized_memory(True)
    yield
    torch.use_deterministic_algorithms(False)
    torch._C._set_deterministic_fill_uninitialized_memory(before)


@needs_no_gpu
def test_padded_slots_change_no_loss_no_metric_and_no_gradient(kernel_task, uninitialized_memory_is_nan, monkeypatch):
    kernel_task.corpora = ("one", "other")
    # The first caption has no masked token, and is shown with an image that belongs to neither pair.
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
        if not name.endswith("key.bias"):  # its gradient is zero but for rounding
            difference = float((recorded[name] - value).detach().norm())
            assert difference < 1e-4 * float(value.detach().norm()) + 1e-6 * scale, name


def test_most_batches_of_a_size_share_a_bucket():
    lengths = [
        tuple(map(int, torch.randint(5, 20, (64,), generator=torch.Generator().manual_seed(n)))) for n in range(50)
    ]
    batches = [random_batch(2)._replace(num_tokens=counts, num_masked=(1,) * 30 + (2,) * 34) for counts in lengths]
    assert len(set(lengths)) == 50 and len({fit_bucket(batch) for batch in batches}) <= 4
    for batch in batches:
        assert sum(batch.num_tokens) <= fit_bucket(batch).tokens < sum(batch.num_tokens) + 64
        assert max(batch.num_tokens) <= fit_bucket(batch).longest <= 32


def test_whether_steps_are_recorded_depends_on_the_settings_of_the_run_alone(kernel_task, monkeypatch):
    assert kernel_task.records_steps() == (DEVICE.type == "cpu")  # kernel_task lets the kernels take float32 there
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
    assert not kernel_task.records_steps()  # captions of up to 77 tokens are possible, even if these are short
    assert not small_task(EVERY_OBJECTIVE).records_steps()
    assert not small_task(ObjectivesConfig()).records_steps()  # CPU operations pad captions to a grid


def _write_decisions(rank: int, folder: Path) -> None:
    decisions = []
    for able in ((True, True), (True, False)):
        task = small_task(ObjectivesConfig())
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(task.model, "supports_buckets", lambda longest, able=able: able[rank])
            decisions.append(task.records_steps())
    (folder / f"{rank}.json").write_text(json.dumps(decisions))


def test_ranks_record_only_if_all_of_them_can(tmp_path):
    run_on_ranks(_write_decisions, 2, tmp_path)
    for rank in range(2):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == [True, False]


def test_evaluation_frees_the_memory_of_recorded_steps(kernel_task, monkeypatch):
    forgotten = []
    monkeypatch.setattr(kernel_task._recorded, "forget", lambda: forgotten.append(True))
    kernel_task.train()
    assert not forgotten
    kernel_task.eval()
    assert forgotten
