"""The debug tap: what happens, published as it happens, to whoever subscribed.

Each process of a neuron binds one XPUB socket in the neuron's tap directory, a Unix socket that
only the daemon's user can open. A message is two frames: the topic (``command.load_model``,
``event.model_loaded``, ``step``, ``request``) and a JSON object. While nobody subscribes,
``wants`` is False and nothing is serialised; the publisher never waits: a slow reader loses
messages. ``TOPICS`` are all there are.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import msgspec
import zmq

from cortex.ipc.messages import Command, Event

SUPERVISOR = "supervisor"

TOPICS = (
    *(f"command.{kind.__struct_config__.tag}" for kind in get_args(Command)),
    *(f"event.{kind.__struct_config__.tag}" for kind in get_args(Event)),
    "request",
    "step",
)


def socket_path(directory: Path, process: str) -> Path:
    """Return where *process* (``supervisor`` or a device's name) of a neuron binds its tap."""
    return directory / f"{process}.tap"


class Tap:
    """The publishing end; ``Tap(None)`` publishes nothing."""

    def __init__(self, directory: Path | None, process: str) -> None:
        self.directory = directory
        self._process = process
        self._topics: set[bytes] = set()
        self._context: zmq.Context[zmq.Socket[bytes]] | None = None
        if directory is None:
            return
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._context = zmq.Context(io_threads=1)
        self._socket = self._context.socket(zmq.XPUB)
        self._socket.linger = 0
        self._socket.bind(f"ipc://{socket_path(directory, process)}")

    def wants(self, topic: str) -> bool:
        """Whether somebody subscribed to *topic*; learns of subscriptions on the way."""
        if self._context is None:
            return False
        while True:
            try:
                frame = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                break
            (self._topics.add if frame[:1] == b"\x01" else self._topics.discard)(frame[1:])
        return any(topic.encode().startswith(prefix) for prefix in self._topics)

    def publish(self, topic: str, message: Any) -> None:
        """Send *message* (anything msgspec encodes) under *topic* if somebody wants it."""
        if not self.wants(topic):
            return
        body = msgspec.json.encode({"process": self._process, "message": message})
        with contextlib.suppress(zmq.Again):  # a debug tap never waits for a slow reader
            self._socket.send_multipart([topic.encode(), body], zmq.NOBLOCK)

    def close(self) -> None:
        """Unbind, and take the socket's file away; closing twice is not an error."""
        if self._context is not None and self.directory is not None:
            self._context.destroy(linger=0)
            self._context = None
            socket_path(self.directory, self._process).unlink(missing_ok=True)


def listen(directory: Path, topics: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield ``(topic, message)`` of every process of the neuron, for ever; blocks.

    Processes that start later are not seen: their sockets are found once, at the start. Raise
    FileNotFoundError where no neuron publishes in *directory*; files that a killed one left behind
    do not count.
    """
    paths = [path for path in sorted(directory.glob("*.tap")) if _is_bound(path)]
    if not paths:
        raise FileNotFoundError(f"no neuron publishes in {directory}")
    with zmq.Context(io_threads=1) as context, context.socket(zmq.SUB) as subscriber:
        subscriber.linger = 0
        for path in paths:
            subscriber.connect(f"ipc://{path}")
        for topic in topics or [""]:
            subscriber.subscribe(topic)
        while True:
            frames = subscriber.recv_multipart()
            yield frames[0].decode(), msgspec.json.decode(frames[1])


def _is_bound(path: Path) -> bool:
    """Whether a process listens at the Unix socket *path*."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return False
    return True
