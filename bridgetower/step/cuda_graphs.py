"""A training step recorded as CUDA graphs, once for each shape, and run from these.

A step of base is some 2,500 kernels, which the host takes 90 ms and more to ask for one by one. Of 64 pairs an H200
computes them in 69. A recorded step is asked for at once.

A step has two stages, and its backward pass a graph for each, so that gradients of the second are there to be reduced
while those of the first are computed.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils import _pytree as pytree

from bridgetower.config.compute import ComputeConfig
from bridgetower.config.run import ObjectivesConfig
from bridgetower.errors import TrainingError
from bridgetower.kernels.keys import RecordedKeys, recording

# Each takes some MB of the host and the device. A run has about a dozen shapes.
_MOST_RECORDINGS = 64

Run = Callable[[], None]


def can_be_recorded(objectives: ObjectivesConfig, compute: ComputeConfig) -> bool:
    """Return True if a run's settings allow CUDA graphs.

    Batches share shapes only with MLM and ITM. ITC gathers from all ranks, compiled code launches kernels of its own,
    and recomputed layers draw dropout again from torch's generator: none of these can be captured.
    """
    return (
        compute.cuda_graphs
        and objectives.mlm
        and objectives.itm
        and not objectives.itc
        and compute.fuse_kernels
        and not compute.recompute
        and not compute.compile
    )


class Stages(NamedTuple):
    """A step in two stages, which do not wait for the device. What they do on the host is done when it is recorded."""

    encode: Callable[[Any], Sequence[Tensor]]
    """From inputs to states."""
    finish: Callable[[Any, Sequence[Tensor]], tuple[Tensor, dict[str, Tensor]]]
    """From inputs and states to a loss, and to metrics of one shape."""


class RecordedStep:
    """The steps of a module, each recorded when its shape comes up for the first time.

    Gradients of parameters are where the next backward pass leaves the next ones: who keeps one copies it. Hooks of
    modules are not called.
    """

    def __init__(self, module: nn.Module, stages: Stages) -> None:
        """Record nothing yet.

        Args:
            module: whose weights get gradients, at least one.
        """
        self._module, self._stages = module, stages
        self.forget()

    def forget(self) -> None:
        """Give up all recordings and their memory."""
        self._recordings: OrderedDict[Any, _Recording] = OrderedDict()
        self._buffers: dict[Any, Tensor] = {}
        self._gradients: dict[nn.Parameter, Tensor] = {}
        self._state: list[Any] = []

    def __getstate__(self) -> Any:
        """A copy records anew."""
        return self._module, self._stages

    def __setstate__(self, state: Any) -> None:
        """Of a copy."""
        self._module, self._stages = state
        self.forget()

    def __call__(self, inputs: Any, kind: Hashable = None) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and the metrics. The loss can be gone back from once, and not after the next call.

        Args:
            inputs: nested tuples of tensors and of plain values.
            kind: what else the step depends on.
        """
        self._look_at_module()
        leaves, structure = pytree.tree_flatten(inputs)
        static = [self._load(place, leaf) for place, leaf in enumerate(leaves)]
        key = (kind, *map(_shape, leaves))
        found = self._recordings.get(key)
        if found is None:
            inputs = pytree.tree_unflatten(static, structure)
            found = _Recording(self._module, self._stages, inputs, self._gradients, self._turn)
            try:
                found.record(self._keys, self._pool, warm_up=not self._recordings)
            except BaseException:
                self.forget()  # what was left in the middle
                raise
            self._recordings[key] = found
            if len(self._recordings) > _MOST_RECORDINGS:
                self._recordings.popitem(last=False)
        self._recordings.move_to_end(key)
        self._keys.draw()
        return found.run()

    def _look_at_module(self) -> None:
        """Forget what was recorded of other weights, of these when they were elsewhere, or in another mode."""
        parts, weights = list(self._module.modules()), list(self._module.parameters())
        state: list[Any] = [part.training for part in parts]
        state += [(weight.data_ptr(), weight.requires_grad) for weight in weights]
        state += [buffer.data_ptr() for buffer in self._module.buffers()]
        if state != self._state:
            self.forget()
            self._state = state
            # Where all recordings leave them.
            self._gradients = {weight: torch.empty_like(weight) for weight in weights if weight.requires_grad}
            device = weights[0].device
            self._turn, self._keys = _Turn(), RecordedKeys(device)
            self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None

    def _load(self, place: int, leaf: Any) -> Any:
        """Put an input where recorded steps of its shape find it."""
        if not isinstance(leaf, Tensor):
            return leaf
        key = (place, _shape(leaf))
        if key not in self._buffers:
            self._buffers[key] = torch.empty(leaf.shape, dtype=leaf.dtype, device=leaf.device)
        return self._buffers[key].copy_(leaf, non_blocking=True)


