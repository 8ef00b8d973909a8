"""Trains a small byte-level BPE tokenizer on the captions of a corpus folder, for models without RoBERTa's weights.

python data_prep/build_tokenizer.py shards/emoji/train --vocabulary_size=1000 --out=tokenizers/emoji
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import fire
from fire.decorators import SetParseFn
from tokenizers import ByteLevelBPETokenizer

from bridgetower.config.cli import parse_whole, refuse_unknown, run_command
from bridgetower.errors import ConfigError, DataError
from bridgetower.shards.index import ShardReader
from bridgetower.shards.manifest import load_manifest

_USAGE = "Usage: python data_prep/build_tokenizer.py SHARDS --vocabulary_size=N --out=DIR"

# In this order, the first four get RoBERTa's ids. The padding id has to be 1: RoBERTa's position ids start after it.
_SPECIAL_TOKENS = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
_NUM_BYTES = 256


def main(shards: str = "", *unexpected: str, vocabulary_size: str = "", out: str = "", **unknown: str) -> None:
    """Train a tokenizer and write its vocab.json and merges.txt."""
    refuse_unknown(unexpected, unknown, ["vocabulary_size", "out"], _USAGE)
    if not shards or not out or not vocabulary_size:
        raise ConfigError(f"SHARDS, --vocabulary_size and --out are all needed. {_USAGE}")
    size = parse_whole("vocabulary_size", vocabulary_size, _NUM_BYTES + len(_SPECIAL_TOKENS))
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(
        _read_captions(Path(shards)), vocab_size=size, special_tokens=_SPECIAL_TOKENS, show_progress=False
    )
    if tokenizer.get_vocab_size() != size:
        raise DataError(
            f"--vocabulary_size={size} is too large: the captions of {shards} give no more than "
            f"{tokenizer.get_vocab_size()} ids. Use --vocabulary_size={tokenizer.get_vocab_size()}."
        )
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer.save_model(str(folder))
    except Exception as error:  # tokenizers has no error class of its own
        raise DataError(f"--out={folder} cannot be written to ({error}). Use another folder.") from error
    print(f"{size} ids in {folder}. Use --model.text.tokenizer={folder} --model.text.vocabulary_size={size}.")


def _read_captions(folder: Path) -> Iterator[str]:
    for shard in load_manifest(folder).shards:
        reader = ShardReader(folder / shard.name)
        for row in range(len(reader)):
            yield from reader.read(row).record["captions"]


if __name__ == "__main__":
    run_command(lambda: fire.Fire(SetParseFn(str)(main)))
