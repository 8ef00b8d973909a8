"""Downloads large files over HTTP: what has arrived is kept, and a further attempt goes on behind it."""

from __future__ import annotations

import hashlib
import os
import random
import time
from collections.abc import Callable
from pathlib import Path

import requests
from requests.adapters import HTTPAdapter
from urllib3.exceptions import HTTPError
from urllib3.util import Retry

from bridgetower.errors import DataError

_BLOCK_BYTES = 1 << 18
_CONNECT_SECONDS, _READ_SECONDS = 15.0, 60.0
_ATTEMPTS = 6
"""Without a single new byte in between; a transfer that gets on is never given up."""
_MAX_WAIT_SECONDS = 60.0
_PASSING_TROUBLE = (408, 429, 500, 502, 503, 504)

Show = Callable[[int, int | None], None]
"""Is told how many bytes are there, and how many there will be (None: the server does not say)."""


def open_session() -> requests.Session:
    """A session that asks again when a server is busy."""
    session = requests.Session()
    retry = Retry(
        total=3,
        backoff_factor=1.0,
        status_forcelist=_PASSING_TROUBLE,
        respect_retry_after_header=True,
        raise_on_status=False,
    )
    for scheme in ("http://", "https://"):
        session.mount(scheme, HTTPAdapter(max_retries=retry))
    # Compressed on the way, a file would have another length, and no place to go on from.
    session.headers.update({"Accept-Encoding": "identity", "User-Agent": "BridgeTower fetch_corpus"})
    return session


def download_file(
    session: requests.Session,
    url: str,
    target: Path,
    *,
    size_bytes: int | None = None,
    md5: str = "",
    show: Show = lambda there, total: None,
    wait_seconds: float = 1.0,
) -> None:
    """Download a file, or what is missing of it; it gets its name when it is complete and right.

    Until then it is NAME.part, which the next call continues, unless the server's file is another one by then.

    Args:
        size_bytes: known size; None: the one that the server tells.
        md5: known checksum, in hexadecimal digits; empty: unknown.
        wait_seconds: before the second attempt; doubles with each further one.

    Raises:
        DataError: the server refuses, the network fails for long, the disk is full, or the file is another one.
    """
    if target.is_file():
        return
    part = target.with_name(f"{target.name}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _complete(session, url, part, show, wait_seconds)
        found = part.stat().st_size
        if size_bytes is not None and found != size_bytes:
            _discard(part)
            raise DataError(f"{url} has {found:,} bytes, not {size_bytes:,}: it is another file now. Look at its page.")
        if md5 and _md5_of(part) != md5:
            _discard(part)
            raise DataError(f"{url} arrived damaged: its MD5 is not {md5}. Run the command again: it starts over.")
        os.replace(part, target)
        _validator_file(part).unlink(missing_ok=True)
    except requests.RequestException as error:
        raise DataError(f"{url} cannot be downloaded ({error}). Run the command again later: it goes on.") from error
    except OSError as error:
        raise DataError(
            f"{part} cannot be written ({error.strerror or error}). Make room there or use another --out, and run the "
            "command again: it goes on."
        ) from error


def _complete(session: requests.Session, url: str, part: Path, show: Show, wait_seconds: float) -> None:
    """Ask for the rest until there is none."""
    fruitless = 0
    while True:
        before = _size(part)
        try:
            if _ask_for_rest(session, url, part, show):
                return
            problem = "the connection ended early"
        except (requests.ConnectionError, requests.Timeout, HTTPError) as error:
            problem = str(error)
        fruitless = 0 if _size(part) > before else fruitless + 1
        if fruitless >= _ATTEMPTS:
            raise DataError(
                f"{url} cannot be downloaded: {_ATTEMPTS} attempts failed ({problem}). Is the network there? Run the "
                "command again later: it goes on."
            )
        # Everybody whom a server has dropped should not come back at the same time.
        pause = min(_MAX_WAIT_SECONDS, wait_seconds * 2.0**fruitless)
        time.sleep(pause * random.uniform(0.5, 1.0))


def _ask_for_rest(session: requests.Session, url: str, part: Path, show: Show) -> bool:
    """One request. Returns: true if the file is complete."""
    there = _size(part)
    validator = _read_validator(part)
    if there and not validator:
        # Without an ETag or date nobody knows whether it is still the same file.
        _discard(part)
        there = 0
    headers = {"Range": f"bytes={there}-", "If-Range": validator} if there else {}
    with session.get(url, headers=headers, stream=True, timeout=(_CONNECT_SECONDS, _READ_SECONDS)) as answer:
        if answer.status_code == requests.codes.requested_range_not_satisfiable:
            if answer.headers.get("Content-Range") == f"bytes */{there}":
                return True
            _discard(part)
            return False
        if answer.status_code not in (requests.codes.ok, requests.codes.partial_content):
            raise DataError(
                f"{url} cannot be downloaded: the server answers {answer.status_code} {answer.reason}. Open the "
                "address in a browser; if the file has moved, download it by hand."
            )
        is_rest = answer.status_code == requests.codes.partial_content
        if is_rest and not answer.headers.get("Content-Range", "").startswith(f"bytes {there}-"):
            _discard(part)
            return False
        if not is_rest:
            there = 0
            _validator_file(part).write_text(_validator_of(answer))
        length = answer.headers.get("Content-Length")
        total = there + int(length) if length is not None else None
        with part.open("ab" if is_rest else "wb") as file:
            show(there, total)
            # Unlike iter_content, which loses what it has of a block when the connection ends.
            while block := answer.raw.read1(_BLOCK_BYTES):
                file.write(block)
                there += len(block)
                show(there, total)
            file.flush()
            os.fsync(file.fileno())
        return total is None or there == total


def _validator_of(answer: requests.Response) -> str:
    """What tells a file from a later one of the same name; weak ETags do not count for parts (RFC 9110, 13.1.5)."""
    etag = answer.headers.get("ETag", "")
    return etag if etag and not etag.startswith("W/") else answer.headers.get("Last-Modified", "")


def _validator_file(part: Path) -> Path:
    return part.with_name(f"{part.name}.of")


def _read_validator(part: Path) -> str:
    file = _validator_file(part)
    return file.read_text() if file.is_file() else ""


def _size(part: Path) -> int:
    return part.stat().st_size if part.is_file() else 0


def _discard(part: Path) -> None:
    part.unlink(missing_ok=True)
    _validator_file(part).unlink(missing_ok=True)


def _md5_of(file: Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
