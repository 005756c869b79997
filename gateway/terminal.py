"""``cortex status`` and ``cortex chat``: clients of a running gateway, for people."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import orjson
from rich.console import Console
from rich.table import Table

from cortex.gateway import sse

CONNECT_SECONDS = 5.0


class Unreachable(Exception):
    """The gateway cannot be asked, or refuses; the text says why."""


class GatewayClient:
    """Asks the gateway at *endpoint*; *key* goes along where there is one."""

    def __init__(self, endpoint: str, key: str | None) -> None:
        self._endpoint = endpoint.rstrip("/")
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}

    async def get(self, path: str) -> Any:
        """Return what ``GET path`` answers; raise Unreachable."""
        async with self._request("GET", path) as response:
            return orjson.loads(await response.read())

    async def default_model(self) -> str:
        """Return a model that is loaded, else any; raise Unreachable where there is none."""
        found = (await self.get("/v1/models"))["data"]
        if not found:
            raise Unreachable(f"{self._endpoint} serves no model")
        loaded = [entry["id"] for entry in found if entry.get("loaded")]
        name: str = (loaded or [entry["id"] for entry in found])[0]
        return name

    async def answer(self, model: str, messages: list[dict[str, str]]) -> AsyncIterator[str]:
        """Yield the text of the next turn as it forms; raise Unreachable."""
        body = {"model": model, "messages": messages, "stream": True}
        splitter = sse.EventSplitter()
        async with self._request("POST", "/v1/chat/completions", orjson.dumps(body)) as response:
            async for chunk in response.content.iter_any():
                for event in splitter.feed(chunk):
                    if event == sse.DONE:
                        return
                    if text := _text(event):
                        yield text
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
                    raise Unreachable(_refusal(response.status, await response.read()))
                yield response
        except (aiohttp.ClientError, TimeoutError, ValueError) as exc:
            raise Unreachable(f"no gateway answers at {self._endpoint}: {exc}") from exc


def _text(event: bytes) -> str:
    data = sse.data_of(event) or {}
    if "error" in data:
        raise Unreachable(str(data["error"].get("message")))
    choices = data.get("choices") or []
    return "".join((choice.get("delta") or {}).get("content") or "" for choice in choices)


def _refusal(status: int, body: bytes) -> str:
    try:
        return str(orjson.loads(body)["error"]["message"])
    except (orjson.JSONDecodeError, LookupError, TypeError):
        return f"it answered with status {status}"


def print_fleet(console: Console, health: dict[str, Any], fleet: dict[str, Any]) -> None:
    """Show the fleet as two tables."""
    nodes = health["nodes"]
    console.print(f"{health['status']}: {nodes['healthy']} of {nodes['total']} nodes up")
    devices = Table("node", "state", "device", "free MB", "used MB", "note")
    models = Table("model", "node", "status", "running", "queued", "note")
    for node in fleet["nodes"]:
        state = "up" if node["healthy"] else "down"
        for device in node["devices"] or [{}]:
            devices.add_row(
                node["name"],
                "draining" if node["draining"] else state,
                device.get("name", ""),
                _shown(device.get("vram_free_mb")),
                _shown(device.get("vram_used_mb")),
                node["error"] or "",
            )
        loads = {load["id"]: load for load in node["load"]}
        for model in node["models"]:
            load = loads.get(model["id"], {})
            models.add_row(
                model["id"],
                node["name"],
                model["status"],
                _shown(load.get("in_flight")),
                _shown(load.get("queue_depth")),
                model.get("failure") or model["servable"].get("reason") or "",
            )
    console.print(devices)
    console.print(models)


def _shown(number: int | None) -> str:
    return "" if number is None else str(number)
