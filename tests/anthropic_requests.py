"""Requests of Anthropic's Messages, and what a node is asked for them; for tests."""

from typing import Any

import msgspec
import pytest

from cortex.gateway.dialects.messages import MessagesCall, decode_messages
from cortex.ipc.errors import ApiError

USER: list[dict[str, Any]] = [{"role": "user", "content": "hi"}]


def decoded(*, strip: bool = True, counts_only: bool = False, **fields: Any) -> MessagesCall:
    """Return the call in a plain request with *fields*; ``...`` takes one away."""
    body = {"model": "m", "max_tokens": 10, "messages": USER, **fields}
    raw = msgspec.json.encode({name: value for name, value in body.items() if value is not ...})
    return decode_messages(raw, strip_billing_block=strip, counts_only=counts_only)


def asked(**fields: Any) -> dict[str, Any]:
    """Return what the node is asked when a client says *fields*."""
    body: dict[str, Any] = msgspec.json.decode(decoded(**fields).body("node-id"))
    return body


def said(*blocks: dict[str, Any], role: str = "user") -> list[dict[str, Any]]:
    """Return the node's messages for a turn with *blocks*, with a turn of the user behind it."""
    messages = asked(messages=[{"role": role, "content": list(blocks)}, *USER])["messages"]
    assert messages[-1:] == USER
    return list(messages[:-1])


def refusal(**fields: Any) -> ApiError:
    """Return why a request with *fields* is refused."""
    with pytest.raises(ApiError) as caught:
        decoded(**fields)
    return caught.value
