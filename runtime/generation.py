"""One sequence, seen from the supervisor: read its tokens as they come, cancel it, one end.

    running --records with a finish--> finished   the reader gets them, then the iteration stops
    running --a failure--------------> failed     the reader gets what came before, then the error

Nothing else happens to a generation, and either happens once. The failures are: the device process
died (NodeFailed), the device refused or failed the sequence, the model was unloaded by force, the
supervisor stopped, and a reader that took nothing for 30 seconds while its buffer was full.

The ring is drained whatever a reader does, so a slow one never stalls the others. Its buffer counts
as full at 1,024 records; it goes on taking what the device sends until the reader's patience ends,
but never more than 65,536.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import TracebackType
from typing import Self

from cortex.ipc.errors import ApiError, InvalidRequest
from cortex.ipc.ring import Flag, TokenRecord

FULL_RECORDS = 1024
LIMIT_RECORDS = 64 * FULL_RECORDS
FINISH = int(Flag.FINISH)  # as a plain number: one & of an IntFlag takes a microsecond
READER_PATIENCE_SECONDS = 30.0


class Generation:
    """An async iterator of batches of token records; leave its context to cancel what still runs.

    The last record of the last batch has a ``Flag.FINISH`` bit. One reader only.
    """

    def __init__(
        self,
        sequence_id: int,
        model_id: str,
        cancel: Callable[[int], None],
        *,
        patience_seconds: float = READER_PATIENCE_SECONDS,
    ) -> None:
        self.sequence_id = sequence_id
        self.model_id = model_id
        self.ended = asyncio.Event()
        """Set once the device is done with the sequence, or the sequence failed."""
        self._cancel = cancel
        self._cancelled = False
        self._patience_seconds = patience_seconds
        self._out_of_patience: asyncio.TimerHandle | None = None
        self._buffer: list[TokenRecord] = []
        self._error: ApiError | None = None
        self._waiting: asyncio.Future[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None  # asking for it is a system call

    def cancel(self) -> None:
        """Ask the device to end the sequence; its CANCELLED finish comes within a step."""
        if not self._cancelled and not self.ended.is_set():
            self._cancelled = True
            self._cancel(self.sequence_id)

    def add(self, records: list[TokenRecord]) -> None:
        """Buffer *records*, in order, for the reader; the conversation calls this."""
        if self.ended.is_set():
            return
        self._buffer += records
        self._wake()
        if records[-1].flags & FINISH:
            self._end()
        elif len(self._buffer) >= LIMIT_RECORDS:
            self._give_up_reader()
        elif len(self._buffer) >= FULL_RECORDS and self._out_of_patience is None:
            self._out_of_patience = asyncio.get_running_loop().call_later(
                self._patience_seconds, self._give_up_reader
            )

    def fail(self, error: ApiError) -> None:
        """End with *error*, after what is buffered; too late where it has ended already."""
        if not self.ended.is_set():
            self._error = error
            self._end()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> list[TokenRecord]:
        while not self._buffer:
            if self._error is not None:
                raise self._error
            if self.ended.is_set():
                raise StopAsyncIteration
            await self._something()
        if self._out_of_patience is not None:
            self._stop_waiting_for_reader()
        batch, self._buffer = self._buffer, []
        return batch

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        _type: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        self.cancel()

    def _end(self) -> None:
        self._stop_waiting_for_reader()
        self.ended.set()
        self._wake()

    def _something(self) -> asyncio.Future[None]:
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
        self._waiting = self._loop.create_future()
        return self._waiting

    def _wake(self) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    def _give_up_reader(self) -> None:
        waiting = len(self._buffer)
        self.cancel()
        self.fail(
            InvalidRequest(
                f"the answer was not read while {waiting} tokens of it waited, "
                f"for {self._patience_seconds:g} s or too many: the generation was cancelled"
            )
        )

    def _stop_waiting_for_reader(self) -> None:
        if self._out_of_patience is not None:
            self._out_of_patience.cancel()
            self._out_of_patience = None
