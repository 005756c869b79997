"""A reader of the plan ring in a process of its own; importable by name from a child."""

from multiprocessing.connection import Connection

from cortex.ipc.descriptors import Descriptor
from cortex.ipc.plan_ring import PlanReader


def read(descriptors: list[Descriptor], messages: int, answers: Connection) -> None:
    """Send back the length of each message and its bytes' sum, one after the other."""
    reader = PlanReader(descriptors)
    for _ in range(messages):
        message = reader.take(20.0)
        assert message is not None, "the writer has gone"
        answers.send((len(message), sum(message)))
