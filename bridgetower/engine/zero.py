"""Every private name of DeepSpeed that this project uses: above all a faster ZeRO optimizer with the same results.

DeepSpeed 0.19.8 checks the gradient tensor by tensor, once for numbers that are not finite and once for its norm. On a
GPU that launches a dozen kernels for each of 700 tensors, most of which hold a few hundred numbers, and takes longer
than the forward pass of a step. A rank's partition of a parameter group is one piece of memory, so `PartitionedZero`
checks it as one tensor.

DeepSpeed also copies each gradient into its communication bucket as soon as it arrives, which keeps the host busy for
60 ms of a step whose kernels take 200 ms. `PartitionedZero` copies all gradients of a bucket at once, when it is full.

All of this leans on names that DeepSpeed may change in any release. `find_mismatch` compares the installed DeepSpeed
with the one that was tried; where they differ, DeepSpeed's own optimizer trains to the same results.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any

import deepspeed
import torch

# What a checkpoint is written with and holds. There is nothing to fall back on: a run without them must not start.
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from torch import Tensor, nn

from bridgetower import dist

_IMPORT_FAULT = ""
try:
    from deepspeed.runtime import engine as engine_module
    from deepspeed.runtime.base_optimizer import BackwardHookStateManager
    from deepspeed.runtime.utils import mask_nan_or_inf_with_val_inplace
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer, GradPartitionBufferGroup, IPGBucket
except ImportError as error:  # another DeepSpeed; `find_mismatch` says so, and nothing below is used
    _IMPORT_FAULT = str(error)
    DeepSpeedZeroOptimizer = GradPartitionBufferGroup = IPGBucket = BackwardHookStateManager = object

logger = logging.getLogger(__name__)

TRIED_VERSION = "0.19.8"

CheckpointEngine = TorchCheckpointEngine
"""DeepSpeed's writer and reader of single checkpoint files."""
CHECKPOINT_CLASSES = (LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address)
"""What DeepSpeed's files hold beside tensors and plain types. Restoring them runs no code."""

# What `PartitionedZero` reads, calls or replaces, by the class that must have it.
_NEEDED_NAMES: dict[type, str] = {
    DeepSpeedZeroOptimizer: (
        "_backward_hook_state _build_compact_grad_partition_buffer _coalesce_grad_reduction "
        "_get_compact_grad_partition_buffer _grad_acc_hooks _max_expected_hooks_seen _remaining_grad_acc_hooks "
        "_update_model_bit16_weights _use_compact_grad_partition_buffer _zero_padding average_tensor bit16_groups "
        "bit16_groups_flat check_overflow compute_grad_norm contiguous_gradients cpu_offload "
        "create_gradient_handling_hooks dp_process_group extra_large_param_to_reduce get_grad_norm_direct "
        "get_param_comm_dtype get_param_id grad_partition_insertion_offset gradient_accumulation_dtype ipg_buckets "
        "overlap_comm param_idx_in_group partition_gradients partition_size process_gradients ready_for_gradients "
        "reduce_bucket_size reduce_independent_p_g_buckets_and_remove_grads reduce_ipg_grads "
        "reenter_backward_if_needed update_hook_state_and_maybe_run_epilogue use_grad_accum_attribute zenflow"
    ),
    BackwardHookStateManager: (
        "backward_active_depth hooks_fired_this_backward post_backward_callback_graph_task_id "
        "post_backward_callback_queued"
    ),
    IPGBucket: "buffer copy_streams elements grads has_moe_params index params",
    GradPartitionBufferGroup: "flat_partition",
}


