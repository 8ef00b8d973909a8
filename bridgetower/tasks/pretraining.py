"""The pretraining task: the model and its objectives as one module, from a batch to a loss.

Shapes: B pairs, L tokens, R rows of the cross-modal encoder, N images, T tokens of all texts (in scoring: captions),
M masked tokens, X values of an objective (masked tokens or pairs), K bridged layers, P image positions, D width, C
contrastive width, in metrics: corpora.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bridgetower.batch import PretrainBatch
from bridgetower.config.compute import ComputeConfig
from bridgetower.config.run import ObjectivesConfig
from bridgetower.dist import any_rank, world_size
from bridgetower.kernels.layout import padded
from bridgetower.model.bridgetower import BridgeTower
from bridgetower.model.heads import linear_in_float32
from bridgetower.objectives.itc import image_text_contrast
from bridgetower.objectives.itm import image_text_matching
from bridgetower.objectives.mlm import masked_language_modeling
from bridgetower.objectives.objective import Result, mean_metric
from bridgetower.step.cuda_graphs import RecordedStep, Stages, can_be_recorded
from bridgetower.step.plan import StepPlan, fit_bucket, plan_step, read_columns


class States(NamedTuple):
    """What the towers return for a step."""

    text_KTD: Tensor
    """The bridged layers of all texts, transformed."""
    last_TD: Tensor
    """The text tower's last layer, before it is transformed."""
    image_KNPD: Tensor
    """The bridged layers of all images, transformed."""
    class_ND: Tensor
    """Class tokens of the vision tower's last layer, before they are transformed."""


class Features(NamedTuple):
    """Encoded images or captions of a held-out split."""

    states_KBND: Tensor
    embedding_BC: Tensor | None
    """Unit vectors for retrieval by ITC; None without it."""


