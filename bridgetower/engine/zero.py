"""ZeRO's step over whole partitions.

DeepSpeed 0.19.8 looks at the gradient tensor by tensor: for numbers that are not finite, and for its norm. On a GPU
that is a dozen kernels for each of 700 tensors, most of a few hundred numbers, and took longer than a step's forward
pass. A rank's share of a parameter group is one piece of memory, and so is looked at as one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from deepspeed.runtime.utils import mask_nan_or_inf_with_val_inplace
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
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

    def average_tensor(self, tensor: Tensor, communication_data_type: torch.dtype) -> None:
        """Add the gradients of a bucket to the partition; a single rank has nobody to average with.

        DeepSpeed would copy each of them there and back, and wait for the device before.
        """
        bucket = self.ipg_buckets[communication_data_type]
        groups = {group_index for group_index, _, _ in bucket.params}
        if (
            torch.distributed.get_world_size(self.dp_process_group) > 1
            or self.cpu_offload
            or bucket.has_moe_params
            or not all(map(self._use_compact_grad_partition_buffer, groups))
        ):
            super().average_tensor(tensor, communication_data_type)
            return
        for stream in bucket.copy_streams:
            torch.cuda.current_stream().wait_stream(stream)
        sizes = [self.bit16_groups[group][number].numel() for group, number, _ in bucket.params]
        shares = [
            self._get_compact_grad_partition_slice(group, 0, parameter, size)
            for (group, _, parameter), size in zip(bucket.params, sizes, strict=True)
        ]
        torch._foreach_add_(shares, list(tensor.to(shares[0].dtype).split(sizes)))

    def _update_model_bit16_weights(self, group_index: int) -> None:
        """Nothing once weights are views of the partitions, as they are after the first time."""
        if self.bit16_groups[group_index][0].data_ptr() != self.bit16_groups_flat[group_index].data_ptr():
            super()._update_model_bit16_weights(group_index)


def look_at_partitions(optimizer: Any) -> None:
    """Give DeepSpeed's ZeRO optimiser these methods, in place; others stay as they are."""
    if type(optimizer) is DeepSpeedZeroOptimizer:
        optimizer.__class__ = PartitionedZero
