"""From text to token ids: the tokenizers of RoBERTa-like encoders, from local files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tokenizers
from tokenizers import ByteLevelBPETokenizer

from bridgetower.errors import ConfigError

I64 = npt.NDArray[np.int64]

SHIPPED_TOKENIZERS = ("emoji", "roberta")
"""Tokenizers in the package: RoBERTa's exact vocabulary (50,265 ids), and a small one trained on the demo's
captions."""

_NAMES = {
    "start": ("<s>", "[CLS]"),
    "pad": ("<pad>", "[PAD]"),
    "end": ("</s>", "[SEP]"),
    "unknown": ("<unk>", "[UNK]"),
    "mask": ("<mask>", "[MASK]"),
}
"""Name of each special token in RoBERTa and in BERT."""

_MODELS = ("BPE", "WordPiece", "Unigram")
_ACCEPTED = (
    f"one of {', '.join(SHIPPED_TOKENIZERS)}, a folder with tokenizer.json, a folder with vocab.json and merges.txt, "
    "or the path of a tokenizer.json"
)
_SUGGESTION = "transformers' AutoTokenizer.from_pretrained(NAME).save_pretrained(FOLDER) writes a tokenizer.json."


def tokenizer_folder(name: str) -> Path:
    """Return the folder of a tokenizer's files, where ``name`` is a shipped tokenizer or a path."""
    shipped = Path(str(resources.files("bridgetower.data") / "assets" / name))
    return shipped if name in SHIPPED_TOKENIZERS else Path(name)


class Tokenizer:
    """Converts texts to token ids and back. A text such as "<mask>" never becomes the special token.

    Its characters are tokenised like any others, and are unknown tokens where the vocabulary lacks them. The same holds
    for further special tokens of a ``tokenizer.json``; its ordinary added tokens are used.
    """

    def __init__(self, name: str) -> None:
        """Open a tokenizer.

        If a folder has both kinds of files, ``tokenizer.json`` is read, as transformers does: only it says how text is
        normalised and split. Its template of special tokens, truncation, padding and BPE dropout are not used.

        Args:
            name: a shipped tokenizer; a folder with ``tokenizer.json`` (of the tokenizers library: BPE, WordPiece or
                Unigram), or with ``vocab.json`` and ``merges.txt`` (byte-level BPE); or the path of a
                ``tokenizer.json``.

        Raises:
            ConfigError: the tokenizer does not exist, its files are damaged, or its vocabulary lacks a special token.
        """
        self.name = name
        files = _find_files(name)
        content: dict[str, Any] = {}
        if len(files) == 1:
            self._backend, content = _open_json(name, files[0])
        else:
            self._backend = _open_byte_level(name, *files)
        vocabulary: dict[str, int] = self._backend.get_vocab()
        special = _find_special_tokens(files[0], vocabulary, content)
        self.start_id, self.pad_id, self.end_id, self.unknown_id, self.mask_id = (vocabulary[t] for t in special)
        # Not the number of entries, as ids may have gaps.
        self.vocabulary_size = max(vocabulary.values()) + 1
        self._is_special = np.zeros(self.vocabulary_size, np.bool_)
        self._is_special[[vocabulary[token] for token in special]] = True
        if content:
            _make_unreachable(self._backend, content["model"], special, self.unknown_id)

    def __reduce__(self) -> tuple[type[Tokenizer], tuple[str]]:
        """Pickle the name only, so that workers open the files: the library's changed pickle renumbers added tokens."""
        return type(self), (self.name,)

    def encode(self, texts: Sequence[str], max_tokens: int) -> list[I64]:
        """Return the token ids of each text, start and end tokens included.

        Args:
            max_tokens: maximum number of ids; longer texts are cut off before the end token.
        """
        # The fast variant does not compute the tokens' offsets in the text.
        encoded = self._backend.encode_batch_fast(list(texts))
        return [np.array([self.start_id, *one.ids[: max_tokens - 2], self.end_id], dtype=np.int64) for one in encoded]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids, without special tokens."""
        return str(self._backend.decode([int(token_id) for token_id in ids if not self._is_special[token_id]]))

    def is_special(self, ids: I64) -> npt.NDArray[np.bool_]:
        """Return True where an id is a special token, which MLM never masks; bool, same shape as ``ids``."""
        return self._is_special[ids]


def pad(rows: Sequence[I64], pad_id: int) -> I64:
    """Stack rows of token ids, padded to the longest row; int64, shape (rows, length)."""
    padded = np.full((len(rows), max(map(len, rows))), pad_id, np.int64)
    for index, row in enumerate(rows):
        padded[index, : len(row)] = row
    return padded


def _find_files(name: str) -> list[Path]:
    """Return the path of tokenizer.json, or those of vocab.json and merges.txt."""
    folder = tokenizer_folder(name)
    tokenizer_json = folder if folder.is_file() else folder / "tokenizer.json"
    if tokenizer_json.is_file():
        return [tokenizer_json]
    bpe_files = [folder / "vocab.json", folder / "merges.txt"]
    missing = [str(file) for file in bpe_files if not file.is_file()]
    if missing:
        raise ConfigError(
            f"model.text.tokenizer={name!r}: there is no {tokenizer_json}, and no {' and no '.join(missing)}. "
            f"Use {_ACCEPTED}. {_SUGGESTION}"
        )
    return bpe_files


def _open_byte_level(name: str, vocabulary: Path, merges: Path) -> Any:
    try:
        return ByteLevelBPETokenizer(str(vocabulary), str(merges))._tokenizer
    except Exception as error:  # the tokenizers library raises plain Exception
        raise ConfigError(
            f"model.text.tokenizer={name!r} is not a byte-level BPE ({error}). Copy its files again, or use "
            f"{_ACCEPTED}."
        ) from error


def _open_json(name: str, file: Path) -> tuple[Any, dict[str, Any]]:
    """Return the library's tokenizer, and the content of its file, which the library has accepted."""
    try:
        text = file.read_text(encoding="utf-8")
        backend = tokenizers.Tokenizer.from_str(text)
        content = json.loads(text)
    except Exception as error:  # the tokenizers library raises plain Exception
        raise ConfigError(
            f"model.text.tokenizer={name!r}: {file} is damaged, or not a tokenizer.json ({error}). Copy it again, or "
            f"use {_ACCEPTED}. {_SUGGESTION}"
        ) from error
    model_type = type(backend.model).__name__
    if model_type not in _MODELS:
        raise ConfigError(
            f"model.text.tokenizer={name!r}: {file} holds a {model_type} model, not one of {', '.join(_MODELS)}. Use "
            "the tokenizer of a RoBERTa-like encoder."
        )
    for token in content.get("added_tokens") or []:
        # The library numbers added tokens by their order and ignores their ids.
        if backend.token_to_id(token["content"]) != token["id"]:
            raise ConfigError(
                f"{file} gives its added token {token['content']!r} the id {token['id']}, but the tokenizers library "
                f"reads it as {backend.token_to_id(token['content'])}, the next free id. Number the added tokens in "
                "order and without gaps."
            )
    return backend, content


