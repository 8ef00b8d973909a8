"""What stands beside the weights in a folder of transformers: the image processor and the tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bridgetower.errors import CheckpointError
from bridgetower.interop.weight_files import first_line
from bridgetower.model.bridgetower import BridgeTower

_PROCESSOR = "BridgeTowerProcessor"
_START, _PAD, _END, _UNKNOWN, _MASK = _SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")


def build_image_processor(model: BridgeTower) -> Any:
    """Build transformers' image processor for a model's image size and pixel statistics."""
    from transformers import BridgeTowerImageProcessor

    side = {"shortest_edge": model.config.image_size_px}
    mean, std = model.pixel_statistics
    return BridgeTowerImageProcessor(
        size=side,
        crop_size=side,
        image_mean=list(mean),
        image_std=list(std),
        # The processor rounds sides down to a multiple of it. With transformers' default of 32, a side of 294 becomes
        # 288 and is padded with black.
        size_divisor=model.config.vision.patch_size_px,
        processor_class=_PROCESSOR,
    )


def build_tokenizer(model: BridgeTower, path: Path) -> Any:
    """Build transformers' tokenizer for a model.

    Args:
        path: a tokenizer.json, or a folder with one, or a folder with vocab.json and merges.txt.

    Raises:
        CheckpointError: there is no such file, it is damaged, or it is another model's tokenizer.
    """
    text = model.config.text
    max_tokens = text.num_positions - 2  # a RoBERTa's first token has position 2
    file = path if path.is_file() else path / "tokenizer.json"
    tokenizer = _open_tokenizer_json(file, max_tokens) if file.is_file() else _open_vocabulary(path, max_tokens)
    num_ids = max(tokenizer.get_vocab().values()) + 1
    if num_ids != text.vocabulary_size or tokenizer.pad_token_id != 1:
        raise CheckpointError(
            f"{path} has {num_ids} ids and pads with {tokenizer.pad_token_id}, the model has "
            f"model.text.vocabulary_size={text.vocabulary_size} and pads with 1. Give the tokenizer that the model was "
            f"trained with ({text.tokenizer})."
        )
    return tokenizer


def _open_vocabulary(folder: Path, max_tokens: int) -> Any:
    from transformers import AddedToken, RobertaTokenizer

    files = [folder / "vocab.json", folder / "merges.txt"]
    missing = [str(file) for file in files if not file.is_file()]
    if missing:
        raise CheckpointError(
            f"There is no {folder / 'tokenizer.json'}, and no {' and no '.join(missing)}. Give a folder with the "
            "first, or with the two others."
        )
    return RobertaTokenizer(
        vocab=str(files[0]),
        merges=str(files[1]),
        # As in roberta-base, <mask> takes the space before it, so that "a <mask>" has no id for that space.
        mask_token=AddedToken(_MASK, lstrip=True, special=True),
        model_max_length=max_tokens,
        processor_class=_PROCESSOR,
    )


def _open_tokenizer_json(file: Path, max_tokens: int) -> Any:
    """Open a tokenizer.json with RoBERTa's start and end tokens around each text.

    Its own post-processor is replaced, because this program adds start and end to every text whatever the file says.
    """
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    try:
        backend = Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers has no error class of its own
        raise CheckpointError(
            f"{file} is not a file of the library tokenizers ({first_line(error)}). Copy it again."
        ) from error
    ids = {token: backend.token_to_id(token) for token in _SPECIAL_TOKENS}
    missing = [token for token, token_id in ids.items() if token_id is None]
    if missing:
        raise CheckpointError(f"{file} lacks {', '.join(missing)}. Give a RoBERTa's tokenizer.")
    backend.post_processor = TemplateProcessing(
        single=f"{_START} $A {_END}",
        pair=f"{_START} $A {_END} {_END} $B {_END}",
        special_tokens=[(_START, ids[_START]), (_END, ids[_END])],
    )
    backend.no_truncation()
    backend.no_padding()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=_START,
        pad_token=_PAD,
        eos_token=_END,
        unk_token=_UNKNOWN,
        cls_token=_START,
        sep_token=_END,
        mask_token=_MASK,
        model_max_length=max_tokens,
        processor_class=_PROCESSOR,
    )
