"""Checkpoints of the published code, ``.ckpt`` files of BridgeTower and METER: read and write them, strictly.

Source: BridgeTower (arXiv 2206.08657) src/modules/bt_module.py, meter_module.py and clip_model.py; METER
meter/modules/clip_model.py; pytorch-lightning 1.5.10 trainer/connectors/checkpoint_connector.py:335-408.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bridgetower.config.model import ModelConfig
from bridgetower.errors import CheckpointError, ConfigError
from bridgetower.interop import names
from bridgetower.interop.reference_config import (
    PUBLISHED_EPS,
    find_heads,
    list_unpublished_options,
    read_config,
    write_settings,
)
from bridgetower.interop.strict import build_shapes, check_tensors, load_strictly
from bridgetower.interop.weight_files import detach_for_file, read_torch_file, write_atomically
from bridgetower.model.bridgetower import BridgeTower
from bridgetower.model.sizes import complete_model_config

logger = logging.getLogger(__name__)

# Sizes of CLIP's text tower, of which the published code keeps a few tensors and reads none.
_CLIP_CONTEXT, _CLIP_VOCABULARY = 77, 49408
_CLIP_TEXT_WIDTH = {768: 512, 1024: 768}  # by the width of the vision tower: ViT-B and ViT-L

# Early checkpoints number all norms before the cross-modal layers: 0 has no bridge, the others are the bridges'.
_NUMBERED_NORM = re.compile(r"cross_modal_(text|image)_layernorm\.(\d+)\.(weight|bias)")


def from_reference(
    path: str | Path, *, config: ModelConfig | None = None, image_size_px: int | None = None
) -> BridgeTower:
    """Load a checkpoint of the published BridgeTower or METER, with all heads that it has.

    No code in the file is run; a file that carries code is refused.

    Args:
        config: configuration of the saved model. None reads it from the tensors' shapes. The number of attention heads
            and the dropout show in no shape: they are the checkpoint's own settings, or else the published 64 channels
            per head and 0.1.
        image_size_px: side of the images to read, if not the configuration's or the checkpoint's; the position table is
            resized to it.

    Returns: the model, in evaluation mode and the checkpoint's floating-point dtype.

    Raises:
        CheckpointError: the file is missing, damaged, carries code or is no such checkpoint; or a tensor is missing,
            not expected, or has another shape. Tensors that the published code never reads may be present or absent.
    """
    path = Path(path)
    tensors, settings = _read(path)
    heads = find_heads(tensors)
    config = _infer_config(tensors, settings, str(path)) if config is None else complete_model_config(config)
    saved = _at_saved_resolution(config, tensors)
    needed = {
        _to_published_name(name): _to_published_shape(name, value)
        for name, value in build_shapes(saved, heads, str(path)).items()
    }
    check_tensors(needed, tensors, str(path), unused=_list_unused(saved, heads, tensors))
    weights = {
        _to_our_name(name): value.reshape(1) if name == "temperature" else value
        for name, value in tensors.items()
        if name in needed
    }
    return load_strictly(saved, heads, weights, str(path), image_size_px=image_size_px or config.image_size_px)


def to_reference(model: BridgeTower, path: str | Path) -> None:
    """Write a model as a checkpoint of the published code, atomically.

    The file holds what Lightning saves with ``save_weights_only=True``: weights and settings, nothing to resume from.

    The published code has an epsilon of 1e-12 in the cross-modal layers and the MLM head. A model with another epsilon
    is written with a warning.

    Raises:
        CheckpointError: the published code cannot build this model, or the file cannot be written.
    """
    path = Path(path)
    tensors = build_reference_tensors(model)
    if model.config.fusion.layer_norm_eps != PUBLISHED_EPS:
        logger.warning(
            "The published code has an epsilon of %s in the cross-modal layers and the MLM head, this model has %s. In "
            "the published code the MLM logits will differ by about 1e-4; the weights are unchanged.",
            PUBLISHED_EPS,
            model.config.fusion.layer_norm_eps,
        )
    content = {
        "epoch": 0,
        "global_step": 0,
        "pytorch-lightning_version": "1.5.10",
        "state_dict": {name: detach_for_file(value) for name, value in tensors.items()},
        "hparams_name": "kwargs",
        "hyper_parameters": {"config": write_settings(model)},
    }
    write_atomically(path, lambda temporary: torch.save(content, temporary))


def build_reference_tensors(model: BridgeTower) -> dict[str, Tensor]:
    """Return a model's tensors by their published names, with those that the published code registers and never reads.

    The unread ones are zeros, except the position ids and the temperature. A pretraining checkpoint has 707 parameters
    (base) or 1043 (large), and the buffer of position ids.

    Raises:
        CheckpointError: the published code cannot build this model.
    """
    reasons = list_unpublished_options(model)
    if reasons:
        raise CheckpointError(
            f"The published code cannot hold this model: {'; '.join(reasons)}. Use --format=safetensors, which holds "
            "every model."
        )
    config = model.config
    tensors = {
        _to_published_name(name): _to_published_shape(name, value.detach())
        for name, value in model.state_dict().items()
    }
    for name, shape in _list_unused(config, list(model.heads), {}).items():
        if name != "vit_model.token_embedding.weight":  # only the original METER's checkpoints have it
            tensors[name] = model.text_pooler.weight.new_zeros(shape)
    tensors["text_transformer.embeddings.position_ids"] = torch.arange(config.text.num_positions)[None]
    if "itc" not in model.heads:
        tensors["temperature"] = torch.tensor(
            config.heads.itc_initial_temperature, dtype=model.text_pooler.weight.dtype
        )
    return tensors


def _read(path: Path) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
    """Read a checkpoint's tensors, and the published code's settings if the file holds them."""
    content = read_torch_file(path)
    tensors = content.get("state_dict", content) if isinstance(content, dict) else content
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        entries = ", ".join(map(str, list(content)[:5])) if isinstance(content, dict) else "no entries"
        raise CheckpointError(
            f"{path} holds no state_dict of tensors: it is a {type(content).__name__} with {entries}. Give a "
            "checkpoint of the published code, or its state_dict saved alone."
        )
    parameters = content.get("hyper_parameters")
    settings = parameters.get("config") if isinstance(parameters, dict) else None
    return _rename_numbered_norms(tensors), settings if isinstance(settings, dict) else {}


def _infer_config(tensors: Mapping[str, Tensor], settings: Mapping[str, Any], source: str) -> ModelConfig:
    try:
        return complete_model_config(read_config(tensors, settings, source))
    except ConfigError as error:
        raise CheckpointError(
            f"No model can be built from the shapes in {source}: {error} If the file is complete, give the model's "
            "configuration: bridgetower.interop.reference.from_reference(path, config=...)."
        ) from error


def _rename_numbered_norms(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give the norms of early checkpoints their later names."""
    renamed = {}
    for name, value in tensors.items():
        match = _NUMBERED_NORM.fullmatch(name)
        if match:
            modality, index, parameter = match[1], int(match[2]), match[3]
            module = "layernorm" if index == 0 else f"link_tower.{index - 1}.LayerNorm"
            new_name = f"cross_modal_{modality}_{module}.{parameter}"
            # If both names are there, the early one stays and is reported as not expected.
            name = name if new_name in tensors else new_name
        renamed[name] = value
    return renamed


