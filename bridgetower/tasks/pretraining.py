"""The pretraining task: the model and its objectives as one module, from a batch to a loss.

Shapes: B pairs, L tokens, R rows of the cross-modal encoder, N images, T tokens of all texts (in scoring: captions),
M masked tokens, K bridged layers, P image positions, D width, C contrastive width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bridgetower.batch import PretrainBatch
from bridgetower.config.compute import ComputeConfig
from bridgetower.config.run import ObjectivesConfig
from bridgetower.dist import any_rank, world_size
from bridgetower.model.bridgetower import BridgeTower
from bridgetower.model.heads import linear_in_float32
from bridgetower.model.packed import padded
from bridgetower.objectives.itc import image_text_contrast
from bridgetower.objectives.itm import image_text_matching
from bridgetower.objectives.mlm import masked_language_modeling
from bridgetower.objectives.objective import Result, mean_metric
from bridgetower.step.cuda_graphs import RecordedStep, Stages
from bridgetower.step.plan import Pass, StepRows, can_be_recorded, plan_rows, read_columns, room_for


class States(NamedTuple):
    """What the towers give for a step."""

    text_KTD: Tensor
    last_TD: Tensor
    """Of the text tower's last layer as they leave it."""
    image_KNPD: Tensor
    class_ND: Tensor
    """Class tokens of the vision tower's last layer as they leave it."""


class Features(NamedTuple):
    """Encoded images or captions of a held-out split."""

    states_KBND: Tensor
    embedding_BC: Tensor | None
    """Unit vectors for retrieval by ITC; None without it."""


def pool_pairs(model: BridgeTower, text_KRLD: Tensor, mask_RL: Tensor, image_KNPD: Tensor, image_R: Tensor) -> Tensor:
    """The pooled states of encoded pairs, shape (R, 2 D). Of the last layer nothing else is computed.

    Args:
        image_R: the image of each text.
    """
    num_rows = len(mask_RL)
    wanted = read_columns(mask_RL, np.zeros(num_rows, np.int64), np.ones(num_rows, np.int64), images=True)
    text_RD, image_RD = model.fuse_rows(text_KRLD.flatten(1, 2), padded(mask_RL), image_KNPD, image_R, wanted)
    return model.pool(text_RD, image_RD)


