"""Models of Hugging Face's port of BridgeTower, read and written, strictly.

Source: transformers 5.23.0, models/bridgetower; its graph is the published one (reference_spec 6).
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import (
    AddedToken,
    BridgeTowerConfig,
    BridgeTowerForContrastiveLearning,
    BridgeTowerForImageAndTextRetrieval,
    BridgeTowerForMaskedLM,
    BridgeTowerImageProcessor,
    BridgeTowerModel,
    PreTrainedTokenizerFast,
    RobertaTokenizer,
)

from bridgetower.errors import CheckpointError
from bridgetower.interop import names
from bridgetower.interop.huggingface_config import read_config, why_no_port, write_config
from bridgetower.interop.published_towers import TOWER_EPS
from bridgetower.interop.strict import check_tensors, load_strictly, tensors_of
from bridgetower.interop.weight_files import first_line, own_values, read_safetensors, read_torch_file, write_whole
from bridgetower.model.bridgetower import BridgeTower
from bridgetower.model.init import WithoutInitialValues
from bridgetower.model.sizes import complete_model_config

_CLASSES: dict[str, Any] = {
    "mlm": BridgeTowerForMaskedLM,
    "itm": BridgeTowerForImageAndTextRetrieval,
    "none": BridgeTowerModel,
}
logger = logging.getLogger(__name__)

_PROCESSOR = "BridgeTowerProcessor"
_SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
_PREFIX = "bridgetower."
_BARE = ("text_model.", "vision_model.", "cross_modal_", "token_type_embeddings.")
_DECODER = "mlm_score.decoder.weight"
_WORDS = "bridgetower.text_model.embeddings.word_embeddings.weight"
_POOLER = "bridgetower.text_model.pooler.dense"
_HEAD_NAMES = {"mlm_score.": "mlm", "itm_score.": "itm"}
_CONTRASTIVE = ("itc_text_head.", "itc_image_head.", "itc_cross_modal_head.", "logit_scale")


def from_huggingface(
    path_or_model: Any,
    *,
    image_size_px: int | None = None,
    layer_norm_eps: float | None = None,
    drop_contrastive_heads: bool = False,
) -> BridgeTower:
    """Load BridgeTowerModel, ...ForMaskedLM or ...ForImageAndTextRetrieval, with the heads that are there.

    Args:
        path_or_model: a model of transformers, a folder with its config.json and weights (safetensors, or
            pytorch_model.bin, opened for its weights alone), or its name on the hub.
        image_size_px: the side of the images it will read; the position table is resized.
        layer_norm_eps: of the cross-modal layers and the MLM head. None takes the configuration's, 1e-5, and gives
            transformers' numbers; 1e-12 gives those of the published code, whose checkpoints the hub's were made from.
        drop_contrastive_heads: load the rest of a model that also has the heads of BridgeTowerForContrastiveLearning.
            They are no ITC heads of ours: the image's reads the transformed state, and a third one the pooled pair.

    Returns: the model, in evaluation mode, with the weights' floating-point type.

    Raises:
        CheckpointError: it is not there, it is damaged, carries code, has an option that ours has no setting for, or a
            tensor is missing, not expected or of another shape.
    """
    if isinstance(path_or_model, (str, Path)):
        source = str(path_or_model)
        folder = _folder_of(source)
        theirs, tensors = _read_config_file(folder), _read_folder(folder)
    else:
        source = f"The given {type(path_or_model).__name__}"
        known = (*_CLASSES.values(), BridgeTowerForContrastiveLearning)
        if not isinstance(path_or_model, known):
            raise CheckpointError(
                f"{source} is no model of BridgeTower in transformers. Give a "
                f"{', '.join(one.__name__ for one in _CLASSES.values())}, a folder or a name of the hub."
            )
        _check_norms(path_or_model, source)
        theirs, tensors = path_or_model.config, path_or_model.state_dict()
    config = complete_model_config(read_config(theirs, source, layer_norm_eps))
    tensors = _without_contrastive(_with_prefix(tensors), source, drop_contrastive_heads)
    if config.heads.mlm_tied:
        tensors = _without_tied_decoder(tensors, source)
    heads = [head for start, head in _HEAD_NAMES.items() if any(name.startswith(start) for name in tensors)]
    needed = {_theirs(name): value for name, value in tensors_of(config, heads, source).items()}
    width, side = config.text.width, config.image_size_px // config.vision.patch_size_px
    unused = {
        f"{_POOLER}.weight": (width, width),
        f"{_POOLER}.bias": (width,),
        # Tables of 0, 1, 2, ... that transformers stored up to 4.30.
        "bridgetower.text_model.embeddings.position_ids": (1, config.text.num_positions),
        "bridgetower.vision_model.visual.embeddings.position_ids": (1, side * side + 1),
    }
    check_tensors(needed, tensors, source, unused=unused)
    weights = {_ours(name): value for name, value in tensors.items() if name in needed}
    return load_strictly(config, heads, weights, source, image_size_px=image_size_px)


def to_huggingface(model: BridgeTower, head: str | None = None) -> Any:
    """Copy a model into a class of transformers.

    Its epsilon is 1e-5 in all norms: of a model with the published 1e-12 that is said in a warning.

    Args:
        head: mlm (BridgeTowerForMaskedLM), itm (BridgeTowerForImageAndTextRetrieval) or none (BridgeTowerModel). None
            takes the head that the model has, if it has one or none.

    Returns: the model of transformers, in evaluation mode.

    Raises:
        CheckpointError: transformers has no such model, or no class for its heads.
    """
    _check_fits(model)
    if head is None:
        if len(model.heads) > 1:
            raise CheckpointError(
                f"The model has the heads {', '.join(model.heads)}, a class of transformers has one. Say which: "
                "to_huggingface(model, 'mlm'), 'itm' or 'none', or save all: save_huggingface."
            )
        head = next(iter(model.heads), "none")
    if head not in _CLASSES or (head != "none" and head not in model.heads):
        raise CheckpointError(
            f"head={head!r}: transformers has classes for mlm, itm and none, and the model has "
            f"{', '.join(model.heads) or 'no heads'}. Choose one of both, or none."
        )
    their_class = _CLASSES[head]
    with WithoutInitialValues():
        theirs = their_class(write_config(model, their_class.__name__))
    tensors = _their_tensors(model, [head] if head != "none" else [])
    if head == "none":
        tensors = {name.removeprefix(_PREFIX): value for name, value in tensors.items()}
    if head == "mlm" and model.config.heads.mlm_tied:
        tensors[_DECODER] = tensors[_WORDS]
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

    The weights hold every head that transformers has a class for, so that BridgeTowerForMaskedLM and
    BridgeTowerForImageAndTextRetrieval both open a pretraining model; each reports the other's head as not its own.

    transformers' image processor is not the published transform: it caps the longer side at 5/3 of the shorter one,
    rounds it to whole patches and pads with black. For the published numbers use this program's own pictures.

    Args:
        folder: made if it is not there; files of the same names are replaced, the weights last.
        tokenizer_folder: with tokenizer.json, or with vocab.json and merges.txt; or a tokenizer.json itself. None
            writes no tokenizer.
        drop_heads: heads to leave out on purpose, as transformers has no class for them.

    Raises:
        CheckpointError: transformers has no such model or no class for a head, the tokenizer is another model's, or the
            folder cannot be written.
    """
    _check_fits(model)
    heads = [name for name in model.heads if name not in drop_heads]
    homeless = [name for name in heads if name not in _CLASSES]
    if homeless:
        raise CheckpointError(
            f"transformers has no class for the head(s) {', '.join(homeless)}"
            f"{' (its contrastive class compares other states than our ITC)' if 'itc' in homeless else ''}. Leave them "
            f"out on purpose with drop_heads={homeless}, or use --format=safetensors, which holds every head."
        )
    config = write_config(model, _CLASSES[heads[0] if heads else "none"].__name__)
    tensors = _their_tensors(model, heads)
    if not heads:
        tensors = {name.removeprefix(_PREFIX): value for name, value in tensors.items()}
    place = Path(folder)
    try:
        place.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place, prefix=".export") as scratch:
            config.save_pretrained(scratch)
            _image_processor(model).save_pretrained(scratch)
            if tokenizer_folder is not None:
                _tokenizer(model, Path(tokenizer_folder)).save_pretrained(scratch)
            for file in sorted(Path(scratch).iterdir()):
                file.replace(place / file.name)
    except OSError as error:
        raise CheckpointError(f"{place} cannot be written ({error}). Make room, or use another folder.") from error
    write_whole(place / "model.safetensors", lambda path: save_file(tensors, path, metadata={"format": "pt"}))


