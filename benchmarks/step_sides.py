"""The sides of benchmarks/step.py: one pretraining step (forward and backward) each, of the same pairs and weights.

Shapes: B pairs, L tokens, S image side in pixels.
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from bridgetower.kernels.compiled import compile_parts
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from bridgetower.batch import PretrainBatch
from bridgetower.config.compute import ComputeConfig
from bridgetower.config.model import ModelConfig
from bridgetower.config.run import ObjectivesConfig
from bridgetower.cost.counted import count_flops
from bridgetower.interop.huggingface import to_huggingface
from bridgetower.model.bridgetower import BridgeTower
from bridgetower.tasks.pretraining import PretrainTask

OBJECTIVES = ObjectivesConfig(mlm=True, itm=True, itc=False)
MEAN_TOKENS = 12
# What the published step pads captions to.
PUBLISHED_TOKENS = 50
_FIRST_WORD = 4  # below are special ids


class Side(NamedTuple):
    """One way to compute the step."""

    name: str
    loss: Callable[[], Tensor]
    """Runs forward."""
    parameters: list[nn.Parameter]

    def step(self) -> float:
        """Forward and backward; gradients are let go."""
        loss = self.loss()
        loss.backward()
        for parameter in self.parameters:
            parameter.grad = None
        return float(loss.detach())


def caption_lengths(pairs: int, mean: float, most: int, seed: int = 0) -> list[int]:
    """Lengths with that mean, log-normal as captions are, <s> and </s> counted."""
    drawn = np.random.default_rng(seed).lognormal(np.log(mean) - 0.1, 0.4, pairs)
    lengths = np.clip(drawn.round(), 4, most).astype(int)
    while lengths.sum() != round(mean * pairs):
        wrong = 1 if lengths.sum() < mean * pairs else -1
        lengths[lengths.argmin() if wrong == 1 else lengths.argmax()] += wrong
    return [int(length) for length in lengths]


def make_batch(
    model: ModelConfig, pairs: int, device: torch.device, *, pad_to: int = 0, seed: int = 0
) -> PretrainBatch:
    """Pairs of random pixels and words, 15 % of these masked, half of the captions with another image for ITM.

    Args:
        pad_to: 0 pads to the longest caption.
    """
    rng = np.random.default_rng(seed)
    length_B = np.array(caption_lengths(pairs, MEAN_TOKENS, model.text.max_tokens))
    longest, side = pad_to or int(length_B.max()), model.image_size_px
    is_token_BL = np.arange(longest) < length_B[:, None]
    words = rng.integers(_FIRST_WORD, model.text.vocabulary_size, (pairs, PUBLISHED_TOKENS))[:, :longest]
    clean_BL = np.where(is_token_BL, words, 1)
    column = np.arange(longest)
    is_word_BL = (column > 0) & (column < length_B[:, None] - 1)
    chance_BL = rng.random((pairs, PUBLISHED_TOKENS))[:, :longest]
    is_masked_BL = is_word_BL & (chance_BL < 0.15)
    is_masked_BL[0, 1] = True
    index_M = np.flatnonzero(is_masked_BL)
    image_B = np.where(np.arange(pairs) % 2, np.roll(np.arange(pairs), 1), np.arange(pairs))
    arrays = {
        "clean_ids_BL": clean_BL,
        "masked_ids_BL": np.where(is_masked_BL, 4, clean_BL),
        "attention_mask_BL": is_token_BL,
        "mlm_index_M": index_M,
        "mlm_label_M": clean_BL.ravel()[index_M],
        "mlm_weight_M": np.full(len(index_M), 1 / len(index_M), np.float32),
        "itm_image_B": image_B,
        "itm_label_B": (image_B == np.arange(pairs)).astype(np.int64),
        "image_id_B": np.arange(pairs),
        "corpus_B": np.zeros(pairs, np.int64),
        "replaced_B": np.zeros(pairs, bool),
    }
    pixels = rng.integers(0, 256, (pairs, 3, side, side), np.uint8)
    tensors: dict[str, Any] = {name: torch.from_numpy(values).to(device) for name, values in arrays.items()}
    return PretrainBatch(
        pixels_N3SS=torch.from_numpy(pixels).to(device),
        num_tokens=tuple(length_B.tolist()),
        num_masked=tuple(is_masked_BL.sum(axis=1).tolist()),
        **tensors,
    )


def build_model(config: ModelConfig, device: torch.device, dtype: torch.dtype, dropout: float | None) -> BridgeTower:
    """A model with random weights, in training mode.

    Args:
        dropout: None keeps the preset's.
    """
    config = with_dropout(config, dropout)
    # transformers has 1e-5 everywhere.
    config = dataclasses.replace(config, fusion=dataclasses.replace(config.fusion, layer_norm_eps=1e-5))
    torch.manual_seed(0)
    return BridgeTower(config, OBJECTIVES.heads).to(device, dtype).train()


def with_dropout(config: ModelConfig, dropout: float | None) -> ModelConfig:
    """The model with this dropout everywhere; None keeps its own."""
    if dropout is None:
        return config
    return dataclasses.replace(
        config,
        text=dataclasses.replace(config.text, dropout=dropout),
        fusion=dataclasses.replace(config.fusion, dropout=dropout),
    )


def our_side(name: str, model: BridgeTower, batch: PretrainBatch, compute: ComputeConfig) -> Side:
    """Of this project. ``compute.compile`` compiles the model for good."""
    task = PretrainTask(model, OBJECTIVES, compute)
    if compute.compile:
        compile_parts(model)
    return Side(name, lambda: task(batch)[0], list(task.parameters()))


def transformers_side(model: BridgeTower, batch: PretrainBatch, *, compiled: bool) -> Side:
    """Transformers' BridgeTower: MLM and ITM each as its own forward pass."""
    masked_lm, matching = to_huggingface(model, "mlm"), to_huggingface(model, "itm")
    matching.bridgetower = masked_lm.bridgetower
    both = nn.ModuleDict({"mlm": masked_lm, "itm": matching}).train()
    both.to(model.text_pooler.weight.device, model.text_pooler.weight.dtype)
    if compiled:
        for module in masked_lm.modules():
            if type(module).__name__ in (
                "BridgeTowerBertCrossLayer",
                "BridgeTowerTextLayer",
                "BridgeTowerResidualAttention",
            ):
                module.compile()
    mask_BL, statistics, dtype = batch.attention_mask_BL.long(), model.pixel_statistics, model.text_pooler.weight.dtype
    mean, std = (torch.tensor(values, device=mask_BL.device).view(3, 1, 1) for values in statistics)

    def normalized(pixels_N3SS: Tensor) -> Tensor:
        return ((pixels_N3SS.float() / 255 - mean) / std).to(dtype)

    def loss() -> Tensor:
        pixels = normalized(batch.pixels_N3SS)
        words_BLV = masked_lm(pixel_values=pixels, input_ids=batch.masked_ids_BL, attention_mask=mask_BL).logits
        label_S = torch.full((mask_BL.numel(),), -100, device=mask_BL.device)
        label_S = label_S.index_put((batch.mlm_index_M,), batch.mlm_label_M)
        mlm = F.cross_entropy(words_BLV.flatten(0, 1).float(), label_S)
        shown = normalized(batch.pixels_N3SS[batch.itm_image_B])
        match_B2 = matching(pixel_values=shown, input_ids=batch.clean_ids_BL, attention_mask=mask_BL).logits
        return mlm + F.cross_entropy(match_B2.float(), batch.itm_label_B)

    return Side("transformers", loss, list(both.parameters()))


