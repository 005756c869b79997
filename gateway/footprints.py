"""What models have been seen to hold, remembered across restarts.

A poll that shows a loaded model is a measurement: weights, KV cache and workspace on all its
devices. It is kept by the model's name on nodes, the quantisation and the context that its profile
asks for, the class of its devices (their name without a number, and their size) and how many there
are, because each of them changes it; and it is written only where it has changed.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Callable

import msgspec

from cortex.gateway.catalogue import Profile
from cortex.gateway.eviction import held_mb
from cortex.gateway.fleet import Node
from cortex.gateway.state import StateFile
from cortex.ipc.node_api import ModelInfo

NUMBER = re.compile(r":\d+\Z")

ProfileOf = Callable[[str], Profile | None]
"""The profile of a model, by its name on nodes."""


class Footprints:
    """The measurements; kept true by whoever tells it of polls with ``saw``."""

    def __init__(self, state: StateFile) -> None:
        self._state = state
        self._mb: dict[str, int] = {}
        self._seen: dict[str, tuple[ModelInfo, ...]] = {}

    async def read(self) -> None:
        """Read what earlier lives have measured."""
        rows = await self._state.do(_all)
        self._mb = {key: int(value) for key, value in rows}

    def of(self, node: Node, node_id: str, profile: Profile | None) -> int | None:
        """Return what the model holds on devices like those of *node*, in MB, if that is known."""
        devices = node.discovery.devices if node.discovery else []
        classes = {class_of(node, device.index) for device in devices}
        count = profile.device_count if profile else 1
        known = [self._mb.get(_key(node_id, profile, name, count)) for name in classes]
        return max((mb for mb in known if mb is not None), default=None)

    def saw(self, node: Node, profile_of: ProfileOf) -> None:
        """Note what a poll of *node* shows."""
        if node.discovery is None or self._seen.get(node.name) is node.models:
            return
        self._seen[node.name] = node.models
        for model in node.models:
            mb = sum(held_mb(model).values())
            if model.status == "loaded" and mb:
                on = class_of(node, model.devices[0].index)
                self._keep(_key(model.id, profile_of(model.id), on, len(model.devices)), mb)

    def _keep(self, key: str, mb: int) -> None:
        if self._mb.get(key) == mb:
            return
        self._mb[key] = mb
        self._state.later(lambda connection: _put(connection, key, mb))


def class_of(node: Node, index: int) -> str:
    """Return the name of a device without its number, and its size: ``NVIDIA H200, 143771 MB``."""
    devices = node.discovery.devices if node.discovery else []
    found = next((device for device in devices if device.index == index), None)
    return f"{NUMBER.sub('', found.name)}, {found.vram_total_mb} MB" if found else ""


def _key(node_id: str, profile: Profile | None, device_class: str, devices: int) -> str:
    quant = profile.quant if profile else None
    context = profile.max_context_tokens if profile else None
    how_many = [devices] if devices > 1 else []
    return msgspec.json.encode([node_id, quant, device_class, context, *how_many]).decode()


def _all(connection: sqlite3.Connection) -> list[tuple[str, bytes]]:
    return connection.execute("SELECT key, value FROM footprints").fetchall()


def _put(connection: sqlite3.Connection, key: str, mb: int) -> None:
    connection.execute("REPLACE INTO footprints VALUES (?, ?)", (key, b"%d" % mb))
