"""Running until somebody says stop: signals, drain, end."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable

from cortex.gateway.app import Gateway
from cortex.gateway.background import Background
from cortex.gateway.reload import Reload
from cortex.gateway.state import state_path
from cortex.gateway.written import Written
from cortex.ipc.descriptors import allow_many_descriptors

INTERRUPTED = 130
"""Exit status after a second signal, which cuts the drain short."""


class StopSignals:
    """SIGTERM and Ctrl-C: the first asks to stop, the second cancels the task that made this.

    SIGHUP stops too where it says that the terminal is gone, unless ``nohup`` has it ignored; a
    daemon is told by it to read its files again: ``hangup`` is set.
    """

    def __init__(self, *, is_daemon: bool) -> None:
        self.asked = asyncio.Event()
        self.hangup = asyncio.Event()
        self.is_impatient = False
        self._task = asyncio.current_task()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)
        if is_daemon:
            loop.add_signal_handler(signal.SIGHUP, self.hangup.set)
        elif signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            loop.add_signal_handler(signal.SIGHUP, self._on_signal)

    def _on_signal(self) -> None:
        if not self.asked.is_set():
            self.asked.set()
            return
        self.is_impatient = True
        if self._task is not None:
            self._task.cancel()


async def reload_at(hangup: asyncio.Event, reload: Reload) -> None:
    """Read the files again whenever *hangup* is set, for ever."""
    while True:
        await hangup.wait()
        hangup.clear()
        await reload.again()


async def serve(read: Callable[[], Written], on_ready: Callable[[Gateway], None]) -> int:
    """Serve what *read* returns until a signal, drain, and return the exit status.

    *on_ready* gets the gateway. Raise ConfigError, or CannotListen.
    """
    allow_many_descriptors()
    signals = StopSignals(is_daemon=True)
    try:
        written = await asyncio.to_thread(read)
        state = state_path(written.config)
        async with (
            Gateway(written.config, written.catalogue, state=state) as gateway,
            Background() as background,
        ):
            background.start(reload_at(signals.hangup, gateway.reload(read)), "reload")
            on_ready(gateway)
            await signals.asked.wait()
            await gateway.drain()
    except asyncio.CancelledError:
        if signals.is_impatient:
            return INTERRUPTED
        raise
    return 0
