"""ZeRO's step over whole partitions and buckets.

DeepSpeed 0.19.8 looks at the gradient tensor by tensor: for numbers that are not finite, and for its norm. On a GPU
that is a dozen kernels for each of 700 tensors, most of a few hundred numbers, and took longer than a step's forward
pass. A rank's share of a parameter group is one piece of memory, and so is looked at as one.

It also copies each gradient into its bucket as it comes, which keeps the host busy for 60 ms of a step whose kernels
take 200. Here a bucket is filled at once, when it is full.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from deepspeed.runtime.utils import mask_nan_or_inf_with_val_inplace
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer, GradPartitionBufferGroup
from torch import Tensor


class PartitionedZero(DeepSpeedZeroOptimizer):  # type: ignore[misc]
    """DeepSpeed's ZeRO 2 (and 1, but for bfloat16, which has an optimiser of its own there), with the same results."""

    def check_overflow(self, partition_gradients: bool = True) -> None:
        """Nothing: the norm, which ``step`` looks at too, is not finite if a number of the gradient is not."""
        if not self.compute_grad_norm:
            super().check_overflow(partition_gradients)

    def get_grad_norm_direct(
        self, gradients: Sequence[Tensor], params: Sequence[Tensor], norm_type: float = 2
    ) -> Tensor:
        """The norm of a parameter group's gradient over all ranks; -1 if it is not finite.

        Args:
            gradients: this rank's share, in DeepSpeed's own list, which knows the memory that it is of.
        """
        flat: Tensor | None = getattr(gradients, "flat_partition", None)
        if flat is None or norm_type != 2:
            norm: Tensor = super().get_grad_norm_direct(gradients, params, norm_type)
            return norm
        # In double precision, so that a large but finite gradient is not lost. Padding is zero.
        square = torch.linalg.vector_norm(flat, dtype=torch.float64).square()
        torch.distributed.all_reduce(square, group=self.dp_process_group)
        total: Tensor = square.sqrt().float()
        mask_nan_or_inf_with_val_inplace(total, device=total.device)
        return total

    def reduce_independent_p_g_buckets_and_remove_grads(self, param: Any, i: int) -> None:
        """Note a gradient for its bucket, which is reduced before it has more than it can hold."""
        size = param.numel()
        if not self._fills_at_once() or not 0 < size <= self.reduce_bucket_size:
            super().reduce_independent_p_g_buckets_and_remove_grads(param, i)
            return
        dtype = self.get_param_comm_dtype(param)
        bucket = self.ipg_buckets[dtype]
        if bucket.elements + size > self.reduce_bucket_size:
            self.reduce_ipg_grads(comm_dtype=dtype)
            if self.overlap_comm:
                bucket.index = 1 - bucket.index
        bucket.elements += size
        bucket.grads.append(param.grad)
        bucket.params.append((i, param.param_idx_in_group, self.get_param_id(param)))
        if param.is_cuda:
            # A number, as asking for the stream itself takes longer than all else here.
            bucket.copy_streams.add(torch._C._cuda_getCurrentRawStream(param.device.index))

    def reduce_ipg_grads(self, comm_dtype: torch.dtype | None = None) -> None:
        """Fill the buckets, and reduce them."""
        for dtype, bucket in self.ipg_buckets.items():
            is_reduced = comm_dtype in (None, dtype) and dtype not in self.extra_large_param_to_reduce
            if is_reduced and bucket.params and self._fills_at_once():
                self._fill(bucket)
        super().reduce_ipg_grads(comm_dtype)

    def _fills_at_once(self) -> bool:
        """Whether gradients are added to the partition, so that nobody reads them in the bucket later."""
        known: dict[str, Any] = self.__dict__
        if "_at_once" not in known:
            known["_at_once"] = (
                self.contiguous_gradients
                and self.partition_gradients
                and not self.cpu_offload
                and not self.zenflow
                and not self.use_grad_accum_attribute
                and all(map(self._use_compact_grad_partition_buffer, range(len(self.bit16_groups))))
            )
        return bool(known["_at_once"])

    def _build_compact_grad_partition_buffer(self, group_idx: int) -> GradPartitionBufferGroup:
        """A group's partition of zeros, and its tensors in it, which are where they were the last time."""
        known: dict[int, list[tuple[torch.Size, bool]]] = self.__dict__.setdefault("_partition_shapes", {})
        if group_idx not in known:
            first = super()._build_compact_grad_partition_buffer(group_idx)
            known[group_idx] = [(part.shape, hasattr(part, "_zero_padding")) for part in first]
            return first
        shapes = known[group_idx]
        weights = self.bit16_groups[group_idx][0]
        flat = torch.zeros(
            int(self.partition_size[group_idx]), dtype=self.gradient_accumulation_dtype, device=weights.device
        )
        parts = []
        for part, (shape, is_padding) in zip(flat.split([shape.numel() for shape, _ in shapes]), shapes, strict=True):
            parts.append(part.view(shape))
            if is_padding:
                parts[-1]._zero_padding = True
        return GradPartitionBufferGroup(parts, flat)

    def _fill(self, bucket: Any) -> None:
        if bucket.copy_streams:
            here = torch.cuda.current_stream()
            for number in bucket.copy_streams - {here.cuda_stream}:
                # 0 is the default stream's, of which a new one must not be made.
                stream = torch.cuda.ExternalStream(number) if number else torch.cuda.default_stream()
                here.wait_stream(stream)
                for gradient in bucket.grads:
                    gradient.record_stream(here)
            bucket.copy_streams = {here}
        buffer = bucket.buffer[bucket.index].narrow(0, 0, bucket.elements)
        places = buffer.split([gradient.numel() for gradient in bucket.grads])
        torch._foreach_copy_(places, [gradient.reshape(-1) for gradient in bucket.grads])
        bucket.grads.clear()
        for group, number, _ in bucket.params:
            self.bit16_groups[group][number].grad = None

    def average_tensor(self, tensor: Tensor, communication_data_type: torch.dtype) -> None:
        """Add the gradients of a bucket to the partition; a single rank has nobody to average with.

        DeepSpeed would copy each of them there and back, and wait for the device before.
        """
        bucket = self.ipg_buckets[communication_data_type]
        if not bucket.params:
            return
        is_alone = torch.distributed.get_world_size(self.dp_process_group) == 1
        if not is_alone or bucket.has_moe_params or not self._fills_at_once():
            super().average_tensor(tensor, communication_data_type)
            return
        for stream in bucket.copy_streams:
            torch.cuda.current_stream().wait_stream(stream)
        sizes = [self.bit16_groups[group][number].numel() for group, number, _ in bucket.params]
        groups = {group for group, _, _ in bucket.params}
        flat = {group: self._get_compact_grad_partition_buffer(group).flat_partition for group in groups}
        shares = [
            flat[group].narrow(0, int(self.grad_partition_insertion_offset[group][0][parameter]), size)
            for (group, _, parameter), size in zip(bucket.params, sizes, strict=True)
        ]
        torch._foreach_add_(shares, list(tensor.to(shares[0].dtype).split(sizes)))

    def _update_model_bit16_weights(self, group_index: int) -> None:
        """Nothing once weights are views of the partitions, as they are after the first time."""
        if self.bit16_groups[group_index][0].data_ptr() != self.bit16_groups_flat[group_index].data_ptr():
            super()._update_model_bit16_weights(group_index)

    def take_gradient(self, group_index: int, parameter: Tensor) -> None:
        """What DeepSpeed's hook of a parameter does, without its questions once the backward pass is under way."""
        state = self._backward_hook_state
        is_under_way = (
            state.post_backward_callback_queued
            and state.backward_active_depth > 0
            and state.post_backward_callback_graph_task_id == torch._C._current_graph_task_id()
            and self.ready_for_gradients
            and not self._coalesce_grad_reduction
        )
        if is_under_way and self._fills_at_once():
            state.hooks_fired_this_backward += 1
            self.reduce_independent_p_g_buckets_and_remove_grads(parameter, group_index)
            return
        self.reenter_backward_if_needed()
        self.process_gradients(parameter, group_index)
        # Torch says when the backward pass is over, so that no number of gradients need be expected.
        self.update_hook_state_and_maybe_run_epilogue(self._max_expected_hooks_seen)


def look_at_partitions(optimizer: Any) -> None:
    """Give DeepSpeed's ZeRO optimiser these methods, in place; others stay as they are."""
    if type(optimizer) is DeepSpeedZeroOptimizer:
        optimizer.__class__ = PartitionedZero
        for handle in optimizer._grad_acc_hooks:
            handle.remove()
        optimizer._grad_acc_hooks = [
            parameter.register_post_accumulate_grad_hook(partial(optimizer.take_gradient, group_index))
            for group_index, parameters in enumerate(optimizer.bit16_groups)
            for parameter in parameters
            if parameter.requires_grad
        ]
        if torch.distributed.get_world_size(optimizer.dp_process_group) == 1:
            # There is nothing to overlap with, but DeepSpeed would wait for the device after each backward pass.
            optimizer.overlap_comm = False
