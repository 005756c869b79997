"""The two typed ends of the control channel between a supervisor and one device process.

One PAIR socket per *life* of a child, at an abstract ``ipc://@`` address that holds 128 random
bits: no file is left after a crash, nothing of an earlier life can reach a later one, and the
address, being the only protection, stays out of the logs.
"""

from __future__ import annotations

import os
import secrets
from types import TracebackType
from typing import Self

import zmq
import zmq.asyncio

from cortex.ipc import codec
from cortex.ipc.messages import Command, Event


def private_address() -> str:
    """Return an address that only a process told of it can connect to."""
    return f"ipc://@neuron-{os.getpid()}-{secrets.token_hex(16)}"


class SupervisorEnd:
    """The parent's end: binds, sends commands, receives events in an event loop."""

    def __init__(self, context: zmq.asyncio.Context) -> None:
        self.address = private_address()
        self._socket = context.socket(zmq.PAIR)
        self._socket.linger = 0
        self._socket.bind(self.address)

    async def send(self, command: Command) -> None:
        """Queue *command*; the child reads it between two steps."""
        await self.send_frame(codec.encode(command))

    async def send_frame(self, frame: bytes) -> None:
        """Queue what is, unless a test wants otherwise, an encoded command."""
        await self._socket.send(frame)

    async def receive(self) -> Event:
        """Wait for the next event; raise ProtocolError for anything else."""
        return codec.decode_event(await self._socket.recv())

    def close(self) -> None:
        """Drop the socket and whatever is still queued in it."""
        self._socket.close()


class DeviceEnd:
    """The child's end: connects, receives commands without or with waiting, sends events."""

    def __init__(self, address: str) -> None:
        self._context = zmq.Context(io_threads=1)
        self._socket = self._context.socket(zmq.PAIR)
        self._socket.linger = 1000  # a Bye or a fatal Failed should still arrive
        self._socket.connect(address)
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)

    def send(self, event: Event) -> None:
        """Send *event*."""
        self.send_frame(codec.encode(event))

    def send_frame(self, frame: bytes) -> None:
        """Send what is, unless a test wants otherwise, an encoded event."""
        self._socket.send(frame)

    def receive_waiting(self) -> Command | None:
        """Return the next command that has arrived, or None; raise ProtocolError for a bad one."""
        try:
            return codec.decode_command(self._socket.recv(zmq.NOBLOCK))
        except zmq.Again:
            return None

    def wait(self, timeout_seconds: float | None, *also: int) -> None:
        """Return when a command has arrived, a descriptor of *also* is readable, or in time."""
        for fd in also:
            self._poller.register(fd, zmq.POLLIN)
        try:
            self._poller.poll(None if timeout_seconds is None else int(timeout_seconds * 1e3))
        finally:
            for fd in also:
                self._poller.unregister(fd)

    def close(self) -> None:
        """Send what is queued, within a second, and end the context."""
        self._context.destroy()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        _type: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        self.close()
