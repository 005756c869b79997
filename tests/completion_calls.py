"""Requests for completions, sent to a ``FakeNode``, and what comes back."""

from __future__ import annotations

from typing import Any

import msgspec

from fake_node import FakeNode, posting

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
HELLO = [{"role": "user", "content": "Hello"}]


def chat(**more: Any) -> dict[str, Any]:
    """Return a chat request."""
    return {"model": "m", "messages": HELLO, **more}


def text(**more: Any) -> dict[str, Any]:
    """Return a text completion request."""
    return {"model": "m", "prompt": "Hello", **more}


async def asked(node: FakeNode, path: str, body: Any, **options: Any) -> tuple[int, Any]:
    """Return status and JSON body of one POST."""
    async with posting(node, path, body, **options) as response:
        return response.status, await response.json()


async def streamed(node: FakeNode, path: str, body: Any, **headers: str) -> list[str]:
    """Return the frames of one stream."""
    async with posting(node, path, body | {"stream": True}, headers) as response:
        assert response.status == 200, await response.text()
        assert response.content_type == "text/event-stream"
        return (await response.text()).split("\n\n")[:-1]


def events(frames: list[str]) -> list[Any]:
    """Return the JSON of the data frames, [DONE] left out."""
    data = [f.removeprefix("data: ") for f in frames if f.startswith("data: ")]
    return [msgspec.json.decode(d) for d in data if d != "[DONE]"]
