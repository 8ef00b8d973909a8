"""Read the file that an offline run of W&B writes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

# After a file header of 7 bytes comes LevelDB's log format: blocks of 32 KiB that hold chunks. A chunk's header has its
# checksum (4 bytes), length (2) and type (1); a long record is split into a first, middle and last chunk.
_FILE_HEADER_BYTES, _BLOCK_BYTES, _CHUNK_HEADER_BYTES = 7, 32768, 7
_FULL, _LAST = 1, 4


def _split_records(content: bytes) -> Iterator[bytes]:
    offset, record = _FILE_HEADER_BYTES, b""
    while offset + _CHUNK_HEADER_BYTES <= len(content):
        left_in_block = _BLOCK_BYTES - offset % _BLOCK_BYTES
        if left_in_block < _CHUNK_HEADER_BYTES:  # the rest of the block is padding
            offset += left_in_block
            continue
        length, chunk_type = int.from_bytes(content[offset + 4 : offset + 6], "little"), content[offset + 6]
        offset += _CHUNK_HEADER_BYTES
        record += content[offset : offset + length]
        offset += length
        if chunk_type in (_FULL, _LAST):
            yield record
            record = b""


def read_history(file: Path) -> list[dict[str, Any]]:
    """Return the logged rows of metrics, each with its ``_step``."""
    rows = []
    for data in _split_records(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.HasField("history"):
            metrics = {
                "/".join([item.key, *item.nested_key]).strip("/"): json.loads(item.value_json)
                for item in record.history.item
            }
            rows.append({"_step": record.history.step.num, **metrics})
    return rows
