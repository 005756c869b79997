"""SIGHUP: the files are read again, and a running gateway follows them.

    what has changed                       when it counts
    models, aliases, keys, other options   with the next request that asks for them
    a node that is new                     it is polled at once
    a node that is gone                    its streams go on to their end, nothing new goes there
    a node at another address              as one that is gone, and one that is new
    where we listen, where state is kept   at the next start, which the log says

Where one of the files is wrong nothing changes, and the log says what is wrong with it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
import structlog

from cortex.gateway.background import Background
from cortex.gateway.config import GatewayConfig
from cortex.gateway.credentials import Credentials
from cortex.gateway.fleet import Fleet
from cortex.gateway.poller import Poller
from cortex.gateway.written import Written
from cortex.ipc.settings import ConfigError, Table

NEED_A_RESTART = ("gateway", "state")
LISTS = frozenset({"neurons", "engines", "entitlements.keys"})
"""What is told apart by names, not by places."""

log = structlog.get_logger()


@dataclass(frozen=True)
class Reload:
    """The parts of a gateway that follow its files; *read* returns what these say, or raises."""

    read: Callable[[], Written]
    written: Written
    credentials: Credentials
    fleet: Fleet
    poller: Poller
    background: Background

    async def again(self) -> None:
        """Read the files and follow them, or say why not."""
        try:
            found = await asyncio.to_thread(self.read)
            credentials = await asyncio.to_thread(self.credentials.reread, found.config.nodes)
        except ConfigError as exc:
            log.error("configuration not reloaded, what it was stays", why=str(exc))  # noqa: TRY400
            return
        except Exception:  # a bug of ours ends no gateway that serves
            log.exception("configuration not reloaded, what it was stays")
            return
        if waiting := waiting_for_a_restart(self.written.config, found.config):
            log.warning("these options need a restart", options=waiting)
        new = Written(following(self.written.config, found.config), found.catalogue)
        log.info("configuration reloaded", **changes(self.written, new))
        self.written.config, self.written.catalogue = new.config, new.catalogue
        self.credentials.take(new.config.nodes, credentials)
        self.credentials.warn()
        self.fleet.configure(new.config.neurons, new.config.engines)
        self.poller.configure(self.background)


def following(running: GatewayConfig, written: GatewayConfig) -> GatewayConfig:
    """Return *written*, but for what cannot change while a gateway runs."""
    kept = {name: getattr(running, name) for name in NEED_A_RESTART}
    return msgspec.structs.replace(written, **kept)


def waiting_for_a_restart(running: GatewayConfig, written: GatewayConfig) -> list[str]:
    """Return the options that have changed in vain."""
    return [
        f"{name}.{option}"
        for name in NEED_A_RESTART
        for option in _different(getattr(running, name), getattr(written, name))
    ]


def changes(before: Written, after: Written) -> dict[str, list[str]]:
    """Return what is different, as the fields of a log line; keys by their ids."""
    old, new = before.config, after.config
    found = {
        **_of("models", before.catalogue.profiles, after.catalogue.profiles),
        **_of("aliases", before.catalogue.aliases, after.catalogue.aliases),
        **_of("nodes", {n.name: n for n in old.nodes}, {n.name: n for n in new.nodes}),
        **_of(
            "keys",
            {key.id: key for key in old.entitlements.keys},
            {key.id: key for key in new.entitlements.keys},
        ),
        "options": [option for option in _different(old, new) if option not in LISTS],
    }
    return {name: values for name, values in found.items() if values}


def _of(what: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, list[str]]:
    both = before.keys() & after.keys()
    return {
        f"{what}_added": sorted(after.keys() - before.keys()),
        f"{what}_removed": sorted(before.keys() - after.keys()),
        f"{what}_changed": sorted(name for name in both if before[name] != after[name]),
    }


def _different(before: Table, after: Table) -> Iterator[str]:
    """Yield the options that are not the same in both."""
    for name in before.__struct_fields__:
        old, new = getattr(before, name), getattr(after, name)
        if isinstance(old, Table) and isinstance(new, Table):
            yield from (f"{name}.{option}" for option in _different(old, new))
        elif old != new:
            yield name
