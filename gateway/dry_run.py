"""``GET /fleet/placement``: where a model would go, as operators read it; pure."""

from __future__ import annotations

from collections.abc import Sequence

from cortex.gateway.placement import Candidate, Incoming
from cortex.gateway.refusal import refusal
from cortex.ipc.fleet_api import CandidateView, PlacementView


def view_of(
    incoming: Incoming, found: Sequence[Candidate], loaded_on: Sequence[str] = ()
) -> PlacementView:
    """Return what operators see of *found*, the best first; it is *loaded_on* these nodes."""
    views = [_candidate(candidate) for candidate in found]
    best = found[0] if found else None
    if best is None or best.fits in ("no", "away", "never"):
        error = refusal(incoming, found)
        said = {"status": error.status, **error.body()["error"]}
        return PlacementView(incoming.target.id, views, refusal=said, loaded_on=tuple(loaded_on))
    return PlacementView(
        model=incoming.target.id,
        candidates=views,
        needs_mb=best.need.mb,
        source=best.need.source,
        least_mb=best.need.smallest_mb,
        least_source=best.need.smallest_source,
        loaded_on=tuple(loaded_on),
        chosen=best.node.name,
        fits=best.fits,
        devices=best.devices,
        evicts=views[0].evicts,
    )


def _candidate(candidate: Candidate) -> CandidateView:
    return CandidateView(
        node=candidate.node.name,
        fits=candidate.fits,
        why=candidate.why,
        needs_mb=candidate.need.mb,
        source=candidate.need.source,
        least_mb=candidate.need.smallest_mb,
        least_source=candidate.need.smallest_source,
        free_mb=candidate.free_mb,
        reclaimable_mb=candidate.reclaimable_mb,
        devices=candidate.devices,
        evicts=tuple(victim.name for victim in candidate.victims),
    )
