"""What each node has to be shown, and has to show: our key, and a certificate that we trust.

The files are read at the start, and again at SIGHUP; what is broken then stays as it was, and is
said to be. A key goes to the node it was configured for and to no other: nodes are asked without
following redirects.
"""

from __future__ import annotations

import ssl
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import structlog

from cortex.gateway.config import Neuron
from cortex.ipc.keys import read_keys
from cortex.ipc.settings import ConfigError, is_loopback

log = structlog.get_logger()


@dataclass(frozen=True)
class Credential:
    """What goes with a request to one node."""

    headers: Mapping[str, str] = field(default_factory=dict)
    context: ssl.SSLContext | bool = True
    """Which authorities its certificate may come from; True is the system's, as aiohttp says it."""

    @classmethod
    def read(cls, neuron: Neuron) -> Self:
        """Read the files of *neuron*; raise ConfigError, which names it."""
        try:
            headers = _authorization(neuron.key_file)
            context = _authorities(neuron.ca_file)
        except ConfigError as exc:
            raise ConfigError(f"neuron {neuron.name}: {exc}") from exc
        return cls(headers, context)


class Credentials:
    """The credentials of all nodes, by name; none of them before ``read``."""

    def __init__(self, neurons: Iterable[Neuron]) -> None:
        self._neurons = tuple(neurons)
        self._of: dict[str, Credential] = {}

    def read(self) -> None:
        """Read every file; blocks. Raise ConfigError."""
        self._of = {neuron.name: Credential.read(neuron) for neuron in self._neurons}

    def of(self, name: str) -> Credential:
        """Return what goes with a request to node *name*."""
        return self._of[name]

    def reload(self) -> None:
        """Read every file again; blocks."""
        for neuron in self._neurons:
            try:
                self._of[neuron.name] = Credential.read(neuron)
            except ConfigError as exc:
                log.warning("not reloaded, what it was stays", why=str(exc))
            else:
                log.info("reloaded", node=neuron.name)

    def warn(self) -> None:
        """Say which key everybody on the way to its node can read."""
        for neuron in self._neurons:
            if neuron.key_file and not neuron.is_encrypted and not is_loopback(neuron.host):
                log.warning("the key of this node is sent unencrypted", node=neuron.name)


def _authorization(key_file: str | None) -> dict[str, str]:
    if key_file is None:
        return {}
    return {"Authorization": f"Bearer {read_keys(Path(key_file))[0]}"}


def _authorities(ca_file: str | None) -> ssl.SSLContext | bool:
    if ca_file is None:
        return True
    try:
        return ssl.create_default_context(cafile=ca_file)
    except ssl.SSLError as exc:
        raise ConfigError(f"{ca_file} holds no certificate in PEM form") from exc
    except OSError as exc:
        raise ConfigError(f"cannot read {ca_file}: {exc.strerror}") from exc