class PretrainTask(nn.Module):
    """BridgeTower with the pretraining objectives that are switched on."""

    def __init__(
        self,
        model: BridgeTower,
        objectives: ObjectivesConfig,
        compute: ComputeConfig | None = None,
        corpora: Sequence[str] = (),
    ) -> None:
        """Take a model with a head for each objective.

        Args:
            corpora: names of the corpora that pairs are of; with two or more each has metrics of its own.

        Parameters that no active objective reads get no gradient; they are frozen, as DeepSpeed would still decay
        them (DeepSpeed 0.19.8 steps every parameter of its groups).
        """
        super().__init__()
        self.model, self.objectives = model, objectives
        self.corpora = tuple(corpora) if len(corpora) > 1 else ()
        model.compute = compute or ComputeConfig()
        self._recorded = RecordedStep(self, Stages(self._encode_recorded, self._finish_recorded))
        self._agreed: dict[Any, bool] = {}
        if not objectives.itm:
            self._freeze_what_only_itm_reads()

    def _freeze_what_only_itm_reads(self) -> None:
        model = self.model
        parts: list[nn.Module] = [model.text_pooler, model.image_pooler]
        if model.config.fusion.num_layers:
            parts.append(model.cross_modal.image_layers[-1])
        elif not self.objectives.itc:
            parts.append(model.vision_tower)  # without cross-modal layers MLM sees no image
        for part in parts:
            part.requires_grad_(False)

    def forward(self, batch: PretrainBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """One pretraining step of a micro-batch: each image runs through the vision tower once.

        Returns: the sum of the losses (weight 1 each, as published), and metrics as (sum, count).
        """
        compute, pixels_N3SS = self.model.step_compute, batch.pixels_N3SS
        if self._records(compute):
            rows = plan_rows(batch, self.objectives, compute, room_for(batch))
            loss, metrics = self._recorded((pixels_N3SS, rows), (compute, self.corpora))
        else:
            if not compute.share_images:
                pixels_N3SS = torch.cat([pixels_N3SS, pixels_N3SS[batch.itm_image_B]])
            rows, states = self._encode(pixels_N3SS, lambda: plan_rows(batch, self.objectives, compute))
            loss, metrics = self._finish(rows, states)
        num_pairs = len(batch.replaced_B)
        metrics["replaced_fraction"] = mean_metric(batch.replaced_B.sum(), num_pairs)
        metrics["tokens_per_pair"] = mean_metric(batch.attention_mask_BL.sum(), num_pairs)
        return loss, metrics

    def _records(self, compute: ComputeConfig) -> bool:
        """Whether the next step is recorded.

        A rule of the run, not of the batch or the node: gradients become ready in another order then, and DeepSpeed
        adds up what stands at the same place on all ranks.
        """
        if not self.training or not torch.is_grad_enabled() or not can_be_recorded(self.objectives, compute):
            return False
        weight = self.model.text_pooler.weight
        key = compute, weight.dtype, weight.device
        if key not in self._agreed:
            longest = self.model.config.text.max_tokens
            can = self.model.takes_rooms(longest) and any(part.requires_grad for part in self.parameters())
            self._agreed[key] = can if world_size() == 1 else not any_rank(not can, weight.device)
        return self._agreed[key]

    def train(self, mode: bool = True) -> PretrainTask:
        """As of every module. Evaluation gets the memory of recorded steps."""
        if not mode:
            self._recorded.forget()
        return super().train(mode)

    def _encode_recorded(self, inputs: tuple[Tensor, StepRows]) -> States:
        pixels_N3SS, rows = inputs
        return self._encode(pixels_N3SS, lambda: rows)[1]

    def _finish_recorded(
        self, inputs: tuple[Tensor, StepRows], states: Sequence[Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return self._finish(inputs[1], States(*states))

    def _encode(self, pixels_N3SS: Tensor, plan: Callable[[], StepRows]) -> tuple[StepRows, States]:
        """Run both towers.

        Args:
            plan: called when the device has work for a while.
        """
        model = self.model
        texts: list[tuple[StepRows, Tensor, Tensor]] = []

        def encode_texts() -> None:
            rows = plan()
            texts.append((rows, *model.encode_tokens(rows.ids_T, rows.column_T, rows.layout)))

        # The host takes longer to ask for the many small products of texts than a GPU to compute them. In the middle of
        # the vision tower, where the GPU has enough to do, both here and in the backward pass, nothing waits for it.
        image = model.encode_image(model.normalize(pixels_N3SS), meanwhile=encode_texts)
        ((rows, text_KTD, last_TD),) = texts
        return rows, States(text_KTD, last_TD, image.states_KBND, image.class_BD)

    def _finish(self, rows: StepRows, states: States) -> tuple[Tensor, dict[str, Tensor]]:
        """From the towers' states to the sum of the losses, and metrics."""
        model, results = self.model, list[Result]()
        for part in rows.passes:
            results += self._fused_objectives(rows, part, states.text_KTD, states.image_KNPD)
        if self.objectives.itc:
            head = model.itc_head
            text_BC = head.embed_text(states.last_TD[rows.class_B])
            image_BC = head.embed_image(states.class_ND[rows.order_B])
            results.append(image_text_contrast(text_BC, image_BC, rows.image_id_B, head.clamped_temperature()))
        loss = torch.stack([result.loss for result in results]).sum()
        metrics = {name: value for result in results for name, value in result.metrics.items()}
        if self.corpora:
            metrics |= self._by_corpus(rows, results)
        return loss, metrics

    def _by_corpus(self, rows: StepRows, results: Sequence[Result]) -> dict[str, Tensor]:
        """Every loss and accuracy of each corpus alone, and its share of the pairs."""
        is_of_BC = F.one_hot(rows.corpus_B, len(self.corpora)).float()
        # A product has one order of adding up; index_add_ on a GPU has not.
        found = {"share": (is_of_BC.sum(dim=0), torch.full_like(is_of_BC[0], len(is_of_BC)))}
        is_of_BC = F.pad(is_of_BC, (0, 0, 0, 1))  # empty places are of none
        for result in results:
            for name, value_X in result.values.items():
                pair_X = rows.mlm_pair_M if name.endswith("/mlm") else rows.order_B
                is_of_XC = is_of_BC[pair_X]
                found[name] = (value_X.float() @ is_of_XC, is_of_XC.sum(dim=0))
        return {
            f"corpus/{corpus}/{name}": torch.stack([total_C[number], count_C[number]])
            for name, (total_C, count_C) in found.items()
            for number, corpus in enumerate(self.corpora)
        }

    def _fused_objectives(self, rows: StepRows, part: Pass, text_KTD: Tensor, image_KNPD: Tensor) -> list[Result]:
        """MLM on (masked caption, own image), ITM on (clean caption, own or other image), or both."""
        model, num_pairs = self.model, len(rows.order_B)
        text_QD, image_ID = model.fuse_rows(
            text_KTD[:, part.tokens], part.layout, image_KNPD, part.image_R, part.wanted
        )
        results = []
        if "mlm" in part.kinds:
            read_MD = text_QD[num_pairs * ("itm" in part.kinds) :]
            logits_MV = model.word_logits(read_MD)
            if rows.mlm_read_M is not None:
                logits_MV = logits_MV[rows.mlm_read_M]
            results.append(masked_language_modeling(logits_MV, rows.mlm_label_M, rows.mlm_weight_M))
        if "itm" in part.kinds:
            pooled_B2D = model.pool(text_QD[:num_pairs], image_ID)
            results.append(image_text_matching(model.itm_head(pooled_B2D), rows.itm_label_B))
        return results

    def image_features(self, pixels_N3SS: Tensor) -> Features:
        """Encode uint8 images for scoring."""
        model = self.model
        encoded = model.encode_image(model.normalize(pixels_N3SS))
        embedding = model.itc_head.embed_image(encoded.class_BD) if self.objectives.itc else None
        return Features(encoded.states_KBND, embedding)

    def text_features(self, ids_TL: Tensor, attention_mask_TL: Tensor) -> Features:
        """Encode captions for scoring."""
        encoded = self.model.encode_text(ids_TL, attention_mask_TL)
        embedding = self.model.itc_head.embed_text(encoded.class_BD) if self.objectives.itc else None
        return Features(encoded.states_KBND, embedding)

    def match_logits(self, text_KRLD: Tensor, mask_RL: Tensor, image_KNPD: Tensor, image_R: Tensor) -> Tensor:
        """ITM's logits for encoded pairs, float32, shape (R, 2); column 1 is a match. Needs the itm head.

        Args:
            image_R: the image of each pair.
        """
        pooled_R2D = pool_pairs(self.model, text_KRLD, mask_RL, image_KNPD, image_R)
        return linear_in_float32(self.model.itm_head.classifier, pooled_R2D)

    def contrast_temperature(self) -> float:
        """ITC's temperature. Needs the itc head."""
        return float(self.model.itc_head.clamped_temperature())

    def masked_logits(
        self, text_KRLD: Tensor, mask_RL: Tensor, image_KNPD: Tensor, image_R: Tensor, index_M: Tensor
    ) -> Tensor:
        """MLM's logits at masked positions of encoded pairs, float32, shape (M, V). Needs the mlm head.

        Args:
            image_R: the image of each pair.
            index_M: flat index r * L + l of each, in order; on the CPU.
        """
        num_pairs, length = mask_RL.shape
        counts = np.bincount(index_M.numpy() // length, minlength=num_pairs)
        wanted = read_columns(mask_RL, index_M.numpy() % length, counts, images=False)
        text_MD, _ = self.model.fuse_rows(text_KRLD.flatten(1, 2), padded(mask_RL), image_KNPD, image_R, wanted)
        return self.model.word_logits(text_MD).float()

    def word_attention(self, text_KRLD: Tensor, mask_RL: Tensor, image_KRPD: Tensor) -> Tensor | None:
        """Where each token of encoded pairs looks: cross-attention of the last layer, mean over heads.

        Returns: float32, shape (R, L, Y, X) for Y by X patches; a row adds up to 1, less what a class token takes. None
            for a model without cross-modal layers.
        """
        maps = self.model.fuse(text_KRLD, image_KRPD, mask_RL, return_attention=True).attention
        if maps is None or not maps.text_to_image:
            return None
        side = self.model.config.image_size_px // self.model.config.vision.patch_size_px
        patches_RLP: Tensor = maps.text_to_image[-1].mean(dim=1)[
            ..., -side * side :
        ]  # a class token stands before them
        return patches_RLP.reshape(*patches_RLP.shape[:2], side, side)