def _at_saved_resolution(config: ModelConfig, tensors: Mapping[str, Tensor]) -> ModelConfig:
    """Return the configuration with the image size of the checkpoint's position table."""
    table = tensors.get("vit_model.visual.positional_embedding")
    grid_side = round((len(table) - 1) ** 0.5) if table is not None and table.ndim == 2 and len(table) > 1 else 0
    return dataclasses.replace(config, image_size_px=grid_side * config.vision.patch_size_px or config.image_size_px)


def _list_unused(config: ModelConfig, heads: list[str], tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors that the published code registers and never reads.

    Args:
        tensors: a checkpoint's tensors, which may show the width of CLIP's text tower; without them it is that of
            OpenAI's models.
    """
    text_width, fusion_width = config.text.width, config.fusion.width
    clip_width = _CLIP_TEXT_WIDTH.get(config.vision.width, config.vision.width)
    norm = tensors.get("vit_model.ln_final.weight")
    if norm is not None and norm.ndim == 1:
        clip_width = len(norm)
    unused: dict[str, tuple[int, ...]] = {
        "text_transformer.embeddings.position_ids": (1, config.text.num_positions),
        "text_transformer.pooler.dense.weight": (text_width, text_width),
        "text_transformer.pooler.dense.bias": (text_width,),
        "vit_model.positional_embedding": (_CLIP_CONTEXT, clip_width),
        "vit_model.token_embedding.weight": (_CLIP_VOCABULARY, clip_width),
        "vit_model.ln_final.weight": (clip_width,),
        "vit_model.ln_final.bias": (clip_width,),
    }
    if "itc" not in heads:
        unused["temperature"] = ()
    if not config.fusion.num_layers:
        unused["token_type_embeddings.weight"] = (3 if "nlvr2" in heads else 2, fusion_width)
        for modality, tower_width in (("text", text_width), ("image", config.vision.width)):
            unused[f"cross_modal_{modality}_transform.weight"] = (fusion_width, tower_width)
            unused[f"cross_modal_{modality}_transform.bias"] = (fusion_width,)
            unused[f"cross_modal_{modality}_layernorm.weight"] = (fusion_width,)
            unused[f"cross_modal_{modality}_layernorm.bias"] = (fusion_width,)
    return unused


def _to_published_name(name: str) -> str:
    # A tensor that the published code has no name for keeps this program's, and is then reported as missing under it.
    return names.to_reference(name) or name


def _to_published_shape(name: str, value: Tensor) -> Tensor:
    return value.reshape(()) if name == "heads.itc.temperature" else value


def _to_our_name(name: str) -> str:
    ours = names.from_reference(name)
    assert ours is not None, name  # _to_published_name gave it
    return ours
