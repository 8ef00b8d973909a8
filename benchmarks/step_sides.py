"""The sides of benchmarks/step.py: forward and backward of one pretraining step, with the same pairs and weights.

Our side is built by the functions that ``pretrain/train.py`` calls. The others get its weights.

Shapes: B pairs, L tokens, S image side in pixels, N images, V vocabulary, X token slots of all captions.
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
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from bridgetower.batch import PretrainBatch
from bridgetower.config.compute import ComputeConfig
from bridgetower.config.model import ModelConfig
from bridgetower.config.run import ObjectivesConfig
from bridgetower.cost.counted import count_flops
from bridgetower.cost.published import PUBLISHED_TOKENS
from bridgetower.interop.huggingface import to_huggingface
from bridgetower.kernels.choose import choose_ops
from bridgetower.kernels.ops import Ops
from bridgetower.model.bridgetower import BridgeTower
from bridgetower.model.plain import PlainBridgeTower
from bridgetower.tasks.pretraining import PretrainTask
from pretrain.assemble import build_task
from pretrain.presets import base_4m

OBJECTIVES = ObjectivesConfig(mlm=True, itm=True, itc=False)
MEAN_TOKENS = 12
"""Mean caption length of the four pretraining corpora, with <s> and </s>."""
_FIRST_WORD = 4  # smaller ids are special tokens
# The modules that are compiled one by one; a whole model would take minutes and be compiled anew for each length.
_TRANSFORMERS_LAYERS = ("BridgeTowerBertCrossLayer", "BridgeTowerTextLayer", "BridgeTowerResidualAttention")
_PLAIN_LAYERS = ("VisionBlock", "TextLayer", "CrossModalLayer")


class Side(NamedTuple):
    """One way to compute the step."""

    loss: Callable[[], Tensor]
    """Runs the forward pass."""
    parameters: list[nn.Parameter]
    """Parameters that get gradients."""
    kernels: str = ""
    """Name of the operations that compute our layers; empty on other sides."""

    def step(self) -> float:
        """Run forward and backward, drop the gradients, and return the loss."""
        loss = self.loss()
        loss.backward()
        for parameter in self.parameters:
            parameter.grad = None
        return float(loss.detach())


def caption_lengths(pairs: int, mean: float, longest: int, seed: int = 0) -> list[int]:
    """Return log-normal caption lengths with this mean, <s> and </s> included."""
    drawn = np.random.default_rng(seed).lognormal(np.log(mean) - 0.1, 0.4, pairs)
    lengths = np.clip(drawn.round(), 4, longest).astype(int)
    while lengths.sum() != round(mean * pairs):
        step = 1 if lengths.sum() < mean * pairs else -1
        lengths[lengths.argmin() if step == 1 else lengths.argmax()] += step
    return [int(length) for length in lengths]


def make_batch(
    model: ModelConfig, pairs: int, device: torch.device, *, pad_to: int = 0, seed: int = 0
) -> PretrainBatch:
    """Return pairs of random pixels and words; 15 % of the words are masked, and ITM swaps half of the images.

    Args:
        pad_to: number of tokens that captions are padded to; 0 pads to the longest caption.
    """
    rng = np.random.default_rng(seed)
    length_B = np.array(caption_lengths(pairs, MEAN_TOKENS, model.text.max_tokens))
    longest, side = pad_to or int(length_B.max()), model.image_size_px
    is_token_BL = np.arange(longest) < length_B[:, None]
    # Drawn for the longest caption there may be, so that padding changes neither words nor masks.
    words = rng.integers(_FIRST_WORD, model.text.vocabulary_size, (pairs, PUBLISHED_TOKENS))[:, :longest]
    clean_BL = np.where(is_token_BL, words, 1)
    column = np.arange(longest)
    is_word_BL = (column > 0) & (column < length_B[:, None] - 1)
    chance_BL = rng.random((pairs, PUBLISHED_TOKENS))[:, :longest]
    is_masked_BL = is_word_BL & (chance_BL < 0.15)
    is_masked_BL[0, 1] = True  # MLM needs a masked token
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


def make_padded_batch(model: ModelConfig, pairs: int, device: torch.device) -> PretrainBatch:
    """Return the pairs of ``make_batch`` with captions padded as in the published step."""
    return make_batch(model, pairs, device, pad_to=min(PUBLISHED_TOKENS, model.text.max_tokens))


def build_our_task(
    config: ModelConfig,
    compute: ComputeConfig,
    device: torch.device,
    dtype: torch.dtype,
    *,
    dropout: float | None = None,
    ops: Ops | None = None,
) -> PretrainTask:
    """Build model and objectives as ``pretrain/train.py`` does, with random weights and in training mode.

    Args:
        dropout: None keeps the model's own.
        ops: None: what a run with these settings chooses on this device.
    """
    config = with_dropout(config, dropout)
    # transformers has 1e-5 in all norms.
    config = dataclasses.replace(config, fusion=dataclasses.replace(config.fusion, layer_norm_eps=1e-5))
    run = dataclasses.replace(base_4m(), model=config, objectives=OBJECTIVES, compute=compute)
    ops = ops or choose_ops(device, fuse_kernels=compute.fuse_kernels, compiled=compute.compile)
    with device:  # a CPU takes long to draw 900 million weights
        return build_task(run, ops).to(device, dtype).train()


def with_dropout(config: ModelConfig, dropout: float | None) -> ModelConfig:
    """Return the model's settings with one dropout everywhere; None keeps its own."""
    if dropout is None:
        return config
    return dataclasses.replace(
        config,
        text=dataclasses.replace(config.text, dropout=dropout),
        fusion=dataclasses.replace(config.fusion, dropout=dropout),
    )


