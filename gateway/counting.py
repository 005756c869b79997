"""How many tokens a prompt has; asked of the first node that can tell.

A node counts with the tokeniser it has in its cache, so the model need not be loaded; nodes that
serve it are asked first, then every other one that is up, but for engines (``engine_tokens.py``).
"""

from __future__ import annotations

from typing import Protocol

from aiohttp import web

from cortex.gateway.auth import principal_of
from cortex.gateway.catalogue import Target
from cortex.gateway.engine_tokens import count_tokens_at
from cortex.gateway.fleet import FleetSnapshot
from cortex.gateway.renaming import Renaming
from cortex.gateway.request_id import id_of
from cortex.gateway.routing import in_words, replicas
from cortex.gateway.services import SERVICES
from cortex.gateway.upstream import NodeClient
from cortex.ipc.errors import ApiError, ModelNotFound, Recovering
from cortex.ipc.node_api import HEADER_REQUEST_ID


class Counted(Protocol):
    """A call whose prompt can be counted."""

    @property
    def model(self) -> str:
        """The model, as the client named it."""

    def refusal(self, error: ApiError) -> ApiError:
        """Return *error* of a node as the client would say it."""

    def count_body(self, node_id: str) -> bytes:
        """Return the request that counts, for a node that calls the model *node_id*."""


async def tokens_asked(request: web.Request, call: Counted) -> int:
    """Return the tokens of the prompt in *call*, if who sent *request* may use its model.

    Raise ApiError.
    """
    services = request.app[SERVICES]
    target = services.written.catalogue.target(call.model)
    principal_of(request).check_may_use(target.id, services.written.catalogue)
    await services.poller.first_round()
    with Renaming(target.node_id, call.model).errors():
        try:
            return await count_tokens(
                services.fleet.snapshot(), services.client, target, call, id_of(request)
            )
        except ApiError as error:
            raise call.refusal(error) from error


async def count_tokens(
    snapshot: FleetSnapshot,
    client: NodeClient,
    target: Target,
    call: Counted,
    request_id: str,
) -> int:
    """Return the tokens of the prompt in *call*; raise ModelNotFound where no node can tell."""
    serving = replicas(snapshot, target.node_id)
    others = (n for n in snapshot.nodes if n.takes_requests and not n.is_engine)
    nodes = [*serving, *(node for node in others if node not in serving)]
    if not nodes:
        why = in_words(snapshot.nodes)
        raise Recovering(f"no node can count now: {why}", retry_after_seconds=5)
    failure: ApiError | None = None
    for node in nodes:
        body = call.count_body(target.node_id)
        headers = {HEADER_REQUEST_ID: request_id}
        try:
            return await count_tokens_at(client, node, body, headers)
        except ApiError as error:
            if error.status < 500 and error.status != 404:
                raise
            failure = failure if error.status == 404 else error
    message = f"no node can count for {target.id!r}: none has it, or can tell"
    raise failure or ModelNotFound(message, param="model")
