"""BridgeTower models of transformers: load them, convert to them, and write folders that transformers opens.

Source: transformers 5.23.0, models/bridgetower. Its forward pass is the published one, apart from the epsilon of the
LayerNorms (docs/parity.md).
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from bridgetower.errors import CheckpointError
from bridgetower.interop import names
from bridgetower.interop.huggingface_config import list_unported_options, read_config, write_config
from bridgetower.interop.huggingface_folder import find_folder, read_config_file, read_weights
from bridgetower.interop.huggingface_processor import build_image_processor, build_tokenizer
from bridgetower.interop.published_towers import TOWER_EPS
from bridgetower.interop.strict import build_shapes, check_tensors, load_strictly
from bridgetower.interop.weight_files import detach_for_file, write_atomically
from bridgetower.model.bridgetower import BridgeTower
from bridgetower.model.init import WithoutInitialValues
from bridgetower.model.sizes import complete_model_config

if TYPE_CHECKING:
    from transformers import BridgeTowerConfig

logger = logging.getLogger(__name__)

_CLASS_NAMES = {
    "mlm": "BridgeTowerForMaskedLM",
    "itm": "BridgeTowerForImageAndTextRetrieval",
    "none": "BridgeTowerModel",
}
_CONTRASTIVE_CLASS = "BridgeTowerForContrastiveLearning"

_PREFIX = "bridgetower."
"""Start of the backbone's tensor names in the classes with heads; the bare class has no prefix."""
_BACKBONE = ("text_model.", "vision_model.", "cross_modal_", "token_type_embeddings.")
_DECODER = "mlm_score.decoder.weight"
_WORD_EMBEDDINGS = "bridgetower.text_model.embeddings.word_embeddings.weight"
_UNUSED_POOLER = "bridgetower.text_model.pooler.dense"
_HEAD_OF_PREFIX = {"mlm_score.": "mlm", "itm_score.": "itm"}
_CONTRASTIVE_PREFIXES = ("itc_text_head.", "itc_image_head.", "itc_cross_modal_head.", "logit_scale")


def from_huggingface(
    path_or_model: Any,
    *,
    image_size_px: int | None = None,
    layer_norm_eps: float | None = None,
    drop_contrastive_heads: bool = False,
) -> BridgeTower:
    """Load transformers' BridgeTowerModel, ...ForMaskedLM or ...ForImageAndTextRetrieval, with all heads it has.

    Args:
        path_or_model: a model of transformers; a folder with its config.json and weights (safetensors, or
            pytorch_model.bin, which is opened without running code); or its name on the hub.
        image_size_px: side of the images to read, if not the saved one; the position table is resized to it.
        layer_norm_eps: epsilon of the cross-modal layers and the MLM head. None takes the configuration's 1e-5, which
            gives transformers' outputs; 1e-12 gives those of the published code, whose checkpoints were converted to
            the hub's.
        drop_contrastive_heads: load a model of BridgeTowerForContrastiveLearning without its contrastive heads. They
            are not the published ITC heads: the image head reads the transformed state, and a third head the pooled
            pair.

    Returns: the model, in evaluation mode and the weights' floating-point dtype.

    Raises:
        CheckpointError: there is no such model, it is damaged, carries code or has an option without a setting here; or
            a tensor is missing, not expected, or has another shape.
    """
    if isinstance(path_or_model, (str, Path)):
        source = str(path_or_model)
        folder = find_folder(source)
        their_config, tensors = read_config_file(folder), read_weights(folder)
    else:
        source = f"The given {type(path_or_model).__name__}"
        their_config, tensors = _read_model(path_or_model, source)
    config = complete_model_config(read_config(their_config, source, layer_norm_eps))
    tensors = _drop_contrastive_heads(_add_prefix(tensors), source, drop_contrastive_heads)
    if config.heads.mlm_tied:
        tensors = _drop_tied_decoder(tensors, source)
    heads = [head for prefix, head in _HEAD_OF_PREFIX.items() if any(name.startswith(prefix) for name in tensors)]
    needed = {_to_their_name(name): value for name, value in build_shapes(config, heads, source).items()}
    width, grid_side = config.text.width, config.image_size_px // config.vision.patch_size_px
    unused = {
        f"{_UNUSED_POOLER}.weight": (width, width),
        f"{_UNUSED_POOLER}.bias": (width,),
        # Tables of 0, 1, 2, ... that transformers stored up to 4.30.
        "bridgetower.text_model.embeddings.position_ids": (1, config.text.num_positions),
        "bridgetower.vision_model.visual.embeddings.position_ids": (1, grid_side * grid_side + 1),
    }
    check_tensors(needed, tensors, source, unused=unused)
    weights = {_to_our_name(name): value for name, value in tensors.items() if name in needed}
    return load_strictly(config, heads, weights, source, image_size_px=image_size_px)


