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
from bridgetower.engine.throughput import DataAdvice, Throughput, Yardstick, memory_figures
from bridgetower.engine.tracker import Means, Tracker
from bridgetower.errors import TrainingError

# Asking all ranks costs a device sync, which a GPU step should not wait for.
_STOP_CHECK_STEPS = {"cuda": 10, "cpu": 1}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What the loop does when."""

    total_steps: int
    accumulation_steps: int
    global_batch_size: int
    log_every_steps: int
    checkpoint_every_steps: int
    evaluate_every_steps: int
    """0 only at the end."""
    seed: int
    num_pairs: int
    """Of an epoch."""
    data_cure: str = ""
    """What to do where steps wait for data, for people."""
    yardstick: Yardstick | None = None
    """What speed is compared with, where the work of a step was counted."""

    def is_reported(self, step: int) -> bool:
        """Whether a step has a line of metrics in any case."""
        return is_due(step, self.log_every_steps, self.total_steps) or self.is_saved(step)

    def is_saved(self, step: int) -> bool:
        """Whether a step has a checkpoint in any case: also before an evaluation, which may take long."""
        return is_due(step, self.checkpoint_every_steps, self.total_steps) or self.is_evaluated(step)

    def is_evaluated(self, step: int) -> bool:
        """Whether a step is followed by an evaluation."""
        return is_due(step, self.evaluate_every_steps, self.total_steps)

    def progress(self, state: TrainState, step_seconds: float) -> dict[str, float]:
        """How far training is, and when it ends if it goes on at this speed."""
        return {
            "progress/pairs": state.pairs_seen,
            "progress/epoch": state.pairs_seen / self.num_pairs,
            "progress/eta_hours": (self.total_steps - state.step) * step_seconds / 3600,
        }


def is_due(step: int, every_steps: int, total_steps: int) -> bool:
    """True at multiples and at the end."""
    return step == total_steps or (every_steps > 0 and step % every_steps == 0)


def train(
    engine: Any,
    batches: Iterator[NamedTuple],
    plan: Plan,
    state: TrainState,
    *,
    rank: int,
    world_size: int,
    tracker: Tracker,
    checkpoints: Checkpoints,
    stop: StopRequests,
    evaluate: Callable[[int], dict[str, float]],
) -> bool:
    """Train from ``state`` to the end, or until asked to stop; then a checkpoint is saved.

    Args:
        engine: DeepSpeed's, around a module that takes a batch and returns (loss, metrics).
        batches: micro-batches of this rank from ``state`` on.
        evaluate: scores on held-out data after a step; called on all ranks.

    Returns: True if it came to the end.

    Raises:
        TrainingError: a loss, the gradient or a weight is not a finite number.
    """
    means, throughput = Means(), Throughput(plan.yardstick)
    advice = DataAdvice(plan.data_cure if rank == 0 else "")
    batches = throughput.watch(batches)
    engine.train()
    while state.step < plan.total_steps:
        rates = {group["name"]: float(group["lr"]) for group in engine.optimizer.param_groups}
        norms: dict[str, float] = {}
        for micro_step in range(plan.accumulation_steps):
            batch = to_device(next(batches), engine.device)
            # Dropout is a function of the step and the rank, so that there is no random state to lose.
            torch.manual_seed(rng.key(plan.seed, "dropout", state.step, micro_step, rank) >> 1)
            loss, metrics = engine(batch)
            engine.backward(loss)  # DeepSpeed divides by the accumulation steps
            if micro_step == plan.accumulation_steps - 1 and plan.is_reported(state.step + 1):
                norms = measure_grad_norms(engine.module, engine.device)
            engine.step()  # changes weights on the last micro-step only
            means.add({**metrics, "loss/total": torch.stack([loss.detach().float(), torch.ones_like(loss)])})
        state.step += 1
        state.pairs_seen += plan.global_batch_size
        throughput.step_done(plan.global_batch_size)
        tracker.show_step(state.step)
        is_asked_to_stop = is_due(state.step, _STOP_CHECK_STEPS[engine.device.type], 0) and stop.agreed(engine.device)
        saves = is_asked_to_stop or plan.is_saved(state.step)
        # Never a checkpoint without a look at losses, gradient and weights: it must not be one of a run that diverged.
        if saves or plan.is_reported(state.step):
            figures = {f"train/{name}": value for name, value in means.take().items()}  # waits for the device
            figures |= _grad_norm(engine)
            _stop_if_not_finite(state.step, figures)
            figures |= {f"optim/grad_norm/{part}": norm for part, norm in norms.items()}
            figures |= {f"optim/lr/{name}": rate for name, rate in rates.items()}
            figures["optim/skipped_updates"] = engine.skipped_steps
            figures |= throughput.report(world_size, figures["train/tokens_per_pair"])
            figures |= memory_figures(engine.device)
            figures |= plan.progress(state, figures["speed/step_seconds"])
            tracker.write(state.step, figures)
            advice.heed(figures["data/wait_fraction_of_slowest"])
        if saves:
            _stop_if_not_finite(state.step, {"a weight": _lost_weights(engine)})
            with throughput.paused("checkpoint"):
                checkpoints.save(engine, state)
        if is_asked_to_stop and state.step < plan.total_steps:
            return False  # an evaluation that is due is made when the run goes on
        if plan.is_evaluated(state.step):
            with throughput.paused("evaluation"):
                tracker.write(state.step, evaluate(state.step))
            engine.train()
    return True


def to_device(batch: NamedTuple, device: torch.device) -> Any:
    """Move a batch without waiting for the copy."""
    parts = (part.to(device, non_blocking=True) if isinstance(part, Tensor) else part for part in batch)
    return type(batch)._make(parts)


def _grad_norm(engine: Any) -> dict[str, float]:
    """Global norm of the gradient before clipping."""
    norm = engine.get_global_grad_norm()
    return {} if norm is None else {"optim/grad_norm": float(norm)}


def _lost_weights(engine: Any) -> float:
    """Nan if a weight is not finite, else 0; all ranks have the same weights and so the same answer."""
    finite = torch.stack([parameter.isfinite().all() for parameter in engine.module.parameters()]).all()
    return 0.0 if finite else math.nan


def _stop_if_not_finite(step: int, figures: dict[str, float]) -> None:
    for name, value in figures.items():
        if not math.isfinite(value) and not name.startswith("train/accuracy/"):
            raise TrainingError(
                f"{name} is {value} at step {step}: training diverged, and this step was not saved. Going on from an "
                "earlier checkpoint leads here again: start a run of another --name with a lower optim.base_lr, or "
                "with optim.max_grad_norm=1."
            )
