"""Descriptors that a device process is sent while it runs: its end of a group's plan ring.

    supervisor   Post.send(group, descriptors)   one packet: the group's name, and SCM_RIGHTS
    device       Letters.take(group)             when JoinGroup says that they have been sent

The control channel is ZeroMQ's, which carries no descriptors; those that are there when a child is
forked travel with the fork (``descriptors.py``), and a group is made later. So every device process
inherits one end of a pair of unix sockets of packets. A packet is in the socket's queue when
``send`` returns, and the command that asks for it is sent after that: the device never has to wait.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence

from cortex.ipc.descriptors import Descriptor

MAX_NAME_BYTES = 512
MAX_DESCRIPTORS = 250
"""Linux takes 253 in one packet."""


class Post:
    """The supervisor's end, and, until the child is forked, also the child's."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket = ours
        self._socket.setblocking(False)
        self.letters = Descriptor(theirs.detach())
        """What the child is forked with, to make its ``Letters`` of."""

    def send(self, group: str, descriptors: Sequence[Descriptor]) -> None:
        """Send *descriptors* of *group*, at most 250; the sender keeps its own.

        Raise OSError where the child is gone, or has not read what it was sent for too long.
        """
        name = group.encode()
        assert 0 < len(name) <= MAX_NAME_BYTES, "the group's name fits a packet"
        assert len(descriptors) <= MAX_DESCRIPTORS, "a packet has no room for more"
        socket.send_fds(self._socket, [name], [descriptor.fd for descriptor in descriptors])

    def close(self) -> None:
        """Give up both ends; what the child has not taken goes with its own."""
        self._socket.close()
        self.letters.close()


class Letters:
    """The device process's end: what was sent for each group and not taken yet."""

    def __init__(self, end: Descriptor) -> None:
        self._socket = socket.socket(fileno=os.dup(end.fd))
        self._socket.setblocking(False)
        self._sent: dict[str, list[Descriptor]] = {}

    def take(self, group: str) -> list[Descriptor] | None:
        """Return what was sent last for *group*, once; None where nothing was."""
        while (packet := self._next()) is not None:
            name, descriptors = packet
            _close(self._sent.pop(name, []))
            self._sent[name] = descriptors
        return self._sent.pop(group, None)

    def close(self) -> None:
        """Give up the end, and what nobody took."""
        self._socket.close()
        for descriptors in self._sent.values():
            _close(descriptors)

    def _next(self) -> tuple[str, list[Descriptor]] | None:
        try:
            name, fds, _, _ = socket.recv_fds(self._socket, MAX_NAME_BYTES, MAX_DESCRIPTORS)
        except BlockingIOError:
            return None
        for fd in fds:
            os.set_inheritable(fd, False)  # recv_fds does not pass MSG_CMSG_CLOEXEC on
        return (name.decode(), [Descriptor(fd) for fd in fds]) if name else None


def _close(descriptors: Sequence[Descriptor]) -> None:
    for descriptor in descriptors:
        descriptor.close()