class PartitionedZero(DeepSpeedZeroOptimizer):  # type: ignore[misc]  # DeepSpeed has no types
    """DeepSpeed's optimizer of ZeRO stages 1 and 2, with the same results.

    Stage 1 with bfloat16 has an optimizer of its own in DeepSpeed, which stays as it is.
    """

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        """Take what DeepSpeed's engine gives its own optimizer."""
        super().__init__(*arguments, **settings)
        if torch.distributed.get_world_size(self.dp_process_group) == 1:
            # A single rank has no communication to overlap, but DeepSpeed would wait for the device after each
            # backward pass.
            self.overlap_comm = False

    def create_gradient_handling_hooks(self) -> None:
        """Register `take_gradient` for each trainable parameter, instead of DeepSpeed's hooks."""
        self._grad_acc_hooks += [
            parameter.register_post_accumulate_grad_hook(partial(self.take_gradient, group_index))
            for group_index, parameters in enumerate(self.bit16_groups)
            for parameter in parameters
            if parameter.requires_grad
        ]
        self._remaining_grad_acc_hooks = 0

    def take_gradient(self, group_index: int, parameter: Tensor) -> None:
        """Handle one gradient that autograd has finished.

        DeepSpeed's hook asks at every parameter whether a backward pass has begun, was entered again (reentrant
        checkpointing) or has come to its end. The first hook of a backward pass still asks; the others see that the
        pass is under way and only note their gradient.
        """
        state = self._backward_hook_state
        is_under_way = (
            state.post_backward_callback_queued
            and state.backward_active_depth > 0
            and state.post_backward_callback_graph_task_id == torch._C._current_graph_task_id()
            and self.ready_for_gradients
            and not self._coalesce_grad_reduction
        )
        if is_under_way and self._fills_whole_buckets:
            state.hooks_fired_this_backward += 1
            self.reduce_independent_p_g_buckets_and_remove_grads(parameter, group_index)
            return
        self.reenter_backward_if_needed()
        self.process_gradients(parameter, group_index)
        # Autograd calls back when the backward pass is over, so there is no need to count the gradients to expect.
        self.update_hook_state_and_maybe_run_epilogue(self._max_expected_hooks_seen)

    @cached_property
    def _fills_whole_buckets(self) -> bool:
        """True if a bucket may be filled at once.

        Reduced gradients must be added to the rank's float32 partition, so that nobody reads them from the bucket
        later: DeepSpeed's stage 2 does so if the weights are in bfloat16.
        """
        return bool(
            self.contiguous_gradients
            and self.partition_gradients
            and not self.cpu_offload
            and not self.zenflow
            and not self.use_grad_accum_attribute
            and all(map(self._use_compact_grad_partition_buffer, range(len(self.bit16_groups))))
        )

    def reduce_independent_p_g_buckets_and_remove_grads(self, param: Any, i: int) -> None:
        """Note a gradient for its bucket. A bucket that could not hold it is reduced first."""
        size = param.numel()
        if not self._fills_whole_buckets or not 0 < size <= self.reduce_bucket_size:
            super().reduce_independent_p_g_buckets_and_remove_grads(param, i)
            return
        dtype = self.get_param_comm_dtype(param)
        bucket = self.ipg_buckets[dtype]
        if bucket.elements + size > self.reduce_bucket_size:
            self.reduce_ipg_grads(comm_dtype=dtype)
            if self.overlap_comm:
                # The reduction still reads this buffer; the next gradients go into the other one.
                bucket.index = 1 - bucket.index
        bucket.elements += size
        bucket.grads.append(param.grad)
        bucket.params.append((i, param.param_idx_in_group, self.get_param_id(param)))
        if param.is_cuda:
            # The stream's number: asking for the stream object takes longer than everything else in this method.
            bucket.copy_streams.add(torch._C._cuda_getCurrentRawStream(param.device.index))

    def reduce_ipg_grads(self, comm_dtype: torch.dtype | None = None) -> None:
        """Fill the buckets, and reduce them."""
        for dtype, bucket in self.ipg_buckets.items():
            is_reduced = comm_dtype in (None, dtype) and dtype not in self.extra_large_param_to_reduce
            if is_reduced and bucket.params and self._fills_whole_buckets:
                self._fill(bucket)
        super().reduce_ipg_grads(comm_dtype)

    def _fill(self, bucket: Any) -> None:
        """Copy all noted gradients into the bucket's buffer, and free them."""
        if bucket.copy_streams:
            # Autograd may have computed the gradients on other streams than the one that copies them. It waits for
            # those, and their memory must not be used again before the copy.
            here = torch.cuda.current_stream()
            for number in bucket.copy_streams - {here.cuda_stream}:
                # Number 0 is the default stream; an ExternalStream of it would be another one.
                stream = torch.cuda.ExternalStream(number) if number else torch.cuda.default_stream()
                here.wait_stream(stream)
                for gradient in bucket.grads:
                    gradient.record_stream(here)
            bucket.copy_streams = {here}
        buffer = bucket.buffer[bucket.index].narrow(0, 0, bucket.elements)
        slices = buffer.split([gradient.numel() for gradient in bucket.grads])
        torch._foreach_copy_(slices, [gradient.reshape(-1) for gradient in bucket.grads])
        bucket.grads.clear()
        for group_index, parameter_index, _ in bucket.params:
            self.bit16_groups[group_index][parameter_index].grad = None

    def average_tensor(self, tensor: Tensor, communication_data_type: torch.dtype) -> None:
        """Add the gradients of a bucket to the partition, without averaging if there is a single rank.

        DeepSpeed would copy each of them there and back, and wait for the device before.
        """
        bucket = self.ipg_buckets[communication_data_type]
        if not bucket.params:
            return
        is_alone = torch.distributed.get_world_size(self.dp_process_group) == 1
        if not is_alone or bucket.has_moe_params or not self._fills_whole_buckets:
            super().average_tensor(tensor, communication_data_type)
            return
        for stream in bucket.copy_streams:
            torch.cuda.current_stream().wait_stream(stream)
        sizes = [self.bit16_groups[group][index].numel() for group, index, _ in bucket.params]
        groups = {group for group, _, _ in bucket.params}
        flat = {group: self._get_compact_grad_partition_buffer(group).flat_partition for group in groups}
        slices = [
            flat[group].narrow(0, int(self.grad_partition_insertion_offset[group][0][parameter_id]), size)
            for (group, _, parameter_id), size in zip(bucket.params, sizes, strict=True)
        ]
        torch._foreach_add_(slices, list(tensor.to(slices[0].dtype).split(sizes)))

    def _build_compact_grad_partition_buffer(self, group_idx: int) -> GradPartitionBufferGroup:
        """Build a group's partition of zeros and the views of its tensors.

        DeepSpeed works out offsets and shapes anew in every step; they never change, so the first answer is kept.
        """
        known: dict[int, list[tuple[torch.Size, bool]]] = self.__dict__.setdefault("_view_shapes", {})
        if group_idx not in known:
            first = super()._build_compact_grad_partition_buffer(group_idx)
            known[group_idx] = [(view.shape, hasattr(view, "_zero_padding")) for view in first]
            return first
        shapes = known[group_idx]
        weights = self.bit16_groups[group_idx][0]
        flat = torch.zeros(
            int(self.partition_size[group_idx]), dtype=self.gradient_accumulation_dtype, device=weights.device
        )
        views = []
        for piece, (shape, is_padding) in zip(flat.split([shape.numel() for shape, _ in shapes]), shapes, strict=True):
            views.append(piece.view(shape))
            if is_padding:
                views[-1]._zero_padding = True  # DeepSpeed's mark
        return GradPartitionBufferGroup(views, flat)

    def check_overflow(self, partition_gradients: bool = True) -> None:
        """Do nothing: the norm, which ``step`` checks too, is not finite if any number of the gradient is not."""
        if not self.compute_grad_norm:
            super().check_overflow(partition_gradients)

    def get_grad_norm_direct(
        self, gradients: Sequence[Tensor], params: Sequence[Tensor], norm_type: float = 2
    ) -> Tensor:
        """Compute the norm of a parameter group's gradient over all ranks; -1 if it is not finite.

        Args:
            gradients: of this rank's partition, in DeepSpeed's own list, which has the memory that they are views of.
        """
        flat: Tensor | None = getattr(gradients, "flat_partition", None)
        if flat is None or norm_type != 2:
            norm: Tensor = super().get_grad_norm_direct(gradients, params, norm_type)
            return norm
        # In double precision: the square of a large but finite gradient overflows float32. Padding is zero.
        square = torch.linalg.vector_norm(flat, dtype=torch.float64).square()
        torch.distributed.all_reduce(square, group=self.dp_process_group)
        total: Tensor = square.sqrt().float()
        mask_nan_or_inf_with_val_inplace(total, device=total.device)
        return total

    def _update_model_bit16_weights(self, group_index: int) -> None:
        """Make the weights views of the group's flat buffer, which they are from the first time on."""
        if self.bit16_groups[group_index][0].data_ptr() != self.bit16_groups_flat[group_index].data_ptr():
            super()._update_model_bit16_weights(group_index)


