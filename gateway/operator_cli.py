"""The operators' commands: they ask a running gateway and print tables, or with --json its answer.

``cortex models | placement | load | unload | pin | unpin | drain | undrain | usage``: ``cli.py``
puts them beside the others and has the exit codes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import date
from typing import Annotated
from urllib.parse import quote, urlencode

import typer
from rich.console import Console

from cortex.gateway.asking import AT, ApiKey, Endpoint, Json, answer_of, client_of, fail, print_json
from cortex.gateway.tables import (
    add,
    print_models,
    print_placement,
    print_usage,
    say,
    table,
)
from cortex.gateway.telling import drain_and_tell, load_and_tell
from cortex.gateway.terminal import LoadLines
from cortex.ipc.fleet_api import (
    DrainNode,
    LoadModel,
    PinAnswer,
    PinModel,
    PlacementView,
    UndrainAnswer,
    UnloadAnswer,
    UnloadModel,
    UnpinAnswer,
    UsageView,
)
from cortex.ipc.openai_answers import ModelList

Model = Annotated[str, typer.Argument(metavar="MODEL", help="Its id, or an alias of it.")]
NodeName = Annotated[
    str, typer.Argument(metavar="NODE", help="A name of [[neurons]] or [[engines]].")
]
OnNode = Annotated[
    str | None, typer.Option(metavar="NAME", help="On this node; by default wherever it is.")
]


def models(endpoint: Endpoint = AT, api_key: ApiKey = None, json: Json = False) -> None:
    """List the models that the fleet can serve.

    \b
      cortex models
      cortex models --json | jq -r '.data[] | select(.loaded).id'
    """  # noqa: D301  # the backspace is click's mark for "do not wrap"
    found = answer_of(client_of(endpoint, api_key).read("/v1/models", ModelList))
    if json:
        print_json(found)
    else:
        print_models(Console(), found)


def placement(
    model: Model, endpoint: Endpoint = AT, api_key: ApiKey = None, json: Json = False
) -> None:
    """Say where a model would be loaded, and what would go.

    Nothing is loaded. What is needed is measured once the model has been loaded anywhere; before
    that it is what the node or models.toml says.

    \b
      cortex placement qwen3-8b
    """  # noqa: D301
    query = urlencode({"model": model})
    placed = answer_of(
        client_of(endpoint, api_key).read(f"/fleet/placement?{query}", PlacementView)
    )
    if json:
        print_json(placed)
    else:
        print_placement(Console(), placed)


def load(
    model: Model,
    *,
    node: Annotated[
        str | None, typer.Option(metavar="NAME", help="To this node; by default the best one.")
    ] = None,
    wait: Annotated[bool, typer.Option(help="Stay until it is loaded, and say how far.")] = True,
    endpoint: Endpoint = AT,
    api_key: ApiKey = None,
    json: Json = False,
) -> None:
    """Load a model of the catalogue.

    Where there is no room, idle models make it, as `cortex placement` says. Ctrl-C stops the
    waiting and not the load; `cortex unload` does that.

    \b
      cortex load qwen3-8b
      cortex load qwen3-8b --node beta --no-wait
    """  # noqa: D301
    client = client_of(endpoint, api_key)
    done = answer_of(load_and_tell(client, LoadModel(model, node), LoadLines(_aside), wait=wait))
    if json:
        print_json(done)
    else:
        _print_places(model, [done.node], done.status)


def unload(
    model: Model,
    *,
    node: OnNode = None,
    force: Annotated[
        bool, typer.Option("--force", help="Also while it answers: those requests fail.")
    ] = False,
    endpoint: Endpoint = AT,
    api_key: ApiKey = None,
    json: Json = False,
) -> None:
    """Unload a model, or stop its load.

    A model that answers a request stays, unless --force. A load that waits for its turn is taken
    back: who waits for it is told.

    \b
      cortex unload qwen3-8b
      cortex unload qwen3-8b --node beta --force
    """  # noqa: D301
    asked = UnloadModel(model, node, force)
    done = answer_of(client_of(endpoint, api_key).post("/fleet/models/unload", asked, UnloadAnswer))
    if json:
        print_json(done)
    else:
        _print_places(model, done.nodes or [None], done.status)


def pin(
    model: Model,
    node: OnNode = None,
    endpoint: Endpoint = AT,
    api_key: ApiKey = None,
    json: Json = False,
) -> None:
    """Keep a model: nothing displaces it.

    Nor is it unloaded for being idle. A pin loads nothing; where the model is not loaded, it
    counts from the moment it is. It lasts until `cortex unpin`, also over restarts.

    \b
      cortex pin qwen3-8b
      cortex pin qwen3-8b --node beta
    """  # noqa: D301
    asked = PinModel(model, node)
    done = answer_of(client_of(endpoint, api_key).post("/fleet/models/pin", asked, PinAnswer))
    if json:
        print_json(done)
        return
    _print_places(model, done.nodes, done.status)
    if not done.loaded:
        say(Console(), f"{model} is not loaded there: `cortex load` does that.")


def unpin(
    model: Model,
    node: OnNode = None,
    endpoint: Endpoint = AT,
    api_key: ApiKey = None,
    json: Json = False,
) -> None:
    """Let a model be displaced again.

    \b
      cortex unpin qwen3-8b
    """  # noqa: D301
    asked = PinModel(model, node)
    done = answer_of(client_of(endpoint, api_key).post("/fleet/models/unpin", asked, UnpinAnswer))
    if json:
        print_json(done)
    elif done.nodes:
        _print_places(model, done.nodes, done.status)
    else:
        say(Console(), f"{model} was not pinned" + (f" on {node}" if node else ""))


def drain(
    node: NodeName,
    wait: Annotated[
        bool, typer.Option("--wait", help="Stay until nothing is left there, and say how far.")
    ] = False,
    endpoint: Endpoint = AT,
    api_key: ApiKey = None,
    json: Json = False,
) -> None:
    """Take a node out of service, in good order.

    It gets no new requests and no loads; what runs finishes, then its models are unloaded. It
    stays so until `cortex undrain`, also over restarts. Ctrl-C stops the waiting, not the drain.

    \b
      cortex drain beta --wait && ssh beta systemctl stop neuron
    """  # noqa: D301
    client = client_of(endpoint, api_key)
    done = answer_of(drain_and_tell(client, node, LoadLines(_aside), wait=wait))
    if json:
        print_json(done)
        return
    found = table("node", "status", "requests", "models left")
    add(found, done.node, done.status, done.drain.in_flight, ", ".join(done.drain.models))
    Console().print(found)


def undrain(
    node: NodeName, endpoint: Endpoint = AT, api_key: ApiKey = None, json: Json = False
) -> None:
    """Put a node that was drained into service again.

    \b
      cortex undrain beta
    """  # noqa: D301
    path = f"/fleet/nodes/{quote(node, safe='')}/undrain"
    done = answer_of(client_of(endpoint, api_key).post(path, DrainNode(), UndrainAnswer))
    if json:
        print_json(done)
        return
    found = table("node", "status")
    add(found, done.node, done.status)
    Console().print(found)


def usage(
    *,
    key: Annotated[str | None, typer.Option(metavar="ID", help="Of this key only.")] = None,
    model: Annotated[str | None, typer.Option(metavar="ID", help="Of this model only.")] = None,
    since: Annotated[
        str | None, typer.Option(metavar="YYYY-MM-DD", help="From this day on; days are UTC's.")
    ] = None,
    endpoint: Endpoint = AT,
    api_key: ApiKey = None,
    json: Json = False,
) -> None:
    """Show who has used how many tokens.

    By key, model and day. Requests without a key are those of "-".

    \b
      cortex usage
      cortex usage --key laptop --since 2026-11-01
    """  # noqa: D301
    if since is not None:
        _check_day(since)
    asked = {"key": key, "model": model, "since": since}
    query = urlencode({name: text for name, text in asked.items() if text is not None})
    used = answer_of(client_of(endpoint, api_key).read(f"/fleet/usage?{query}", UsageView))
    if json:
        print_json(used)
    else:
        print_usage(Console(), used)


def _check_day(text: str) -> None:
    try:
        date.fromisoformat(text)
    except ValueError:
        fail(f"--since {text!r}: expected a day, as YYYY-MM-DD", 2)


def _aside(line: str) -> None:
    """Say how far something is, without touching what the command prints."""
    typer.echo(line, err=True)


def _print_places(model: str, nodes: Sequence[str | None], status: str) -> None:
    found = table("model", "node", "status")
    for node in nodes:
        add(found, model, node, status)
    Console().print(found)


COMMANDS: tuple[Callable[..., None], ...] = (
    models,
    placement,
    load,
    unload,
    pin,
    unpin,
    drain,
    undrain,
    usage,
)
