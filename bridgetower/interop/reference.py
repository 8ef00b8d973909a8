"""Checkpoints of the published code: BridgeTower's and METER's ``.ckpt``, read and written, strictly.

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
from bridgetower.interop.reference_config import PUBLISHED_EPS, heads_of, read_config, why_not_published, write_settings
from bridgetower.interop.strict import check_tensors, load_strictly, tensors_of
from bridgetower.interop.weight_files import own_values, read_torch_file, write_whole
from bridgetower.model.bridgetower import BridgeTower
from bridgetower.model.sizes import complete_model_config

logger = logging.getLogger(__name__)

# CLIP's text side, of which the published code keeps a few tensors and reads none.
_CLIP_CONTEXT, _CLIP_VOCABULARY = 77, 49408
_CLIP_TEXT_WIDTH = {768: 512, 1024: 768}  # by the width of its image side: ViT-B and ViT-L

_OLD_NORM = re.compile(r"cross_modal_(text|image)_layernorm\.(\d+)\.(weight|bias)")


def from_reference(
    path: str | Path, *, config: ModelConfig | None = None, image_size_px: int | None = None
) -> BridgeTower:
    """Load a checkpoint of the published BridgeTower or METER, with all heads that it has.

    The file is opened for its weights alone; one that carries code is refused and nothing of it is run.

    Args:
        config: of its model. None reads it from the shapes; then heads have 64 channels as published, if the checkpoint
            does not say otherwise itself, and dropout is 0.1.
        image_size_px: the side of the images it will read, if not config's or its own; the position table is resized.

    Returns: the model, in evaluation mode, with the checkpoint's floating-point type.

    Raises:
        CheckpointError: the file is missing, damaged, carries code, is of something else, or a tensor is missing, not
            expected or of another shape. Tensors that the published code never reads may be there or not.
    """
    path = Path(path)
    tensors, settings = _read(path)
    heads = heads_of(tensors)
    found = _infer(tensors, settings, str(path)) if config is None else complete_model_config(config)
    saved = _at_own_resolution(found, tensors)
    needed = {
        _published(name): _as_published(name, value) for name, value in tensors_of(saved, heads, str(path)).items()
    }
    unused = _unused(saved, heads, tensors)
    check_tensors(needed, tensors, str(path), unused=unused)
    weights = {
        _ours(name): value.reshape(1) if name == "temperature" else value
        for name, value in tensors.items()
        if name in needed
    }
    return load_strictly(saved, heads, weights, str(path), image_size_px=image_size_px or found.image_size_px)


def to_reference(model: BridgeTower, path: str | Path) -> None:
    """Write a model as a checkpoint that the published code reads, whole or not at all.

    It holds what Lightning saves with ``save_weights_only=True``: weights and settings, nothing to resume from.

    Its epsilon in cross-modal layers and MLM head is 1e-12: of a model with another that is said in a warning.

    Raises:
        CheckpointError: the published code has no such model, or the file cannot be written.
    """
    path = Path(path)
    tensors = reference_tensors(model)
    if model.config.fusion.layer_norm_eps != PUBLISHED_EPS:
        logger.warning(
            "The published code has an epsilon of %s in cross-modal layers and MLM head, this model %s: there its MLM "
            "logits differ by about 1e-4. The weights are the same.",
            PUBLISHED_EPS,
            model.config.fusion.layer_norm_eps,
        )
    content = {
        "epoch": 0,
        "global_step": 0,
        "pytorch-lightning_version": "1.5.10",
        "state_dict": {name: own_values(value) for name, value in tensors.items()},
        "hparams_name": "kwargs",
        "hyper_parameters": {"config": write_settings(model)},
    }
    write_whole(path, lambda temporary: torch.save(content, temporary))


def reference_tensors(model: BridgeTower) -> dict[str, Tensor]:
    """A model's tensors by the published names, with those that the published code registers and never reads.

    Those are zeros, but for the position ids and the temperature. A pretraining model has 707 parameters (base) or
    1043 (large), and the buffer of position ids.

    Raises:
        CheckpointError: the published code has no such model.
    """
    reasons = why_not_published(model)
    if reasons:
        raise CheckpointError(
            f"The published code cannot hold this model: {'; '.join(reasons)}. Use --format=safetensors, which holds "
            "every model."
        )
    config = model.config
    tensors = {_published(name): _as_published(name, value.detach()) for name, value in model.state_dict().items()}
    for name, shape in _unused(config, list(model.heads), {}).items():
        if name != "vit_model.token_embedding.weight":  # the original METER's alone
            tensors[name] = model.text_pooler.weight.new_zeros(shape)
    tensors["text_transformer.embeddings.position_ids"] = torch.arange(config.text.num_positions)[None]
    if "itc" not in model.heads:
        tensors["temperature"] = torch.tensor(
            config.heads.itc_initial_temperature, dtype=model.text_pooler.weight.dtype
        )
    return tensors


def _read(path: Path) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
    """The tensors of a checkpoint, and the published code's settings if it has them."""
    content = read_torch_file(path)
    tensors = content.get("state_dict", content) if isinstance(content, dict) else content
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        entries = ", ".join(map(str, list(content)[:5])) if isinstance(content, dict) else "no entries"
        raise CheckpointError(
            f"{path} holds no state_dict of tensors: it is a {type(content).__name__} with {entries}. Give a "
            "checkpoint of the published code, or a file of its state_dict."
        )
    parameters = content.get("hyper_parameters")
    settings = parameters.get("config") if isinstance(parameters, dict) else None
    return _with_new_norms(tensors), settings if isinstance(settings, dict) else {}


