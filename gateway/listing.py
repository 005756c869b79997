"""``GET /v1/models``: everything the fleet can serve, merged; in either dialect.

In it is every model of the catalogue, loaded or not, whatever a node that is up has loaded or is
loading, and every alias as an entry of its own. Where replicas differ, the tightest limit counts.
Ids are sorted and ``created`` is 0, "not known", so that two calls can be compared.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

from msgspec import UNSET

from cortex.gateway.catalogue import Catalogue
from cortex.gateway.fleet import FleetSnapshot
from cortex.gateway.routing import replicas
from cortex.ipc.errors import InvalidRequest
from cortex.ipc.node_api import Limit, ModelInfo
from cortex.ipc.openai_answers import ModelEntry

OWNER = "cortex"
_LIMIT = re.compile(r"0*[1-9][0-9]{0,8}", re.ASCII)
EPOCH = "1970-01-01T00:00:00Z"
"""What Anthropic says of a model whose release date is not known."""


def entries(
    snapshot: FleetSnapshot, catalogue: Catalogue, is_allowed: Callable[[str], bool]
) -> list[ModelEntry]:
    """Return one entry a name, sorted; *is_allowed* judges resolved ids."""
    ids = set(catalogue.profiles)
    for node in snapshot.nodes:
        if node.is_healthy:
            ids |= {catalogue.public_id(m.id) for m in node.models if m.status != "failed"}
    found = {model: _entry(model, model, snapshot, catalogue) for model in ids}
    for alias in catalogue.aliases:
        target = catalogue.target(alias).id
        if target in ids:
            found[alias] = _entry(alias, target, snapshot, catalogue)
    return [found[name] for name in sorted(found) if is_allowed(catalogue.target(name).id)]


def _entry(name: str, model: str, snapshot: FleetSnapshot, catalogue: Catalogue) -> ModelEntry:
    target = catalogue.target(model)
    held = {
        node.name: info
        for node in snapshot.nodes
        if node.is_healthy and (info := node.model(target.node_id)) is not None
    }
    declared = target.profile.known_limit() if target.profile else None
    limit = _limit(held.values(), declared)
    context = limit.context or UNSET
    return ModelEntry(
        id=name,
        created=0,
        owned_by=OWNER,
        loaded=bool(replicas(snapshot, target.node_id)),
        locations=[{"node": node, "status": held[node].status} for node in sorted(held)],
        context_length=context,
        max_model_len=context,
        max_input_tokens=limit.input or context,
    )


def _limit(infos: Iterable[ModelInfo], declared: Limit | None) -> Limit:
    told = [info.limit for info in infos if info.limit and info.limit.context]
    if told:
        return min(told, key=lambda limit: limit.context or 0)
    return declared or Limit()


def anthropic_entry(entry: ModelEntry) -> dict[str, Any]:
    """Return *entry* as Anthropic spells it."""
    return {
        "type": "model",
        "id": entry.id,
        "display_name": entry.id,
        "created_at": EPOCH,
        "lifecycle": "active",
        "deprecated_at": None,
        "retires_at": None,
        "line": None,
        "capabilities": None,
        "max_input_tokens": None if entry.max_input_tokens is UNSET else entry.max_input_tokens,
        "max_tokens": None,
    }


def anthropic_page(found: list[ModelEntry], query: dict[str, str]) -> dict[str, Any]:
    """Return the page that ``limit``, ``after_id`` and ``before_id`` ask for.

    Without a limit everything is on it. Raise InvalidRequest.
    """
    limit = query.get("limit", str(max(len(found), 1)))
    if not _LIMIT.fullmatch(limit):
        raise InvalidRequest("limit must be a number from 1 on", param="limit")
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
