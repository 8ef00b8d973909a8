"""From captions to token ids: byte-level BPE with RoBERTa's special tokens, from files that need no hub."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import ByteLevelBPETokenizer

from bridgetower.errors import ConfigError

I64 = npt.NDArray[np.int64]

SHIPPED_TOKENIZERS = ("emoji", "roberta")
"""``roberta`` is RoBERTa's exact vocabulary (50,265 ids); ``emoji`` a small one trained on the demo's captions."""

SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")


class Tokenizer:
    """Byte-level BPE. A text such as "<mask>" in a caption is only a text: it never becomes the special token."""

    def __init__(self, name: str) -> None:
        """Open a tokenizer.

        Args:
            name: a shipped one, or a folder that holds ``vocab.json`` and ``merges.txt``.

        Raises:
            ConfigError: no such tokenizer, its files are damaged, or its vocabulary lacks a special token.
        """
        folder = (
            Path(str(resources.files("bridgetower.data") / "assets" / name))
            if name in SHIPPED_TOKENIZERS
            else Path(name)
        )
        files = [folder / "vocab.json", folder / "merges.txt"]
        missing = [str(file) for file in files if not file.is_file()]
        if missing:
            raise ConfigError(
                f"model.text.tokenizer={name!r}: there is no {' and no '.join(missing)}. Use one of "
                f"{', '.join(SHIPPED_TOKENIZERS)}, or a folder with vocab.json and merges.txt."
            )
        self.name = name
        try:
            self._bpe = ByteLevelBPETokenizer(str(files[0]), str(files[1]))
        except Exception as error:  # tokenizers has no error class of its own
            raise ConfigError(
                f"model.text.tokenizer={name!r} is not a byte-level BPE ({error}). Copy its files again, or use one of "
                f"{', '.join(SHIPPED_TOKENIZERS)}."
            ) from error
        ids = {token: self._bpe.token_to_id(token) for token in SPECIAL_TOKENS}
        lacking = [token for token, number in ids.items() if number is None]
        if lacking:
            raise ConfigError(f"{files[0]} lacks the special token(s) {', '.join(lacking)}.")
        self.start_id, self.pad_id, self.end_id, self.unknown_id, self.mask_id = (ids[t] for t in SPECIAL_TOKENS)
        self.vocabulary_size = int(self._bpe.get_vocab_size())

    def encode(self, captions: Sequence[str], max_tokens: int) -> list[I64]:
        """Token ids of each caption, with ``<s>`` and ``</s>``; longer ones lose their end."""
        encoded = self._bpe.encode_batch(list(captions))
        return [np.array([self.start_id, *one.ids[: max_tokens - 2], self.end_id], dtype=np.int64) for one in encoded]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some ids, special tokens left out."""
        special = {self.start_id, self.pad_id, self.end_id, self.unknown_id, self.mask_id}
        return str(self._bpe.decode([int(number) for number in ids if int(number) not in special]))

    def is_special(self, ids: I64) -> npt.NDArray[np.bool_]:
        """True where an id is a special token, which MLM never masks."""
        return np.isin(ids, [self.start_id, self.pad_id, self.end_id, self.unknown_id, self.mask_id])


def pad(rows: Sequence[I64], pad_id: int) -> I64:
    """Stack ids of different lengths to the longest of them."""
    padded = np.full((len(rows), max(map(len, rows))), pad_id, np.int64)
    for number, row in enumerate(rows):
        padded[number, : len(row)] = row
    return padded