class _Turn:
    """Which step was run last, and which of its parts is next: all recordings share their memory."""

    step, part = 0, 0

    def begin(self) -> int:
        """Returns: the number of the next step."""
        self.step, self.part = self.step + 1, 1
        return self.step

    def take(self, step: int, part: int) -> None:
        """Raises RuntimeError if it is not the turn of this part of this step."""
        if (step, part) != (self.step, self.part):
            raise RuntimeError(
                "A recorded step was run again before the backward pass of the run before, or that pass was run twice, "
                "and its states are gone. Call backward once after each step, or use compute.cuda_graphs=false."
            )
        self.part += 1


class _Recording:
    """A step of one shape, in three parts: forward, back to the states, back to the inputs."""

    def __init__(
        self,
        module: nn.Module,
        stages: Stages,
        inputs: Any,
        gradients: dict[nn.Parameter, Tensor],
        turn: _Turn,
    ) -> None:
        self._module, self._stages, self._inputs, self._gradients = module, stages, inputs, gradients
        self._turn = turn
        self.loss_grad = torch.ones((), device=next(iter(gradients)).device)
        """Of the loss, which DeepSpeed may scale."""

    def record(self, keys: RecordedKeys, pool: Any, *, warm_up: bool) -> None:
        """Record it.

        Args:
            pool: of a GPU's memory; None: each run computes it anew.
            warm_up: run it once before, when what is set up at the first use is, which cannot be recorded.
        """

        def forward() -> None:
            with recording(keys), torch.enable_grad():
                self._forward()

        self.keep_sums()
        self.parts: tuple[Run, ...] = forward, self._go_back_to_states, self._go_back_to_inputs
        if warm_up or pool is None:
            with _draws_kept(self.loss_grad.device):
                for part in self.parts:
                    part()
            self._forget()
        if pool is not None:
            self.parts = tuple(_record(part, pool) for part in self.parts)
            self._forget()  # others may use the memory
        self.of_encode = [parameter for parameter in self._gradients if parameter in self._from_encode]
        from_finish_alone = self._from_finish - self._from_encode
        self.of_finish = [parameter for parameter in self._gradients if parameter in from_finish_alone]

    def run(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Run the forward pass. Returns: loss and metrics, which later runs leave alone."""
        number = self._turn.begin()
        gate = _Encode.apply(self, number, *self.of_encode)
        loss: Tensor = _Finish.apply(self, number, gate, *self.of_finish)
        return loss, dict(zip(self._names, self._metrics.clone().unbind(), strict=True))

    def go_back(self, part: int, number: int, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        """Run a part of the backward pass.

        Raises:
            RuntimeError: it is not that of the last run.
        """
        self._turn.take(number, part)
        self.parts[part]()
        # Nobody else holds these, so that autograd takes them as gradients as they are.
        return [self._gradients[parameter].detach() for parameter in parameters]

    def keep_sums(self) -> None:
        """Move gradients of steps before, which are added to, from the places of the next ones."""
        for parameter, place in self._gradients.items():
            if parameter.grad is not None and parameter.grad.data_ptr() == place.data_ptr():
                parameter.grad = parameter.grad.clone()

    def _forward(self) -> None:
        # Autograd knows of a parameter on which stream it was first used, and hooks may hang on it; these have none.
        self._weights = {parameter: parameter.detach().requires_grad_() for parameter in self._gradients}
        with _replaced(self._module, self._weights):
            self._states = self._stages.encode(self._inputs)
            self._cut = [state.detach().requires_grad_(state.requires_grad) for state in self._states]
            self._loss, metrics = self._stages.finish(self._inputs, self._cut)
        self.loss = self._loss.detach()
        self._names, self._metrics = tuple(metrics), torch.stack(list(metrics.values()))

    def _go_back_to_states(self) -> None:
        states = [state for state in self._cut if state.requires_grad]
        read = [*states, *self._weights.values()]
        found = torch.autograd.grad(self._loss, read, self.loss_grad, allow_unused=True)
        self._state_grads = found[: len(states)]
        self._from_finish = self._put(found[len(states) :], set())

    def _go_back_to_inputs(self) -> None:
        states = [state for state in self._states if state.requires_grad]
        reached = [(state, grad) for state, grad in zip(states, self._state_grads, strict=True) if grad is not None]
        found: Sequence[Tensor | None] = [None] * len(self._gradients)
        if reached:
            outputs, grads = zip(*reached, strict=True)
            found = torch.autograd.grad(outputs, list(self._weights.values()), grads, allow_unused=True)
        self._from_encode = self._put(found, self._from_finish)

    def _put(self, found: Sequence[Tensor | None], there: set[nn.Parameter]) -> set[nn.Parameter]:
        """Leave gradients in their places; what is there already is added to. Returns: whose there are."""
        places, grads = [], []
        given = set()
        for (parameter, place), grad in zip(self._gradients.items(), found, strict=True):
            if grad is None:
                continue
            given.add(parameter)
            if parameter in there:
                place.add_(grad)
            else:
                places.append(place)
                grads.append(grad)
        if places:
            torch._foreach_copy_(places, grads)
        return given

    def _forget(self) -> None:
        """What was computed, but not what is read of it after a run."""
        del self._weights, self._states, self._cut, self._loss, self._state_grads


class _Encode(torch.autograd.Function):
    """The whole forward pass, and the backward pass of the first stage."""

    @staticmethod
    def forward(ctx: Any, made: _Recording, number: int, *parameters: Tensor) -> Tensor:
        ctx.made, ctx.number = made, number
        made.parts[0]()
        return torch.zeros_like(made.loss_grad)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gate_grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *ctx.made.go_back(2, ctx.number, ctx.made.of_encode)


class _Finish(torch.autograd.Function):
    """The loss, and the backward pass of the second stage; the gate lets it be the first to go back."""

    @staticmethod
    def forward(ctx: Any, made: _Recording, number: int, gate: Tensor, *parameters: Tensor) -> Tensor:
        ctx.made, ctx.number = made, number
        return made.loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, loss_grad: Tensor) -> tuple[Tensor | None, ...]:
        made = ctx.made
        made.loss_grad.copy_(loss_grad)
        made.keep_sums()
        return None, None, torch.zeros_like(loss_grad), *made.go_back(1, ctx.number, made.of_finish)


def _record(run: Run, pool: Any) -> Run:
    """Record what a function asks the GPU for. Returns: asks for the same again.

    Raises:
        TrainingError: it cannot be recorded.
    """
    graph = torch.cuda.CUDAGraph()
    try:
        # Kernels that are new may be loaded meanwhile, and other threads may pin memory.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="relaxed"):
            run()
    except RuntimeError as error:
        # The end of a recording that failed says so itself.
        first = error.__context__ or error
        if isinstance(first, torch.OutOfMemoryError):
            raise first from None
        said = (str(first).strip().splitlines() or [""])[0]
        raise TrainingError(
            f"The step cannot be recorded as CUDA graphs with torch {torch.__version__}: {said} Ask for it kernel by "
            "kernel, which keeps the host busier: --compute.cuda_graphs=false."
        ) from error
    return graph.replay


@contextmanager
def _replaced(module: nn.Module, weights: Mapping[nn.Parameter, Tensor]) -> Iterator[None]:
    """Inside, a module computes with these in place of its parameters."""
    places = [
        (part._parameters, name, parameter)
        for part in module.modules()
        for name, parameter in part._parameters.items()
        if parameter is not None and parameter in weights
    ]
    try:
        for found, name, parameter in places:
            found[name] = weights[parameter]  # type: ignore[assignment]
        yield
    finally:
        for found, name, parameter in places:
            found[name] = parameter


@contextmanager
def _draws_kept(device: torch.device) -> Iterator[None]:
    """Torch's generator is afterwards where it was, so that draws do not depend on what was recorded when."""
    generator = torch.cuda.default_generators[device.index] if device.type == "cuda" else torch.default_generator
    state = generator.get_state()
    try:
        yield
    finally:
        generator.set_state(state)


def _shape(leaf: Any) -> Any:
    return (tuple(leaf.shape), leaf.dtype) if isinstance(leaf, Tensor) else repr(leaf)
