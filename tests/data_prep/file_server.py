"""An HTTP server on the loopback interface that knows ranges, counts what it sends, and can hang up in the middle."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class FileServer:
    """What is served, and what has been asked for."""

    files: dict[str, bytes] = field(default_factory=dict)
    hang_up_after: dict[str, list[int]] = field(default_factory=dict)
    """By path: how many bytes each of the next answers sends before the connection closes."""
    statuses: dict[str, list[int]] = field(default_factory=dict)
    """By path: codes to answer with instead."""
    etags: dict[str, str] = field(default_factory=dict)
    knows_ranges: bool = True
    requests: list[tuple[str, str]] = field(default_factory=list)
    """Path and Range of each request."""
    sent_bytes: int = 0
    url: str = ""


@contextmanager
def file_server() -> Iterator[FileServer]:
    """Serve for the length of a block."""
    state = FileServer()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            wanted = self.headers.get("Range", "")
            state.requests.append((self.path, wanted))
            content = state.files.get(self.path)
            if state.statuses.get(self.path):
                self._empty(state.statuses[self.path].pop(0))
                return
            if content is None:
                self._empty(404)
                return
            etag = state.etags.get(self.path, f'"{len(content)}"')
            match = re.fullmatch(r"bytes=(\d+)-", wanted) if state.knows_ranges else None
            if match is not None and self.headers.get("If-Range", etag) == etag:
                first = int(match[1])
                if first >= len(content):
                    self._empty(416, f"bytes */{len(content)}")
                    return
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
                content = content[first:]
            else:
                self.send_response(200)
            if etag:
                self.send_header("ETag", etag)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            limits = state.hang_up_after.get(self.path)
            if limits:
                content = content[: limits.pop(0)]
                self.close_connection = True
            state.sent_bytes += len(content)
            self.wfile.write(content)

        def _empty(self, code: int, content_range: str = "") -> None:
            self.send_response(code)
            if content_range:
                self.send_header("Content-Range", content_range)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
