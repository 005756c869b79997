"""The far end of a post, in a process of its own; importable by name from a child."""

import os
from multiprocessing.connection import Connection

from cortex.ipc.descriptors import Descriptor
from cortex.ipc.post import Letters


def counts(descriptors: list[Descriptor] | None) -> list[int]:
    """Return what the eventfds among them count, which empties them."""
    assert descriptors is not None
    return [os.eventfd_read(descriptor.fd) for descriptor in descriptors]


def take_in_a_child(end: Descriptor, told: Connection, answers: Connection) -> None:
    """Answer each name of a group with the counts of what was sent for it, until None comes."""
    letters = Letters(end)
    while (group := told.recv()) is not None:
        answers.send(counts(letters.take(group)))