def our_side(task: PretrainTask, batch: PretrainBatch) -> Side:
    """Return this project's step."""
    return Side(lambda: task(batch)[0], list(task.parameters()), task.model.ops.name)


def plain_side(model: BridgeTower, batch: PretrainBatch, *, compiled: bool = False) -> Side:
    """Return the step of ``bridgetower/model/plain.py``, with the weights of ``model``."""
    plain = copy_to_plain(model)
    if compiled:
        _compile_layers(plain, _PLAIN_LAYERS)
    normalize = _normalizer(model)

    def loss() -> Tensor:
        losses = plain.losses(normalize(batch.pixels_N3SS), batch)
        return torch.stack(list(losses.values())).sum()

    return Side(loss, list(plain.parameters()))


def copy_to_plain(model: BridgeTower) -> PlainBridgeTower:
    """Return the plain model with the weights, device, dtype and mode of ``model``."""
    weight = model.text_pooler.weight
    with weight.device:
        plain = PlainBridgeTower(model.config, OBJECTIVES.heads).to(weight.device, weight.dtype)
    plain.load_state_dict(model.state_dict(), strict=True)
    return plain.train(model.training)


def transformers_side(model: BridgeTower, batch: PretrainBatch, *, compiled: bool = False) -> Side:
    """Return the step of transformers' BridgeTower, with the weights of ``model``: a forward pass per objective."""
    masked_lm, matching = to_huggingface(model, "mlm"), to_huggingface(model, "itm")
    matching.bridgetower = masked_lm.bridgetower
    both = nn.ModuleDict({"mlm": masked_lm, "itm": matching}).train(model.training)
    both.to(model.text_pooler.weight.device, model.text_pooler.weight.dtype)
    if compiled:
        _compile_layers(masked_lm, _TRANSFORMERS_LAYERS)
    mask_BL, normalize = batch.attention_mask_BL.long(), _normalizer(model)

    def loss() -> Tensor:
        pixels = normalize(batch.pixels_N3SS)
        words_BLV = masked_lm(pixel_values=pixels, input_ids=batch.masked_ids_BL, attention_mask=mask_BL).logits
        label_X = torch.full((mask_BL.numel(),), -100, device=mask_BL.device)
        label_X = label_X.index_put((batch.mlm_index_M,), batch.mlm_label_M)
        mlm = F.cross_entropy(words_BLV.flatten(0, 1).float(), label_X)
        shown = normalize(batch.pixels_N3SS[batch.itm_image_B])
        match_B2 = matching(pixel_values=shown, input_ids=batch.clean_ids_BL, attention_mask=mask_BL).logits
        return mlm + F.cross_entropy(match_B2.float(), batch.itm_label_B)

    return Side(loss, list(both.parameters()))


