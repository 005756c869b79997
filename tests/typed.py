"""The command ``cortex``, as people type it: in a process of its own, or in a thread of this."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys

from typer.testing import CliRunner

from cortex.gateway import cli
from cortex.gateway.app import Gateway


def cortex(*arguments: str, **environ: str) -> tuple[int, str, str]:
    """Return exit status, stdout and stderr of ``cortex`` with *arguments*."""
    done = subprocess.run(
        [sys.executable, "-m", "cortex.gateway", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env={**os.environ, **environ},
    )
    return done.returncode, done.stdout, done.stderr


async def invoked(gateway: Gateway, *arguments: str) -> tuple[int, str, str]:
    """Return what ``typed`` does, from a thread: quicker, and signals mean nothing to it."""
    await gateway.poller.first_round()
    command = [*arguments, "--endpoint", gateway.url]
    done = await asyncio.to_thread(CliRunner().invoke, cli.app, command)
    return done.exit_code, done.stdout, done.stderr


async def typed(gateway: Gateway, *arguments: str, said: str = "") -> tuple[int | None, str, str]:
    """Return exit status, stdout and stderr of ``cortex`` that talks with *gateway*."""
    process = await started(gateway, *arguments)
    out, err = await process.communicate(said.encode())
    return process.returncode, out.decode(), err.decode()


async def started(gateway: Gateway, *arguments: str) -> asyncio.subprocess.Process:
    """Return a ``cortex`` that talks with *gateway* and has just been started."""
    await gateway.poller.first_round()
    command = [sys.executable, "-m", "cortex.gateway", *arguments, "--endpoint", gateway.url]
    pipe = asyncio.subprocess.PIPE
    return await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe, stderr=pipe)


def cells(text: str) -> list[list[str]]:
    """Return the cells of the rows of all tables in *text*, without their heads."""
    found: list[list[str]] = []
    is_body = False
    for line in text.splitlines():
        if "│" not in line:
            is_body = "┼" in line
        elif is_body:
            found.append([cell.strip() for cell in line.split("│")])
    return found
