"""``cortex status`` and ``cortex chat``: clients of a running gateway, for people.

Also how a load that goes on is told on the terminal, by them and by ``cortex up``.
"""

from __future__ import annotations

import re
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import msgspec
import orjson
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from cortex.gateway import sse
from cortex.gateway.config import ENDPOINT
from cortex.gateway.errors import reason_of
from cortex.ipc.node_api import Progress
from cortex.ipc.settings import ConfigError

CONNECT_SECONDS = 5.0
LINE_SECONDS = 5.0
MIB = 2**20


class Unreachable(Exception):
    """The gateway cannot be asked, or refuses; the text says why."""


class GatewayClient:
    """Asks the gateway at *endpoint*; *key* goes along where there is one."""

    def __init__(self, endpoint: str, key: str | None) -> None:
        """Raise ConfigError for an endpoint or a key that nobody can have."""
        if not re.match(ENDPOINT, endpoint):
            raise ConfigError(f"--endpoint {endpoint!r}: expected http://HOST:PORT, without a path")
        if key and not (key.isascii() and key.isprintable()):
            raise ConfigError("--api-key: expected printable ASCII characters only, on one line")
        self._endpoint = endpoint.rstrip("/")
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}

    async def get(self, path: str, member: str) -> dict[str, Any]:
        """Return what ``GET path`` answers: an object with *member*; raise Unreachable."""
        async with self._request("GET", path) as response:
            body = await response.read()
        try:
            answer = orjson.loads(body)
        except orjson.JSONDecodeError:
            answer = None
        if not isinstance(answer, dict) or member not in answer:
            raise Unreachable(f"{self._endpoint} answers, but it is no cortex gateway")
        return answer

    async def default_models(self) -> list[str]:
        """Return the models that are loaded, else all; raise Unreachable where there is none."""
        found = (await self.get("/v1/models", "data"))["data"]
        if not found:
            raise Unreachable(f"{self._endpoint} serves no model")
        loaded = [entry["id"] for entry in found if entry.get("loaded")]
        return loaded or [entry["id"] for entry in found]

    async def answer(self, model: str, messages: list[dict[str, str]]) -> AsyncIterator[str]:
        """Yield the text of the next turn as it forms; raise Unreachable."""
        body = {"model": model, "messages": messages, "stream": True}
        splitter = sse.EventSplitter()
        is_complete = False
        async with self._request("POST", "/v1/chat/completions", orjson.dumps(body)) as response:
            # To the very end: whoever hangs up before counts as a client that has gone away.
            async for chunk in response.content.iter_any():
                for event in splitter.feed(chunk):
                    is_complete = is_complete or event == sse.DONE
                    if text := _text(event):
                        yield text
        if not is_complete:
            raise Unreachable("the answer broke off")

    @asynccontextmanager
    async def _request(
        self, method: str, path: str, body: bytes | None = None
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        limits = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS)
        headers = {**self._headers, "Content-Type": "application/json"} if body else self._headers
        try:
            async with (
                aiohttp.ClientSession(headers=headers, timeout=limits) as session,
                session.request(method, self._endpoint + path, data=body) as response,
            ):
                if response.status != 200:
                    raise Unreachable(self._refusal(response.status, await response.read()))
                yield response
        except aiohttp.ClientConnectorError as exc:
            why = reason_of(exc.os_error)
            raise Unreachable(f"no gateway answers at {self._endpoint}: {why}") from exc
        except aiohttp.InvalidURL as exc:
            raise Unreachable(f"--endpoint {self._endpoint!r}: nobody can be asked there") from exc
        except (aiohttp.ClientError, TimeoutError, ValueError) as exc:
            raise Unreachable(f"no gateway answers at {self._endpoint}: {exc}") from exc

    def _refusal(self, status: int, body: bytes) -> str:
        try:
            error = orjson.loads(body)["error"]
            code, words = error.get("code"), str(error["message"])
        except (orjson.JSONDecodeError, LookupError, TypeError, AttributeError):
            return f"{self._endpoint} answered with status {status}"
        if code == "not_found":  # a neuron, say
            return f"{self._endpoint} answers, but it is no cortex gateway"
        return words


