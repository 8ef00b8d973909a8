"""The pretraining task: the model and its objectives as one module, from a batch to a loss.

Shapes: B pairs, L tokens, R rows of the cross-modal encoder, N images, T captions, M masked tokens, K bridged layers,
P image positions, D width, C contrastive width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from bridgetower.batch import PretrainBatch
from bridgetower.config.schema import ModelConfig, ObjectivesConfig
from bridgetower.model.bridgetower import BridgeTower
from bridgetower.objectives.itc import ImageTextContrast
from bridgetower.objectives.itm import ImageTextMatching
from bridgetower.objectives.mlm import MaskedLanguageModeling
from bridgetower.objectives.objective import Result


class Features(NamedTuple):
    """Encoded images or captions of a held-out split."""

    states_KBND: Tensor
    embedding_BC: Tensor | None
    """Unit vectors for retrieval by ITC; None without it."""


class PretrainTask(nn.Module):
    """BridgeTower with the pretraining objectives that are switched on."""

    def __init__(self, model: BridgeTower, config: ModelConfig, objectives: ObjectivesConfig) -> None:
        """Add the heads.

        Parameters that no active objective reads get no gradient; they are frozen, as DeepSpeed would still decay
        them (DeepSpeed 0.19.8 steps every parameter of its groups).
        """
        super().__init__()
        self.model = model
        self.mlm = MaskedLanguageModeling(config) if objectives.mlm else None
        self.itm = ImageTextMatching(config) if objectives.itm else None
        self.itc = (
            ImageTextContrast(config, objectives.itc_width, objectives.itc_initial_temperature)
            if objectives.itc
            else None
        )
        if self.itm is None:
            self._freeze_what_only_itm_reads()

    def _freeze_what_only_itm_reads(self) -> None:
        encoder = self.model.cross_modal
        parts: list[nn.Module] = [self.model.text_pooler, self.model.image_pooler, encoder.image_layers[-1]]
        for part in parts:
            part.requires_grad_(False)

    def forward(self, batch: PretrainBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """One pretraining step of a micro-batch: each image runs through the vision tower once.

        Returns: the sum of the losses (weight 1 each, as published), and metrics as (sum, count).
        """
        model = self.model
        image = model.encode_image(model.normalize(batch.pixels_B3SS))
        # Rows of the text tower: masked captions for MLM, clean ones for ITM and ITC.
        needs_clean = self.itm is not None or self.itc is not None
        kinds = [batch.masked_ids_BL] * (self.mlm is not None) + [batch.clean_ids_BL] * needs_clean
        mask_RL = batch.attention_mask_BL.repeat(len(kinds), 1)
        text = model.encode_text(torch.cat(kinds), mask_RL)
        results = self._fused_objectives(batch, text.states_KBND, image.states_KBND, mask_RL)
        if self.itc is not None:
            clean_class_BD = text.class_BD[-len(batch.clean_ids_BL) :]
            results.append(self.itc(clean_class_BD, image.class_BD, batch.image_id_B))
        loss = torch.stack([result.loss for result in results]).sum()
        metrics = {name: value for result in results for name, value in result.metrics.items()}
        return loss, metrics

    def _fused_objectives(
        self, batch: PretrainBatch, text_KRLD: Tensor, image_KBPD: Tensor, mask_RL: Tensor
    ) -> list[Result]:
        """MLM on (masked caption, own image) and ITM on (clean caption, own or other image), in one pass."""
        num_pairs = len(batch.clean_ids_BL)
        images = [image_KBPD] * (self.mlm is not None) + [image_KBPD[:, batch.itm_image_B]] * (self.itm is not None)
        num_rows = num_pairs * len(images)
        fused = self.model.fuse(text_KRLD[:, :num_rows], torch.cat(images, dim=1), mask_RL[:num_rows])
        results = []
        if self.mlm is not None:
            masked_BLD = fused.text_states[:num_pairs]
            results.append(self.mlm(masked_BLD, batch.mlm_index_M, batch.mlm_label_M, batch.mlm_weight_M))
        if self.itm is not None:
            results.append(self.itm(fused.pooled[-num_pairs:], batch.itm_label_B))
        return results

    def image_features(self, pixels_N3SS: Tensor) -> Features:
        """Encode uint8 images for scoring."""
        encoded = self.model.encode_image(self.model.normalize(pixels_N3SS))
        return Features(encoded.states_KBND, None if self.itc is None else self.itc.head.embed_image(encoded.class_BD))

    def text_features(self, ids_TL: Tensor, attention_mask_TL: Tensor) -> Features:
        """Encode captions for scoring."""
        encoded = self.model.encode_text(ids_TL, attention_mask_TL)
        return Features(encoded.states_KBND, None if self.itc is None else self.itc.head.embed_text(encoded.class_BD))

    def match_log_odds(self, text_KRLD: Tensor, mask_RL: Tensor, image_KRPD: Tensor) -> Tensor:
        """ITM's log odds of a match for encoded pairs, float32, shape (R,). Needs objectives.itm."""
        assert self.itm is not None
        return self.itm.log_odds(self.model.fuse(text_KRLD, image_KRPD, mask_RL).pooled)

    def contrast_temperature(self) -> float:
        """ITC's temperature. Needs objectives.itc."""
        assert self.itc is not None
        return float(self.itc.head.clamped_temperature())

    def masked_logits(self, text_KRLD: Tensor, mask_RL: Tensor, image_KRPD: Tensor, index_M: Tensor) -> Tensor:
        """MLM's logits at masked positions of encoded pairs, float32, shape (M, V). Needs objectives.mlm."""
        assert self.mlm is not None
        return self.mlm.logits(self.model.fuse(text_KRLD, image_KRPD, mask_RL).text_states, index_M)