def to_huggingface(model: BridgeTower, head: str | None = None) -> Any:
    """Copy a model into one of transformers' classes.

    transformers has one epsilon, 1e-5, in all norms. A model with the published 1e-12 is converted with a warning.

    Args:
        head: mlm (BridgeTowerForMaskedLM), itm (BridgeTowerForImageAndTextRetrieval) or none (BridgeTowerModel). None
            takes the model's only head, or none if it has no head.

    Returns: a model of transformers, in evaluation mode.

    Raises:
        CheckpointError: transformers cannot build this model, or has no class for its heads.
    """
    import transformers

    _check_can_be_ported(model)
    if head is None:
        if len(model.heads) > 1:
            raise CheckpointError(
                f"The model has the heads {', '.join(model.heads)}, but each class of transformers has one. Choose "
                "one: to_huggingface(model, 'mlm'), 'itm' or 'none'; or write all heads with save_huggingface."
            )
        head = next(iter(model.heads), "none")
    if head not in _CLASS_NAMES or (head != "none" and head not in model.heads):
        raise CheckpointError(
            f"head={head!r}: transformers has classes for mlm, itm and none, and the model has "
            f"{', '.join(model.heads) or 'no heads'}. Choose a head that both have, or none."
        )
    class_name = _CLASS_NAMES[head]
    with WithoutInitialValues():
        theirs = getattr(transformers, class_name)(write_config(model, class_name))
    tensors = _build_their_tensors(model, [head] if head != "none" else [])
    if head == "mlm" and model.config.heads.mlm_tied:
        tensors[_DECODER] = tensors[_WORD_EMBEDDINGS]
    theirs = theirs.to(model.text_pooler.weight.dtype)
    theirs.load_state_dict(tensors, strict=True)
    return theirs.eval()


def save_huggingface(
    model: BridgeTower,
    folder: str | Path,
    *,
    tokenizer_folder: str | Path | None = None,
    drop_heads: Sequence[str] = (),
) -> None:
    """Write a folder that transformers opens: config.json, model.safetensors, tokenizer and image processor.

    The weights hold every head that transformers has a class for. A pretrained model opens as BridgeTowerForMaskedLM
    and as BridgeTowerForImageAndTextRetrieval, and each class reports the other's head as unexpected.

    transformers' image processor is not the published transform: it limits the longer side to 5/3 of the shorter one,
    rounds it to whole patches and pads with black. For the published results use this program's image transform.

    Args:
        folder: created if missing. Files of the same names are replaced, the weights last.
        tokenizer_folder: folder with tokenizer.json, or with vocab.json and merges.txt; or the path of a
            tokenizer.json. None writes no tokenizer.
        drop_heads: heads to leave out, because transformers has no class for them.

    Raises:
        CheckpointError: transformers cannot build this model or has no class for a head, the tokenizer is another
            model's, or the folder cannot be written.
    """
    _check_can_be_ported(model)
    heads = [name for name in model.heads if name not in drop_heads]
    unsupported = [name for name in heads if name not in _CLASS_NAMES]
    if unsupported:
        raise CheckpointError(
            f"transformers has no class for the head(s) {', '.join(unsupported)}"
            f"{' (its contrastive class compares other states than ITC here)' if 'itc' in unsupported else ''}. Leave "
            f"them out with drop_heads={unsupported}, or use --format=safetensors, which holds every head."
        )
    config = write_config(model, _CLASS_NAMES[heads[0] if heads else "none"])
    tensors = _build_their_tensors(model, heads)
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Written beside the target first, so that an error leaves the folder's old files alone.
        with tempfile.TemporaryDirectory(dir=folder, prefix=".export") as temporary:
            config.save_pretrained(temporary)
            build_image_processor(model).save_pretrained(temporary)
            if tokenizer_folder is not None:
                build_tokenizer(model, Path(tokenizer_folder)).save_pretrained(temporary)
            for file in sorted(Path(temporary).iterdir()):
                file.replace(folder / file.name)
    except OSError as error:
        raise CheckpointError(
            f"{folder} cannot be written ({error}). Free some disk space, or use another folder."
        ) from error
    write_atomically(folder / "model.safetensors", lambda path: save_file(tensors, path, metadata={"format": "pt"}))


