"""What Zed does: chat, the context length of its models, and edit predictions that fill in."""

from __future__ import annotations

from cortex.gateway.doctor_check import Check, Subject, need
from cortex.gateway.doctor_checks_openai import (
    calls_a_tool,
    completes,
    lists_models,
    refused_clearly,
    streams,
)
from cortex.gateway.doctor_streams import accepted, shaped
from cortex.gateway.doctor_wire import Wire


async def tells_the_context(wire: Wire, subject: Subject) -> str:
    """How much a model can hold, which Zed asks every entry for."""
    entries = accepted(await wire.get("/v1/models")).json["data"]
    [entry] = [entry for entry in entries if entry["id"] == subject.model]
    context = entry.get("context_length")
    need(context, "the list does not tell it: set `limit.context` in models.toml")
    need(entry.get("max_model_len") == context, "context_length and max_model_len differ")
    return f"{context} tokens"


async def fills_in(wire: Wire, subject: Subject) -> str:
    """An edit prediction: what stands between two texts."""
    body = {
        "model": subject.model,
        "prompt": "def add(a, b):\n    return ",
        "suffix": "\n\nprint(add(1, 2))\n",
        "max_tokens": 16,
        "temperature": 0,
        "stop": ["\n\n"],
    }
    reply = await wire.post("/v1/completions", body)
    refused_clearly(reply)
    shaped(reply.json["choices"][0], "text", "finish_reason")
    return f"{reply.json['usage']['completion_tokens']} tokens"


CHECKS = (
    Check("models", lists_models),
    Check("context length in models", tells_the_context),
    Check("chat stream", streams),
    Check("tool call, and its result", calls_a_tool, is_needed=False),
    Check("completions", completes),
    Check("edit prediction: suffix", fills_in, is_needed=False),
)
