"""The training loop of the project: there is no other."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bridgetower import rng
from bridgetower.engine.checkpoint import Checkpoints, TrainState
from bridgetower.engine.grad_norms import measure_grad_norms
from bridgetower.engine.preemption import StopRequests
from bridgetower.engine.throughput import DataAdvice, ReferenceSpeed, Throughput, measure_memory
from bridgetower.engine.tracker import Means, Tracker
from bridgetower.errors import TrainingError

# Steps between two questions to all ranks whether one was asked to stop. Each costs a device sync, which a GPU step
# should not wait for.
_STOP_CHECK_STEPS = {"cuda": 10, "cpu": 1}


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """What the loop does at which step."""

    total_steps: int
    accumulation_steps: int
    global_batch_size: int
    log_every_steps: int
    checkpoint_every_steps: int
    evaluate_every_steps: int
    """Steps between two evaluations; 0: only at the end."""
    seed: int
    num_pairs: int
    """Pairs per epoch."""
    data_suggestion: str = ""
    """What to do if steps wait for data, a sentence for the log."""
    reference_speed: ReferenceSpeed | None = None
    """What the measured speed is compared with; None: nothing."""

    def is_reported(self, step: int) -> bool:
        """Return True if a line of metrics is due after a step. Every checkpoint has one."""
        return is_due(step, self.log_every_steps, self.total_steps) or self.is_saved(step)

    def is_saved(self, step: int) -> bool:
        """Return True if a checkpoint is due after a step. Every evaluation has one before it, since it may be long."""
        return is_due(step, self.checkpoint_every_steps, self.total_steps) or self.is_evaluated(step)

    def is_evaluated(self, step: int) -> bool:
        """Return True if an evaluation is due after a step."""
        return is_due(step, self.evaluate_every_steps, self.total_steps)

    def measure_progress(self, state: TrainState, step_seconds: float) -> dict[str, float]:
        """Compute how far training has come, and how long the rest takes at this speed."""
        return {
            "progress/pairs": state.pairs_seen,
            "progress/epoch": state.pairs_seen / self.num_pairs,
            "progress/eta_hours": (self.total_steps - state.step) * step_seconds / 3600,
        }


def is_due(step: int, every_steps: int, total_steps: int) -> bool:
    """Return True at multiples of ``every_steps`` and at the last step."""
    return step == total_steps or (every_steps > 0 and step % every_steps == 0)


def train(
    engine: Any,
    batches: Iterator[NamedTuple],
    plan: TrainingPlan,
    state: TrainState,
    *,
    rank: int,
    world_size: int,
    tracker: Tracker,
    checkpoints: Checkpoints,
    stop: StopRequests,
    evaluate: Callable[[int], dict[str, float]],
) -> bool:
    """Train from ``state`` to the last step, or until asked to stop; a checkpoint is saved in both cases.

    Args:
        engine: DeepSpeed's, around a module that takes a batch and returns (loss, metrics).
        batches: micro-batches of this rank from ``state`` on.
        evaluate: computes scores on held-out data after a step; called on all ranks.

    Returns: True if it reached the last step.

    Raises:
        TrainingError: a loss, the gradient or a weight is not a finite number.
    """
    means, throughput = Means(), Throughput(plan.reference_speed)
    advice = DataAdvice(plan.data_suggestion if rank == 0 else "")
    batches = throughput.watch(batches)
    engine.train()
    while state.step < plan.total_steps:
        optimizer_figures = _step(engine, batches, plan, state, rank, means)
        throughput.count_step(plan.global_batch_size)
        tracker.show_step(state.step)
        is_asked_to_stop = is_due(state.step, _STOP_CHECK_STEPS[engine.device.type], 0) and stop.agree(engine.device)
        saves = is_asked_to_stop or plan.is_saved(state.step)
        # No checkpoint is saved before losses, gradient and weights are checked: it could hold a run that diverged.
        if saves or plan.is_reported(state.step):
            figures = _read_metrics(engine, state.step, means) | optimizer_figures
            figures["optim/skipped_updates"] = engine.skipped_steps
            figures |= throughput.report(world_size, figures["train/tokens_per_pair"])
            figures |= measure_memory(engine.device)
            figures |= plan.measure_progress(state, figures["speed/step_seconds"])
            tracker.write(state.step, figures)
            advice.check(figures["data/wait_fraction_of_slowest"])
        if saves:
            _stop_if_not_finite(state.step, {"a weight": _check_weights(engine)})
            with throughput.pause("checkpoint"):
                checkpoints.save(engine, state)
        if is_asked_to_stop and state.step < plan.total_steps:
            return False  # an evaluation that is due here runs when the run is resumed
        if plan.is_evaluated(state.step):
            with throughput.pause("evaluation"):
                tracker.write(state.step, evaluate(state.step))
            engine.train()
    return True


def _step(
    engine: Any, batches: Iterator[NamedTuple], plan: TrainingPlan, state: TrainState, rank: int, means: Means
) -> dict[str, float]:
    """Do one optimizer step and advance ``state``. The host waits for the device only if the step is reported.

    Returns: the step's learning rates, and if it is reported the norms of the gradient's parts.
    """
    rates = {f"optim/lr/{group['name']}": float(group["lr"]) for group in engine.optimizer.param_groups}
    norms: dict[str, float] = {}
    for micro_step in range(plan.accumulation_steps):
        batch = to_device(next(batches), engine.device)
        # Dropout depends only on seed, step and rank, so that a checkpoint needs no random state.
        torch.manual_seed(rng.key(plan.seed, "dropout", state.step, micro_step, rank) >> 1)
        loss, metrics = engine(batch)
        engine.backward(loss)  # DeepSpeed divides by the accumulation steps
        if micro_step == plan.accumulation_steps - 1 and plan.is_reported(state.step + 1):
            # Between backward and step only: the step clips the gradient and frees it.
            norms = measure_grad_norms(engine.module, engine.device)
        engine.step()  # changes weights on the last micro-step only
        means.add({**metrics, "loss/total": torch.stack([loss.detach().float(), torch.ones_like(loss)])})
    state.step += 1
    state.pairs_seen += plan.global_batch_size
    return {f"optim/grad_norm/{part}": norm for part, norm in norms.items()} | rates


def _read_metrics(engine: Any, step: int, means: Means) -> dict[str, float]:
    """Read the mean metrics since the last report and the gradient's norm, which waits for the device.

    Metrics are summed on the device and read only here, so that between reports the host stays ahead of it.

    Raises:
        TrainingError: one of them is not a finite number.
    """
    figures = {f"train/{name}": value for name, value in means.take().items()}
    norm = engine.get_global_grad_norm()  # before clipping; DeepSpeed has none without ZeRO
    if norm is not None:
        figures["optim/grad_norm"] = float(norm)
    _stop_if_not_finite(step, figures)
    return figures


def to_device(batch: NamedTuple, device: torch.device) -> Any:
    """Move a batch without waiting for the copy."""
    fields = (field.to(device, non_blocking=True) if isinstance(field, Tensor) else field for field in batch)
    return type(batch)._make(fields)


def _check_weights(engine: Any) -> float:
    """Return nan if a weight is not finite, else 0. All ranks have the same weights, hence the same answer."""
    is_finite = torch.stack([parameter.isfinite().all() for parameter in engine.module.parameters()]).all()
    return 0.0 if is_finite else math.nan


def _stop_if_not_finite(step: int, figures: dict[str, float]) -> None:
    for name, value in figures.items():
        if not math.isfinite(value) and not name.startswith("train/accuracy/"):
            raise TrainingError(
                f"{name} is {value} at step {step}: training diverged, and this step was not saved. Resuming from an "
                "earlier checkpoint leads here again: start a run of another --name with a lower optim.base_lr, or "
                "with optim.max_grad_norm=1."
            )
