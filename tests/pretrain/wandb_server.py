"""A stand-in for W&B's server on loopback: it records requests and stores workspaces."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "0123456789abcdef" * 3
_VIEWER = {"id": "VXNlcjox", "entity": "me", "username": "me", "email": "", "flags": "{}", "teams": {"edges": []}}


@dataclass
class WandbServer:
    """The requests that the server received, and how it answers."""

    url: str = ""
    projects: tuple[str, ...] = ("team/bridgetower",)
    may_write: bool = True
    mutations: list[dict[str, Any]] = field(default_factory=list)
    """Variables of each upsertView that was accepted."""
    authorizations: set[str] = field(default_factory=set)
    views: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Stored workspaces by name."""

    @property
    def env(self) -> dict[str, str]:
        """Environment of a command that is to use this server."""
        return {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": KEY}

    def answer(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        """Return the reply to one GraphQL request."""
        if "upsertView" in query:
            if not self.may_write:
                return {"errors": [{"message": "permission denied"}], "data": {"upsertView": None}}
            self.mutations.append(variables)
            is_new = variables["name"] not in self.views
            view = self.views.setdefault(variables["name"], {"id": f"view{len(self.views)}"})
            view.update(displayName=variables["displayName"], spec=variables["spec"])
            return {"data": {"upsertView": {"view": {"id": view["id"], "name": variables["name"]}, "inserted": is_new}}}
        if "allViews" in query:
            if f"{variables['entityName']}/{variables['projectName']}" not in self.projects:
                return {"data": {"project": None}}
            nodes = [view for name, view in self.views.items() if name == variables["viewName"]]
            return {"data": {"project": {"allViews": {"edges": [{"node": node} for node in nodes]}}}}
        if "viewer" in query:
            return {"data": {"viewer": _VIEWER}}
        raise ValueError(query)


@contextmanager
def serving(**settings: Any) -> Iterator[WandbServer]:
    """Serve on a port of loopback while the context is open."""
    state = WandbServer(**settings)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            state.authorizations.add(self.headers["Authorization"] or "")
            reply = json.dumps(state.answer(body["query"], body.get("variables") or {})).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(reply)))
            self.end_headers()
            self.wfile.write(reply)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
