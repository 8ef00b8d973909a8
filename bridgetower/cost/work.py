"""What a cost is made of: operations, and bytes that are kept between the forward and the backward pass."""

from __future__ import annotations

from typing import NamedTuple

PARTS = ("vision", "text", "fusion")
"""Parts of the model that compute.recompute may name."""


class Work(NamedTuple):
    """Cost of some layers."""

    kept: int = 0
    """Bytes kept from the forward pass for the backward pass."""
    forward: int = 0
    """Operations of the forward pass; a multiplication and an addition are two."""
    backward: int = 0
    """Operations of the backward pass."""

    def __add__(self, other: object) -> Work:  # NamedTuple's own would join the tuples
        assert isinstance(other, Work)
        return Work(self.kept + other.kept, self.forward + other.forward, self.backward + other.backward)


class PartCost(NamedTuple):
    """Cost of one part of the model."""

    kept: int
    """Bytes kept from the forward pass for the backward pass."""
    largest_layer: int
    """Bytes that the part's largest layer keeps while it is recomputed; 0 where nothing is."""
    forward: int
    """Operations of the forward pass."""
    backward: int
    """Operations of the backward pass."""
    repeated: int
    """Operations of recomputing layers in the backward pass."""
    pieces: dict[str, int]
    """Operations by component, forward and backward."""


class StepCost(NamedTuple):
    """Cost of one micro-batch, forward and backward."""

    parts: dict[str, PartCost]
    """Cost by part of the model: vision, text, fusion, heads."""
    bridged: int
    """Bytes of the gradients of the towers' bridged states, which wait for the towers' backward pass."""
    passing: int
    """Bytes of the gradients of states that flow from layer to layer."""
    first_gradient: int
    """Bytes of the gradient of MLM's decoder, which exists before anything kept is freed."""

    @property
    def kept(self) -> int:
        """Bytes kept from the forward pass for the backward pass."""
        return sum(part.kept for part in self.parts.values())

    @property
    def work(self) -> int:
        """Operations, forward and backward, without those that are repeated."""
        return sum(part.forward + part.backward for part in self.parts.values())

    @property
    def pieces(self) -> dict[str, int]:
        """Operations by component, forward and backward.

        The components are vision_tower, image_transform (to the fusion width, for the bridges), text_tower (with its
        transform), bridges, text_stream and image_stream (of the cross-modal layers), and heads (with poolers).
        """
        return {name: work for part in self.parts.values() for name, work in part.pieces.items()}

    @property
    def repeated(self) -> int:
        """Operations of recomputing layers in the backward pass."""
        return sum(part.repeated for part in self.parts.values())

    @property
    def workspace(self) -> int:
        """Bytes that are needed beside what is kept, at the peak.

        The backward pass goes from the heads to the towers and frees what it has read. Where layers are recomputed,
        one layer at a time exists as a whole.
        """
        vision, text = self.parts["vision"], self.parts["text"]
        towers = vision.kept + text.kept + self.bridged
        peak = max(
            self.kept + self.parts["fusion"].largest_layer,
            towers + text.largest_layer if text.largest_layer else 0,
            towers - text.kept + vision.largest_layer if vision.largest_layer else 0,
        )
        return max(peak - self.kept + self.passing, self.first_gradient)


class OperatorMemory(NamedTuple):
    """What the operators of one type of device keep for the backward pass beside their results."""

    statistic_bytes: int | None
    """Bytes of a norm's mean or deviation; None: those of an element of the states."""
    mask_bytes: int
    """Bytes per element of a dropout mask."""
    drops_inside: bool
    """True where attention draws its dropout inside the kernel; False where it keeps all attention probabilities, and a
    byte for each."""
    draws_again: bool
    """True where compute.fuse_kernels keeps no mask of states, because the backward pass draws it again."""
    generator_bytes: int
    """Bytes of the state of the random number generator, which is saved for every layer that is recomputed."""


CUDA = OperatorMemory(statistic_bytes=4, mask_bytes=1, drops_inside=True, draws_again=True, generator_bytes=16)
CPU = OperatorMemory(
    statistic_bytes=None,
    mask_bytes=1,
    drops_inside=False,
    draws_again=False,
    generator_bytes=5056,
)
