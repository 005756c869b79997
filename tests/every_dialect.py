"""One short request in every dialect, streamed and not, for what is alike in all of them."""

from __future__ import annotations

from typing import Any

CHAT = "/v1/chat/completions"
ASKED: dict[str, Any] = {"model": "qwen3-8b", "messages": [{"role": "user", "content": "x"}]}
SHORT: dict[str, Any] = {**ASKED, "max_tokens": 9}
PROMPT: dict[str, Any] = {"model": "qwen3-8b", "prompt": "x", "max_tokens": 9}
INPUT: dict[str, Any] = {"model": "qwen3-8b", "input": "x", "max_output_tokens": 9}

EVERY_DIALECT: list[tuple[str, dict[str, Any]]] = [
    (CHAT, SHORT),
    (CHAT, {**SHORT, "stream": True}),
    ("/v1/completions", PROMPT),
    ("/v1/completions", {**PROMPT, "stream": True}),
    ("/v1/embeddings", {"model": "qwen3-8b", "input": "x"}),
    ("/v1/messages", SHORT),
    ("/v1/messages", {**SHORT, "stream": True}),
    ("/v1/responses", INPUT),
    ("/v1/responses", {**INPUT, "stream": True}),
]
"""Path and body; a FakeNeuron that serves ``qwen3-8b`` says two tokens to each but embeddings."""