def _unknown_of_model(model: Mapping[str, Any]) -> str | None:
    """Return the token that a model gives for unknown text, or None."""
    if isinstance(model.get("vocab"), list):
        return None if model.get("unk_id") is None else str(model["vocab"][model["unk_id"]][0])
    return model.get("unk_token")


def _find_special_tokens(file: Path, vocabulary: Mapping[str, int], content: Mapping[str, Any]) -> list[str]:
    """Return the start, pad, end, unknown and mask tokens.

    If a vocabulary has both names of a token (MPNet's does), one that the file declares special takes precedence, then
    RoBERTa's name. For the unknown token, the one that the model itself gives takes precedence over both.
    """
    declared = {token["content"] for token in content.get("added_tokens") or [] if token["special"]}
    unknown_of_model = _unknown_of_model(content.get("model", {}))
    special, missing = [], []
    for role, names in _NAMES.items():
        candidates = sorted((name for name in names if name in vocabulary), key=lambda name: name not in declared)
        if role == "unknown" and unknown_of_model in vocabulary:
            special.append(str(unknown_of_model))
        elif candidates:
            special.append(candidates[0])
        else:
            missing.append(" or ".join(names))
    if missing:
        raise ConfigError(
            f"{file} lacks the special token(s) {', '.join(missing)}. Use the tokenizer of a RoBERTa-like encoder; "
            f"train your own with {', '.join(roberta for roberta, _ in _NAMES.values())}."
        )
    return special


def _make_unreachable(backend: Any, model: Mapping[str, Any], special: Sequence[str], unknown_id: int) -> None:
    """Change a tokenizer so that no text becomes a special token.

    The library matches added tokens before the model sees a text, and can be told not to match special ones. But most
    vocabularies contain them as well: a Unigram finds "<mask>" in any text, a WordPiece finds "[MASK]" if its
    pre-tokenizer leaves the brackets on, and a BPE may reach one by merges. So special tokens are removed from the
    vocabulary. Where the model needs their entry (a Unigram's ids are positions, and unknown text must become
    something), it is renamed to "", which no text contains.
    """
    changed = dict(model)
    if isinstance(model["vocab"], list):
        changed["vocab"] = [["" if piece in special else piece, score] for piece, score in model["vocab"]]
        if model.get("unk_id") is None:  # without it the library raises an error at the first unknown letter
            changed["vocab"] += [["", 0.0]] * (unknown_id + 1 - len(changed["vocab"]))
            changed["unk_id"] = unknown_id
    else:
        changed["vocab"] = {piece: token_id for piece, token_id in model["vocab"].items() if piece not in special}
        if model.get("unk_token") is not None:
            changed |= {"vocab": {**changed["vocab"], "": unknown_id}, "unk_token": ""}
    if "merges" in model:
        prefix = model.get("continuing_subword_prefix") or ""
        pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
        changed["merges"] = [
            (left, right)
            for left, right in pairs
            if not {left, right, left + right[len(prefix) :]}.intersection(special)
        ]
        changed["dropout"] = None
    # Some files list a special token as an ordinary added one. Its id is that of the present model, so this comes
    # before the model is replaced.
    backend.add_special_tokens(list(special))
    backend.encode_special_tokens = True
    backend.post_processor = None
    backend.no_truncation()
    backend.no_padding()
    backend.model = tokenizers.Tokenizer.from_str(
        json.dumps({"version": "1.0", "added_tokens": [], "model": changed})
    ).model
