"""``GET /v1/models`` as an Anthropic client wants it: its own entries, in pages."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from msgspec import UNSET, UnsetType

from cortex.ipc.errors import InvalidRequest
from cortex.ipc.openai_answers import ModelEntry

EPOCH = "1970-01-01T00:00:00Z"
"""What Anthropic says of a model whose release date is not known."""
_LIMIT = re.compile(r"0*[1-9][0-9]{0,8}", re.ASCII)
NO = {"supported": False}


def anthropic_entry(entry: ModelEntry) -> dict[str, Any]:
    """Return *entry* as Anthropic spells it; what is not known is null."""
    return {
        "type": "model",
        "id": entry.id,
        "display_name": entry.id,
        "created_at": EPOCH,
        "lifecycle": "active",
        "deprecated_at": None,
        "retires_at": None,
        "line": None,
        "capabilities": _capabilities(entry),
        "max_input_tokens": _or_null(entry.max_input_tokens),
        "max_tokens": _or_null(entry.max_output_tokens),
    }


def _capabilities(entry: ModelEntry) -> dict[str, Any] | None:
    """Return what the model can do, all of it or nothing: that is how the dialect has it."""
    if entry.reasoning is UNSET or entry.capabilities is UNSET:
        return None
    chats = {"supported": "chat" in entry.capabilities}
    thinks = {"supported": bool(entry.reasoning)}
    types = {"adaptive": thinks, "between_tools": NO, "disabled": chats, "enabled": thinks}
    levels = ("low", "medium", "high", "xhigh", "max")
    return {
        "batch": NO,
        "citations": NO,
        "code_execution": NO,
        "context_management": NO,
        "effort": {**thinks, **dict.fromkeys(levels, thinks)},
        "image_input": {"supported": "image" in entry.capabilities},
        "pdf_input": NO,
        "server_tools": {**NO, "code_execution": NO, "web_search": NO},
        "structured_outputs": chats,
        "thinking": {**thinks, "types": types},
    }


def _or_null(number: int | UnsetType) -> int | None:
    return None if isinstance(number, UnsetType) else number


def anthropic_page(found: list[ModelEntry], query: Mapping[str, str]) -> dict[str, Any]:
    """Return the page that ``limit``, ``after_id`` and ``before_id`` ask for.

    Without a limit everything is on it. Raise InvalidRequest.
    """
    limit = query.get("limit", str(max(len(found), 1)))
    if not _LIMIT.fullmatch(limit):
        raise InvalidRequest("limit must be a number from 1 on", param="limit")
    ids = {entry.id for entry in found}
    for name in ("after_id", "before_id"):
        if (said := query.get(name)) and said not in ids:
            raise InvalidRequest(f"{name}: there is no model {said!r} in the list", param=name)
    left = [entry for entry in found if entry.id > query.get("after_id", "")]
    if before := query.get("before_id"):
        left = [entry for entry in left if entry.id < before]
        page = left[-int(limit) :]
    else:
        page = left[: int(limit)]
    return {
        "data": [anthropic_entry(entry) for entry in page],
        "has_more": len(page) < len(left),
        "first_id": page[0].id if page else None,
        "last_id": page[-1].id if page else None,
    }
