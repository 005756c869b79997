"""A ``cortex`` command for tests of scripts/quickstart: one process plays both daemons.

``FAKE_CORTEX`` says what goes wrong: ``fails-to-start``, ``fails-to-load``, ``dies-when-asked``,
``knows-nothing``, ``breaks-off``, ``speaks-gibberish``, ``ignores-sigterm``,
``is-slow``, ``loses-its-neuron``; nothing without it.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

MODEL = "smollm2-135m-instruct"
MANNER = os.environ.get("FAKE_CORTEX", "")
WORDS = ["The", " capital", " is", " Berlin" if MANNER == "knows-nothing" else " Paris", "."]
LOADING = [
    {"status": "loading", "progress": {"phase": "downloading", "bytes_done": n, "bytes_total": 100}}
    for n in (0, 50, 100)
]
looks = iter(LOADING)


def neuron_model() -> dict[str, Any]:
    """Return how far the load has come: further with each look."""
    if MANNER == "fails-to-load":
        return {"id": MODEL, "status": "failed", "failure": "the package index is unreachable"}
    return {"id": MODEL} | next(looks, {"status": "loaded"})


def openai_events() -> list[dict[str, Any]]:
    """Return the chunks of a stream, the usage last."""
    texts = [{"choices": [{"delta": {"content": word}}]} for word in WORDS]
    return [*texts, {"choices": [], "usage": {"completion_tokens": len(WORDS)}}]


def anthropic_events() -> list[dict[str, Any]]:
    """Return the events of a stream."""
    return [
        {"type": "message_start", "message": {"usage": {"output_tokens": 0}}},
        {"type": "ping"},
        *({"type": "content_block_delta", "delta": {"text": word}} for word in WORDS),
        {"type": "message_delta", "delta": {}, "usage": {"output_tokens": len(WORDS)}},
        {"type": "message_stop"},
    ]


def openai_whole() -> dict[str, Any]:
    """Return a chat.completion."""
    usage = {"completion_tokens": len(WORDS)}
    return {"choices": [{"message": {"content": "".join(WORDS)}}], "usage": usage}


def anthropic_whole() -> dict[str, Any]:
    """Return a message."""
    text = {"type": "text", "text": "".join(WORDS)}
    return {"content": [text], "usage": {"output_tokens": len(WORDS)}}


class Handler(BaseHTTPRequestHandler):
    """Both daemons' routes."""

    def do_GET(self) -> None:
        """Answer the catalogue of the gateway, and of the neuron."""
        if self.path == "/v1/models":
            is_loaded = next(looks, None) is None and MANNER != "fails-to-load"
            assert "anthropic-version" not in self.headers  # their list knows no "loaded"
            self._json({"data": [{"id": MODEL, "loaded": is_loaded}]})
        else:
            self._json([neuron_model()])

    def do_POST(self) -> None:
        """Answer in the dialect of the path."""
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        is_openai = self.path == "/v1/chat/completions"
        assert is_openai != ("anthropic-version" in self.headers)
        if MANNER == "dies-when-asked":
            os.kill(os.getpid(), signal.SIGKILL)
        if MANNER == "speaks-gibberish":
            self._json({"hello": "world"})
        elif body.get("stream"):
            self._stream(openai_events() if is_openai else anthropic_events())
        else:
            self._json(openai_whole() if is_openai else anthropic_whole())

    def _stream(self, events: list[dict[str, Any]]) -> None:
        if MANNER == "breaks-off":
            events = [*events[:2], {"error": {"message": "the device process died"}}]
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b": keep-alive\n\n")
        for event in events:
            self.wfile.write(b"data: " + json.dumps(event).encode() + b"\n\n")
        self.wfile.write(b"data: [DONE]\n\n")

    def _json(self, content: Any) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(content).encode())

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def serve(listen: str) -> None:
    """Serve on HOST:PORT, in a thread that ends with the process."""
    host, _, port = listen.rpartition(":")
    server = ThreadingHTTPServer((host, int(port)), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()


def main() -> None:
    """Serve until SIGTERM; leave the process number where the test finds it."""
    Path(os.environ["FAKE_CORTEX_PID"]).write_text(str(os.getpid()))
    if MANNER == "fails-to-start":
        print(
            '{"event": "starting"}', "cortex: no such device: cpu:9", '{"event": "bye"}', sep="\n"
        )
        sys.exit(1)
    if MANNER == "ignores-sigterm":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if MANNER == "is-slow":
        print("CPU kernels are not available, plain torch serves", flush=True)
    if MANNER == "loses-its-neuron":
        signal.signal(signal.SIGUSR1, lose_neuron)
    options = dict(zip(sys.argv[2::2], sys.argv[3::2], strict=True))
    serve(options["--listen"])
    serve(options["--neuron-listen"])
    print("Ctrl-C stops it.", flush=True)
    signal.pause()


def lose_neuron(*_: object) -> None:
    """Stop as ``cortex up`` does when its neuron dies."""
    print("cortex up stopped: the neuron has ended with signal 9; what it said is above")
    sys.exit(1)


if __name__ == "__main__":
    main()
