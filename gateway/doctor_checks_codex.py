"""What Codex does: Responses in a stream, with tools of kinds that only OpenAI runs among them."""

from __future__ import annotations

from typing import Any

import orjson

from cortex.gateway.doctor_check import Check, Subject, need, room_for
from cortex.gateway.doctor_checks_openai import FUNCTION
from cortex.gateway.doctor_streams import accepted, response_of, shaped
from cortex.gateway.doctor_wire import Json, Wire

RESPONSES = "/v1/responses"
OWN_TOKENS, NEEDED_TOKENS = 9200, 12_288
"""Of its own prompt, with its tools (0.169.0, measured); of the context that it can work in."""
SESSION = {"session-id": "doctor", "thread-id": "doctor", "originator": "codex_exec"}
SHELL: Json = {"type": "function", **FUNCTION, "strict": False}
TOOLS: list[Json] = [
    SHELL,
    {
        "type": "namespace",
        "name": "multi_agent_v1",
        "description": "Other agents.",
        "tools": [{"type": "function", "name": "spawn", "parameters": {"type": "object"}}],
    },
    {"type": "web_search", "external_web_access": False},
]
UPGRADE = {
    "Connection": "Upgrade",
    "Upgrade": "websocket",
    "Sec-WebSocket-Version": "13",
    "Sec-WebSocket-Key": "ZG9jdG9yZG9jdG9yZG9jdA==",
}


def message(role: str, text: str) -> Json:
    """Return an item with the words of somebody."""
    return {"type": "message", "role": role, "content": [{"type": "input_text", "text": text}]}


def asked(subject: Subject, **more: Any) -> Json:
    """Return its request: what it always sends, about a short question."""
    return {
        "model": subject.model,
        "stream": True,
        "input": [message("developer", "You help."), message("user", "Which city? Paris.")],
        "tools": TOOLS,
        "tool_choice": "auto",
        "parallel_tool_calls": False,
        "reasoning": {"summary": "auto"},
        "store": False,
        "include": ["reasoning.encrypted_content"],
        "prompt_cache_key": "doctor",
        "client_metadata": {"x": "y"},
        "max_output_tokens": 24,
        **more,
    }


async def lists_models(wire: Wire, subject: Subject) -> str:
    """Its list of models, which must have ``models``."""
    listed = accepted(await wire.get("/v1/models?client_version=0.169.0")).json
    shaped(listed, "data", "models")
    need(any(it["id"] == subject.model for it in listed["data"]), "the model is not in the list")
    return f"{len(listed['data'])} in the list"


async def streams(wire: Wire, subject: Subject) -> str:
    """A turn, with every kind of tool and field that it sends."""
    reply = await wire.ask("POST", RESPONSES, asked(subject), SESSION)
    whole = response_of(reply)
    return f"{len(reply.events)} events numbered without gaps, {whole.finish}"


async def calls_a_tool(wire: Wire, subject: Subject) -> str:
    """A demanded call, and the turn that brings its output."""
    choice = {"type": "function", "name": FUNCTION["name"]}
    body = asked(subject, tool_choice=choice, max_output_tokens=120)
    whole = response_of(await wire.ask("POST", RESPONSES, body, SESSION))
    call_id, arguments = whole.call_of(FUNCTION["name"])
    need("city" in arguments, "the arguments are not as the schema says")
    call = {"type": "function_call", "call_id": call_id, "name": FUNCTION["name"]}
    call["arguments"] = orjson.dumps(arguments).decode()
    output = {"type": "function_call_output", "call_id": call_id, "output": "It is sunny."}
    turn = asked(subject, input=[*body["input"], call, output])
    response_of(await wire.ask("POST", RESPONSES, turn, SESSION))
    return "valid JSON; the output was taken"


async def refuses_websockets(wire: Wire, subject: Subject) -> str:
    """Its attempt at a WebSocket, which must fail at once for it to fall back to HTTP."""
    del subject
    reply = await wire.ask("GET", RESPONSES, None, UPGRADE)
    need(400 <= reply.status < 500, f"no 4xx: {reply.refusal}")
    return f"answered with {reply.status}"


CHECKS = (
    room_for(OWN_TOKENS, NEEDED_TOKENS),
    Check("models, with client_version", lists_models),
    Check("responses stream with its tools", streams),
    Check("function_call, and its output", calls_a_tool),
    Check("WebSocket is refused at once", refuses_websockets),
)
