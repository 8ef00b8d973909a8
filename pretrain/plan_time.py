"""The micro-batches and recomputed parts that a run may choose from, with their memory, network and time."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

from bridgetower.config.run import RunConfig
from bridgetower.cost.captions import typical_captions
from bridgetower.cost.devices import DEVICES, Device
from bridgetower.cost.micro_batch import count_micro_batch
from bridgetower.cost.work import PARTS, StepCost
from bridgetower.data.order import Cut
from bridgetower.errors import ConfigError
from bridgetower.step.cuda_graphs import can_be_recorded
from pretrain.plan_memory import STAGES, Parameters, Splitting, States, count_states, why_not_offered

# CUDA's context, NCCL's buffers and libraries' workspaces; an assumption of docs/plan.md.
RESERVED_BYTES = 1_500_000_000
# Images per second that a core decodes, crops and hands over, by the key in a plan's JSON; docs/plan.md.
DECODES_PER_CORE = {"pictures of 304 px": 1000, "pictures of 640 x 480": 520}
# Bytes per parameter that the optimizer moves: the gradient is read; the weight and two means are read and written.
_OPTIMIZER_TRAFFIC = 4 + 2 * (4 + 8)


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """The GPUs that a run is planned for, and their network."""

    gpu: str
    """A key of DEVICES."""
    device: Device
    num_gpus: int
    gpus_per_node: int
    nic_gbps: float
    """Speed of one NIC, one way, in 10^9 bits per second."""
    nics_per_node: int
    mfu: float
    """Fraction of the device's peak operations per second that a step reaches."""

    @property
    def num_nodes(self) -> int:
        """Number of nodes that hold the GPUs."""
        return -(-self.num_gpus // self.gpus_per_node)

    def peak(self, splitting: Splitting) -> float:
        """Return the peak operations per second of a GPU in the run's precision."""
        return self.device.bf16_flops if splitting.bf16 else self.device.fp32_flops


class Choice(NamedTuple):
    """One way to run a model on a GPU: ZeRO stage, micro-batch and recomputed parts, and the memory that it needs."""

    stage: int
    micro_batch: int
    recompute: tuple[str, ...]
    states: States
    kept: int
    """Bytes of activations."""
    workspace: int
    """Bytes that are needed beside the activations, at the peak."""
    total: int
    """Bytes of everything, with what is reserved."""
    fits: bool
    offered: bool
    """True if pretrain/train.py trains with the stage."""


class Timing(NamedTuple):
    """Seconds of one step of a choice, and bytes that each GPU sends."""

    accumulation: int
    """Micro-steps per step."""
    compute: float
    """Seconds per step of forward and backward passes."""
    backward: float
    """Seconds per micro-step of the backward pass."""
    reduce_bytes: float
    """Bytes of gradients that a GPU sends per step."""
    reduce: float
    """Seconds of one reduction of gradients."""
    reduce_exposed: float
    """Seconds per step that the GPU waits for gradients."""
    gather_bytes: float
    """Bytes of weights that a GPU sends per step."""
    gather: float
    """Seconds per step of gathering weights."""
    optimizer: float
    """Seconds per step of the optimizer."""

    @property
    def step(self) -> float:
        """Seconds per step."""
        return self.compute + self.reduce_exposed + self.gather + self.optimizer


class Planner:
    """Finds the choices for one run, and how long their steps take."""

    def __init__(self, config: RunConfig, parameters: Parameters, splitting: Splitting, text_tokens: float) -> None:
        """Keep what all choices have in common.

        Args:
            config: its model is complete.
            text_tokens: mean length of captions, with <s> and </s>.
        """
        self.config, self.parameters, self.splitting, self.text_tokens = config, parameters, splitting, text_tokens
        self.cost = lru_cache(maxsize=None)(self._cost)
        """Cost of a micro-batch, by its pairs, recomputed parts, and the number of GPUs."""

    def _cost(self, num_pairs: int, recompute: tuple[str, ...], num_gpus: int) -> StepCost:
        config = self.config
        captions = typical_captions(
            num_pairs, self.text_tokens, config.model.text.max_tokens, config.objectives.mlm_probability
        )
        return count_micro_batch(
            config.model,
            config.objectives,
            replace(config.compute, recompute=recompute),
            captions,
            element_bytes=self.splitting.element,
            num_images=num_pairs + (num_pairs // 2 if self.reads_negatives else 0),
            num_frozen=(config.optim.frozen_vision_layers, config.optim.frozen_text_layers),
            num_contrasted=num_pairs * num_gpus,
        )

    @property
    def reads_negatives(self) -> bool:
        """True if half of the pairs bring a second image, which is there only as a negative."""
        return self.config.objectives.itm and self.config.data.itm_negatives == "corpus"

    def micro_batches(self, num_gpus: int, group: int | None = None) -> list[int]:
        """Return the micro-batches that divide the global batch and hold whole groups of negatives, smallest first.

        Args:
            group: pairs of a group of negatives; None: data.negative_group_size.

        Raises:
            ConfigError: there is none.
        """
        data = self.config.data
        group = group or data.negative_group_size
        per_gpu = data.global_batch_size // num_gpus
        sizes = [size for size in range(group, per_gpu + 1, group) if data.global_batch_size % (size * num_gpus) == 0]
        if not sizes:
            whole = group * num_gpus
            fewer = next(n for n in range(num_gpus, 0, -1) if n == 1 or data.global_batch_size % (group * n) == 0)
            suggestions = [f"--gpus={fewer}", f"--data.global_batch_size={-(-data.global_batch_size // whole) * whole}"]
            if per_gpu > 1 and data.global_batch_size % num_gpus == 0:
                suggestions.append(f"--data.negative_group_size={per_gpu} (draws other negatives)")
            raise ConfigError(
                f"--gpus={num_gpus} does not divide data.global_batch_size={data.global_batch_size} into micro-batches "
                f"of whole groups of {group} pairs, within which negatives are drawn: {group} x {num_gpus} = {whole}. "
                f"Use {', or '.join(suggestions)}."
            )
        return sizes

    def choices(self, cluster: Cluster, sizes: Sequence[int]) -> Iterator[Choice]:
        """Yield every combination of ZeRO stage, micro-batch and recomputed parts."""
        recomputes = [parts for count in range(len(PARTS) + 1) for parts in itertools.combinations(PARTS, count)]
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
        """Return the bytes of the static buffers that CUDA graphs leave their gradients in."""
        compute = replace(self.config.compute, recompute=recompute)
        is_recorded = self.splitting.bf16 and can_be_recorded(self.config.objectives, compute)
        return self.splitting.element * self.parameters.trained if is_recorded else 0

    def best(self, cluster: Cluster, sizes: Sequence[int]) -> Choice | None:
        """Return the fastest choice that fits, with the run's ZeRO stage; of equally fast ones the smallest."""
        fitting = [c for c in self.choices(cluster, sizes) if c.fits and c.stage == self.splitting.stage]
        return min(fitting, key=lambda c: (self.time(cluster, c).step, c.total), default=None)

    def time(self, cluster: Cluster, choice: Choice) -> Timing:
        """Compute how long a step of a choice takes."""
        cut = Cut(self.config.data.global_batch_size, choice.micro_batch, cluster.num_gpus)
        cost = self.cost(choice.micro_batch, choice.recompute, cluster.num_gpus)
        speed = cluster.peak(self.splitting) * cluster.mfu
        micro_step = (cost.work + cost.repeated) / speed
        backward = sum(part.backward + part.repeated for part in cost.parts.values()) / speed
        size = self.splitting.element * self.parameters.trained
        sent_fraction = (cluster.num_gpus - 1) / cluster.num_gpus
        reductions = cut.accumulation_steps if choice.stage >= 2 else 1
        # DeepSpeed 0.19.8 reduces buckets with all-reduce, which sends them twice.
        reduce_bytes, gather_bytes = 2 * sent_fraction * size, (sent_fraction * size if choice.stage else 0.0)
        reduce, gather = (seconds_on_network(cluster, sent) for sent in (reduce_bytes, gather_bytes))
        # The last bucket has no backward pass left to overlap with.
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
        """Return the error that says that nothing fits, and what would."""
        choices = self.choices(cluster, sizes)
        least = min((c for c in choices if c.stage == self.splitting.stage), key=lambda c: c.total)
        suggestions = []
        group = self.config.data.negative_group_size
        for smaller in (group // 2**n for n in range(1, int(math.log2(group)))):
            fitting = self.best(cluster, self.micro_batches(cluster.num_gpus, smaller)) if smaller > 1 else None
            if fitting is not None:
                suggestions.append(
                    f"--data.negative_group_size={smaller} (draws other negatives) with "
                    f"--data.micro_batch_size={fitting.micro_batch}"
                )
                break
        larger = [name for name, device in DEVICES.items() if device.memory_gb * 1e9 >= least.total]
        if larger:
            suggestions.append("one of the GPUs " + ", ".join(sorted(larger, key=lambda name: DEVICES[name].memory_gb)))
        return ConfigError(
            f"{self.config.name} fits on no --gpu={cluster.gpu} ({cluster.device.memory_gb:g} GB) under ZeRO stage "
            f"{self.splitting.stage}: with --data.micro_batch_size={least.micro_batch} and "
            f"{','.join(least.recompute) or 'nothing'} recomputed it still needs {least.total / 1e9:.1f} GB, "
            f"{least.states.total / 1e9:.1f} GB of it for weights, optimizer, gradients and buckets. "
            f"{'What would fit: ' + '; or '.join(suggestions) if suggestions else 'Use a smaller model'}."
        )


def seconds_on_network(cluster: Cluster, sent: float) -> float:
    """Return the seconds of a collective on a ring over all GPUs.

    Every link of the ring carries the same bytes; between nodes they are spread over the NICs of a node.

    Args:
        sent: bytes that each GPU sends.
    """
    inside = sent / cluster.device.link_bytes_per_second if cluster.num_gpus > 1 else 0.0
    if cluster.num_nodes == 1:
        return inside
    return max(inside, sent / node_bytes_per_second(cluster))


def node_bytes_per_second(cluster: Cluster) -> float:
    """Return how many bytes per second can leave a node."""
    return cluster.nic_gbps * 1e9 / 8 * cluster.nics_per_node