def _compile_layers(model: nn.Module, class_names: tuple[str, ...]) -> None:
    for module in model.modules():
        if type(module).__name__ in class_names:
            module.compile()


def _normalizer(model: BridgeTower) -> Callable[[Tensor], Tensor]:
    """Return ``model.normalize`` without the model, whose memory another side does not need."""
    weight, statistics = model.text_pooler.weight, model.pixel_statistics
    dtype = weight.dtype
    mean, std = (torch.tensor(values, device=weight.device).view(3, 1, 1) for values in statistics)
    return lambda pixels_N3SS: ((pixels_N3SS.float() / 255 - mean) / std).to(dtype)


def kept_bytes(side: Side) -> int:
    """Return the bytes that are kept between forward and backward: by autograd, and as inputs of recomputed layers."""
    addresses_before = {parameter.untyped_storage().data_ptr() for parameter in side.parameters}
    addresses_before |= {tensor.untyped_storage().data_ptr() for tensor in _living_tensors()}
    kept: dict[int, Tensor] = {}  # holds the tensors, so that no address is used again

    def note(tensor: Tensor) -> Tensor:
        bare = tensor.detach()  # an operator's own result would hold the operator, and the operator this result
        if bare.untyped_storage().data_ptr() not in addresses_before:
            kept.setdefault(bare.untyped_storage().data_ptr(), bare)
        return bare

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = side.loss()
    for tensor in _living_tensors():
        note(tensor)
    del loss
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def _living_tensors() -> list[Tensor]:
    """Return all strided tensors that Python holds."""
    gc.collect()
    # type() instead of isinstance, which would import what lazy objects stand for.
    return [thing for thing in gc.get_objects() if issubclass(type(thing), Tensor) and thing.layout == torch.strided]


class _BytesMoved(TorchDispatchMode):
    """Adds up the bytes that every operator reads and writes; views move nothing."""

    num_bytes = num_operators = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        schema = func._schema
        is_view = any(out.alias_info is not None and not out.alias_info.is_write for out in schema.returns)
        is_ours_or_torchs = func.namespace in ("aten", "bridgetower")
        if is_ours_or_torchs and not is_view and "empty" not in schema.name and "detach" not in schema.name:
            self.num_operators += 1
            for value in (
                *torch.utils._pytree.tree_leaves((args, kwargs or {})),
                *torch.utils._pytree.tree_leaves(result),
            ):
                if isinstance(value, Tensor):
                    self.num_bytes += min(value.numel() * value.element_size(), value.untyped_storage().nbytes())
        return result


def count_step_flops(side: Side) -> int:
    """Return the floating-point operations of one step."""
    return count_flops(side.step)[0]


def count_moved_bytes(side: Side) -> tuple[int, int]:
    """Return the bytes that the operators of one step move, and the number of operators."""
    with _BytesMoved() as mode:  # type: ignore[no-untyped-call]
        side.step()
    return mode.num_bytes, mode.num_operators


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Callable[[], int]]:
    """Yield a function that returns the peak of the bytes that were in use beyond those in use before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield lambda: torch.cuda.max_memory_allocated(device) - before
        return
    release_memory()  # so that freed memory is not counted as in use
    Path("/proc/self/clear_refs").write_text("5")  # restarts the peak
    before = _read_status("VmRSS")
    yield lambda: _read_status("VmHWM") - before


def release_memory() -> None:
    """Return freed memory to the system."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def _read_status(name: str) -> int:
    """Return a size of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))
