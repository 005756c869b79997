"""What each node has to be shown, and has to show: our key, and a certificate that we trust.

The files are read at the start, and again at SIGHUP; what is broken then stays as it was, and is
said to be. A key goes to the address it was configured for and to no other: nodes are asked without
following redirects, and one that has moved gets what belongs to its new address.
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
            raise ConfigError(f"{neuron.kind} {neuron.name}: {exc}") from exc
        return cls(headers, context)


class Credentials:
    """The credentials of all nodes, by their URL; none of them before ``read``."""

    def __init__(self, nodes: Iterable[Neuron]) -> None:
        self._nodes = tuple(nodes)
        self._of: Mapping[str, Credential] = {}

    def read(self) -> None:
        """Read every file; blocks. Raise ConfigError."""
        self._of = {node.url: Credential.read(node) for node in self._nodes}

    def of(self, url: str) -> Credential | None:
        """Return what goes with a request to the node at *url*; None: there is no such node."""
        return self._of.get(url)

    def reread(self, nodes: Iterable[Neuron]) -> dict[str, Credential]:
        """Read the files of *nodes*, and return what ``take`` may put in place; blocks.

        What is broken of a node that is configured as it was stays; else raise ConfigError.
        """
        before = {_files(node) for node in self._nodes}
        found = {}
        for node in nodes:
            try:
                found[node.url] = Credential.read(node)
            except ConfigError as exc:
                if _files(node) not in before:
                    raise
                log.warning("not reloaded, what it was stays", why=str(exc))
                found[node.url] = self._of[node.url]
        return found

    def take(self, nodes: Iterable[Neuron], found: Mapping[str, Credential]) -> None:
        """Have *nodes* and no others, with what ``reread`` has *found* for them."""
        self._nodes = tuple(nodes)
        self._of = found

    def warn(self) -> None:
        """Say which key everybody on the way to its node can read."""
        for node in self._nodes:
            if node.key_file and not node.is_encrypted and not is_loopback(node.host):
                log.warning("the key of this node is sent unencrypted", node=node.name)


def _files(node: Neuron) -> tuple[str, str | None, str | None]:
    return node.url, node.key_file, node.ca_file


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
