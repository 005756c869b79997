"""Why no node takes a model, with the arithmetic; pure.

a node could hold it, and is full of what stays     503 overloaded
a node could hold it, and is away                   503 recovering
a node would not have it for the model's own sake   as the node says it
none ever could                                     404 model_not_found, no Retry-After
"""

from __future__ import annotations

from collections.abc import Sequence

from cortex.gateway.placement import Candidate, Incoming
from cortex.ipc.errors import ApiError, ModelNotFound, Overloaded, Recovering

AWAY_SECONDS = 3
FULL_SECONDS = 5


def refusal(incoming: Incoming, found: Sequence[Candidate]) -> ApiError:
    """Return why none of *found* takes the model."""
    name = repr(incoming.target.id)
    in_question = [c for c in found if incoming.only in (None, c.node.name)]
    said = "; ".join(f"node {c.node.name}: {c.why}" for c in in_question)
    numbers = {"nodes": [_numbers(candidate) for candidate in in_question]}
    full = [candidate for candidate in in_question if candidate.fits == "no"]
    away = [candidate for candidate in in_question if candidate.fits == "away"]
    if full:
        message = f"there is no room for {name} now: {said}"
        return Overloaded(message, retry_after_seconds=FULL_SECONDS, extras=numbers)
    if away:
        message = f"{name} cannot be loaded now: {said}"
        return Recovering(message, retry_after_seconds=AWAY_SECONDS, extras=numbers)
    for candidate in in_question:
        if candidate.need.refusal is not None:
            return candidate.need.refusal
    message = f"no node can hold {name}: {said or 'there is none that loads models'}"
    return ModelNotFound(message, param="model", extras=numbers)


def _numbers(candidate: Candidate) -> dict[str, object]:
    return {
        "node": candidate.node.name,
        "needs_mb": candidate.need.mb,
        "source": candidate.need.source,
        "least_mb": candidate.need.smallest_mb,
        "least_source": candidate.need.smallest_source,
        "free_mb": candidate.free_mb,
        "reclaimable_mb": candidate.reclaimable_mb,
        "why": candidate.why,
    }