def pool_pairs(model: BridgeTower, text_KRLD: Tensor, mask_RL: Tensor, image_KNPD: Tensor, image_R: Tensor) -> Tensor:
    """Return the pooled states of encoded pairs, shape (R, 2 D); nothing else of the last layer is computed.

    Args:
        image_R: the image of each text.
    """
    num_rows = len(mask_RL)
    read = read_columns(mask_RL, np.zeros(num_rows, np.int64), np.ones(num_rows, np.int64), images=True)
    text_RD, image_RD = model.fuse_rows(text_KRLD.flatten(1, 2), padded(mask_RL), image_KNPD, image_R, read)
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

        Parameters that no active objective reads get no gradient; they are frozen, as DeepSpeed would still decay
        them (DeepSpeed 0.19.8 steps every parameter of its groups).

        Args:
            compute: whether steps are recorded; the rest of it the model was built with.
            corpora: names of the corpora that pairs belong to; with two or more each has metrics of its own.
        """
        super().__init__()
        self.model, self.objectives = model, objectives
        self.corpora = tuple(corpora) if len(corpora) > 1 else ()
        self._packs = not model.config.fusion.sees_padding
        self._may_record = can_be_recorded(objectives, compute or ComputeConfig()) and self._packs
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
        """Compute one pretraining step of a micro-batch.

        Returns: the sum of the losses (weight 1 each, as published), and metrics as (sum, count).
        """
        if self.records_steps():
            plan = plan_step(batch, self.objectives, bucket=fit_bucket(batch))
            loss, metrics = self._recorded((batch.pixels_N3SS, plan), self.corpora)
        else:
            loss, metrics = self._finish(*self._encode(batch))
        num_pairs = len(batch.replaced_B)
        metrics["replaced_fraction"] = mean_metric(batch.replaced_B.sum(), num_pairs)
        metrics["tokens_per_pair"] = mean_metric(batch.attention_mask_BL.sum(), num_pairs)
        return loss, metrics

    def records_steps(self) -> bool:
        """Return True if the next step is a CUDA graph.

        Every rank must decide alike, and for the whole run: a recorded step produces gradients in a different order,
        and DeepSpeed sums what lies at the same offset of a bucket on all ranks. So the ranks agree once.
        """
        if not self.training or not torch.is_grad_enabled() or not self._may_record:
            return False
        weight = self.model.text_pooler.weight
        key = weight.dtype, weight.device
        if key not in self._agreed:
            supports = self.model.supports_buckets(self.model.config.text.max_tokens)
            can_record = supports and any(parameter.requires_grad for parameter in self.parameters())
            self._agreed[key] = can_record if world_size() == 1 else not any_rank(not can_record, weight.device)
        return self._agreed[key]

    def train(self, mode: bool = True) -> PretrainTask:
        """Set training mode; leaving it frees the CUDA graphs' memory."""
        if not mode:
            self._recorded.forget()
        return super().train(mode)

    def _encode_recorded(self, inputs: tuple[Tensor, StepPlan]) -> States:
        pixels_N3SS, plan = inputs
        images = self.model.begin_image(self.model.normalize(pixels_N3SS))
        text_KTD, last_TD = self.model.encode_tokens(plan.ids_T, plan.column_T, plan.layout)
        image = self.model.finish_image(images)
        return States(text_KTD, last_TD, image.states_KBND, image.class_BD)

    def _finish_recorded(
        self, inputs: tuple[Tensor, StepPlan], states: Sequence[Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return self._finish(inputs[1], States(*states))

    def _encode(self, batch: PretrainBatch) -> tuple[StepPlan, States]:
        """Run both towers.

        The host takes longer to plan a step and to launch the many small matmuls of texts than a GPU to compute them.
        In the middle of the vision tower the GPU has enough to do, here and in the backward pass, to hide that.
        """
        images = self.model.begin_image(self.model.normalize(batch.pixels_N3SS))
        plan = plan_step(batch, self.objectives, packs=self._packs)
        text_KTD, last_TD = self.model.encode_tokens(plan.ids_T, plan.column_T, plan.layout)
        image = self.model.finish_image(images)
        return plan, States(text_KTD, last_TD, image.states_KBND, image.class_BD)

    def _finish(self, plan: StepPlan, states: States) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the sum of the losses and the metrics, from the towers' states."""
        model, results = self.model, self._fused_objectives(plan, states)
        if self.objectives.itc:
            head = model.itc_head
            text_BC = head.embed_text(states.last_TD[plan.class_B])
            image_BC = head.embed_image(states.class_ND[plan.order_B])
            results.append(image_text_contrast(text_BC, image_BC, plan.image_id_B, head.clamped_temperature()))
        loss = torch.stack([result.loss for result in results]).sum()
        metrics = {name: value for result in results for name, value in result.metrics.items()}
        if self.corpora:
            metrics |= self._by_corpus(plan, results)
        return loss, metrics

    def _fused_objectives(self, plan: StepPlan, states: States) -> list[Result]:
        """Compute MLM on (masked caption, own image) and ITM on (clean caption, own or another image), in one pass."""
        model, num_pairs, fusion = self.model, len(plan.order_B), plan.fusion
        text_QD, image_ID = model.fuse_rows(
            states.text_KTD[:, fusion.tokens], fusion.layout, states.image_KNPD, fusion.image_R, fusion.read
        )
        has_itm, results = "itm" in fusion.kinds, []
        if "mlm" in fusion.kinds:
            logits_MV = model.word_logits(text_QD[num_pairs * has_itm :])
            results.append(masked_language_modeling(logits_MV, plan.mlm_label_M, plan.mlm_weight_M))
        if has_itm:
            pooled_B2D = model.pool(text_QD[:num_pairs], image_ID)
            results.append(image_text_matching(model.itm_head(pooled_B2D), plan.itm_label_B))
        return results

    def _by_corpus(self, plan: StepPlan, results: Sequence[Result]) -> dict[str, Tensor]:
        """Return every loss and accuracy of each corpus alone, and its fraction of the pairs."""
        is_of_BC = F.one_hot(plan.corpus_B, len(self.corpora)).float()
        # A matmul sums in one order; index_add_ on a GPU does not.
        sums = {"share": (is_of_BC.sum(dim=0), torch.full_like(is_of_BC[0], len(is_of_BC)))}
        is_of_BC = F.pad(is_of_BC, (0, 0, 0, 1))  # padded slots belong to no corpus
        for result in results:
            for name, value_X in result.values.items():
                pair_X = plan.mlm_pair_M if name.endswith("/mlm") else plan.order_B
                is_of_XC = is_of_BC[pair_X]
                sums[name] = (value_X.float() @ is_of_XC, is_of_XC.sum(dim=0))
        return {
            f"corpus/{corpus}/{name}": torch.stack([total_C[index], count_C[index]])
            for name, (total_C, count_C) in sums.items()
            for index, corpus in enumerate(self.corpora)
        }

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
        """Return ITM's logits of encoded pairs, float32, shape (R, 2); column 1 is a match. Needs the itm head.

        Args:
            image_R: the image of each pair.
        """
        pooled_R2D = pool_pairs(self.model, text_KRLD, mask_RL, image_KNPD, image_R)
        return linear_in_float32(self.model.itm_head.classifier, pooled_R2D)

    def contrast_temperature(self) -> float:
        """Return ITC's temperature. Needs the itc head."""
        return float(self.model.itc_head.clamped_temperature())

    def masked_logits(
        self, text_KRLD: Tensor, mask_RL: Tensor, image_KNPD: Tensor, image_R: Tensor, index_M: Tensor
    ) -> Tensor:
        """Return MLM's logits at masked positions of encoded pairs, float32, shape (M, V). Needs the mlm head.

        Args:
            image_R: the image of each pair.
            index_M: flat index r * L + l of each masked token, ascending, on the CPU.
        """
        num_pairs, length = mask_RL.shape
        counts = np.bincount(index_M.numpy() // length, minlength=num_pairs)
        read = read_columns(mask_RL, index_M.numpy() % length, counts, images=False)
        text_MD, _ = self.model.fuse_rows(text_KRLD.flatten(1, 2), padded(mask_RL), image_KNPD, image_R, read)
        return self.model.word_logits(text_MD).float()

    def word_attention(self, text_KRLD: Tensor, mask_RL: Tensor, image_KRPD: Tensor) -> Tensor | None:
        """Return where each token of encoded pairs looks: cross-attention of the last layer, mean over heads.

        Returns: float32, shape (R, L, Y, X) for Y by X patches; a token's values sum to 1 minus the class token's. None
            for a model without cross-modal layers.
        """
        maps = self.model.fuse(text_KRLD, image_KRPD, mask_RL, return_attention=True).attention
        if maps is None or not maps.text_to_image:
            return None
        side = self.model.image_grid_side
        # The class token stands before the patches.
        patches_RLP: Tensor = maps.text_to_image[-1].mean(dim=1)[..., -side * side :]
        return patches_RLP.reshape(*patches_RLP.shape[:2], side, side)
