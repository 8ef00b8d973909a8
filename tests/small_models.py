"""A small model with every part and with no two sizes alike, and batches for it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bridgetower.batch import PretrainBatch
from bridgetower.config.model import CUSTOM, FusionConfig, HeadsConfig, ModelConfig, TextTowerConfig, VisionTowerConfig
from bridgetower.config.run import ObjectivesConfig
from bridgetower.model.bridgetower import BridgeTower
from bridgetower.tasks.pretraining import PretrainTask

PAD_ID = 1
EVERY_OBJECTIVE = ObjectivesConfig(mlm=True, itm=True, itc=True)
ALL_HEADS = ("mlm", "itm", "itc")


def small_config(*, dropout: float = 0.0, layer_norm_eps: float = 1e-12) -> ModelConfig:
    """Return sizes: 3 layers bridged to towers of 4 and 5 layers, 9 patches, 50 words, no two widths alike."""
    return ModelConfig(
        image_size_px=24,
        vision=VisionTowerConfig(name=CUSTOM, patch_size_px=8, width=48, num_layers=4, num_heads=3),
        text=TextTowerConfig(
            name=CUSTOM,
            vocabulary_size=50,
            max_tokens=12,
            width=32,
            num_layers=5,
            num_heads=2,
            num_positions=20,
            dropout=dropout,
        ),
        fusion=FusionConfig(width=40, num_layers=3, num_heads=4, dropout=dropout, layer_norm_eps=layer_norm_eps),
        heads=HeadsConfig(itc_width=12),
    )


def shake(module: nn.Module, seed: int = 0) -> None:
    """Set every parameter, biases and norms included, to random values that change the result."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=rng, dtype=torch.float64)
            is_norm_scale = parameter.ndim == 1 and name.endswith("weight")
            parameter.copy_(1 + 0.2 * noise if is_norm_scale else 0.15 * noise)


def small_model(config: ModelConfig | None = None) -> BridgeTower:
    """Return a model in float64 and evaluation mode."""
    model = BridgeTower(config or small_config(), ALL_HEADS)
    shake(model)
    return model.double().eval()


def small_task(objectives: ObjectivesConfig = EVERY_OBJECTIVE, *, dropout: float = 0.0) -> PretrainTask:
    """Return a task in float32 and training mode."""
    config = small_config(dropout=dropout)
    task = PretrainTask(BridgeTower(config, objectives.heads), objectives)
    shake(task)
    if objectives.itc:
        nn.init.constant_(task.model.itc_head.temperature, 0.07)
    return task.train()


def random_texts(rows: int, longest: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return ids and mask of captions of different lengths; the first one has no padding."""
    rng = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 50, (rows, longest), generator=rng)
    lengths = torch.randint(3, longest + 1, (rows,), generator=rng)
    lengths[0] = longest
    mask = torch.arange(longest)[None, :] < lengths[:, None]
    return ids.masked_fill(~mask, PAD_ID), mask


def random_pixels(rows: int, seed: int = 0) -> Tensor:
    """Return pixels as a model reads them: normalised, in float64."""
    return torch.randn(rows, 3, 24, 24, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_batch(pairs: int = 4, seed: int = 0) -> PretrainBatch:
    """Return a batch in which half of the pairs have a negative image, and the first two show the same image."""
    rng = torch.Generator().manual_seed(seed)
    clean, mask = random_texts(pairs, 8, seed)
    index = torch.nonzero(mask.flatten() & (torch.rand(mask.numel(), generator=rng) < 0.4)).flatten()
    masked = clean.clone()
    masked.view(-1)[index] = 4
    image = torch.arange(pairs)
    image[(pairs + 1) // 2 :] = torch.arange(pairs // 2)
    image_id = torch.arange(100, 100 + pairs)
    image_id[:2] = 100
    return PretrainBatch(
        pixels_N3SS=torch.randint(0, 256, (pairs, 3, 24, 24), generator=rng, dtype=torch.uint8),
        clean_ids_BL=clean,
        masked_ids_BL=masked,
        attention_mask_BL=mask,
        mlm_index_M=index,
        mlm_label_M=clean.view(-1)[index],
        mlm_weight_M=torch.full((len(index),), 1 / len(index)),
        itm_image_B=image,
        itm_label_B=(image == torch.arange(pairs)).long(),
        image_id_B=image_id,
        corpus_B=torch.arange(pairs) % 2,
        num_tokens=tuple(mask.sum(dim=1).tolist()),
        num_masked=tuple(torch.bincount(index // mask.shape[1], minlength=pairs).tolist()),
        replaced_B=torch.zeros(pairs, dtype=torch.bool),
    )