def _text(event: bytes) -> str:
    data = sse.data_of(event) or {}
    if "error" in data:
        raise Unreachable(str(data["error"].get("message")))
    choices = data.get("choices") or []
    return "".join((choice.get("delta") or {}).get("content") or "" for choice in choices)


class LoadLines:
    """Tells of a load: a line when its phase changes, and one every five seconds meanwhile.

    Lines, not one that is drawn over: the logs of both daemons go to the same terminal.
    """

    def __init__(
        self, say: Callable[[str], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._say = say
        self._clock = clock
        self._phase: str | None = None
        self._said = ""
        self._said_at = -LINE_SECONDS

    def hear(self, what: str, progress: Progress | None) -> None:
        """Hear how far *what* has come."""
        phase = progress.phase if progress else None
        line = f"{what}: {progress_words(progress)}" if progress else what
        is_time = phase != self._phase or self._clock() - self._said_at >= LINE_SECONDS
        if is_time and line != self._said:
            self._phase, self._said, self._said_at = phase, line, self._clock()
            self._say(line)


def progress_words(progress: Progress) -> str:
    """Return ``downloading 40 %, 38 of 94 MB, 12 s left``, or as much of it as is known."""
    words: list[str] = [progress.phase]
    if progress.bytes_total:
        percent = 100 * progress.bytes_done // progress.bytes_total
        done, total = (count // MIB for count in (progress.bytes_done, progress.bytes_total))
        words = [f"{progress.phase} {percent} %", f"{done} of {total} MB"]
    elif progress.bytes_done:
        words.append(f"{progress.bytes_done // MIB} MB")
    if progress.eta_seconds is not None:
        words.append(f"{_duration(progress.eta_seconds)} left")
    return ", ".join(words)


def _duration(seconds: float) -> str:
    """Return a time in the unit that people would use."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def print_fleet(console: Console, health: dict[str, Any], fleet: dict[str, Any]) -> None:
    """Show the fleet as two tables, and below them what is wrong."""
    nodes = health["nodes"]
    console.print(f"{health['status']}: {nodes['healthy']} of {nodes['total']} nodes up")
    devices = _table("node", "state", "device", "free MB", "used MB")
    models = _table("model", "node", "status", "running", "queued")
    for node in fleet["nodes"]:
        _show_devices(devices, node)
        _show_models(models, node)
    console.print(devices)
    console.print(models)
    for line in _troubles(fleet):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _table(*names: str) -> Table:
    """Return a table whose cells go on in the next line where they are too long."""
    return Table(*(Column(name, overflow="fold") for name in names))


def _show_devices(table: Table, node: dict[str, Any]) -> None:
    state = "up" if node["healthy"] else "down"
    for device in node["devices"] or [{}]:
        table.add_row(
            Text(node["name"]),
            "draining" if node["draining"] else state,
            device.get("name", ""),
            _shown(device.get("vram_free_mb")),
            _shown(device.get("vram_used_mb")),
        )


def _show_models(table: Table, node: dict[str, Any]) -> None:
    loads = {load["id"]: load for load in node["load"]}
    for model in node["models"]:
        load = loads.get(model["id"], {})
        table.add_row(
            Text(model["id"]),  # no markup: ids may hold brackets
            Text(node["name"]),
            _status(model),
            _shown(load.get("in_flight")),
            _shown(load.get("queue_depth")),
        )


def _status(model: dict[str, Any]) -> str:
    progress = model.get("progress")
    if progress is None:
        return str(model["status"])
    return progress_words(msgspec.convert(progress, Progress))


def _troubles(fleet: dict[str, Any]) -> Iterator[str]:
    """Yield a line for everything that the tables show to be wrong, and why it is."""
    for node in fleet["nodes"]:
        if node["error"]:
            yield f"{node['name']}: {_reason(node)}"
        for model in node["models"]:
            servable = model["servable"]
            why = model.get("failure") or servable.get("detail") or servable.get("reason")
            if why and why != model["status"]:
                yield f"{model['id']} on {node['name']}: {why}"


def _reason(node: dict[str, Any]) -> str:
    error: str = node["error"]
    return error.removeprefix(f"node {node['name']} ")


def _shown(number: int | None) -> str:
    return "" if number is None else str(number)
