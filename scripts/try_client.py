"""Let a real coding agent, unmodified, have a turn with a tool call through a gateway of its own.

    the client ──► cortex serve ──► a neuron whose model is a script (scripted_model.py)

The agents' prompts are longer than the embedded model's context, and calls need wit, so a script
stands in for the model; the wire, the tokens and the tools are real. The client is installed from
npm into .cache/clients (some 400 MB each) unless it is there; it runs in an empty folder with an
empty home, and may run one command: ``echo cortex was here``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from answers import MODEL, Address, Trouble
from local_gateway import LocalGateway
from local_neuron import ScriptedNeuron
from quickstart import LOGS

CLIENTS = LOGS / "clients"
PROOF = "The tool said: cortex was here"
PROMPT = "Say with a shell command that cortex was here."
TURN_SECONDS = 180.0
KEY = "sk-local"
OPENCODE = {
    "$schema": "https://opencode.ai/config.json",
    "model": f"cortex/{MODEL}",
    "small_model": f"cortex/{MODEL}",
    "permission": {"bash": "allow"},
}


@dataclass(frozen=True)
class Client:
    """How a client is installed, pointed at a gateway, and told what to do."""

    package: str
    program: str
    arguments: Callable[[Address], list[str]]
    environment: Callable[[Address], Mapping[str, str]] = lambda _: {}
    files: Callable[[Address], Mapping[str, str]] = lambda _: {}
    """What has to be in its home, by path."""


def claude_code(place: Address) -> Mapping[str, str]:
    """Return Claude Code's environment."""
    return {
        "ANTHROPIC_BASE_URL": f"http://{place}",
        "ANTHROPIC_AUTH_TOKEN": KEY,
        "ANTHROPIC_MODEL": "claude-local",
        "ANTHROPIC_DEFAULT_HAIKU_MODEL": "claude-local",
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
    }


def codex_toml(place: Address) -> Mapping[str, str]:
    """Return Codex's configuration."""
    text = f"""model = "{MODEL}"
model_provider = "cortex"
[model_providers.cortex]
name = "cortex"
base_url = "http://{place}/v1"
env_key = "CORTEX_KEY"
wire_api = "responses"
"""
    return {".codex/config.toml": text}


def opencode_json(place: Address) -> Mapping[str, str]:
    """Return opencode's configuration."""
    provider = {
        "npm": "@ai-sdk/openai-compatible",
        "options": {"baseURL": f"http://{place}/v1", "apiKey": KEY},
        "models": {MODEL: {"limit": {"context": 131072, "output": 8192}}},
    }
    said = {**OPENCODE, "provider": {"cortex": provider}}
    return {".config/opencode/opencode.json": json.dumps(said)}


CLIENTS_BY_NAME = {
    "claude-code": Client(
        "@anthropic-ai/claude-code-linux-x64@2.1.329",
        "@anthropic-ai/claude-code-linux-x64/claude",
        lambda _: ["-p", PROMPT, "--allowedTools", "Bash(echo:*)", "--max-turns", "4"],
        environment=claude_code,
    ),
    "codex": Client(
        "@openai/codex@0.169.0",
        ".bin/codex",
        lambda _: ["exec", "--skip-git-repo-check", "-s", "danger-full-access", PROMPT],
        environment=lambda _: {"CORTEX_KEY": KEY},
        files=codex_toml,
    ),
    "opencode": Client(
        "opencode-ai@1.18.33",
        ".bin/opencode",
        lambda _: ["run", PROMPT],
        files=opencode_json,
    ),
}


def main() -> int:
    """Run one client; 0 where its turn was whole, 1 where it was not."""
    parser = argparse.ArgumentParser(prog="scripts/try-client", description=__doc__)
    parser.add_argument("client", choices=CLIENTS_BY_NAME)
    parser.add_argument("--installed", type=Path, help="folder that npm installed it into")
    asked = parser.parse_args()
    client = CLIENTS_BY_NAME[asked.client]
    try:
        modules = asked.installed or CLIENTS / asked.client
        program = installed(client, modules)
        said = turn(asked.client, client, program)
    except Trouble as trouble:
        print(f"try-client: {trouble}", file=sys.stderr)
        return 1
    print(said)
    if PROOF not in said:
        print(f"try-client: {asked.client} did not say {PROOF!r}", file=sys.stderr)
        return 1
    print(f"{asked.client}: a turn with a tool call is whole")
    return 0


def installed(client: Client, folder: Path) -> Path:
    """Return the program, installed into *folder* unless it is there; raise Trouble."""
    program = folder / "node_modules" / client.program
    if not program.exists():
        print(f"installing {client.package} from npm into {folder}")
        folder.mkdir(parents=True, exist_ok=True)
        command = ["npm", "install", "--no-audit", "--no-fund"]
        command += ["--prefix", str(folder), client.package]
        try:
            subprocess.run(command, check=True, stdout=sys.stderr)
        except (OSError, subprocess.CalledProcessError) as exc:
            raise Trouble(f"npm could not install {client.package}: {exc}") from exc
    return program


def turn(name: str, client: Client, program: Path) -> str:
    """Return what the client printed; raise Trouble."""
    with ScriptedNeuron(f"{name}-neuron", [MODEL]) as neuron:
        neuron.wait_until_loaded()
        aliases = {"claude-local": MODEL}
        with LocalGateway(f"{name}-gateway", {"local": neuron.place}, aliases) as gateway:
            gateway.wait_until_serving(MODEL)
            with tempfile.TemporaryDirectory(prefix="cortex-client-") as home:
                said = run(client, program, Path(home), gateway.place)
    print(f"logs: {neuron.log} {gateway.log}")
    return said


def run(client: Client, program: Path, home: Path, place: Address) -> str:
    """Run the client once in an empty folder below *home*."""
    for path, text in client.files(place).items():
        file = home / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    work = home / "work"
    work.mkdir()
    environment = {"PATH": os.environ["PATH"], "HOME": str(home), "TERM": "dumb"}
    command = [str(program), *client.arguments(place)]
    try:
        ended = subprocess.run(
            command,
            cwd=work,
            env={**environment, **client.environment(place)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=TURN_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as exc:
        raise Trouble(f"no end of the turn in {TURN_SECONDS:.0f} s: {exc.output!r}") from exc
    return ended.stdout


if __name__ == "__main__":
    sys.exit(main())
