"""What Claude Code does: everything in one long request, and some words that it waits for."""

from __future__ import annotations

import re
import uuid
from typing import Any

import orjson

from cortex.gateway.doctor_check import (
    CONTEXT_UNKNOWN,
    Check,
    NotPossible,
    NotTried,
    Subject,
    Wrong,
    need,
    room_for,
)
from cortex.gateway.doctor_checks_anthropic import (
    COUNT,
    MESSAGES,
    TOOL,
    VERSION,
    calls_a_tool,
    counts,
    keeps_a_format,
    lists_models,
    takes_a_result,
)
from cortex.gateway.doctor_streams import accepted, message_of
from cortex.gateway.doctor_wire import Json, Reply, Wire

BETAS = (
    "claude-code-20250219,interleaved-thinking-2025-05-14,context-management-2025-06-27,"
    "mid-conversation-tool-changes-2026-07-01,advanced-tool-use-2025-11-20,effort-2025-11-24"
)
BILLING = "x-anthropic-billing-header: cc_version=2.1.329.{suffix}; cc_entrypoint=cli;"
EPHEMERAL = {"type": "ephemeral"}
DISCOVERED = ("claude", "anthropic")
"""How the names begin that its model picker lists."""
SILENCE_SECONDS = 30.0
"""A longer one and proxies, or the user, give up."""
LONG_TOKENS = 1000
"""What takes a CPU seconds, when nobody has computed it before."""
LARGEST_CONTEXT = 40_000
"""A prompt beyond a larger context would be megabytes."""
OWN_TOKENS, NEEDED_TOKENS = 12_500, 16_384
"""Of its own prompt, with its tools (2.1.329, measured); of the context that it can work in."""
TOO_LONG = re.compile(r"prompt is too long: \d+ tokens > \d+ maximum")


def headers_of(session: str) -> dict[str, str]:
    """Return what it sends beside the key."""
    return {
        "anthropic-version": VERSION,
        "anthropic-beta": BETAS,
        "x-app": "cli",
        "X-Claude-Code-Session-Id": session,
        "User-Agent": "claude-cli/2.1.329 (external, cli)",
    }


def asked(subject: Subject, *, suffix: str = "136", about: str = "", **more: Any) -> Json:
    """Return its main request, but for its length; *about* goes into the system prompt."""
    user = {"user_id": orjson.dumps({"session_id": "doctor"}).decode()}
    return {
        "model": subject.model,
        "system": [
            {"type": "text", "text": BILLING.format(suffix=suffix)},
            {"type": "text", "text": f"You help with code. {about}", "cache_control": EPHEMERAL},
        ],
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "Which city? Paris."}]},
            {"role": "system", "content": "Tools were found."},
        ],
        "tools": [TOOL, {**TOOL, "name": "WebFetch", "defer_loading": True}],
        "metadata": user,
        "thinking": {"type": "adaptive", "display": "omitted"},
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        "output_config": {"effort": "medium"},
        "max_tokens": 24,
        "stream": True,
        **more,
    }


async def sent(wire: Wire, body: Json, path: str = MESSAGES) -> Reply:
    """Return the answer to *body*, as it asks."""
    return await wire.ask("POST", f"{path}?beta=true", body, headers_of("doctor"))


async def is_greeted(wire: Wire, subject: Subject) -> str:
    """Whether somebody is there, asked in the old way and the new."""
    del subject
    for path in ("/", "/api/hello"):
        reply = await wire.ask("HEAD", path, None, {})
        need(reply.status == 200, f"HEAD {path} is answered with {reply.status}")
    return "HEAD / and HEAD /api/hello"


async def discovers(wire: Wire, subject: Subject) -> str:
    """Its model picker, which lists some names only."""
    del wire
    shown = [name for name in subject.ids if name.startswith(DISCOVERED)]
    if not shown:
        raise NotPossible(
            "its model picker lists names that begin with 'claude' or 'anthropic' only: give a "
            "model such an alias in models.toml, or set ANTHROPIC_MODEL"
        )
    return ", ".join(shown)


async def takes_either_key(wire: Wire, subject: Subject) -> str:
    """The key as ``x-api-key`` too."""
    said = wire.headers.get("Authorization")
    key = said.removeprefix("Bearer ") if said else "placeholder"
    body = asked(subject)
    headers = {**headers_of("doctor"), "Authorization": "", "x-api-key": key}
    accepted(await wire.ask("POST", f"{MESSAGES}?beta=true", {**body, "stream": False}, headers))
    return "x-api-key, and Authorization: Bearer"


