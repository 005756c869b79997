"""Entry of a device process: say Hello, work until told to stop, exit with a code that says why.

    0    Shutdown was answered with Bye
    70   a bug in the loop; Failed(internal_error, fatal) was sent
    71   the device's context is broken or could not be made, or a rank of its group is gone;
         Failed(device_lost, peer_lost or ranks_diverged, fatal) was sent

The process has been forked from a fork server that has imported this module: importing it must not
run any torch operation. Its ties to its parents, signals and title are ``cortex.runtime``'s.
"""

from __future__ import annotations

import gc
import os
import sys
from functools import partial
from pathlib import Path

import torch

from cortex.ipc.channel import DeviceEnd
from cortex.ipc.descriptors import Descriptor
from cortex.ipc.engine_options import EngineOptions
from cortex.ipc.heartbeat import HeartbeatPage, HeartbeatWriter
from cortex.ipc.log import configure_logging
from cortex.ipc.messages import PROTOCOL_VERSION, Hello
from cortex.ipc.post import Letters
from cortex.ipc.ring import TokenProducer, TokenRing
from cortex.ipc.taps import Tap
from cortex.models.execution import Execution
from cortex.models.weights import load_model
from cortex.runtime.device.cuda import measured_free_bytes, share_one_heap, torch_device
from cortex.runtime.device.device import Channel, Device
from cortex.runtime.device.injection import arm
from cortex.runtime.device.loader import Loader, LoadFunction
from cortex.runtime.device.memory import DeviceMemory
from cortex.runtime.device.scheduler import TOKEN_BUDGETS


def main(  # noqa: PLR0917 - the fork passes them by position
    device_name: str,
    memory_bytes: int,
    threads: int | None,
    address: str,
    ring: TokenRing,
    tap_directory: Path | None,
    heartbeat: HeartbeatPage,
    preloaded: bool,
    server_threads: int,
    log_level: str = "info",
    test_faults: str = "",
    options: EngineOptions = EngineOptions(),  # noqa: B008 - frozen
    post: Descriptor | None = None,
) -> None:
    """Be the process of *device_name*; returns after a Shutdown, else exits with 70 or 71.

    *memory_bytes* is the device's budget for weights, caches and workspaces, *address* where the
    supervisor's end of the channel is bound. ``threads=None`` leaves torch's own choice.
    *test_faults* are what ``injection.py`` lets go wrong, *options* how engines compute. By *post*
    (``cortex.ipc.post``) come the plan rings of groups; without one none can be joined.
    """
    share_one_heap()
    gc.freeze()  # what the imports made stays: no collection, here or in an unload, need look at it
    configure_logging("device", log_level, device=device_name)
    if threads is not None:
        torch.set_num_threads(threads)
    load_as_told = partial(load_model, execution=execution_of(options))
    with DeviceEnd(address) as channel:
        channel.send(_hello(device_name, preloaded, server_threads))
        wire, load = (
            arm(test_faults, channel, load_as_told) if test_faults else (channel, load_as_told)
        )
        code = serve(
            device_name,
            memory_bytes,
            channel=wire,
            producer=TokenProducer(ring),
            tap_directory=tap_directory,
            heartbeat=HeartbeatWriter(heartbeat),
            load_model=load,
            options=options,
            letters=Letters(post) if post else None,
        )
    if code:
        sys.exit(code)


def serve(
    device_name: str,
    memory_bytes: int,
    *,
    channel: Channel,
    producer: TokenProducer,
    tap_directory: Path | None,
    heartbeat: HeartbeatWriter,
    load_model: LoadFunction,
    options: EngineOptions,
    letters: Letters | None = None,
) -> int:
    """Put the parts together, run the loop, and return the exit code."""
    device = torch_device(device_name)
    memory = DeviceMemory(memory_bytes, partial(measured_free_bytes, device))
    tap = Tap(tap_directory, device_name)
    loader = Loader(
        load_model,
        device,
        memory,
        token_budget=TOKEN_BUDGETS[device.type],
        options=options,
        beat=heartbeat.loader,
    )
    try:
        return Device(
            device,
            channel=channel,
            producer=producer,
            loader=loader,
            memory=memory,
            tap=tap,
            letters=letters,
            beat=heartbeat.main,
        ).serve()
    finally:
        loader.close()
        tap.close()


def execution_of(options: EngineOptions) -> Execution:
    """Return the part of *options* that the models look at."""
    return Execution(
        attention=options.attention,
        is_batch_invariant=options.batch_invariant,
        has_graphs=options.cuda_graphs,
    )


def _hello(device_name: str, preloaded: bool, server_threads: int) -> Hello:
    return Hello(
        protocol=PROTOCOL_VERSION,
        device=device_name,
        pid=os.getpid(),
        preloaded=preloaded,
        server_threads=server_threads,
        torch_version=str(torch.__version__),
        cuda_version=torch.version.cuda,
    )
