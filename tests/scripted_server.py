"""An HTTP server that answers what a test wrote down, for programs that only speak HTTP."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

Reply = tuple[int, Any]
"""A status, and a body: JSON, or bytes as they are."""


class ScriptedServer:
    """Answers each route with its replies in turn; the last one stays. An unknown route is 404.

    >>> server = ScriptedServer({"GET /health": [(503, {}), (200, {"ok": True})]})
    """

    def __init__(self, replies: Mapping[str, Sequence[Reply]]) -> None:
        self._replies = {route: list(turns) for route, turns in replies.items()}
        self.received: list[tuple[str, Any]] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())

    @property
    def port(self) -> int:
        """Where it listens."""
        return self._server.server_port

    def bodies(self, route: str) -> list[Any]:
        """Return the JSON that was posted to *route*."""
        return [body for name, body in self.received if name == route]

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _reply(self, route: str, body: Any) -> Reply:
        self.received.append((route, body))
        turns = self._replies.get(route, [(404, {"error": {"message": "no such route"}})])
        return turns.pop(0) if len(turns) > 1 else turns[0]

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        reply = self._reply

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._answer(None)

            def do_POST(self) -> None:
                length = int(self.headers["content-length"])
                self._answer(json.loads(self.rfile.read(length)))

            def _answer(self, body: Any) -> None:
                status, content = reply(f"{self.command} {self.path}", body)
                data = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(status)
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                """Say nothing: the test looks at ``received``."""

        return Handler
