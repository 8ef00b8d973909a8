"""From captions to token ids: the tokenizers of RoBERTa-like encoders, from files that need no hub."""

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
"""``roberta`` is RoBERTa's exact vocabulary (50,265 ids); ``emoji`` a small one trained on the demo's captions."""

_NAMES = {
    "start": ("<s>", "[CLS]"),
    "pad": ("<pad>", "[PAD]"),
    "end": ("</s>", "[SEP]"),
    "unknown": ("<unk>", "[UNK]"),
    "mask": ("<mask>", "[MASK]"),
}
"""RoBERTa's name of each special token, and BERT's."""

_MODELS = ("BPE", "WordPiece", "Unigram")
_ACCEPTED = (
    f"one of {', '.join(SHIPPED_TOKENIZERS)}, a folder with tokenizer.json, a folder with vocab.json and merges.txt, "
    "or the path of a tokenizer.json"
)
_CURE = "transformers' AutoTokenizer.from_pretrained(NAME).save_pretrained(FOLDER) writes a tokenizer.json."


def tokenizer_folder(name: str) -> Path:
    """Where the files of a tokenizer lie: a shipped one, or the folder that its name is."""
    shipped = Path(str(resources.files("bridgetower.data") / "assets" / name))
    return shipped if name in SHIPPED_TOKENIZERS else Path(name)


class Tokenizer:
    """Captions to ids and back. A text such as "<mask>" in a caption is only a text, never the special token.

    It becomes what the model makes of its parts, which is unknown where the vocabulary lacks them. Words that were
    added to a ``tokenizer.json`` stay words, unless it calls them special: those, too, are then only texts.
    """

    def __init__(self, name: str) -> None:
        """Open a tokenizer.

        Of a folder with both kinds of files ``tokenizer.json`` is read, as transformers does: it alone says how text
        is normalised and cut. Its template of special tokens, truncation, padding and BPE dropout are not used.

        Args:
            name: a shipped one; a folder with ``tokenizer.json`` (of the library tokenizers: BPE, WordPiece or
                Unigram), or with ``vocab.json`` and ``merges.txt`` (byte-level BPE); or a ``tokenizer.json`` itself.

        Raises:
            ConfigError: no such tokenizer, its files are damaged, or its vocabulary lacks a special token.
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
        # The number of entries would be too few: ids may have gaps.
        self.vocabulary_size = max(vocabulary.values()) + 1
        self._is_special = np.zeros(self.vocabulary_size, np.bool_)
        self._is_special[[vocabulary[token] for token in special]] = True
        if content:
            _make_unreachable(self._backend, content["model"], special, self.unknown_id)

    def __reduce__(self) -> tuple[type[Tokenizer], tuple[str]]:
        """Have data workers open the files anew: a pickle of the library numbers added tokens again."""
        return type(self), (self.name,)

    def encode(self, captions: Sequence[str], max_tokens: int) -> list[I64]:
        """Token ids of each caption, with the start and end tokens; longer ones lose their end."""
        # Does not work out where in the text each token stands.
        encoded = self._backend.encode_batch_fast(list(captions))
        return [np.array([self.start_id, *one.ids[: max_tokens - 2], self.end_id], dtype=np.int64) for one in encoded]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some ids, special tokens left out."""
        return str(self._backend.decode([int(number) for number in ids if not self._is_special[number]]))

    def is_special(self, ids: I64) -> npt.NDArray[np.bool_]:
        """True where an id is a special token, which MLM never masks."""
        return self._is_special[ids]


def pad(rows: Sequence[I64], pad_id: int) -> I64:
    """Stack ids of different lengths to the longest of them."""
    padded = np.full((len(rows), max(map(len, rows))), pad_id, np.int64)
    for number, row in enumerate(rows):
        padded[number, : len(row)] = row
    return padded


def _find_files(name: str) -> list[Path]:
    """Either a tokenizer.json, or vocab.json and merges.txt."""
    folder = tokenizer_folder(name)
    whole = folder if folder.is_file() else folder / "tokenizer.json"
    if whole.is_file():
        return [whole]
    pair = [folder / "vocab.json", folder / "merges.txt"]
    missing = [str(file) for file in pair if not file.is_file()]
    if missing:
        raise ConfigError(
            f"model.text.tokenizer={name!r}: there is no {whole}, and no {' and no '.join(missing)}. Use {_ACCEPTED}. "
            f"{_CURE}"
        )
    return pair


def _open_byte_level(name: str, vocabulary: Path, merges: Path) -> Any:
    try:
        return ByteLevelBPETokenizer(str(vocabulary), str(merges))._tokenizer
    except Exception as error:  # tokenizers has no error class of its own
        raise ConfigError(
            f"model.text.tokenizer={name!r} is not a byte-level BPE ({error}). Copy its files again, or use "
            f"{_ACCEPTED}."
        ) from error


