"""The models of the configuration, loaded one after the other while the neuron already answers.

``pre_warming`` until each has been tried; one that fails is named with its reason and does not keep
the others from being loaded.
"""

from __future__ import annotations

from collections.abc import Sequence

import structlog

from cortex.ipc import node_api
from cortex.ipc.errors import ApiError
from cortex.ipc.node_api import ActivationFailure, LoadRequest
from cortex.runtime.node import Node

log = structlog.get_logger()


class Activation:
    """How far it has come; ``run`` is its only writer."""

    def __init__(self, requests: Sequence[LoadRequest]) -> None:
        self._requests = requests
        self._pending = [request.model_id for request in requests]
        self._in_progress: str | None = None
        self._completed: list[str] = []
        self._failed: list[ActivationFailure] = []

    @property
    def state(self) -> node_api.Activation:
        """What ``/health`` says."""
        is_ready = not self._pending and self._in_progress is None
        return node_api.Activation(
            state="ready" if is_ready else "pre_warming",
            pending=list(self._pending),
            in_progress=self._in_progress,
            completed=list(self._completed),
            failed=list(self._failed),
        )

    async def run(self, node: Node) -> None:
        """Load every model, in order."""
        for request in self._requests:
            self._in_progress = self._pending.pop(0)
            try:
                await node.load(request)
                await node.loaded(request.model_id)
                self._completed.append(request.model_id)
            except ApiError as exc:
                log.warning("model not loaded", model=request.model_id, error=str(exc))
                self._failed.append(ActivationFailure(request.model_id, str(exc)))
            finally:
                self._in_progress = None