def _infer(tensors: Mapping[str, Tensor], settings: Mapping[str, Any], source: str) -> ModelConfig:
    try:
        return complete_model_config(read_config(tensors, settings, source))
    except ConfigError as error:
        raise CheckpointError(
            f"The shapes in {source} are not those of a model that can be built: {error} If it was not cut off, give "
            "its configuration: from_reference(path, config=...)."
        ) from error


def _with_new_norms(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Old checkpoints number all norms: the first is the one without a bridge, the others are the bridges'."""
    renamed = {}
    for name, value in tensors.items():
        old = _OLD_NORM.fullmatch(name)
        if old:
            modality, number, kind = old[1], int(old[2]), old[3]
            place = "layernorm" if number == 0 else f"link_tower.{number - 1}.LayerNorm"
            new = f"cross_modal_{modality}_{place}.{kind}"
            name = name if new in tensors else new  # with both, the old one is reported as not expected
        renamed[name] = value
    return renamed


def _at_own_resolution(config: ModelConfig, tensors: Mapping[str, Tensor]) -> ModelConfig:
    table = tensors.get("vit_model.visual.positional_embedding")
    side = round((len(table) - 1) ** 0.5) if table is not None and table.ndim == 2 and len(table) > 1 else 0
    return dataclasses.replace(config, image_size_px=side * config.vision.patch_size_px or config.image_size_px)


def _unused(config: ModelConfig, heads: list[str], tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Shapes of what the published code registers and never reads.

    Args:
        tensors: of a checkpoint, which tell the width of CLIP's text side; if not, it is that of OpenAI's models.
    """
    text, fusion = config.text.width, config.fusion.width
    clip = _CLIP_TEXT_WIDTH.get(config.vision.width, config.vision.width)
    norm = tensors.get("vit_model.ln_final.weight")
    if norm is not None and norm.ndim == 1:
        clip = len(norm)
    unused: dict[str, tuple[int, ...]] = {
        "text_transformer.embeddings.position_ids": (1, config.text.num_positions),
        "text_transformer.pooler.dense.weight": (text, text),
        "text_transformer.pooler.dense.bias": (text,),
        "vit_model.positional_embedding": (_CLIP_CONTEXT, clip),
        "vit_model.token_embedding.weight": (_CLIP_VOCABULARY, clip),
        "vit_model.ln_final.weight": (clip,),
        "vit_model.ln_final.bias": (clip,),
    }
    if "itc" not in heads:
        unused["temperature"] = ()
    if not config.fusion.num_layers:
        unused["token_type_embeddings.weight"] = (3 if "nlvr2" in heads else 2, fusion)
        for modality, width in (("text", text), ("image", config.vision.width)):
            unused[f"cross_modal_{modality}_transform.weight"] = (fusion, width)
            unused[f"cross_modal_{modality}_transform.bias"] = (fusion,)
            unused[f"cross_modal_{modality}_layernorm.weight"] = (fusion,)
            unused[f"cross_modal_{modality}_layernorm.bias"] = (fusion,)
    return unused


def _published(name: str) -> str:
    found = names.to_reference(name)
    return name if found is None else found  # what the published code has no name for is then reported as missing


def _as_published(name: str, value: Tensor) -> Tensor:
    return value.reshape(()) if name == "heads.itc.temperature" else value


def _ours(name: str) -> str:
    found = names.from_reference(name)
    assert found is not None, name  # it is a name that ours was translated to
    return found
