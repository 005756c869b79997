"""What has to leave a node before a model is loaded there; pure.

Policies are asked by ``lifecycle.py``, which carries their answer out. The only one of this version
evicts nothing: a model that does not fit is refused by the node, in words.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from cortex.gateway.catalogue import Profile
from cortex.gateway.fleet import Node


class EvictionPolicy(Protocol):
    """Decides who makes room."""

    def victims(self, node: Node, incoming: Profile) -> Sequence[str]:
        """Return the models of *node*, by their names there, to unload before *incoming* loads."""


class NothingIsEvicted:
    """Loaded models stay until somebody unloads them."""

    def victims(self, node: Node, incoming: Profile) -> Sequence[str]:
        """Return nothing."""
        del node, incoming
        return ()