def _check_fits(model: BridgeTower) -> None:
    reasons = why_no_port(model)
    if reasons:
        raise CheckpointError(
            f"transformers cannot hold this model: {'; '.join(reasons)}. Use --format=safetensors, which holds every "
            "model."
        )
    eps = model.config.fusion.layer_norm_eps
    if eps != TOWER_EPS:
        logger.warning(
            "transformers has an epsilon of %s in all norms, this model %s in the cross-modal layers and the MLM head: "
            "there its MLM logits differ by about 1e-4. The weights are the same.",
            TOWER_EPS,
            eps,
        )


def _their_tensors(model: BridgeTower, heads: Sequence[str]) -> dict[str, Tensor]:
    """A model's tensors by the names of the classes with heads, with the pooler that nothing reads as zeros."""
    kept = tuple(f"heads.{name}." for name in heads)
    tensors = {
        _theirs(name): own_values(value)
        for name, value in model.state_dict().items()
        if not name.startswith("heads.") or name.startswith(kept)
    }
    width, dtype = model.config.text.width, model.text_pooler.weight.dtype
    tensors[f"{_POOLER}.weight"] = torch.zeros(width, width, dtype=dtype)
    tensors[f"{_POOLER}.bias"] = torch.zeros(width, dtype=dtype)
    return tensors