def _open_json(name: str, file: Path) -> tuple[Any, dict[str, Any]]:
    """The library's tokenizer, and the file's content, which the library found sound."""
    try:
        text = file.read_text(encoding="utf-8")
        backend = tokenizers.Tokenizer.from_str(text)
        content = json.loads(text)
    except Exception as error:  # tokenizers has no error class of its own
        raise ConfigError(
            f"model.text.tokenizer={name!r}: {file} is damaged, or no tokenizer.json ({error}). Copy it again, or use "
            f"{_ACCEPTED}. {_CURE}"
        ) from error
    kind = type(backend.model).__name__
    if kind not in _MODELS:
        raise ConfigError(
            f"model.text.tokenizer={name!r}: {file} holds a {kind} model, not one of {', '.join(_MODELS)}. Use the "
            "tokenizer of a RoBERTa-like encoder."
        )
    for token in content.get("added_tokens") or []:
        # The library numbers added tokens by their order and does not look at the id.
        if backend.token_to_id(token["content"]) != token["id"]:
            raise ConfigError(
                f"{file} gives its added token {token['content']!r} the id {token['id']}, but the library tokenizers "
                f"reads it as {backend.token_to_id(token['content'])}, the next one that is free. Number the added "
                "tokens without gaps, in their order."
            )
    return backend, content


def _own_unknown(model: Mapping[str, Any]) -> str | None:
    """The name of what a model gives for text that it does not know."""
    if isinstance(model.get("vocab"), list):
        return None if model.get("unk_id") is None else str(model["vocab"][model["unk_id"]][0])
    return model.get("unk_token")


def _find_special_tokens(file: Path, vocabulary: Mapping[str, int], content: Mapping[str, Any]) -> list[str]:
    """The names of the start, pad, end, unknown and mask tokens.

    Where a vocabulary holds both names (MPNet's does), one that the file declares special goes before one that it does
    not, then RoBERTa's before BERT's. What the model itself gives for unknown text goes before both names of it.
    """
    declared = {token["content"] for token in content.get("added_tokens") or [] if token["special"]}
    own_unknown = _own_unknown(content.get("model", {}))
    found, lacking = [], []
    for role, names in _NAMES.items():
        there = sorted((one for one in names if one in vocabulary), key=lambda one: one not in declared)
        if role == "unknown" and own_unknown in vocabulary:
            found.append(str(own_unknown))
        elif there:
            found.append(there[0])
        else:
            lacking.append(" or ".join(names))
    if lacking:
        raise ConfigError(
            f"{file} lacks the special token(s) {', '.join(lacking)}. Use the tokenizer of a RoBERTa-like encoder; "
            f"train your own with {', '.join(roberta for roberta, _ in _NAMES.values())}."
        )
    return found


def _make_unreachable(backend: Any, model: Mapping[str, Any], special: Sequence[str], unknown_id: int) -> None:
    """Let no text become a special token: neither as an added token nor as an entry of the model's vocabulary.

    The library finds added tokens before the model sees a text, and can be told not to look for special ones. But the
    vocabulary mostly holds them, too: a Unigram cuts "<mask>" out of any text, a WordPiece finds "[MASK]" where its
    pre-tokenizer leaves the brackets on, and so can a BPE by merges. They leave it, or, where a model needs the place
    (Unigram's ids are positions, unknown text has to become something), are renamed to "", which no text contains.
    """
    own = dict(model)
    if isinstance(model["vocab"], list):
        own["vocab"] = [["" if piece in special else piece, score] for piece, score in model["vocab"]]
        if model.get("unk_id") is None:  # or the first unknown letter would stop the run
            own["vocab"] += [["", 0.0]] * (unknown_id + 1 - len(own["vocab"]))
            own["unk_id"] = unknown_id
    else:
        own["vocab"] = {piece: number for piece, number in model["vocab"].items() if piece not in special}
        if model.get("unk_token") is not None:
            own |= {"vocab": {**own["vocab"], "": unknown_id}, "unk_token": ""}
    if "merges" in model:
        prefix = model.get("continuing_subword_prefix") or ""
        pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
        own["merges"] = [
            (left, right)
            for left, right in pairs
            if not {left, right, left + right[len(prefix) :]}.intersection(special)
        ]
        own["dropout"] = None
    # Before the model is exchanged, for their ids. Some files list a special token as an ordinary added one.
    backend.add_special_tokens(list(special))
    backend.encode_special_tokens = True
    backend.post_processor = None
    backend.no_truncation()
    backend.no_padding()
    backend.model = tokenizers.Tokenizer.from_str(
        json.dumps({"version": "1.0", "added_tokens": [], "model": own})
    ).model
