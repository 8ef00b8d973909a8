"""What a step of a run takes: choices of micro-batch and recomputation, network, time, data, cost and energy."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

from bridgetower.config.run import RunConfig
from bridgetower.cost.closed_form import PARTS, StepCost, count_micro_batch, typical_texts
from bridgetower.cost.devices import DEVICES, Device
from bridgetower.data.order import Cut
from bridgetower.errors import ConfigError
from bridgetower.step.cuda_graphs import can_be_recorded
from pretrain.plan_memory import STAGES, Parameters, Splitting, States, count_states, why_not_offered

# CUDA's context, NCCL's buffers and libraries' workspaces; docs/plan.md.
RESERVED_BYTES = 1_500_000_000
# Images that a core decodes, crops and hands over in a second; docs/plan.md.
DECODES_PER_CORE = {"pictures of 304 px": 1000, "pictures of 640 x 480": 520}
# Shares of the backward pass in a step's operations: two products for each one forward.
_BACKWARD = 2 / 3
# Bytes of memory that the optimizer reads and writes a parameter: gradient, weight and two means.
_OPTIMIZER_TRAFFIC = 4 + 2 * (4 + 8)


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """What it would run on."""

    gpu: str
    device: Device
    num_gpus: int
    gpus_per_node: int
    nic_gbps: float
    """Of one NIC, one way; 10^9 bits a second."""
    nics_per_node: int
    mfu: float
    """Of the operations that the device is sold for, the share that is reached."""

    @property
    def num_nodes(self) -> int:
        """Nodes that are needed."""
        return -(-self.num_gpus // self.gpus_per_node)

    def peak(self, splitting: Splitting) -> float:
        """Operations a second."""
        return self.device.bf16_flops if splitting.bf16 else self.device.fp32_flops


class Choice(NamedTuple):
    """A way to run it on a GPU."""

    stage: int
    micro_batch: int
    recompute: tuple[str, ...]
    states: States
    kept: int
    """Bytes of activations."""
    workspace: int
    total: int
    """Bytes of all, with what is reserved."""
    fits: bool
    offered: bool
    """pretrain/train.py trains so."""


class Timing(NamedTuple):
    """Of one step of a choice; seconds, and bytes a GPU sends."""

    accumulation: int
    compute: float
    backward: float
    """Of one micro-step."""
    reduce_bytes: float
    """Of a step: gradients."""
    reduce: float
    """Seconds of one reduction."""
    reduce_exposed: float
    """Seconds of a step that gradients are waited for."""
    gather_bytes: float
    gather: float
    optimizer: float

    @property
    def step(self) -> float:
        """Seconds of a step."""
        return self.compute + self.reduce_exposed + self.gather + self.optimizer


class Planner:
    """Choices and their times for one run."""

    def __init__(self, config: RunConfig, parameters: Parameters, splitting: Splitting, text_tokens: float) -> None:
        """Take a run whose model is complete.

        Args:
            text_tokens: mean length of captions, with <s> and </s>.
        """
        self.config, self.parameters, self.splitting, self.text_tokens = config, parameters, splitting, text_tokens
        self.cost = lru_cache(maxsize=None)(self._cost)
        """Of a micro-batch: pairs, recomputed parts, GPUs."""

    def _cost(self, pairs: int, recompute: tuple[str, ...], num_gpus: int) -> StepCost:
        config = self.config
        texts = typical_texts(pairs, self.text_tokens, config.model.text.max_tokens, config.objectives.mlm_probability)
        return count_micro_batch(
            config.model,
            config.objectives,
            replace(config.compute, recompute=recompute),
            texts,
            element_bytes=self.splitting.element,
            num_images=pairs + (pairs // 2 if self.reads_negatives else 0),
            num_frozen=(config.optim.frozen_vision_layers, config.optim.frozen_text_layers),
            num_contrasted=pairs * num_gpus,
        )

    @property
    def reads_negatives(self) -> bool:
        """Whether half of the pairs bring an image as a negative alone."""
        return self.config.objectives.itm and self.config.data.itm_negatives == "corpus"

    def micro_batches(self, num_gpus: int, group: int | None = None) -> list[int]:
        """Sizes that divide the global batch and hold whole groups of negatives, smallest first.

        Raises:
            ConfigError: there is none.
        """
        data = self.config.data
        group = group or data.negative_group_size
        share = data.global_batch_size // num_gpus
        sizes = [size for size in range(group, share + 1, group) if data.global_batch_size % (size * num_gpus) == 0]
        if not sizes:
            whole = group * num_gpus
            fewer = next(n for n in range(num_gpus, 0, -1) if n == 1 or data.global_batch_size % (group * n) == 0)
            cures = [f"--gpus={fewer}", f"--data.global_batch_size={-(-data.global_batch_size // whole) * whole}"]
            if share > 1 and data.global_batch_size % num_gpus == 0:
                cures.append(f"--data.negative_group_size={share} (draws other negatives)")
            raise ConfigError(
                f"--gpus={num_gpus} does not divide data.global_batch_size={data.global_batch_size} into micro-batches "
                f"of whole groups of {group} pairs, within which negatives are drawn: {group} x {num_gpus} = {whole}. "
                f"Use {', or '.join(cures)}."
            )
        return sizes

    def choices(self, cluster: Cluster, sizes: Sequence[int]) -> Iterator[Choice]:
        """Every stage, micro-batch and set of recomputed parts."""
        recomputes = [parts for number in range(len(PARTS) + 1) for parts in itertools.combinations(PARTS, number)]
        limit = cluster.device.memory_gb * 1e9
        for stage in STAGES:
            states = count_states(stage, self.parameters, self.splitting, cluster.num_gpus)
            for size, recompute in itertools.product(sizes, recomputes):
                cost = self.cost(size, recompute, cluster.num_gpus)
                workspace = cost.workspace + self.recorded_gradients(recompute)
                total = states.total + cost.kept + workspace + RESERVED_BYTES
                offered = not why_not_offered(stage, self.splitting)
                yield Choice(stage, size, recompute, states, cost.kept, workspace, total, total <= limit, offered)

    def recorded_gradients(self, recompute: tuple[str, ...]) -> int:
        """Bytes that recorded steps leave whole gradients in."""
        compute = replace(self.config.compute, recompute=recompute)
        is_recorded = self.splitting.bf16 and can_be_recorded(self.config.objectives, compute)
        return self.splitting.element * self.parameters.trained if is_recorded else 0

    def best(self, cluster: Cluster, sizes: Sequence[int]) -> Choice | None:
        """The fastest choice that fits, of the ZeRO stage of the run's file; of equals the one with most left."""
        fitting = [c for c in self.choices(cluster, sizes) if c.fits and c.stage == self.splitting.stage]
        return min(fitting, key=lambda c: (self.time(cluster, c).step, c.total), default=None)

    def time(self, cluster: Cluster, choice: Choice) -> Timing:
        """What a step of a choice takes."""
        cut = Cut(self.config.data.global_batch_size, choice.micro_batch, cluster.num_gpus)
        cost = self.cost(choice.micro_batch, choice.recompute, cluster.num_gpus)
        speed = cluster.peak(self.splitting) * cluster.mfu
        micro_step = (cost.work + cost.repeated) / speed
        backward = sum(part.backward + part.repeated for part in cost.parts.values()) / speed
        size = self.splitting.element * self.parameters.trained
        share = (cluster.num_gpus - 1) / cluster.num_gpus
        reductions = cut.accumulation_steps if choice.stage >= 2 else 1
        # DeepSpeed 0.19.8 reduces buckets with all-reduce, which sends them twice.
        reduce_bytes, gather_bytes = 2 * share * size, (share * size if choice.stage else 0.0)
        reduce, gather = (seconds_on_network(cluster, sent) for sent in (reduce_bytes, gather_bytes))
        # The last bucket has no more backward pass to hide behind.
        last = reduce * min(1.0, self.splitting.bucket / self.parameters.trained)
        exposed = max(last, reduce - backward) if self.splitting.overlaps else reduce
        owned = self.parameters.trained / (cluster.num_gpus if choice.stage else 1)
        return Timing(
            accumulation=cut.accumulation_steps,
            compute=micro_step * cut.accumulation_steps,
            backward=backward,
            reduce_bytes=reduce_bytes * reductions,
            reduce=reduce,
            reduce_exposed=exposed * reductions,
            gather_bytes=gather_bytes,
            gather=gather,
            optimizer=owned * _OPTIMIZER_TRAFFIC / cluster.device.memory_bytes_per_second,
        )

    def refuse(self, cluster: Cluster, sizes: Sequence[int]) -> ConfigError:
        """Say that nothing fits, and what would."""
        every = list(self.choices(cluster, sizes))
        least = min((c for c in every if c.stage == self.splitting.stage), key=lambda c: c.total)
        cures = []
        group = self.config.data.negative_group_size
        for smaller in (group // 2**n for n in range(1, int(math.log2(group)))):
            found = self.best(cluster, self.micro_batches(cluster.num_gpus, smaller)) if smaller > 1 else None
            if found is not None:
                cures.append(
                    f"--data.negative_group_size={smaller} (draws other negatives) with "
                    f"--data.micro_batch_size={found.micro_batch}"
                )
                break
        fitting = [name for name, device in DEVICES.items() if device.memory_gb * 1e9 >= least.total]
        if fitting:
            cures.append("one of the GPUs " + ", ".join(sorted(fitting, key=lambda name: DEVICES[name].memory_gb)))
        return ConfigError(
            f"{self.config.name} fits on no --gpu={cluster.gpu} ({cluster.device.memory_gb:g} GB) under ZeRO stage "
            f"{self.splitting.stage}: with --data.micro_batch_size={least.micro_batch} and "
            f"{','.join(least.recompute) or 'nothing'} computed again it still needs {least.total / 1e9:.1f} GB, "
            f"{least.states.total / 1e9:.1f} of them for weights, optimizer, gradients and buckets. "
            f"{'What would fit: ' + '; or '.join(cures) if cures else 'Use a smaller model'}."
        )


def seconds_on_network(cluster: Cluster, sent: float) -> float:
    """Of a ring over all GPUs in which each sends so many bytes.

    Every link of the ring carries the same; between nodes the NICs of a node share it out.
    """
    inside = sent / cluster.device.link_bytes_per_second if cluster.num_gpus > 1 else 0.0
    if cluster.num_nodes == 1:
        return inside
    return max(inside, sent / node_bytes_per_second(cluster))


def node_bytes_per_second(cluster: Cluster) -> float:
    """That leave a node, one way."""
    return cluster.nic_gbps * 1e9 / 8 * cluster.nics_per_node
