"""``cortex doctor``: what clients send, sent to a running gateway, and what works of it.

Each client has its file of checks (``doctor_checks_*.py``); here they are run one after the other,
because a small machine that does two things at once is slow at both.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Annotated, Any

import msgspec
import typer
from msgspec import UNSET
from rich.console import Console

from cortex.gateway import (
    doctor_checks_anthropic,
    doctor_checks_claude_code,
    doctor_checks_codex,
    doctor_checks_openai,
    doctor_checks_opencode,
    doctor_checks_zed,
)
from cortex.gateway.asking import AT, ApiKey, Endpoint, answer_of, client_of, print_json
from cortex.gateway.doctor_check import (
    Check,
    Finding,
    NotPossible,
    NotTried,
    Outcome,
    Subject,
    Wrong,
)
from cortex.gateway.doctor_wire import Wire
from cortex.gateway.tables import add, say, table
from cortex.gateway.terminal import GatewayClient, Unreachable
from cortex.ipc.openai_answers import ModelEntry, ModelList

CHECK_SECONDS = 120.0
"""For one check; a client would have given up."""

CHECKS: Mapping[str, Sequence[Check]] = {
    "claude-code": doctor_checks_claude_code.CHECKS,
    "codex": doctor_checks_codex.CHECKS,
    "openai": doctor_checks_openai.CHECKS,
    "anthropic": doctor_checks_anthropic.CHECKS,
    "zed": doctor_checks_zed.CHECKS,
    "opencode": doctor_checks_opencode.CHECKS,
}


class Client(StrEnum):
    """Whose requests are sent."""

    ALL = "all"
    CLAUDE_CODE = "claude-code"
    CODEX = "codex"
    OPENAI = "openai"
    ANTHROPIC = "anthropic"
    ZED = "zed"
    OPENCODE = "opencode"


class Report(msgspec.Struct, frozen=True):
    """What ``--json`` prints."""

    endpoint: str
    model: str
    ok: bool
    findings: list[Finding]


def doctor(
    client: Annotated[
        Client, typer.Option(help="Whose requests to send.", show_choices=True)
    ] = Client.ALL,
    model: Annotated[
        str | None, typer.Option(metavar="ID", help="By default one that is loaded and chats.")
    ] = None,
    endpoint: Endpoint = AT,
    api_key: ApiKey = None,
    json: Annotated[bool, typer.Option("--json", help="Print every finding as JSON.")] = False,
) -> None:
    """Send what a client sends, and say what works.

    Requests are short and real: tokens are generated, and counted to the key. Exit code 0: each
    client can be used.

    \b
      cortex doctor
      cortex doctor --client claude-code --model qwen3-8b
    """  # noqa: D301  # the backspace is click's mark for "do not wrap"
    asking = client_of(endpoint, api_key)
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    clients = list(CHECKS) if client is Client.ALL else [client.value]
    report = answer_of(_examined(asking, endpoint, headers, clients, model))
    if json:
        print_json(report)
    else:
        print_report(Console(), report)
    raise typer.Exit(0 if report.ok else 1)


def print_report(console: Console, report: Report) -> None:
    """Print a table of what was found, and below it a sentence for each client."""
    clients = list(dict.fromkeys(finding.client for finding in report.findings))
    for client in clients:
        found = table(client, "outcome", "why", "s")
        for finding in (it for it in report.findings if it.client == client):
            add(found, finding.check, finding.outcome, finding.why, f"{finding.seconds:.1f}")
        console.print(found)
    for client in clients:
        bad = [it.check for it in report.findings if it.client == client and it.is_bad]
        verdict = f"no: {', '.join(bad)}" if bad else "yes"
        say(console, f"{client} can be used with {report.model}: {verdict}")


async def _examined(
    asking: GatewayClient,
    endpoint: str,
    headers: Mapping[str, str],
    clients: Sequence[str],
    model: str | None,
) -> Report:
    """Return what every check of *clients* finds; raise Unreachable where nobody can be asked."""
    listed = await asking.read("/v1/models", ModelList)
    subject = subject_of(listed.data, model)
    async with Wire(endpoint, headers) as wire:
        await _wake(wire, subject)
        findings = [
            await examined(client, check, wire, subject)
            for client in clients
            for check in CHECKS[client]
        ]
    is_good = not any(finding.is_bad for finding in findings)
    return Report(endpoint, subject.model, is_good, findings)


def subject_of(entries: Sequence[ModelEntry], model: str | None) -> Subject:
    """Return the *model* that is to be asked, or one that chats, loaded if any is.

    Raise Unreachable where there is none.
    """
    chatting = [it for it in entries if it.capabilities is UNSET or "chat" in it.capabilities]
    chatting.sort(key=lambda entry: entry.loaded is not True)
    named = [entry for entry in entries if entry.id == model]
    found = named if model else chatting
    if not found:
        what = f"the model {model!r}" if model else "a model that chats"
        raise Unreachable(f"the gateway does not list {what}; `cortex models` shows what it does")
    context = found[0].context_length
    return Subject(
        found[0].id,
        context if isinstance(context, int) else None,
        tuple(entry.id for entry in entries),
    )


async def _wake(wire: Wire, subject: Subject) -> None:
    """Have the model loaded, however long it takes; raise Unreachable where it cannot be."""
    body: dict[str, Any] = {"model": subject.model, "max_tokens": 1, "stream": True}
    body["messages"] = [{"role": "user", "content": "Hi."}]
    reply = await wire.post("/v1/chat/completions", body)
    errors = [event.data["error"] for event in reply.events if "error" in event.data]
    if reply.status != 200 or errors:
        why = str(errors[0].get("message")) if errors else reply.refusal
        raise Unreachable(f"{subject.model!r} does not answer: {why}")


async def examined(client: str, check: Check, wire: Wire, subject: Subject) -> Finding:
    """Return what comes of *check*; an answer of a shape that nobody foresaw is a failure too."""
    begin = time.monotonic()
    outcome: Outcome
    try:
        async with asyncio.timeout(CHECK_SECONDS):
            outcome, why = "pass", await check.run(wire, subject)
    except NotPossible as exc:
        outcome, why = "not possible", str(exc)
    except NotTried as exc:
        outcome, why = "not tried", str(exc)
    except Wrong as exc:
        outcome, why = "fail", str(exc)
    except TimeoutError:
        outcome, why = "fail", f"it did not end within {CHECK_SECONDS:.0f} s"
    except (LookupError, TypeError, AttributeError, ValueError) as exc:
        outcome, why = "fail", f"an answer has another shape: {type(exc).__name__}: {exc}"
    return Finding(client, check.name, outcome, why, time.monotonic() - begin, check.is_needed)
