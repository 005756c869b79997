"""Thinking that the client does not want to see, kept in its signature.

A client that asks for ``display: omitted`` gets thinking blocks without text, and gives them back
as they are in its next request. The signature is opaque to it, so it carries the text: else a model
that calls tools would forget between two calls why it makes them. Nothing is signed: what a client
says that its model has thought, it can say anyway.

    b"cortex-thinking." + base64 of the text, UTF-8
"""

from __future__ import annotations

import binascii
from base64 import b64decode, b64encode
from typing import Any

PREFIX = "cortex-thinking."


def signature_of(thinking: str) -> str:
    """Return a signature that carries *thinking*; an empty one for nothing."""
    return PREFIX + b64encode(thinking.encode()).decode() if thinking else ""


def thinking_of(block: dict[str, Any]) -> str:
    """Return what a thinking block says, or carries; empty where somebody else has signed it."""
    said, signature = block.get("thinking"), block.get("signature")
    if isinstance(said, str) and said:
        return said
    if not isinstance(signature, str) or not signature.startswith(PREFIX):
        return ""
    try:
        return b64decode(signature.removeprefix(PREFIX), validate=True).decode()
    except (binascii.Error, ValueError):
        return ""
