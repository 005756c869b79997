"""The other end of the token ring, in a process of its own; importable by name from a child."""

from cortex.ipc.ring import Flag, TokenProducer, TokenRecord, TokenRing


def record(number: int) -> TokenRecord:
    """Return the *number*-th record of a test."""
    return TokenRecord(number, number % 2**32, 0.5, Flag.TOKEN)


def produce(ring: TokenRing, steps: list[int]) -> None:
    """Publish records 0, 1, 2, ... in steps of the sizes given."""
    producer = TokenProducer(ring)
    number = 0
    for size in steps:
        producer.publish([record(n) for n in range(number, number + size)], timeout_seconds=20.0)
        number += size
