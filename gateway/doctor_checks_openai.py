"""What OpenAI's SDKs do: chat, streams, tools, formats, log probabilities, and the older APIs."""

from __future__ import annotations

from typing import Any

import orjson

from cortex.gateway.doctor_check import Check, NotPossible, Subject, Wrong, need
from cortex.gateway.doctor_streams import accepted, arguments_in, chat_of, shaped
from cortex.gateway.doctor_wire import Json, Reply, Wire

CHAT = "/v1/chat/completions"
CITY: Json = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
"""Little to say, so that a small model says it quickly."""
FUNCTION: Json = {"name": "look_up", "description": "Look a city up.", "parameters": CITY}
TOOL: Json = {"type": "function", "function": FUNCTION}
FORCED: Json = {"type": "function", "function": {"name": "look_up"}}
FORMAT: Json = {
    "type": "json_schema",
    "json_schema": {"name": "place", "schema": CITY, "strict": True},
}


def asked(subject: Subject, said: str = "Which city? Paris.", **more: Any) -> Json:
    """Return a short chat request."""
    turns = [{"role": "user", "content": said}]
    return {"model": subject.model, "messages": turns, "max_tokens": 24, **more}


async def lists_models(wire: Wire, subject: Subject) -> str:
    """``client.models.list()`` and ``retrieve``."""
    listed = accepted(await wire.get("/v1/models")).json
    shaped(listed, "object", "data")
    entry = next((it for it in listed["data"] if it["id"] == subject.model), None)
    need(entry, f"{subject.model!r} is not in the list")
    shaped(entry, "id", "object", "created", "owned_by")
    one = accepted(await wire.get(f"/v1/models/{subject.model}")).json
    need(one.get("id") == subject.model, "one model alone has another id")
    return f"{len(listed['data'])} in the list"


async def chats(wire: Wire, subject: Subject) -> str:
    """A whole answer."""
    answer = accepted(await wire.post(CHAT, asked(subject))).json
    shaped(answer, "id", "object", "created", "model", "choices", "usage")
    choice = answer["choices"][0]
    shaped(choice, "index", "message", "finish_reason", "logprobs")
    shaped(choice["message"], "role", "content", "refusal")
    need(answer["model"] == subject.model, f"the answer is of {answer['model']!r}")
    return f"{answer['usage']['total_tokens']} tokens"


async def streams(wire: Wire, subject: Subject) -> str:
    """``stream=True`` with ``include_usage``."""
    body = asked(subject, stream=True, stream_options={"include_usage": True})
    reply = await wire.post(CHAT, body)
    whole = chat_of(reply, wants_usage=True)
    return f"{len(reply.events)} chunks, {whole.usage['completion_tokens']} tokens"


async def calls_a_tool(wire: Wire, subject: Subject) -> str:
    """A demanded call in a stream, and the turn after it."""
    body = asked(subject, tools=[TOOL], tool_choice=FORCED, max_tokens=120)
    whole = chat_of(await wire.post(CHAT, {**body, "stream": True}), wants_usage=False)
    call_id, arguments = whole.call_of("look_up")
    need(arguments.get("city") in ("Paris", "Rome"), "the arguments are not as the schema says")
    function = {"name": "look_up", "arguments": orjson.dumps(arguments).decode()}
    call = {"id": call_id, "type": "function", "function": function}
    turns = [
        *body["messages"],
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": call_id, "content": "It is sunny."},
    ]
    accepted(await wire.post(CHAT, asked(subject, messages=turns, tools=[TOOL])))
    return f"{whole.finish}; the result was taken"


async def keeps_a_format(wire: Wire, subject: Subject) -> str:
    """``response_format`` with a schema, strictly."""
    body = asked(subject, response_format=FORMAT, max_tokens=60)
    answer = accepted(await wire.post(CHAT, body)).json
    found = arguments_in(answer["choices"][0]["message"]["content"])
    need(found.get("city") in ("Paris", "Rome"), "the text is not as the schema says")
    return "the text is as the schema says"


async def tells_logprobs(wire: Wire, subject: Subject) -> str:
    """``logprobs`` and ``top_logprobs``."""
    body = asked(subject, logprobs=True, top_logprobs=2, max_tokens=4)
    answer = accepted(await wire.post(CHAT, body)).json
    tokens = (answer["choices"][0]["logprobs"] or {}).get("content") or []
    need(tokens, "no log probabilities came")
    shaped(tokens[0], "token", "logprob", "bytes", "top_logprobs")
    need(len(tokens[0]["top_logprobs"]) == 2, "not as many likeliest tokens as were asked for")
    return f"of {len(tokens)} tokens"


async def completes(wire: Wire, subject: Subject) -> str:
    """Text completions."""
    body = {"model": subject.model, "prompt": "The capital of France is", "max_tokens": 8}
    answer = accepted(await wire.post("/v1/completions", body)).json
    shaped(answer, "id", "object", "created", "model", "choices", "usage")
    shaped(answer["choices"][0], "text", "index", "finish_reason", "logprobs")
    return f"{answer['usage']['completion_tokens']} tokens"


async def embeds(wire: Wire, subject: Subject) -> str:
    """Embeddings, as numbers."""
    body = {"model": subject.model, "input": ["one", "two"], "encoding_format": "float"}
    reply = await wire.post("/v1/embeddings", body)
    refused_clearly(reply)
    vectors = [entry["embedding"] for entry in accepted(reply).json["data"]]
    need(len(vectors) == 2, f"{len(vectors)} vectors for 2 inputs")
    return f"{len(vectors[0])} numbers each"


async def says_errors(wire: Wire, subject: Subject) -> str:
    """An error that SDKs can read."""
    body = asked(subject, model=f"{subject.model}-that-is-not-there")
    reply = await wire.post(CHAT, body)
    need(reply.status == 404, f"a model that is not there: {reply.refusal}")
    shaped(reply.error, "message", "type", "param", "code")
    return str(reply.error["code"])


def refused_clearly(reply: Reply) -> None:
    """Raise NotPossible where *reply* says in an error object that the request is not for it."""
    if reply.status in (400, 404, 501) and reply.error.get("message"):
        raise NotPossible(str(reply.error["message"]))
    if reply.status != 200:
        raise Wrong(reply.refusal)


CHECKS = (
    Check("models", lists_models),
    Check("chat", chats),
    Check("chat stream with usage", streams),
    Check("forced tool call, and its result", calls_a_tool, is_needed=False),
    Check("response_format: json_schema", keeps_a_format, is_needed=False),
    Check("logprobs", tells_logprobs, is_needed=False),
    Check("completions", completes, is_needed=False),
    Check("embeddings", embeds, is_needed=False),
    Check("errors", says_errors),
)