def find_mismatch() -> str:
    """Explain why `PartitionedZero` does not fit the installed DeepSpeed. Returns an empty string if it does.

    The version alone does not decide: a patched DeepSpeed may keep its number.
    """
    version = deepspeed.__version__.partition("+")[0]
    if version != TRIED_VERSION:
        return f"the installed version is {version}"
    if _IMPORT_FAULT:
        return f"the installed one lacks a name ({_IMPORT_FAULT})"
    if getattr(engine_module, "DeepSpeedZeroOptimizer", None) is not DeepSpeedZeroOptimizer:
        return "the installed engine does not construct DeepSpeedZeroOptimizer by that name"
    for owner, names in _NEEDED_NAMES.items():
        missing = set(names.split()) - _find_names(owner)
        if missing:
            return f"the installed {owner.__name__} has no {', '.join(sorted(missing))}"
    return ""


def _find_names(owner: type) -> set[str]:
    """Collect the names that a class defines or that its methods use: attributes exist only on instances."""
    names = set(dir(owner))
    for base in owner.__mro__:
        for member in vars(base).values():
            if inspect.isfunction(member):
                names |= set(member.__code__.co_names)
    return names


@contextmanager
def partitioned_zero() -> Iterator[None]:
    """Let ``deepspeed.initialize`` construct `PartitionedZero` where it would construct its own ZeRO-1/2 optimizer.

    DeepSpeed has no setting for the class, so the engine's name for it is replaced while the context is open. An
    optimizer cannot be exchanged later: by then it has registered its hooks and moved the weights into its buffers.
    """
    mismatch = find_mismatch()
    if mismatch:
        if dist.rank() == 0:
            logger.warning(
                "DeepSpeed's own ZeRO optimizer is used (same results, slower on a GPU), because the faster one was "
                "written for DeepSpeed %s, but %s. To use the faster one: pip install deepspeed==%s",
                TRIED_VERSION,
                mismatch,
                TRIED_VERSION,
            )
        yield
        return
    engine_module.DeepSpeedZeroOptimizer = PartitionedZero
    try:
        yield
    finally:
        engine_module.DeepSpeedZeroOptimizer = DeepSpeedZeroOptimizer


def read_local_gradient(parameter: nn.Parameter) -> Tensor | None:
    """Read the fragment of a parameter's averaged gradient that this rank holds between backward and step.

    Returns: None if other ranks hold all of it. Without ZeRO every rank holds the whole gradient: it is divided by the
        root of the world size, so that the sum of the ranks' squares is the square of the whole.
    """
    if not hasattr(parameter, "_hp_mapping"):
        return None if parameter.grad is None else parameter.grad.float() / dist.world_size() ** 0.5
    mapping: Any = parameter._hp_mapping  # from the weights in computing precision to this rank's float32 fragment
    if mapping is None:
        return None
    gradient: Tensor = mapping.get_lp_grad_fragment(parameter._index_in_param_group)  # type: ignore[attr-defined]
    return gradient


def skip_inference_build() -> None:
    """Keep ``deepspeed.init_distributed`` from building an extension that only serves inference.

    The build takes 71 s on a CPU, and fails without g++. A DeepSpeed without this table of extensions is left alone.
    """
    getattr(deepspeed.ops, "__compatible_ops__", {})["deepspeed_shm_comm"] = False
