"""What an offline run of W&B holds."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

# LevelDB's log format behind a header of 7 bytes: blocks of chunks, each with checksum (4), length (2) and kind (1).
_FILE_HEADER, _BLOCK, _CHUNK_HEADER = 7, 32768, 7
_WHOLE, _LAST = 1, 4


def _records(content: bytes) -> Iterator[bytes]:
    at, parts = _FILE_HEADER, b""
    while at + _CHUNK_HEADER <= len(content):
        left = _BLOCK - at % _BLOCK
        if left < _CHUNK_HEADER:  # the end of a block that no chunk fits in
            at += left
            continue
        length, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        at += _CHUNK_HEADER
        parts += content[at : at + length]
        at += length
        if kind in (_WHOLE, _LAST):
            yield parts
            parts = b""


def read_history(file: Path) -> list[dict[str, Any]]:
    """The lines that were logged, each with its ``_step``."""
    lines = []
    for data in _records(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.HasField("history"):
            found = {
                "/".join([item.key, *item.nested_key]).strip("/"): json.loads(item.value_json)
                for item in record.history.item
            }
            lines.append({"_step": record.history.step.num, **found})
    return lines