async def counts_tools(wire: Wire, subject: Subject) -> str:
    """What ``/context`` asks, two dozen times."""
    turns = [{"role": "user", "content": "foo"}]
    body = {"model": subject.model, "messages": turns, "tools": [TOOL]}
    with_tool = accepted(await sent(wire, body, COUNT)).json["input_tokens"]
    without = accepted(await sent(wire, {**body, "tools": []}, COUNT)).json["input_tokens"]
    need(with_tool > without, "a tool adds no token to the count")
    return f"{without} tokens, {with_tool} with a tool"


async def streams(wire: Wire, subject: Subject) -> str:
    """Its main request: system turns among the others, deferred tools, thinking and all."""
    reply = await sent(wire, asked(subject))
    return f"{len(reply.events)} events, {message_of(reply).finish}"


async def takes_its_limit(wire: Wire, subject: Subject) -> str:
    """The same with ``max_tokens`` of 32,000, and Escape."""
    body = asked(subject, max_tokens=32_000)
    path = f"{MESSAGES}?beta=true"
    reply = await wire.ask("POST", path, body, headers_of("doctor"), lambda it: len(it.events) > 8)
    need(accepted(reply).events, "no event came")
    return "accepted, and cancelled"


async def caches_beside_the_bill(wire: Wire, subject: Subject) -> str:
    """Its billing line, which changes, and must not cost the cache of what follows it."""
    about = f"{uuid.uuid4()} " * 4
    same, other = asked(subject, about=about), asked(subject, about=about, suffix="f6c")
    message_of(await sent(wire, same))
    cached = message_of(await sent(wire, other)).usage["cache_read_input_tokens"]
    if cached:
        return f"{cached} tokens from the cache"
    if not message_of(await sent(wire, other)).usage["cache_read_input_tokens"]:
        raise NotPossible("not even the same prompt is found in a cache here")
    raise Wrong("another suffix, and nothing of the prompt is found: is strip_billing_block off?")


async def is_kept_awake(wire: Wire, subject: Subject) -> str:
    """A long prompt that nobody has seen before: something must come while it is computed."""
    tokens = min(LONG_TOKENS, (subject.context_tokens or 4 * LONG_TOKENS) // 2)
    about = f"{uuid.uuid4()} " + "word " * (tokens - 300)
    reply = await sent(wire, asked(subject, about=about))
    usage = message_of(reply).usage
    silence = max(reply.first_seconds, reply.longest_silence_seconds)
    need(silence < SILENCE_SECONDS, f"nothing came for {silence:.0f} s")
    return (
        f"{usage['input_tokens']} tokens, {silence:.1f} s without a word, {reply.keep_alives} pings"
    )


async def is_told_to_compact(wire: Wire, subject: Subject) -> str:
    """A prompt beyond the context, refused in the words that it compacts at."""
    context = subject.context_tokens
    if context is None:
        raise NotTried(CONTEXT_UNKNOWN)
    if context > LARGEST_CONTEXT:
        raise NotTried(f"the context of {context} tokens is large")
    reply = await sent(wire, asked(subject, about="word " * (context + 100), stream=False))
    said = str(reply.error.get("message"))
    need(reply.status in (400, 413), f"a prompt beyond the context: {reply.refusal}")
    need(TOO_LONG.fullmatch(said), f"not in the words that it compacts at: {said!r}")
    return said


CHECKS = (
    room_for(OWN_TOKENS, NEEDED_TOKENS),
    Check("greeting", is_greeted),
    Check("models", lists_models),
    Check("model discovery", discovers, is_needed=False),
    Check("key as x-api-key", takes_either_key),
    Check("count_tokens with tools", counts_tools),
    Check("count_tokens equals the call's usage", counts),
    Check("stream of its main request", streams),
    Check("max_tokens 32000, cancelled", takes_its_limit),
    Check("forced tool call, streamed", calls_a_tool),
    Check("tool_result", takes_a_result),
    Check("title as JSON", keeps_a_format, is_needed=False),
    Check("billing line and the prefix cache", caches_beside_the_bill, is_needed=False),
    Check("long prompt is not silent", is_kept_awake),
    Check("prompt is too long", is_told_to_compact),
)
