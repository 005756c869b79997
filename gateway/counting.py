"""How many tokens a prompt has; asked of the first node that can tell.

A node counts with the tokeniser it has in its cache, so the model need not be loaded; nodes that
serve it are asked first, then every other one that is up.
"""

from __future__ import annotations

import orjson

from cortex.gateway.catalogue import Target
from cortex.gateway.dialects.messages import MessagesCall
from cortex.gateway.fleet import FleetSnapshot
from cortex.gateway.routing import in_words, replicas
from cortex.gateway.upstream import NodeClient
from cortex.ipc.errors import ApiError, ModelNotFound, NodeFailed, Recovering
from cortex.ipc.node_api import HEADER_REQUEST_ID


async def count_tokens(
    snapshot: FleetSnapshot,
    client: NodeClient,
    target: Target,
    call: MessagesCall,
    request_id: str,
) -> int:
    """Return the tokens of the prompt in *call*; raise ModelNotFound where no node can tell."""
    serving = replicas(snapshot, target.node_id)
    nodes = [*serving, *(n for n in snapshot.nodes if n.takes_requests and n not in serving)]
    if not nodes:
        why = in_words(snapshot.nodes)
        raise Recovering(f"no node can count now: {why}", retry_after_seconds=5)
    failure: ApiError | None = None
    for node in nodes:
        body = call.count_body(target.node_id)
        headers = {HEADER_REQUEST_ID: request_id}
        try:
            answer = await client.control(node, "POST /tokenize", body, headers)
            return int(orjson.loads(answer)["count"])
        except ApiError as error:
            if error.status < 500 and error.status != 404:
                raise
            failure = failure if error.status == 404 else error
        except (orjson.JSONDecodeError, LookupError, TypeError, ValueError):
            failure = NodeFailed(f"node {node.name} did not answer with a count")
    raise failure or ModelNotFound(f"no node has the model {target.id!r}", param="model")