def kept_bytes(side: Side) -> int:
    """Bytes that are kept between forward and backward: by autograd, and what recomputed layers start from."""
    there = {parameter.untyped_storage().data_ptr() for parameter in side.parameters}
    there |= {tensor.untyped_storage().data_ptr() for tensor in _living_tensors()}
    kept: dict[int, Tensor] = {}  # tensors, so that no address is used again

    def note(tensor: Tensor) -> Tensor:
        bare = tensor.detach()  # an operator's own result would hold the operator, and this the result
        if bare.untyped_storage().data_ptr() not in there:
            kept.setdefault(bare.untyped_storage().data_ptr(), bare)
        return bare

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = side.loss()
    for tensor in _living_tensors():
        note(tensor)
    del loss
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def _living_tensors() -> list[Tensor]:
    """All that Python holds."""
    gc.collect()
    return [thing for thing in gc.get_objects() if issubclass(type(thing), Tensor) and thing.layout == torch.strided]


class _BytesMoved(TorchDispatchMode):
    """Adds up what every operator reads and writes; views move nothing."""

    num_bytes = num_operators = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        schema = func._schema
        is_view = any(out.alias_info is not None and not out.alias_info.is_write for out in schema.returns)
        if not is_view and func.namespace == "aten" and "empty" not in schema.name and "detach" not in schema.name:
            self.num_operators += 1
            for value in (
                *torch.utils._pytree.tree_leaves((args, kwargs or {})),
                *torch.utils._pytree.tree_leaves(result),
            ):
                if isinstance(value, Tensor):
                    self.num_bytes += min(value.numel() * value.element_size(), value.untyped_storage().nbytes())
        return result


def flops(side: Side) -> int:
    """Floating-point operations of one step."""
    return count_flops(side.step)[0]


def moved(side: Side) -> tuple[int, int]:
    """Bytes that the operators of one step move, and how many operators there are."""
    with _BytesMoved() as mode:  # type: ignore[no-untyped-call]
        side.step()
    return mode.num_bytes, mode.num_operators


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Callable[[], int]]:
    """Gives a function that says how many bytes more than before were in use at once."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield lambda: torch.cuda.max_memory_allocated(device) - before
        return
    give_memory_back()  # so that it is not counted before
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted anew
    before = _status("VmRSS")
    yield lambda: _status("VmHWM") - before


def give_memory_back() -> None:
    """Hand what was freed back to the system."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))
