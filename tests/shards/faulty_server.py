"""A web server on loopback that serves a folder, or forwards to another server, and misbehaves on request."""

from __future__ import annotations

import http.client
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit


@dataclass
class Fault:
    """What goes wrong with the next requests of some paths."""

    kind: str
    """delay, hang (no answer), stall (half an answer, then silence), drop (half an answer, then the connection closes),
    truncate (a complete answer, but too short), flip (a wrong byte), or an HTTP status: 503."""
    of: str = r"\.tar$"
    """Pattern of the paths."""
    times: int = 1
    """Number of requests that fail."""
    after_bytes: int | None = None
    """Bytes that stall and drop send first; by default half of them."""


@dataclass
class FaultyServer:
    """State of a running server: its address, its faults, and the paths requested so far."""

    url: str = ""
    faults: list[Fault] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    knows_ranges: bool = True
    hang_seconds: float = 5.0
    delay_seconds: float = 1.0

    def next_fault(self, path: str) -> Fault:
        """Record a request, and return the fault that it meets."""
        self.requests.append(path)
        for fault in self.faults:
            if fault.times > 0 and re.search(fault.of, path):
                fault.times -= 1
                return fault
        return Fault("")


@contextmanager
def serving(folder: Path | None = None, upstream: str = "") -> Iterator[FaultyServer]:
    """Serve the files of a folder, or forward requests to ``upstream``."""
    state = FaultyServer()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            path = self.path.partition("?")[0]
            length = int(self.headers.get("Content-Length") or 0)
            body = self.rfile.read(length)
            fault = state.next_fault(path) if self.command == "GET" else Fault("")
            kind = fault.kind
            if kind == "delay":
                time.sleep(state.delay_seconds)
            if kind == "hang":
                time.sleep(state.hang_seconds)
                self.close_connection = True
                return
            if kind.isdigit():
                self.reply(int(kind), {}, b"", b"")
                return
            status, headers, content = self.ask(body)
            if status < 300 and kind == "truncate":
                content = content[: len(content) // 2]
            elif status < 300 and kind == "flip":
                content = content[:-1] + bytes([content[-1] ^ 1])
            sent = content
            if status < 300 and kind in ("drop", "stall"):
                sent = content[: len(content) // 2 if fault.after_bytes is None else fault.after_bytes]
            self.reply(status, headers, content, sent)
            if kind == "stall":
                time.sleep(state.hang_seconds)
            if len(sent) < len(content):
                self.close_connection = True

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = answer

        def ask(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
            if upstream:
                connection = http.client.HTTPConnection(urlsplit(upstream).netloc, timeout=20)
                connection.request(self.command, self.path, body, dict(self.headers))
                response = connection.getresponse()
                content = response.read()
                dropped = ("transfer-encoding", "connection", "date", "server")
                kept = {name: value for name, value in response.getheaders() if name.lower() not in dropped}
                connection.close()
                return response.status, kept, content
            assert folder is not None
            file = folder / self.path.lstrip("/")
            if not file.is_file():
                return 404, {}, b""
            content = file.read_bytes()
            range_match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
            if range_match is None or not state.knows_ranges:
                return 200, {}, content
            first, last = int(range_match[1]), min(int(range_match[2]), len(content) - 1)
            return 206, {"Content-Range": f"bytes {first}-{last}/{len(content)}"}, content[first : last + 1]

        def reply(self, status: int, headers: dict[str, str], content: bytes, sent: bytes) -> None:
            self.send_response(status)
            for name, value in headers.items():
                if name.lower() != "content-length" or self.command == "HEAD":
                    self.send_header(name, value)
            if self.command != "HEAD" or "Content-Length" not in {name.title() for name in headers}:
                self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(sent)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    state.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
