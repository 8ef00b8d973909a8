"""Count the operations of a real pretraining step on torch's meta device, to compare formulas with."""

from __future__ import annotations

import numpy as np
import torch

from bridgetower.batch import PretrainBatch
from bridgetower.config.compute import ComputeConfig
from bridgetower.config.model import ModelConfig
from bridgetower.config.run import ObjectivesConfig
from bridgetower.cost.captions import CaptionLengths
from bridgetower.cost.counted import count_flops
from bridgetower.model.bridgetower import BridgeTower
from bridgetower.model.init import shapes_alone
from bridgetower.tasks.pretraining import PretrainTask

BOTH = ObjectivesConfig()


def meta_batch(config: ModelConfig, captions: CaptionLengths) -> PretrainBatch:
    """A batch of these shapes on the meta device."""
    num_pairs, longest = len(captions.num_tokens), max(captions.num_tokens)
    num_masked, side = int(np.sum(captions.num_masked)), config.image_size_px
    with shapes_alone():
        ids = torch.ones(num_pairs, longest, dtype=torch.long)
        return PretrainBatch(
            pixels_N3SS=torch.empty(num_pairs, 3, side, side, dtype=torch.uint8),
            clean_ids_BL=ids,
            masked_ids_BL=ids,
            attention_mask_BL=torch.ones(num_pairs, longest, dtype=torch.bool),
            mlm_index_M=torch.ones(num_masked, dtype=torch.long),
            mlm_label_M=torch.ones(num_masked, dtype=torch.long),
            mlm_weight_M=torch.ones(num_masked),
            itm_image_B=torch.ones(num_pairs, dtype=torch.long),
            itm_label_B=torch.ones(num_pairs, dtype=torch.long),
            image_id_B=torch.ones(num_pairs, dtype=torch.long),
            corpus_B=torch.ones(num_pairs, dtype=torch.long),
            num_tokens=tuple(captions.num_tokens),
            num_masked=tuple(captions.num_masked),
            replaced_B=torch.zeros(num_pairs, dtype=torch.bool),
        )


def count_step(
    config: ModelConfig,
    captions: CaptionLengths,
    *,
    objectives: ObjectivesConfig = BOTH,
    compute: ComputeConfig | None = None,
) -> float:
    """Operations per pair, forward and backward, of the step that is trained."""
    with shapes_alone():
        recompute = compute.recompute if compute else ()
        task = PretrainTask(BridgeTower(config, objectives.heads, recompute=recompute), objectives, compute)
    batch = meta_batch(task.model.config, captions)
    flops, _ = count_flops(lambda: task(batch)[0].backward())
    return flops / len(captions.num_tokens)
