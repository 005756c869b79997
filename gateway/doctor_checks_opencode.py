"""What opencode does: chat streams with its session in a header, and a limit of 32,000 tokens."""

from __future__ import annotations

from cortex.gateway.doctor_check import Check, Subject, need, room_for
from cortex.gateway.doctor_checks_openai import CHAT, TOOL, asked, calls_a_tool, lists_models
from cortex.gateway.doctor_streams import accepted, refuse_error
from cortex.gateway.doctor_wire import Reply, Wire

SESSION = {"x-session-affinity": "ses_doctor", "x-session-id": "ses_doctor"}
OWN_TOKENS, NEEDED_TOKENS = 7800, 12_288
"""Of its own prompt, with its tools (1.18.33, measured); of the context that it can work in."""
LIMIT_TOKENS = 32_000
ENOUGH_EVENTS = 12
"""Then it hangs up, as a user does who presses Escape: nobody waits for 32,000 tokens here."""


async def streams(wire: Wire, subject: Subject) -> str:
    """Its main request, and an end to it from outside."""
    body = asked(
        subject,
        max_tokens=LIMIT_TOKENS,
        stream=True,
        stream_options={"include_usage": True},
        tools=[TOOL],
        tool_choice="auto",
    )
    reply = await wire.ask("POST", CHAT, body, SESSION, has_enough)
    accepted(reply)
    refuse_error(reply.events)
    need(reply.events, "no chunk came")
    return f"accepted; first chunk after {reply.first_seconds:.1f} s"


async def names_the_session(wire: Wire, subject: Subject) -> str:
    """Its small request for a title, with the session in the header."""
    reply = accepted(await wire.ask("POST", CHAT, asked(subject), SESSION))
    node = reply.headers.get("x-cortex-node")
    need(node, "the answer does not say which node gave it: is this a cortex gateway?")
    return f"{node}, {reply.headers.get('x-cortex-reason')}"


def has_enough(reply: Reply) -> bool:
    """Whether so much of a stream has come that the rest needs no waiting for."""
    return len(reply.events) >= ENOUGH_EVENTS


CHECKS = (
    room_for(OWN_TOKENS, NEEDED_TOKENS),
    Check("models", lists_models),
    Check("stream with max_tokens 32000, cancelled", streams),
    Check("session in x-session-affinity", names_the_session),
    Check("tool call, and its result", calls_a_tool),
)
