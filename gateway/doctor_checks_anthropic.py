"""What Anthropic's SDKs do, in the versions of the API of 2023 and 2026."""

from __future__ import annotations

from typing import Any

from cortex.gateway.doctor_check import Check, Subject, need
from cortex.gateway.doctor_checks_openai import CITY
from cortex.gateway.doctor_streams import accepted, arguments_in, message_of, shaped
from cortex.gateway.doctor_wire import Json, Reply, Wire

MESSAGES = "/v1/messages"
COUNT = "/v1/messages/count_tokens"
VERSION = "2023-06-01"
VERSIONS = (VERSION, "2026-10-21")
USAGE = ("input_tokens", "output_tokens", "cache_read_input_tokens", "cache_creation_input_tokens")
TOOL: Json = {"name": "look_up", "description": "Look a city up.", "input_schema": CITY}
FORCED: Json = {"type": "tool", "name": "look_up"}


def asked(subject: Subject, said: str = "Which city? Paris.", **more: Any) -> Json:
    """Return a short request."""
    turns = [{"role": "user", "content": said}]
    return {"model": subject.model, "messages": turns, "max_tokens": 24, **more}


async def sent(wire: Wire, body: Json, path: str = MESSAGES) -> Reply:
    """Return the answer to *body*, as an SDK asks."""
    return await wire.post(path, body, anthropic_version=VERSION)


async def lists_models(wire: Wire, subject: Subject) -> str:
    """``client.models.list()``."""
    reply = accepted(await wire.get("/v1/models?limit=1000", anthropic_version=VERSION)).json
    shaped(reply, "data", "has_more", "first_id", "last_id")
    entry = next((it for it in reply["data"] if it["id"] == subject.model), None)
    need(entry, f"{subject.model!r} is not in the list")
    shaped(entry, "type", "display_name", "created_at", "max_input_tokens", "max_tokens")
    return f"{len(reply['data'])} in the list"


async def answers(wire: Wire, subject: Subject) -> str:
    """A whole message, in every version of the API."""
    for version in VERSIONS:
        reply = await wire.post(MESSAGES, asked(subject), anthropic_version=version)
        message = accepted(reply).json
        shaped(message, "id", "type", "role", "model", "content", "stop_reason", "stop_sequence")
        shaped(message.get("usage"), *USAGE)
        need(reply.headers.get("request-id"), "the answer has no request-id")
    return ", ".join(VERSIONS)


async def streams(wire: Wire, subject: Subject) -> str:
    """A stream."""
    reply = await sent(wire, asked(subject, stream=True))
    return f"{len(reply.events)} events, {message_of(reply).finish}"


async def calls_a_tool(wire: Wire, subject: Subject) -> str:
    """A demanded call in a stream, whose arguments come as ``input_json_delta``."""
    body = asked(subject, tools=[TOOL], tool_choice=FORCED, max_tokens=120, stream=True)
    whole = message_of(await sent(wire, body))
    call_id, arguments = whole.call_of("look_up")
    need(call_id, "the call has no id")
    need(arguments.get("city") in ("Paris", "Rome"), "the arguments are not as the schema says")
    need(whole.finish == "tool_use", f"stop_reason is {whole.finish!r}")
    return "valid JSON, stop_reason tool_use"


async def takes_a_result(wire: Wire, subject: Subject) -> str:
    """The turn after a call."""
    use = {"type": "tool_use", "id": "toolu_1", "name": "look_up", "input": {"city": "Paris"}}
    result = {"type": "tool_result", "tool_use_id": "toolu_1", "content": "hi", "is_error": False}
    turns = [
        {"role": "user", "content": "Which city?"},
        {"role": "assistant", "content": [use]},
        {"role": "user", "content": [{**result, "cache_control": {"type": "ephemeral"}}]},
    ]
    accepted(await sent(wire, asked(subject, messages=turns, tools=[TOOL])))
    return "taken"


async def keeps_a_format(wire: Wire, subject: Subject) -> str:
    """``output_config.format``, as Claude Code's request for a title has it."""
    output = {"format": {"type": "json_schema", "schema": CITY}}
    reply = accepted(await sent(wire, asked(subject, output_config=output, max_tokens=60)))
    text = "".join(block.get("text") or "" for block in reply.json["content"])
    need("city" in arguments_in(text), "the text is not as the schema says")
    return "the text is as the schema says"


async def counts(wire: Wire, subject: Subject) -> str:
    """``count_tokens``, and that it is what the call then costs."""
    body = asked(subject, tools=[TOOL], system="You help.")
    counted = accepted(await sent(wire, {**body, "max_tokens": 1})).json["usage"]
    del body["max_tokens"]
    count = accepted(await sent(wire, body, COUNT)).json.get("input_tokens")
    paid = counted["input_tokens"] + counted["cache_read_input_tokens"]
    need(count == paid, f"counted are {count} tokens, and the call has {paid}")
    return f"{count} tokens, and as many in the call"


async def warms_the_cache(wire: Wire, subject: Subject) -> str:
    """``max_tokens: 0``: the prompt is computed, and nothing is said."""
    message = accepted(await sent(wire, asked(subject, max_tokens=0))).json
    need(message["usage"]["output_tokens"] == 0, "something was generated")
    return f"{sum(message['usage'][name] for name in USAGE)} tokens of prompt"


async def goes_on(wire: Wire, subject: Subject) -> str:
    """A last turn of the assistant, which is continued."""
    turns = [
        {"role": "user", "content": "Which city?"},
        {"role": "assistant", "content": "The city of"},
    ]
    accepted(await sent(wire, asked(subject, messages=turns)))
    return "continued"


async def says_errors(wire: Wire, subject: Subject) -> str:
    """An error in its envelope."""
    reply = await sent(wire, asked(subject, model=f"{subject.model}-that-is-not-there"))
    need(reply.status == 404, f"a model that is not there: {reply.refusal}")
    shaped(reply.json, "type", "error", "request_id")
    need(reply.error.get("type") == "not_found_error", f"its type is {reply.error.get('type')!r}")
    return "not_found_error"


CHECKS = (
    Check("models", lists_models),
    Check("messages, both versions", answers),
    Check("stream", streams),
    Check("count_tokens equals the call's usage", counts),
    Check("forced tool call, streamed", calls_a_tool, is_needed=False),
    Check("tool_result", takes_a_result, is_needed=False),
    Check("output_config.format", keeps_a_format, is_needed=False),
    Check("max_tokens 0", warms_the_cache, is_needed=False),
    Check("assistant's turn is continued", goes_on, is_needed=False),
    Check("errors", says_errors),
)
