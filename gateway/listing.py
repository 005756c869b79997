"""``GET /v1/models``: everything the fleet can serve, merged.

    what is in it                            as long as
    a model of the catalogue                 some node could hold it, or was never reached
    what a node or an engine has             it is up, and the load has not failed
    an alias, as an entry of its own         its model is in it

    an entry says        from
    limits               the tightest of the replicas, else what was known last, else ``limit`` of
                         its profile; of a cold model never more than ``max_context_tokens``
    what it can do       the same; what nobody knows is left out: absent is not zero
    ``locations``        where it is, and its state there; ``unservable`` is loaded in vain
    ``feasible_on``      where it is, and what nodes could hold it
    ``loaded``           whether it would be answered without a load

Ids are sorted and ``created`` is 0, "not known", so that two calls can be compared.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import msgspec
from msgspec import UNSET, UnsetType

from cortex.gateway.catalogue import Catalogue, Profile
from cortex.gateway.fleet import FleetSnapshot, Node
from cortex.gateway.last_known import Known
from cortex.gateway.placement import could_hold
from cortex.gateway.routing import replicas
from cortex.ipc.node_api import Limit
from cortex.ipc.openai_answers import ModelEntry

OWNER = "cortex"
UNSERVABLE = "unservable"


@dataclass(frozen=True)
class Listing:
    """The list of one moment; *last_known* is asked by names on nodes.

    *least_mb* tells the least that a model needs on a node, where the node has said it.
    """

    snapshot: FleetSnapshot
    catalogue: Catalogue
    last_known: Callable[[str], Known | None]
    least_mb: Callable[[Node, Profile], int | None]

    def entries(self, is_allowed: Callable[[str], bool]) -> list[ModelEntry]:
        """Return one entry a name, sorted; *is_allowed* judges resolved ids."""
        found = {model: entry for model in self._ids() if (entry := self._entry(model))}
        for alias in self.catalogue.aliases:
            if entry := found.get(self.catalogue.target(alias).id):
                found[alias] = msgspec.structs.replace(entry, id=alias)
        allowed = (name for name in found if is_allowed(self.catalogue.target(name).id))
        return [found[name] for name in sorted(allowed)]

    def _ids(self) -> set[str]:
        """Return the public ids of the catalogue, and of what is or will be on the nodes."""
        ids = set(self.catalogue.profiles)
        for node in self._up:
            names = {info.id for info in node.models if info.status != "failed"}
            ids |= {self.catalogue.public_id(name) for name in names | _coming(node)}
        return ids

    @property
    def _up(self) -> list[Node]:
        return [node for node in self.snapshot.nodes if node.is_healthy]

    def _entry(self, model: str) -> ModelEntry | None:
        """Return the entry of *model*, or None where no node has it or could."""
        target = self.catalogue.target(model)
        states = {node.name: state for node in self._up if (state := _state(node, target.node_id))}
        feasible = {name for name, state in states.items() if state != "failed"}
        if profile := target.profile:
            feasible |= {
                node.name
                for node in self.snapshot.nodes
                if could_hold(node, profile, self.least_mb(node, profile))
            }
        if not feasible:
            return None
        live = Known.of(info for node in self._up if (info := node.model(target.node_id)))
        known = live or self.last_known(target.node_id)
        limit = _limit(target.profile, known, is_cold=live is None)
        declared = list(target.profile.capabilities) if target.profile else []
        can = known.capabilities if known else []
        return ModelEntry(
            id=model,
            created=0,
            owned_by=OWNER,
            loaded=bool(replicas(self.snapshot, target.node_id)),
            locations=[{"node": name, "status": states[name]} for name in sorted(states)],
            feasible_on=sorted(feasible),
            context_length=_or_unset(limit.context),
            max_model_len=_or_unset(limit.context),
            max_input_tokens=_or_unset(limit.input),
            max_output_tokens=_or_unset(limit.output),
            limit=limit if limit != Limit() else UNSET,
            capabilities=can or declared or UNSET,
            tool_call=known.tool_call if known and can else UNSET,
            reasoning=known.reasoning if known and can else UNSET,
            cost=_cost(target.profile),
        )


def _limit(profile: Profile | None, known: Known | None, *, is_cold: bool) -> Limit:
    told = known.limit if known else None
    limit = told or (profile.known_limit() if profile else None) or Limit()
    bounds = [limit.context]
    if profile and limit.context and is_cold:
        bounds.append(profile.max_context_tokens)
    context = _least(*bounds)
    return Limit(context, _least(limit.input, context), limit.output)


def _least(*numbers: int | None) -> int | None:
    return min((number for number in numbers if number is not None), default=None)


def _or_unset(number: int | None) -> int | UnsetType:
    return UNSET if number is None else number


def _state(node: Node, node_id: str) -> str | None:
    info = node.model(node_id)
    if info and info.status == "loaded" and not (info.servable.ok or info.servable.is_full):
        return UNSERVABLE
    return node.status_of(node_id)


def _coming(node: Node) -> set[str]:
    """Return the names of what *node* loads at its own start."""
    activation = node.health.activation if node.health else None
    if activation is None:
        return set()
    return {*activation.pending, *filter(None, [activation.in_progress])}


def _cost(profile: Profile | None) -> dict[str, float] | UnsetType:
    if profile is None or profile.cost is None:
        return UNSET
    prices = msgspec.structs.asdict(profile.cost)
    return {kind: price for kind, price in prices.items() if price is not None}
