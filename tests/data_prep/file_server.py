"""An HTTP server on the loopback interface that supports ranges, counts sent bytes, and can drop connections."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class FileServer:
    """Files that are served, and the requests so far."""

    files: dict[str, bytes] = field(default_factory=dict)
    hang_up_after: dict[str, list[int]] = field(default_factory=dict)
    """Bytes that each of the next responses sends before the connection is closed, by path."""
    statuses: dict[str, list[int]] = field(default_factory=dict)
    """Status codes of the next responses, which then have no content, by path."""
    knows_ranges: bool = True
    requests: list[tuple[str, str]] = field(default_factory=list)
    """Path and Range header of each request."""
    sent_bytes: int = 0
    url: str = ""


@contextmanager
def file_server() -> Iterator[FileServer]:
    """Serve for the length of a block."""
    state = FileServer()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            requested_range = self.headers.get("Range", "")
            state.requests.append((self.path, requested_range))
            content = state.files.get(self.path)
            if state.statuses.get(self.path):
                self._empty(state.statuses[self.path].pop(0))
                return
            if content is None:
                self._empty(404)
                return
            etag = f'"{len(content)}"'
            match = re.fullmatch(r"bytes=(\d+)-", requested_range) if state.knows_ranges else None
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
