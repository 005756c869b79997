"""How far a load has come: told ten times a second, and stopped early where it is hopeless."""

from __future__ import annotations

from collections.abc import Callable

from cortex.ipc.messages import LoadModel, LoadProgress
from cortex.runtime.device.memory import DeviceMemory, mebibytes
from cortex.runtime.device.refusal import Refused

PROGRESS_SECONDS = 0.1


class Progress:
    """Passes a load's progress on. *look* raises where nothing can come of the load any more."""

    def __init__(
        self,
        command: LoadModel,
        clock: Callable[[], float],
        memory: DeviceMemory,
        report: Callable[[LoadProgress], None],
        look: Callable[[], None] = lambda: None,
    ) -> None:
        self._command = command
        self._clock = clock
        self._memory = memory
        self._report = report
        self._look = look
        self._next_at: float | None = None

    def tell(self, bytes_done: int, bytes_total: int) -> None:
        """Raise Refused where the weights alone are more than what is free."""
        now = self._clock()
        if self._next_at is None:
            self._refuse_too_large(bytes_total)
        elif now < self._next_at:
            return
        self._next_at = now + PROGRESS_SECONDS
        self._look()
        self._report(
            LoadProgress(self._command.command_id, self._command.model, bytes_done, bytes_total)
        )

    def _refuse_too_large(self, weights_bytes: int) -> None:
        free_bytes = self._memory.free_bytes()
        if weights_bytes > free_bytes:
            raise Refused(
                "insufficient_memory",
                f"the weights take {mebibytes(weights_bytes)}, "
                f"the device has {mebibytes(free_bytes)} free",
                weights_bytes=weights_bytes,
                memory_bytes=free_bytes,
            )
