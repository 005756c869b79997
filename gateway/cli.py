"""``cortex up | serve | status | chat``, and from elsewhere the other commands.

``operator_cli.py`` has those of the operators, ``doctor.py`` that which looks after clients.

What can be wrong is one sentence, never a traceback.

Exit codes: 0 stopped as asked, 1 something outside is in the way, 2 the configuration is wrong,
130 interrupted.
"""

from __future__ import annotations

import asyncio
import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
import uvloop
from rich.console import Console

from cortex.gateway import serving
from cortex.gateway.app import CannotListen, Gateway
from cortex.gateway.asking import AT, ApiKey, Endpoint, Json, answer_of, client_of, fail, print_json
from cortex.gateway.doctor import doctor
from cortex.gateway.operator_cli import COMMANDS
from cortex.gateway.tables import print_fleet
from cortex.gateway.terminal import GatewayClient, Unreachable
from cortex.gateway.up import Plan
from cortex.gateway.up import up as run_up
from cortex.gateway.written import Written
from cortex.ipc.fleet_api import FleetView
from cortex.ipc.log import configure_logging
from cortex.ipc.node_api import EMBEDDED_MODEL, GATEWAY_PORT, METRICS_PORT, NEURON_PORT
from cortex.ipc.settings import ConfigError
from cortex.ipc.version import BUILD

LOCAL = "127.0.0.1"

app = typer.Typer(
    name="cortex",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="""One address in front of a few machines that serve language models.

\b
  cortex up                        a gateway and a neuron on this machine, with a small model
  cortex chat "Who are you?"       ask it
  cortex status                    what the fleet is doing
  cortex models                    what there is to serve
  cortex load MODEL                load a model now; placement MODEL: where it would go
  cortex doctor --client codex     send what a client sends, and say what works
  cortex serve --config FILE       a gateway alone, in front of the neurons of a fleet

\b
Point any client at it: OpenAI SDKs at http://127.0.0.1:31313/v1, Anthropic SDKs and Claude Code
at http://127.0.0.1:31313.
""",
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"cortex {BUILD.package_version}")
        raise typer.Exit


@app.callback()
def _cortex(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    pass


@app.command()
def up(
    listen: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="Where clients connect; port 0 is any.")
    ] = f"{LOCAL}:{GATEWAY_PORT}",
    metrics_listen: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="Where Prometheus scrapes; port 0 is any.")
    ] = f"{LOCAL}:{METRICS_PORT}",
    neuron_listen: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="Where the neuron listens.")
    ] = f"{LOCAL}:{NEURON_PORT}",
    model: Annotated[
        str, typer.Option(metavar="ID", help="Loaded at once; file:/path/to.gguf works too.")
    ] = EMBEDDED_MODEL,
    devices: Annotated[
        str | None,
        typer.Option(metavar="NAMES", help="cpu:0,cpu:1 or cuda:0; by default all there are."),
    ] = None,
) -> None:
    """Run a gateway and a neuron on this machine.

    Ctrl-C stops them in good order, a second one at once.

    \b
      cortex up
      cortex up --model file:/models/SmolLM2-135M-Instruct.Q4_1.gguf --devices cpu:0
    """  # noqa: D301  # the backspace is click's mark for "do not wrap"
    configure_logging("gateway")
    plan = Plan(listen, metrics_listen, neuron_listen, model, devices)
    try:
        status = uvloop.run(run_up(plan, typer.echo))
    except ConfigError as exc:
        fail(str(exc), 2)
    except CannotListen as exc:
        fail(str(exc), 1)
    raise typer.Exit(status)


@app.command()
def serve(
    config: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Configuration; /etc/cortex/cortex.toml if it exists."),
    ] = None,
) -> None:
    """Run the gateway in front of a fleet of neurons.

    SIGTERM or Ctrl-C stops it in good order, a second one at once. SIGHUP reads the files again.

    \b
    The environment wins over the file: CORTEX_GATEWAY__LISTEN=0.0.0.0:31313 is listen in
    [gateway], CORTEX_NEURONS__0__ENDPOINT the endpoint of the first of [[neurons]].
    """  # noqa: D301  # the backspace is click's mark for "do not wrap"
    configure_logging("gateway")
    try:
        status = uvloop.run(serving.serve(partial(Written.read, config), _announce))
    except ConfigError as exc:
        fail(str(exc), 2)
    except CannotListen as exc:
        fail(str(exc), 1)
    raise typer.Exit(status)


def _announce(gateway: Gateway) -> None:
    typer.echo(f"cortex serves at {gateway.url}, metrics at {gateway.metrics_url}/metrics")


@app.command()
def status(
    endpoint: Endpoint = AT,
    api_key: ApiKey = None,
    json: Json = False,
) -> None:
    """Show nodes, devices, models and loads, and what is wrong."""
    client = client_of(endpoint, api_key)
    fleet = answer_of(client.read("/fleet", FleetView))
    health = answer_of(client.get("/health", "nodes"))
    if json:
        print_json(fleet)
    else:
        print_fleet(Console(), health, fleet)


@app.command()
def chat(
    prompt: Annotated[
        str | None, typer.Argument(help="A question; without one, a conversation.")
    ] = None,
    endpoint: Endpoint = AT,
    model: Annotated[
        str | None, typer.Option(metavar="ID", help="By default one that is loaded.")
    ] = None,
    api_key: ApiKey = None,
) -> None:
    """Ask a model, or talk with it.

    Ctrl-D ends a conversation, Ctrl-C an answer.
    """
    client = client_of(endpoint, api_key)
    try:
        names = [model] if model else asyncio.run(client.default_models())
        name = names[0]
        if prompt is not None and len(names) > 1:
            typer.echo(f"{name} answers; --model asks another one.", err=True)
        if prompt is not None:
            asyncio.run(_turn(client, name, [{"role": "user", "content": prompt}]))
        else:
            _converse(client, name)
    except Unreachable as exc:
        fail(str(exc), 1)
    except KeyboardInterrupt:
        raise typer.Exit(serving.INTERRUPTED) from None


def _converse(client: GatewayClient, model: str) -> None:
    is_typed = sys.stdin.isatty()
    typer.echo(f"Talking with {model}; Ctrl-D ends.", err=True)
    messages: list[dict[str, str]] = []
    while True:
        try:
            said = input("> " if is_typed else "")
        except EOFError:
            if is_typed:
                typer.echo()
            return
        if not said.strip():
            continue
        messages.append({"role": "user", "content": said})
        try:
            answer = asyncio.run(_turn(client, model, messages))
        except KeyboardInterrupt:
            typer.echo("\n(interrupted)", err=True)
            messages.pop()
            continue
        messages.append({"role": "assistant", "content": answer})


async def _turn(client: GatewayClient, model: str, messages: list[dict[str, str]]) -> str:
    """Print the next turn as it forms, and return it."""
    answer = ""
    async for text in client.answer(model, messages):
        sys.stdout.write(text)
        sys.stdout.flush()
        answer += text
    typer.echo()
    return answer


for _command in (*COMMANDS, doctor):
    app.command()(_command)
