"""The fine-tuning tasks: each is the model with the task's heads as one module, from a batch to a loss.

Shapes: B pairs, L tokens, R rows of the cross-modal encoder, N images, P image positions, K bridged layers, D width,
C classes.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from bridgetower.batch import FinetuneBatch
from bridgetower.config.finetune import TaskName
from bridgetower.model.bridgetower import IMAGE_ROW, BridgeTower
from bridgetower.objectives.classification import classification
from bridgetower.objectives.hard_negatives import hard_negatives
from bridgetower.objectives.itc import image_text_contrast
from bridgetower.objectives.itm import image_text_matching
from bridgetower.objectives.objective import Result, mean_metric
from bridgetower.objectives.vqa import question_answering
from bridgetower.tasks.pretraining import pool_pairs

_OBJECTIVES: dict[str, Callable[[Tensor, Tensor], Result]] = {
    "vqa": question_answering,
    "snli_ve": partial(classification, "snli_ve"),
    "nlvr2": partial(classification, "nlvr2"),
}


class FinetuneTask(nn.Module):
    """The base class of all tasks: losses are summed with weight 1, metrics are merged."""

    def __init__(self, model: BridgeTower) -> None:
        """Use a model that has the task's heads and no others: a head that no loss reads would only decay."""
        super().__init__()
        self.model = model

    def forward(self, batch: FinetuneBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute a micro-batch. Returns: the loss, and metrics as (sum, count)."""
        results = self.results(batch)
        metrics = {name: value for result in results for name, value in result.metrics.items()}
        num_pairs = len(batch.replaced_B)
        metrics["replaced_fraction"] = mean_metric(batch.replaced_B.sum(), num_pairs)
        metrics["tokens_per_pair"] = mean_metric(batch.attention_mask_BL.sum(), num_pairs)
        return torch.stack([result.loss for result in results]).sum(), metrics

    @abstractmethod
    def results(self, batch: FinetuneBatch) -> list[Result]:
        """Compute the losses of a micro-batch, with their metrics."""


class ClassifierTask(FinetuneTask):
    """VQA, SNLI-VE and NLVR2: classifies each text with its image, for NLVR2 with its two images."""

    def __init__(self, model: BridgeTower, name: TaskName) -> None:
        """Use a model with the task's head.

        Args:
            name: name of the task, which is also the head's.
        """
        super().__init__(model)
        self.name = name

    def logits(self, batch: FinetuneBatch) -> Tensor:
        """Compute the head's logits, shape (B, C).

        For NLVR2 each text is encoded once and fused with each of its images; the head reads both pooled pairs.
        """
        model, mask_BL, image_B = self.model, batch.attention_mask_BL, batch.image_B
        text_KBLD = model.encode_text(batch.ids_BL, mask_BL).states_KBND
        pixels_N3SS = model.normalize(batch.pixels_N3SS)
        if self.name != "nlvr2":
            pooled = pool_pairs(self.model, text_KBLD, mask_BL, model.encode_image(pixels_N3SS).states_KBND, image_B)
        else:
            sides = pixels_N3SS.chunk(2)
            image_KNPD = torch.cat(
                [model.encode_image(side, IMAGE_ROW + row).states_KBND for row, side in enumerate(sides)], dim=1
            )
            image_R = torch.cat([image_B, image_B + len(sides[0])])
            both = pool_pairs(self.model, text_KBLD.repeat(1, 2, 1, 1), mask_BL.repeat(2, 1), image_KNPD, image_R)
            pooled = torch.cat(both.chunk(2), dim=1)
        logits_BC: Tensor = model.heads[self.name](pooled)
        return logits_BC

    def results(self, batch: FinetuneBatch) -> list[Result]:
        """Compute the loss of the task."""
        return [_OBJECTIVES[self.name](self.logits(batch), batch.target_BC)]


class RetrievalTask(FinetuneTask):
    """Retrieval: ITC over the pairs of all ranks, and ITM on each pair and on its two hard negatives."""

    def __init__(self, model: BridgeTower, group_size: int) -> None:
        """Use a model with the itm and itc heads.

        Args:
            group_size: number of consecutive pairs within which hard negatives are drawn.
        """
        super().__init__(model)
        self._group_size = group_size

    def results(self, batch: FinetuneBatch) -> list[Result]:
        """Compute ITC, and ITM on B true pairs, B texts with a wrong image and B images with a wrong text.

        Source: microsoft/BridgeTower, src/modules/objectives.py (compute_irtr_itm_itc).
        """
        model, mask_BL, head = self.model, batch.attention_mask_BL, self.model.itc_head
        image = model.encode_image(model.normalize(batch.pixels_N3SS))
        text = model.encode_text(batch.ids_BL, mask_BL)
        text_BC, image_BC = head.embed_text(text.class_BD), head.embed_image(image.class_BD)
        temperature = head.clamped_temperature()
        contrast = image_text_contrast(text_BC, image_BC, batch.image_id_B, temperature)
        wrong = hard_negatives(text_BC, image_BC, batch.image_id_B, batch.draw_B2, temperature, self._group_size)
        pair_B = torch.arange(len(mask_BL), device=mask_BL.device)
        text_R = torch.cat([pair_B, pair_B, wrong.text_B])
        image_R = torch.cat([pair_B, wrong.image_B, pair_B])
        pooled = pool_pairs(self.model, text.states_KBND[:, text_R], mask_BL[text_R], image.states_KBND, image_R)
        # A group whose pairs all show the same image has no negatives: hard_negatives then returns the pair itself,
        # which counts as a true one.
        wrong_label_B = (~wrong.has_any_B).long()
        label_R = torch.cat([torch.ones_like(wrong_label_B), wrong_label_B, wrong_label_B])
        return [contrast, image_text_matching(model.itm_head(pooled), label_R)]