def _image_processor(model: BridgeTower) -> Any:
    side = {"shortest_edge": model.config.image_size_px}
    mean, std = model.pixel_statistics
    return BridgeTowerImageProcessor(
        size=side,
        crop_size=side,
        image_mean=list(mean),
        image_std=list(std),
        # Sides are rounded down to multiples of it. transformers' own 32 makes 288 of 294, and fills up with black.
        size_divisor=model.config.vision.patch_size_px,
        processor_class=_PROCESSOR,
    )


def _tokenizer(model: BridgeTower, place: Path) -> Any:
    text = model.config.text
    longest = text.num_positions - 2
    whole = place if place.is_file() else place / "tokenizer.json"
    tokenizer = _open_whole(whole, longest) if whole.is_file() else _open_byte_level(place, longest)
    num_ids = max(tokenizer.get_vocab().values()) + 1
    if num_ids != text.vocabulary_size or tokenizer.pad_token_id != 1:
        raise CheckpointError(
            f"{place} has {num_ids} ids and pads with {tokenizer.pad_token_id}, the model has "
            f"model.text.vocabulary_size={text.vocabulary_size} and pads with 1. Give the tokenizer that it was "
            f"trained with ({text.tokenizer})."
        )
    return tokenizer


def _open_byte_level(folder: Path, longest: int) -> Any:
    files = [folder / "vocab.json", folder / "merges.txt"]
    lacking = [str(file) for file in files if not file.is_file()]
    if lacking:
        raise CheckpointError(
            f"There is no {folder / 'tokenizer.json'}, and no {' and no '.join(lacking)}. Give a folder with the "
            "first, or with the two others."
        )
    return RobertaTokenizer(
        vocab=str(files[0]),
        merges=str(files[1]),
        # As in roberta-base: it takes the space before it, so that "a <mask>" has no id for the space.
        mask_token=AddedToken("<mask>", lstrip=True, special=True),
        model_max_length=longest,
        processor_class=_PROCESSOR,
    )


def _open_whole(file: Path, longest: int) -> Any:
    """A tokenizer.json, with RoBERTa's start and end around a text, whatever it says itself: a run adds them, too."""
    try:
        backend = Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers has no error class of its own
        raise CheckpointError(
            f"{file} is no tokenizer of the library tokenizers ({first_line(error)}). Copy it again."
        ) from error
    ids = {name: backend.token_to_id(name) for name in _SPECIAL_TOKENS}
    lacking = [name for name, number in ids.items() if number is None]
    if lacking:
        raise CheckpointError(f"{file} lacks {', '.join(lacking)}. Give the tokenizer of a RoBERTa.")
    start, _, end, *_ = _SPECIAL_TOKENS
    backend.post_processor = TemplateProcessing(
        single=f"{start} $A {end}",
        pair=f"{start} $A {end} {end} $B {end}",
        special_tokens=[(start, ids[start]), (end, ids[end])],
    )
    backend.no_truncation()
    backend.no_padding()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **dict(zip(("bos_token", "pad_token", "eos_token", "unk_token"), _SPECIAL_TOKENS[:4], strict=True)),
        cls_token=start,
        sep_token=end,
        mask_token=_SPECIAL_TOKENS[4],
        model_max_length=longest,
        processor_class=_PROCESSOR,
    )


def _folder_of(source: str) -> Path:
    folder = Path(source)
    if folder.is_dir():
        return folder
    if folder.exists() or source.count("/") != 1 or source.startswith((".", "/", "~")):
        raise CheckpointError(
            f"{source} is no folder of transformers, nor a name of the hub such as BridgeTower/bridgetower-base. Give "
            "the folder that holds config.json and the weights."
        )
    try:
        for weights in ("*.safetensors", "pytorch_model*.bin"):
            folder = Path(snapshot_download(source, allow_patterns=["config.json", weights, f"{weights}.index.json"]))
            if list(folder.glob(weights)):
                break
    except Exception as error:  # the hub's client raises many kinds
        raise CheckpointError(
            f"{source} is no folder here, and could not be had from the hub: {first_line(error)} Give a "
            "folder, or run once where the hub can be reached."
        ) from error
    return folder


