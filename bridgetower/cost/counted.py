"""Floating-point operations of one pair, counted on torch's meta device by running the code itself.

A multiplication and an addition count as two. Attention is counted in full, forward and backward: its products are
seen as the matrix products that they are (torch's counter takes its fused kernels on a CPU for nothing).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bridgetower.batch import PretrainBatch
from bridgetower.config.compute import PLAIN, ComputeConfig
from bridgetower.config.model import ModelConfig
from bridgetower.config.run import ObjectivesConfig
from bridgetower.cost.closed_form import Texts, count_micro_batch
from bridgetower.model.bridgetower import BridgeTower
from bridgetower.model.init import shapes_alone
from bridgetower.model.named_vits import is_clip_tower
from bridgetower.model.sizes import complete_model_config
from bridgetower.tasks.pretraining import PretrainTask

Result = TypeVar("Result")


class ForwardFlops(NamedTuple):
    """Of the parts of a model, forward, each run once for one pair."""

    encode_image: int
    """Vision tower and image transform."""
    encode_text: int
    """Text tower and text transform."""
    fuse: int
    """Bridges, cross-modal layers of both modalities, and poolers."""
    heads: dict[str, int]
    """MLM at every token, and ITM, where the model has them."""


def count_forward(config: ModelConfig, heads: Sequence[str], text_tokens: int) -> ForwardFlops:
    """Count the forward pass of one pair, with no work saved.

    Args:
        text_tokens: length of the caption with its start and end.
    """
    with shapes_alone():
        model = BridgeTower(config, heads)
        model.compute = PLAIN
        side = model.config.image_size_px
        pixels = torch.empty(1, 3, side, side)
        ids, mask = torch.ones(1, text_tokens, dtype=torch.long), torch.ones(1, text_tokens, dtype=torch.bool)
    image_flops, image = count_flops(lambda: model.encode_image(pixels))
    text_flops, text = count_flops(lambda: model.encode_text(ids, mask))
    fuse_flops, output = count_flops(lambda: model.fuse(text.states_KBND, image.states_KBND, mask))
    scores = {"mlm": model.mlm_logits, "itm": model.itm_logits}
    by_head = {name: count_flops(partial(score, output))[0] for name, score in scores.items() if name in heads}
    return ForwardFlops(image_flops, text_flops, fuse_flops, by_head)


def count_step(
    config: ModelConfig,
    objectives: ObjectivesConfig,
    compute: ComputeConfig,
    text_tokens: Sequence[int],
    masked_tokens: Sequence[int],
) -> float:
    """Count a pretraining step, forward and backward, per pair.

    Args:
        text_tokens: length of each caption with its start and end.
        masked_tokens: of each caption, how many are predicted.
    """
    pairs, longest = len(text_tokens), max(text_tokens)
    length_B, masked_B = np.array(text_tokens), np.array(masked_tokens)
    num_masked = int(masked_B.sum())
    with shapes_alone():
        task = PretrainTask(BridgeTower(config, objectives.heads), objectives, compute)
        side = task.model.config.image_size_px
        ids = torch.ones(pairs, longest, dtype=torch.long)
        batch = PretrainBatch(
            pixels_N3SS=torch.empty(pairs, 3, side, side, dtype=torch.uint8),
            clean_ids_BL=ids,
            masked_ids_BL=ids,
            attention_mask_BL=torch.ones(pairs, longest, dtype=torch.bool),
            mlm_index_M=torch.ones(num_masked, dtype=torch.long),
            mlm_label_M=torch.ones(num_masked, dtype=torch.long),
            mlm_weight_M=torch.ones(num_masked),
            itm_image_B=torch.ones(pairs, dtype=torch.long),
            itm_label_B=torch.ones(pairs, dtype=torch.long),
            image_id_B=torch.ones(pairs, dtype=torch.long),
            corpus_B=torch.ones(pairs, dtype=torch.long),
            num_tokens=tuple(length_B.tolist()),
            num_masked=tuple(masked_B.tolist()),
            replaced_B=torch.zeros(pairs, dtype=torch.bool),
        )
    flops, _ = count_flops(lambda: task(batch)[0].backward())
    return flops / pairs


class StepWork(NamedTuple):
    """Operations of a pair as a function of its caption's length: a straight line, as they are short."""

    without_text: float
    per_token: float

    def of_pair(self, text_tokens: float) -> float:
        """Forward and backward.

        Args:
            text_tokens: mean length of the captions with their start and end.
        """
        return self.without_text + self.per_token * text_tokens


def step_work(config: ModelConfig, objectives: ObjectivesConfig, compute: ComputeConfig) -> StepWork:
    """The work of steps with short and with longer captions, 15 % masked. What is computed anew is not work.

    By the closed form; for towers that have none, steps are counted, which takes seconds, and is to be done before
    there is a process group.
    """
    compute = dataclasses.replace(compute, recompute=(), compile=False)
    config = complete_model_config(config)

    def of_pair(tokens: int, masked: int) -> float:
        texts = Texts((tokens,) * 2, (masked,) * 2)
        if is_clip_tower(config.vision):
            return count_micro_batch(config, objectives, compute, texts, element_bytes=2).work / 2
        return count_step(config, objectives, compute, *texts)

    short, longer = of_pair(7, 1), of_pair(27, 4)
    per_token = (longer - short) / 20
    return StepWork(short - 7 * per_token, per_token)


def count_flops(run: Callable[[], Result]) -> tuple[int, Result]:
    """Count what a function computes. Returns: operations, and its result."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        result = run()
    return int(counter.get_total_flops()), result
