"""Training steps captured as CUDA graphs, one capture per input shape, and replayed.

A base step launches about 2,500 kernels: at least 90 ms of launch time, against 69 ms of compute for 64 pairs on an
H200. Replaying a graph launches them all at once.

A captured step is three graphs: the forward pass, and one backward pass for each of its two stages. With a single
backward graph every gradient would appear at its end. With two, DeepSpeed reduces the gradients of the second stage
over ranks while the GPU still computes those of the first.

"Recorded" means captured, everywhere in this package.
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

# Each recording takes a few MB on the host and on the device. A run has about a dozen shapes.
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
    """The two stages of a step. Neither may wait for the device; their host code runs only while they are captured."""

    encode: Callable[[Any], Sequence[Tensor]]
    """Computes the states from the inputs."""
    finish: Callable[[Any, Sequence[Tensor]], tuple[Tensor, dict[str, Tensor]]]
    """Computes the loss, and metrics that all have the same shape, from inputs and states."""


class RecordedStep:
    """The step of a module, recorded once per input shape and replayed from then on.

    Gradients stand in static buffers, which the next backward pass overwrites: whoever keeps a gradient copies it.
    Hooks of modules are not called at a replay.
    """

    def __init__(self, module: nn.Module, stages: Stages) -> None:
        """Start without recordings.

        Args:
            module: owner of the weights; at least one of them gets a gradient.
        """
        self._module, self._stages = module, stages
        self.forget()

    def forget(self) -> None:
        """Drop all recordings and free their memory."""
        self._recordings: OrderedDict[Any, _Recording] = OrderedDict()
        self._buffers: dict[Any, Tensor] = {}
        self._gradients: dict[nn.Parameter, Tensor] = {}
        self._module_state: list[Any] = []

    def __getstate__(self) -> Any:
        """Leave the recordings out of a copy: graphs hold addresses of the original's weights."""
        return self._module, self._stages

    def __setstate__(self, state: Any) -> None:
        """Start a copy without recordings."""
        self._module, self._stages = state
        self.forget()

    def __call__(self, inputs: Any, kind: Hashable = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss and the metrics. ``backward()`` may be called once on the loss, before the next call.

        Args:
            inputs: nested tuples of tensors and of plain values.
            kind: whatever else selects the computation; steps of another kind are recorded apart.

        Raises:
            TrainingError: the step cannot be captured.
        """
        self._check_module()
        leaves, structure = pytree.tree_flatten(inputs)
        static_leaves = [self._copy_to_buffer(index, leaf) for index, leaf in enumerate(leaves)]
        key = (kind, *map(_shape, leaves))
        recording_of_shape = self._recordings.get(key)
        if recording_of_shape is None:
            recording_of_shape = self._record(pytree.tree_unflatten(static_leaves, structure))
            self._recordings[key] = recording_of_shape
            if len(self._recordings) > _MOST_RECORDINGS:
                self._recordings.popitem(last=False)
        self._recordings.move_to_end(key)
        self._keys.draw()
        return recording_of_shape.run()

    def _record(self, static_inputs: Any) -> _Recording:
        new_recording = _Recording(self._module, self._stages, static_inputs, self._gradients, self._pass_order)
        try:
            # One warm-up is enough: it sets up libraries (cuBLAS workspaces, Triton modules), which capturing forbids,
            # and they stay. A later shape would run its whole step once more for nothing.
            new_recording.record(self._keys, self._pool, warm_up=not self._recordings)
        except BaseException:
            self.forget()  # the shared memory pool may hold half a capture
            raise
        return new_recording

    def _check_module(self) -> None:
        """Forget all recordings if the module has other weights, weights at other addresses, or another mode.

        A graph reads weights by address, and contains only the branches of the mode that it was captured in.
        """
        weights = list(self._module.parameters())
        module_state: list[Any] = [module.training for module in self._module.modules()]
        module_state += [(weight.data_ptr(), weight.requires_grad) for weight in weights]
        module_state += [buffer.data_ptr() for buffer in self._module.buffers()]
        if module_state != self._module_state:
            self.forget()
            self._module_state = module_state
            # All recordings write gradients to the same buffers, whose addresses the graphs hold. A set of buffers per
            # recording would cost the size of the model for each shape.
            self._gradients = {weight: torch.empty_like(weight) for weight in weights if weight.requires_grad}
            device = weights[0].device
            self._pass_order, self._keys = _PassOrder(), RecordedKeys(device)
            self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None

    def _copy_to_buffer(self, index: int, leaf: Any) -> Any:
        """Copy an input to the static buffer that all recordings read an input of its index and shape from."""
        if not isinstance(leaf, Tensor):
            return leaf
        key = (index, _shape(leaf))
        if key not in self._buffers:
            self._buffers[key] = torch.empty(leaf.shape, dtype=leaf.dtype, device=leaf.device)
        return self._buffers[key].copy_(leaf, non_blocking=True)


class _PassOrder:
    """Checks that the passes of a step run once each and in order, since all recordings share their memory."""

    step, next_pass = 0, 0

    def begin_step(self) -> int:
        """Start a step with its forward pass, pass 0. Returns: the number of the step."""
        self.step, self.next_pass = self.step + 1, 1
        return self.step

    def check(self, step: int, pass_index: int) -> None:
        """Advance to the next pass.

        Raises:
            RuntimeError: another pass is due, or another step has begun.
        """
        if (step, pass_index) != (self.step, self.next_pass):
            raise RuntimeError(
                "backward() was called on the loss of a recorded step after the next step had begun, or twice on the "
                "same loss. Its states are gone, since recorded steps share their memory. Call backward() once after "
                "each step, or use --compute.cuda_graphs=false."
            )
        self.next_pass += 1


class _Recording:
    """The step of one shape, in three passes: forward, backward to the states, backward from the states."""

    def __init__(
        self,
        module: nn.Module,
        stages: Stages,
        inputs: Any,
        gradients: dict[nn.Parameter, Tensor],
        pass_order: _PassOrder,
    ) -> None:
        self._module, self._stages, self._inputs, self._gradients = module, stages, inputs, gradients
        self._pass_order = pass_order
        self.loss_grad = torch.ones((), device=next(iter(gradients)).device)
        """Gradient of the loss: 1, times the factor that DeepSpeed scales the loss with."""

    def record(self, keys: RecordedKeys, pool: Any, *, warm_up: bool) -> None:
        """Capture the three passes.

        Args:
            pool: memory pool of the graphs; None on a CPU, where each run computes the passes anew.
            warm_up: run the step once before it is captured.
        """

        def forward() -> None:
            with recording(keys), torch.enable_grad():
                self._forward()

        self.keep_sums()
        self.passes: tuple[Run, ...] = forward, self._backward_to_states, self._backward_from_states
        if warm_up or pool is None:
            with _generator_restored(self.loss_grad.device):
                for run_pass in self.passes:
                    run_pass()
            self._release_graph()
        if pool is not None:
            self.passes = tuple(_capture(run_pass, pool) for run_pass in self.passes)
            self._release_graph()  # other recordings may reuse the memory of the pool
        # A parameter that both stages read gets its whole gradient with the last pass, that of the first stage.
        self.encode_parameters = [parameter for parameter in self._gradients if parameter in self._from_encode]
        from_finish_alone = self._from_finish - self._from_encode
        self.finish_parameters = [parameter for parameter in self._gradients if parameter in from_finish_alone]

    def run(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Run the forward pass. Returns: loss and metrics, as copies that later runs do not overwrite."""
        step = self._pass_order.begin_step()
        gate = _Encode.apply(self, step, *self.encode_parameters)
        loss: Tensor = _Finish.apply(self, step, gate, *self.finish_parameters)
        return loss, dict(zip(self._metric_names, self._metrics.clone().unbind(), strict=True))

    def run_backward(self, pass_index: int, step: int, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        """Run one backward pass. Returns: the gradients of the parameters.

        Raises:
            RuntimeError: the pass is not the next one of the last step.
        """
        self._pass_order.check(step, pass_index)
        self.passes[pass_index]()
        # detach() makes new tensors over the static buffers. Autograd holds the only reference to them, and so takes
        # them as parameter.grad without a copy.
        return [self._gradients[parameter].detach() for parameter in parameters]

    def keep_sums(self) -> None:
        """Copy accumulated gradients out of the static buffers, which the next backward pass overwrites."""
        for parameter, buffer in self._gradients.items():
            if parameter.grad is not None and parameter.grad.data_ptr() == buffer.data_ptr():
                parameter.grad = parameter.grad.clone()

    def _forward(self) -> None:
        # The stages compute with detached parameters. Autograd notes on which stream a parameter was first used, which
        # would be the capturing stream, and DeepSpeed hangs hooks on parameters, which must not run while a pass is
        # captured but after each replay. The detached ones share the memory and have neither.
        self._weights = {parameter: parameter.detach().requires_grad_() for parameter in self._gradients}
        with _replaced(self._module, self._weights):
            self._states = self._stages.encode(self._inputs)
            # Cuts autograd's graph between the stages, so that each has a backward pass of its own.
            self._cut_states = [state.detach().requires_grad_(state.requires_grad) for state in self._states]
            self._loss, metrics = self._stages.finish(self._inputs, self._cut_states)
        self.loss = self._loss.detach()
        self._metric_names, self._metrics = tuple(metrics), torch.stack(list(metrics.values()))

    def _backward_to_states(self) -> None:
        states = [state for state in self._cut_states if state.requires_grad]
        leaves = [*states, *self._weights.values()]
        gradients = torch.autograd.grad(self._loss, leaves, self.loss_grad, allow_unused=True)
        self._state_grads = gradients[: len(states)]
        self._from_finish = self._write_gradients(gradients[len(states) :], set())

    def _backward_from_states(self) -> None:
        states = [state for state in self._states if state.requires_grad]
        reached = [(state, grad) for state, grad in zip(states, self._state_grads, strict=True) if grad is not None]
        gradients: Sequence[Tensor | None] = [None] * len(self._gradients)
        if reached:
            outputs, output_grads = zip(*reached, strict=True)
            gradients = torch.autograd.grad(outputs, list(self._weights.values()), output_grads, allow_unused=True)
        self._from_encode = self._write_gradients(gradients, self._from_finish)

    def _write_gradients(
        self, gradients: Sequence[Tensor | None], already_written: set[nn.Parameter]
    ) -> set[nn.Parameter]:
        """Write gradients to their static buffers, or add to a buffer that this step has already written.

        Returns: the parameters that have a gradient.
        """
        buffers_to_fill, grads_to_copy = [], []
        written = set()
        for (parameter, buffer), grad in zip(self._gradients.items(), gradients, strict=True):
            if grad is None:
                continue
            written.add(parameter)
            if parameter in already_written:
                buffer.add_(grad)
            else:
                buffers_to_fill.append(buffer)
                grads_to_copy.append(grad)
        if buffers_to_fill:
            torch._foreach_copy_(buffers_to_fill, grads_to_copy)
        return written

    def _release_graph(self) -> None:
        """Drop autograd's graph and intermediate states; loss, metrics and gradients stay."""
        del self._weights, self._states, self._cut_states, self._loss, self._state_grads


class _Encode(torch.autograd.Function):
    """Runs the whole forward pass; its backward pass is that of the first stage.

    Its output, the gate, is a zero that only ``_Finish`` reads. It makes autograd run the backward pass of ``_Finish``
    before this one. Each function takes the parameters whose gradients its backward pass completes as inputs, so that
    autograd accumulates them and calls their hooks as soon as they are there.
    """

    @staticmethod
    def forward(ctx: Any, step_recording: _Recording, step: int, *parameters: Tensor) -> Tensor:
        ctx.recording, ctx.step = step_recording, step
        step_recording.passes[0]()
        return torch.zeros_like(step_recording.loss_grad)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gate_grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *ctx.recording.run_backward(2, ctx.step, ctx.recording.encode_parameters)


class _Finish(torch.autograd.Function):
    """Returns the loss; its backward pass is that of the second stage, which comes first."""

    @staticmethod
    def forward(ctx: Any, step_recording: _Recording, step: int, gate: Tensor, *parameters: Tensor) -> Tensor:
        ctx.recording, ctx.step = step_recording, step
        return step_recording.loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, loss_grad: Tensor) -> tuple[Tensor | None, ...]:
        step_recording = ctx.recording
        step_recording.loss_grad.copy_(loss_grad)
        step_recording.keep_sums()
        gradients = step_recording.run_backward(1, ctx.step, step_recording.finish_parameters)
        return None, None, torch.zeros_like(loss_grad), *gradients


def _capture(run: Run, pool: Any) -> Run:
    """Capture the kernels that a function launches. Returns: a function that replays them.

    Raises:
        TrainingError: the function cannot be captured.
    """
    graph = torch.cuda.CUDAGraph()
    try:
        # "relaxed", since kernels may be loaded for the first time and other threads may pin memory during the capture.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="relaxed"):
            run()
    except RuntimeError as error:
        # Ending a failed capture raises a second error, with the cause as its context.
        cause = error.__context__ or error
        if isinstance(cause, torch.OutOfMemoryError):
            raise cause from None
        first_line = (str(cause).strip().splitlines() or [""])[0]
        raise TrainingError(
            f"The step cannot be captured as CUDA graphs with torch {torch.__version__}: {first_line} Run without CUDA "
            "graphs (slower on the host): --compute.cuda_graphs=false."
        ) from error
    return graph.replay


@contextmanager
def _replaced(module: nn.Module, weights: Mapping[nn.Parameter, Tensor]) -> Iterator[None]:
    """Inside, a module computes with these tensors instead of its parameters."""
    slots = [
        (submodule._parameters, name, parameter)
        for submodule in module.modules()
        for name, parameter in submodule._parameters.items()
        if parameter is not None and parameter in weights
    ]
    try:
        for parameters, name, parameter in slots:
            parameters[name] = weights[parameter]  # type: ignore[assignment]
        yield
    finally:
        for parameters, name, parameter in slots:
            parameters[name] = parameter


@contextmanager
def _generator_restored(device: torch.device) -> Iterator[None]:
    """Restore torch's generator afterwards, so that random numbers do not depend on which steps were recorded when."""
    generator = torch.cuda.default_generators[device.index] if device.type == "cuda" else torch.default_generator
    state = generator.get_state()
    try:
        yield
    finally:
        generator.set_state(state)


def _shape(leaf: Any) -> Any:
    return (tuple(leaf.shape), leaf.dtype) if isinstance(leaf, Tensor) else repr(leaf)
