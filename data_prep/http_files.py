"""Downloads large files over HTTP: bytes that have arrived are kept, and the next attempt continues after them."""

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
"""Failed attempts in a row, without a single new byte, after which a download is given up."""
_MAX_WAIT_SECONDS = 60.0
_TEMPORARY_STATUSES = (408, 429, 500, 502, 503, 504)
"""HTTP status codes after which the same request may succeed."""

Show = Callable[[int, int | None], None]
"""Called with the number of bytes done and the total, which is None where nobody knows it beforehand."""


def open_session() -> requests.Session:
    """Open an HTTP session that repeats a request when the server is busy."""
    session = requests.Session()
    retry = Retry(
        total=3,
        backoff_factor=1.0,
        status_forcelist=_TEMPORARY_STATUSES,
        respect_retry_after_header=True,
        raise_on_status=False,
    )
    for scheme in ("http://", "https://"):
        session.mount(scheme, HTTPAdapter(max_retries=retry))
    # A compressed transfer would have another length, and could not be continued from a byte offset.
    session.headers.update({"Accept-Encoding": "identity", "User-Agent": "BridgeTower fetch_corpus"})
    return session


def download_file(
    session: requests.Session,
    url: str,
    target: Path,
    *,
    size_bytes: int | None = None,
    md5: str = "",
    show: Show = lambda done_bytes, total_bytes: None,
    wait_seconds: float = 1.0,
) -> None:
    """Download a file, or the rest of it; it gets its name when it is complete and its checksum is right.

    Until then it is called NAME.part. The next call continues it, unless the file on the server has changed.

    Args:
        size_bytes: known size; None: the size that the server reports.
        md5: known checksum in hexadecimal digits; empty if unknown.
        wait_seconds: pause before the second attempt; doubles with each further one.

    Raises:
        DataError: the server refuses, the network keeps failing, the disk is full, or size or checksum are wrong.
    """
    if target.is_file():
        return
    part = target.with_name(f"{target.name}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _complete(session, url, part, show, wait_seconds)
        actual_bytes = part.stat().st_size
        if size_bytes is not None and actual_bytes != size_bytes:
            _discard(part)
            raise DataError(
                f"{url} has {actual_bytes:,} bytes, not {size_bytes:,}: the file was replaced. Read the page of its "
                "owner, and download it by hand."
            )
        if md5 and _compute_md5(part) != md5:
            _discard(part)
            raise DataError(f"{url} arrived damaged: its MD5 is not {md5}. Run the command again: it starts over.")
        os.replace(part, target)
        _get_validator_file(part).unlink(missing_ok=True)
    except requests.RequestException as error:
        raise DataError(f"{url} cannot be downloaded ({error}). Run the command again later: it continues.") from error
    except OSError as error:
        raise DataError(
            f"{part} cannot be written ({error.strerror or error}). Make room there or use another --out, and run the "
            "command again: it continues."
        ) from error


def _complete(session: requests.Session, url: str, part: Path, show: Show, wait_seconds: float) -> None:
    """Request the rest of the file until nothing is missing."""
    num_failures = 0
    while True:
        before = _get_size(part)
        try:
            if _request_rest(session, url, part, show):
                return
            problem = "the connection ended early"
        except (requests.ConnectionError, requests.Timeout, HTTPError) as error:
            problem = str(error)
        num_failures = 0 if _get_size(part) > before else num_failures + 1
        if num_failures >= _ATTEMPTS:
            raise DataError(
                f"{url} cannot be downloaded: {_ATTEMPTS} attempts failed ({problem}). Check the network, and run the "
                "command again later: it continues."
            )
        # Random, so that the clients that a server has dropped do not all come back at the same time.
        pause = min(_MAX_WAIT_SECONDS, wait_seconds * 2.0**num_failures)
        time.sleep(pause * random.uniform(0.5, 1.0))


def _request_rest(session: requests.Session, url: str, part: Path, show: Show) -> bool:
    """Make one request for the missing bytes. Returns: true if the file is complete."""
    done_bytes = _get_size(part)
    validator = _read_validator(part)
    if done_bytes and not validator:
        # Without an ETag or date, nothing shows that the bytes are of the file that the server has now.
        _discard(part)
        done_bytes = 0
    headers = {"Range": f"bytes={done_bytes}-", "If-Range": validator} if done_bytes else {}
    with session.get(url, headers=headers, stream=True, timeout=(_CONNECT_SECONDS, _READ_SECONDS)) as response:
        if response.status_code == requests.codes.requested_range_not_satisfiable:
            if response.headers.get("Content-Range") == f"bytes */{done_bytes}":
                return True
            _discard(part)
            return False
        if response.status_code not in (requests.codes.ok, requests.codes.partial_content):
            raise DataError(
                f"{url} cannot be downloaded: the server answers {response.status_code} {response.reason}. Open the "
                "address in a browser; if the file has moved, download it by hand."
            )
        is_rest = response.status_code == requests.codes.partial_content
        if is_rest and not response.headers.get("Content-Range", "").startswith(f"bytes {done_bytes}-"):
            _discard(part)
            return False
        if not is_rest:
            done_bytes = 0
            _get_validator_file(part).write_text(_get_validator(response))
        length = response.headers.get("Content-Length")
        total_bytes = done_bytes + int(length) if length is not None else None
        with part.open("ab" if is_rest else "wb") as file:
            show(done_bytes, total_bytes)
            # Not iter_content: it loses the beginning of a block when the connection ends in the middle of it.
            while block := response.raw.read1(_BLOCK_BYTES):
                file.write(block)
                done_bytes += len(block)
                show(done_bytes, total_bytes)
            file.flush()
            os.fsync(file.fileno())
        return total_bytes is None or done_bytes == total_bytes


def _get_validator(response: requests.Response) -> str:
    """Return the ETag or date that changes with the file; weak ETags are not allowed for ranges (RFC 9110, 13.1.5)."""
    etag = response.headers.get("ETag", "")
    return etag if etag and not etag.startswith("W/") else response.headers.get("Last-Modified", "")


def _get_validator_file(part: Path) -> Path:
    return part.with_name(f"{part.name}.of")


def _read_validator(part: Path) -> str:
    file = _get_validator_file(part)
    return file.read_text() if file.is_file() else ""


def _get_size(part: Path) -> int:
    return part.stat().st_size if part.is_file() else 0


def _discard(part: Path) -> None:
    part.unlink(missing_ok=True)
    _get_validator_file(part).unlink(missing_ok=True)


def _compute_md5(file: Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