def _read_config_file(folder: Path) -> BridgeTowerConfig:
    file = folder / "config.json"
    try:
        kind = json.loads(file.read_bytes()).get("model_type")
        if kind != "bridgetower":
            raise ValueError(f"its model_type is {kind!r}, not 'bridgetower'")
        return BridgeTowerConfig.from_pretrained(str(folder))
    except Exception as error:  # transformers raises many kinds
        raise CheckpointError(
            f"{file} does not describe a BridgeTower ({error}). Give the folder of one, with config.json and weights."
        ) from error


def _read_folder(folder: Path) -> dict[str, Tensor]:
    """The tensors of a folder: of one file or of several with an index, safetensors before others."""
    for name, read in (("model.safetensors", read_safetensors), ("pytorch_model.bin", _read_bin)):
        if (folder / name).is_file():
            return read(folder / name)
        index = folder / f"{name}.index.json"
        if index.is_file():
            return _read_shards(index, read)
    raise CheckpointError(
        f"{folder} has no weights: no model.safetensors and no pytorch_model.bin, whole or with an index. Copy it "
        "again."
    )


def _read_shards(index: Path, read: Any) -> dict[str, Tensor]:
    try:
        places: dict[str, str] = json.loads(index.read_bytes())["weight_map"]
        files = sorted(set(places.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is no index of weights ({error}). Copy it again.") from error
    outside = [file for file in files if Path(file).name != file]
    if outside:
        raise CheckpointError(f"{index} names files outside its folder: {', '.join(outside)}. It is not to be trusted.")
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors.update(read(index.parent / file))
    lacking = sorted(places.keys() - tensors.keys())
    if lacking:
        raise CheckpointError(
            f"{index} lists {len(lacking)} tensor(s) that its files do not hold: {', '.join(lacking[:20])}. Copy the "
            "folder again."
        )
    return tensors


def _read_bin(path: Path) -> dict[str, Tensor]:
    content = read_torch_file(path)
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(f"{path} holds a {type(content).__name__} that is not of tensors alone. Copy it again.")
    return content


def _check_norms(model: Any, source: str) -> None:
    odd = {name: part.eps for name, part in model.named_modules() if getattr(part, "eps", TOWER_EPS) != TOWER_EPS}
    if odd:
        name, eps = next(iter(odd.items()))
        raise CheckpointError(
            f"{source} has {len(odd)} norms with another epsilon than {TOWER_EPS}, such as {name} with {eps}. Build it "
            f"with {TOWER_EPS} in all, and say layer_norm_eps={eps} here if that is meant for its cross-modal layers."
        )


def _with_prefix(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The names of the classes with heads; the bare class lacks their prefix."""
    is_bare = not any(name.startswith(_PREFIX) for name in tensors)
    return {
        f"{_PREFIX}{name}" if is_bare and name.startswith(_BARE) else name: value for name, value in tensors.items()
    }


def _without_contrastive(tensors: Mapping[str, Tensor], source: str, is_meant: bool) -> dict[str, Tensor]:
    found = [name for name in tensors if name.startswith(_CONTRASTIVE)]
    if found and not is_meant:
        raise CheckpointError(
            f"{source} has the heads of BridgeTowerForContrastiveLearning ({', '.join(found)}). They are no ITC heads "
            "of the published model: the image's reads the transformed state where ours reads the vision tower's, a "
            "third one reads the pooled pair, and all were trained with another loss. To load all else, say "
            "drop_contrastive_heads=True."
        )
    return {name: value for name, value in tensors.items() if name not in found}


def _without_tied_decoder(tensors: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    decoder, words = tensors.get(_DECODER), tensors.get(_WORDS)
    if decoder is not None and words is not None and not torch.equal(decoder, words):
        raise CheckpointError(
            f"{source} says tie_word_embeddings=true, but its {_DECODER} is not its {_WORDS}. Save it again with "
            "tie_word_embeddings=false if both are meant."
        )
    return {name: value for name, value in tensors.items() if name != _DECODER}


def _theirs(name: str) -> str:
    found = names.to_huggingface(name)
    return name if found is None else found


def _ours(name: str) -> str:
    found = names.from_huggingface(name)
    assert found is not None, name  # it is a name that ours was translated to
    return found
