"""A fake neuron as a process, for those that start neurons: ``fake_neuron.py PORT [MANNER]``.

Manners: ``ends`` exits at once with status 3, ``cannot-load`` fails every load, ``stubborn``
ignores SIGTERM.
"""

import asyncio
import signal
import sys

from fakes import FakeNeuron


async def serve(port: int, manner: str) -> None:
    async with FakeNeuron(port=port) as neuron:
        if manner == "cannot-load":
            neuron.fails_load = "the disk is full"
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, stop.set)
        if manner == "stubborn":
            loop.add_signal_handler(signal.SIGTERM, lambda: None)
        await stop.wait()


if __name__ == "__main__":
    port, manner = sys.argv[1], sys.argv[2]
    if manner == "ends":
        sys.exit(3)
    asyncio.run(serve(int(port), manner))
