"""What every command has that asks a running gateway: its options, its client, its ends.

Whatever is wrong is one sentence on stderr. ``cli.py`` has the exit codes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Annotated, Any, NoReturn, TypeVar

import msgspec
import typer

from cortex.gateway.config import API_KEY_VARIABLE
from cortex.gateway.serving import INTERRUPTED
from cortex.gateway.terminal import GatewayClient, Unreachable
from cortex.ipc.node_api import GATEWAY_PORT
from cortex.ipc.settings import ConfigError

AT = f"http://127.0.0.1:{GATEWAY_PORT}"

Endpoint = Annotated[str, typer.Option(metavar="URL", help="The gateway to ask.")]
ApiKey = Annotated[
    str | None, typer.Option(envvar=API_KEY_VARIABLE, help="Key, where the gateway wants one.")
]
Json = Annotated[bool, typer.Option("--json", help="Print what the gateway answers.")]

T = TypeVar("T")


def client_of(endpoint: str, key: str | None) -> GatewayClient:
    """Return a client, or end the command."""
    try:
        return GatewayClient(endpoint, key)
    except ConfigError as exc:
        fail(str(exc), 2)


def answer_of(asking: Coroutine[Any, Any, T]) -> T:
    """Return what *asking* returns, or end the command."""
    try:
        return asyncio.run(asking)
    except Unreachable as exc:
        fail(str(exc), 1)
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None


def print_json(answer: Any) -> None:
    """Print *answer* for programs, and for people who want all of it."""
    typer.echo(msgspec.json.format(msgspec.json.encode(answer), indent=2).decode())


def fail(message: str, status: int) -> NoReturn:
    """End the command."""
    typer.echo(f"cortex: {message}", err=True)
    raise typer.Exit(status)