def _read_model(model: Any, source: str) -> tuple[BridgeTowerConfig, dict[str, Tensor]]:
    import transformers

    accepted = tuple(getattr(transformers, name) for name in (*_CLASS_NAMES.values(), _CONTRASTIVE_CLASS))
    if not isinstance(model, accepted):
        raise CheckpointError(
            f"{source} is not a BridgeTower model of transformers. Give a {', '.join(_CLASS_NAMES.values())}, a "
            "folder or a hub name."
        )
    # The configuration's epsilon says nothing about a norm that was changed after the model was built.
    changed = {
        name: module.eps for name, module in model.named_modules() if getattr(module, "eps", TOWER_EPS) != TOWER_EPS
    }
    if changed:
        name, eps = next(iter(changed.items()))
        raise CheckpointError(
            f"{source} has {len(changed)} norms with another epsilon than {TOWER_EPS}, such as {name} with {eps}. "
            f"Build it with {TOWER_EPS} everywhere, and give layer_norm_eps={eps} here if the cross-modal layers need "
            "that epsilon."
        )
    return model.config, model.state_dict()


def _check_can_be_ported(model: BridgeTower) -> None:
    reasons = list_unported_options(model)
    if reasons:
        raise CheckpointError(
            f"transformers cannot hold this model: {'; '.join(reasons)}. Use --format=safetensors, which holds every "
            "model."
        )
    eps = model.config.fusion.layer_norm_eps
    if eps != TOWER_EPS:
        logger.warning(
            "transformers has an epsilon of %s in all norms, this model has %s in the cross-modal layers and the MLM "
            "head. In transformers the MLM logits will differ by about 1e-4; the weights are unchanged.",
            TOWER_EPS,
            eps,
        )


def _build_their_tensors(model: BridgeTower, heads: Sequence[str]) -> dict[str, Tensor]:
    """Return a model's tensors, ready for a file, by the names of transformers' class for these heads.

    transformers registers a pooler in the text tower that nothing reads. It is filled with zeros.
    """
    kept_heads = tuple(f"heads.{name}." for name in heads)
    tensors = {
        _to_their_name(name): detach_for_file(value)
        for name, value in model.state_dict().items()
        if not name.startswith("heads.") or name.startswith(kept_heads)
    }
    width, dtype = model.config.text.width, model.text_pooler.weight.dtype
    tensors[f"{_UNUSED_POOLER}.weight"] = torch.zeros(width, width, dtype=dtype)
    tensors[f"{_UNUSED_POOLER}.bias"] = torch.zeros(width, dtype=dtype)
    return tensors if heads else {name.removeprefix(_PREFIX): value for name, value in tensors.items()}


def _add_prefix(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give tensors of the bare class the names that they have in the classes with heads."""
    is_bare = not any(name.startswith(_PREFIX) for name in tensors)
    return {
        f"{_PREFIX}{name}" if is_bare and name.startswith(_BACKBONE) else name: value for name, value in tensors.items()
    }


def _drop_contrastive_heads(tensors: Mapping[str, Tensor], source: str, is_allowed: bool) -> dict[str, Tensor]:
    contrastive = [name for name in tensors if name.startswith(_CONTRASTIVE_PREFIXES)]
    if contrastive and not is_allowed:
        raise CheckpointError(
            f"{source} has the heads of {_CONTRASTIVE_CLASS} ({', '.join(contrastive)}). They are not the published "
            "ITC heads: the image head reads the transformed state where the published one reads the vision tower's, a "
            "third head reads the pooled pair, and all were trained with another loss. To load everything else, use "
            "bridgetower.interop.huggingface.from_huggingface(..., drop_contrastive_heads=True)."
        )
    return {name: value for name, value in tensors.items() if name not in contrastive}


def _drop_tied_decoder(tensors: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    decoder, words = tensors.get(_DECODER), tensors.get(_WORD_EMBEDDINGS)
    if decoder is not None and words is not None and not torch.equal(decoder, words):
        raise CheckpointError(
            f"{source} says tie_word_embeddings=true, but its {_DECODER} differs from its {_WORD_EMBEDDINGS}. If both "
            "are needed, save it again with tie_word_embeddings=false."
        )
    return {name: value for name, value in tensors.items() if name != _DECODER}


def _to_their_name(name: str) -> str:
    # A tensor that transformers has no name for keeps this program's, and is then reported as missing under it.
    return names.to_huggingface(name) or name


def _to_our_name(name: str) -> str:
    ours = names.from_huggingface(name)
    assert ours is not None, name  # _to_their_name gave it
    return ours
