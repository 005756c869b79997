"""Loads and drains that somebody at a terminal waits for: begun, and told about until their end."""

from __future__ import annotations

import asyncio
from urllib.parse import quote

import msgspec

from cortex.gateway.tables import drain_words, load_words
from cortex.gateway.terminal import GatewayClient, LoadLines, Unreachable
from cortex.ipc.fleet_api import DrainAnswer, DrainNode, FleetView, LoadAnswer, LoadModel

LOOK_SECONDS = 0.5
"""How often something that goes on is looked at."""


async def load_and_tell(
    client: GatewayClient, asked: LoadModel, lines: LoadLines, *, wait: bool
) -> LoadAnswer:
    """Begin a load and, to *wait*, see it to its end; raise Unreachable."""
    begun = await client.post("/fleet/models/load", asked, LoadAnswer)
    if begun.status == "loaded" or not wait:
        return begun
    waiting = msgspec.structs.replace(asked, wait=True)
    async with asyncio.TaskGroup() as group:
        end = group.create_task(_outcome(client, waiting))
        while not end.done():
            await _tell(client, begun.model, lines)
            await asyncio.wait([end], timeout=LOOK_SECONDS)
    outcome = end.result()
    if isinstance(outcome, Unreachable):
        raise outcome
    return outcome


async def _outcome(client: GatewayClient, asked: LoadModel) -> LoadAnswer | Unreachable:
    """Return how a load has ended; an error is returned, so that it comes alone."""
    try:
        return await client.post("/fleet/models/load", asked, LoadAnswer)
    except Unreachable as exc:
        return exc


async def _tell(client: GatewayClient, model: str, lines: LoadLines) -> None:
    """Say how far the load of *model* is; where it cannot be asked, its end will say why."""
    try:
        view = await client.read("/fleet", FleetView)
    except Unreachable:
        return
    for load in view.loads:
        if load.model == model:
            where = f" on {load.node}" if load.node else ""
            what = f"loading {model}{where}"
            lines.hear(what if load.progress else f"{what}: {load_words(load)}", load.progress)


async def drain_and_tell(
    client: GatewayClient, node: str, lines: LoadLines, *, wait: bool
) -> DrainAnswer:
    """Begin a drain and, to *wait*, see it to its end; raise Unreachable."""
    path = f"/fleet/nodes/{quote(node, safe='')}/drain"
    done = await client.post(path, DrainNode(), DrainAnswer)
    while wait and not done.drain.done:
        lines.hear(f"{node}: {drain_words(done.drain)}", None)
        await asyncio.sleep(LOOK_SECONDS)
        view = await client.read("/fleet", FleetView)
        drain = next((known.drain for known in view.nodes if known.name == node), None)
        if drain is None:
            raise Unreachable(f"somebody has undrained {node}")
        done = DrainAnswer(node, drain, "drained" if drain.done else "draining")
    return done
