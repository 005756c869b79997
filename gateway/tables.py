"""What the operators' commands print: tables, and below them what is wrong, in sentences.

Cells go on in the next line where they are too long: ids are never cut. Names are no markup: they
may hold brackets.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from typing import Any

from msgspec import UNSET
from rich.box import MINIMAL
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from cortex.gateway.terminal import duration, progress_words
from cortex.ipc.fleet_api import (
    Drain,
    FleetDevice,
    FleetModel,
    FleetNode,
    FleetView,
    LoadView,
    PlacementView,
    UsageRow,
    UsageView,
)
from cortex.ipc.openai_answers import ModelList

PHASES = {
    "asking": "asking the nodes what it needs",
    "waiting": "waiting for memory",
    "clearing": "making room",
    "loading": "loading",
}


def table(*names: str) -> Table:
    """Return a table with these columns, lean: many of them have to fit into 80 characters."""
    columns = (Column(name, overflow="fold") for name in names)
    return Table(*columns, box=MINIMAL, pad_edge=False, padding=(0, 1, 0, 0))


def add(to: Table, *cells: object) -> None:
    """Add a row; None is an empty cell."""
    to.add_row(*(Text("" if cell is None else str(cell)) for cell in cells))


def say(console: Console, line: str) -> None:
    """Print a sentence as it is."""
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def print_fleet(console: Console, health: dict[str, Any], fleet: FleetView) -> None:
    """Show nodes with their devices, models, and loads, and below them what is wrong."""
    nodes = health["nodes"]
    say(console, f"{health['status']}: {nodes['healthy']} of {nodes['total']} nodes up")
    console.print(_devices(fleet))
    console.print(_models(fleet))
    if fleet.loads:
        console.print(_loads(fleet.loads))
    for line in troubles(fleet):
        say(console, line)


def _devices(fleet: FleetView) -> Table:
    found = table("node", "state", "since", "device", "free MB", "used MB", "of MB", "°C")
    for node in fleet.nodes:
        known = (node.name, state_of(node), _moment(node.since))
        for device in node.devices:
            is_ready = device.state == "ready"
            add(
                found,
                *known,
                device.name if is_ready else f"{device.name}, {device.state}",
                *_memory_mb(device),
                device.vram_total_mb,
                device.temp_c,
            )
        if not node.devices:
            add(found, *known, "engine" if node.is_engine else None)
    return found


def _memory_mb(device: FleetDevice) -> tuple[int | None, int | None]:
    """Return what is free and what is used, as placement counts them where the node says."""
    free_mb, total_mb = device.loadable_mb, device.vram_total_mb
    if free_mb is None or total_mb is None:
        return device.vram_free_mb, device.vram_used_mb
    return free_mb, total_mb - free_mb


def _models(fleet: FleetView) -> Table:
    found = table("model", "node", "status", "running", "queued", "idle", "MB", "class")
    for node in fleet.nodes:
        for model in node.models:
            add(
                found,
                model.id,
                node.name,
                _status(model),
                model.in_flight,
                model.queue_depth,
                duration(model.idle_seconds) if model.status == "loaded" else None,
                model.footprint_mb or None,
                model.residency_class,
            )
    return found


def _status(model: FleetModel) -> str:
    status = progress_words(model.progress) if model.progress else model.status
    return f"{status}, pinned" if model.pinned else status


def _loads(loads: Iterable[LoadView]) -> Table:
    found = table("load", "node", "what it is at", "since", "requests")
    for load in loads:
        add(
            found,
            load.model,
            load.node,
            load_words(load),
            duration(load.seconds),
            load.waiting_requests,
        )
    return found


def load_words(load: LoadView) -> str:
    """Return what a load is at."""
    if load.progress is not None:
        return progress_words(load.progress)
    return load.why or PHASES[load.phase]


def state_of(node: FleetNode) -> str:
    """Return ``up``, or the strongest reason why not."""
    if not node.healthy:
        return "down"
    if node.drain is not None:
        return "drained" if node.drain.done else "draining"
    if node.draining:
        return "stopping"
    return "up" if node.breaker == "closed" else f"up, breaker {node.breaker.replace('_', ' ')}"


def drain_words(drain: Drain) -> str:
    """Return how far a drain has come."""
    if drain.done:
        return "drained by an operator: nothing is left there"
    models = ", ".join(drain.models) or "none"
    return f"drained by an operator: {drain.in_flight} requests run, models left: {models}"


def troubles(fleet: FleetView) -> Iterator[str]:
    """Yield a line for everything that the tables show to be wrong, and why it is."""
    for node in fleet.nodes:
        if node.error:
            yield f"{node.name}: {node.error.removeprefix(f'node {node.name} ')}"
        if node.drain is not None:
            yield f"{node.name}: {drain_words(node.drain)}"
        elif node.healthy and node.why:
            yield f"{node.name}: {node.why}"
        for device in node.devices:
            if device.state != "ready" and device.last_failure:
                yield f"{device.name} on {node.name}: {device.last_failure}"
        for failed in node.activation.failed if node.activation else []:
            yield f"{failed.model_id} on {node.name}: {failed.error}"
        for model in node.models:
            why = model.failure or model.servable.detail or model.servable.reason
            if why and why != model.status:
                yield f"{model.id} on {node.name}: {why}"


def _moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).astimezone().strftime("%d %b %H:%M")


def print_placement(console: Console, placed: PlacementView) -> None:
    """Say where a model would go, and what every node had to offer."""
    say(console, placement_words(placed))
    found = table(
        "node", "fits", "wants MB", "by", "least MB", "by", "free MB", "could free MB", "would go"
    )
    for candidate in placed.candidates:
        add(
            found,
            candidate.node,
            candidate.fits.replace("_", " "),
            candidate.needs_mb,
            candidate.source,
            candidate.least_mb,
            candidate.least_source,
            candidate.free_mb,
            candidate.reclaimable_mb,
            ", ".join(candidate.evicts),
        )
    console.print(found)
    for candidate in placed.candidates:
        say(console, f"{candidate.node}: {candidate.why}")


def placement_words(placed: PlacementView) -> str:
    """Return what would become of a load of a model, in one sentence."""
    if placed.loaded_on:
        return f"{placed.model} is loaded on {', '.join(placed.loaded_on)}"
    if placed.chosen is None:
        return str((placed.refusal or {}).get("message"))
    would = f"{placed.model} would be loaded on {placed.chosen}"
    gone = ", ".join(placed.evicts)
    if placed.fits == "now":
        return f"{would}; nothing would have to go"
    if placed.fits == "after_evicting":
        return f"{would}; {gone} would be unloaded first"
    if gone:
        return f"{would}, once {gone} may go"
    return f"{placed.model} would have to wait for {placed.chosen}: {placed.candidates[0].why}"


def print_models(console: Console, found: ModelList) -> None:
    """Show what there is to serve."""
    shown = table("model", "loaded", "where", "context")
    for entry in found.data:
        places = [] if entry.locations is UNSET else entry.locations
        add(
            shown,
            entry.id,
            "yes" if entry.loaded is True else None,
            ", ".join(f"{place['node']} ({place['status']})" for place in places),
            None if entry.context_length is UNSET else entry.context_length,
        )
    console.print(shown)


def print_usage(console: Console, used: UsageView) -> None:
    """Show what was used, and below it all of it together."""
    shown = table("day", "key", "model", "requests", "prompts", "of it cached", "answers")
    for row in used.usage:
        add(shown, row.day, row.key, row.model, *_tokens(row))
    if used.usage:
        shown.add_section()
        add(shown, "all", None, None, *map(sum, zip(*map(_tokens, used.usage), strict=True)))
    console.print(shown)


def _tokens(row: UsageRow) -> tuple[int, int, int, int]:
    cached = row.cached_prompt_tokens
    return row.requests, row.prompt_tokens, cached, row.completion_tokens
