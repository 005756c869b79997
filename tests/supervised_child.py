"""A device process without a device: the real signature, the real channel, no torch.

A model of any name is loaded at once. A Generate for the model ``gil`` says one token and then
holds the interpreter's lock in C code for a minute; for ``spin`` it computes for a minute; for
``crash`` it dies of a segmentation fault. Any other model says the prompt and stops.
"""

from __future__ import annotations

import ctypes
import os
import time

from cortex.ipc.channel import DeviceEnd
from cortex.ipc.descriptors import Descriptor
from cortex.ipc.engine_options import EngineOptions
from cortex.ipc.heartbeat import Activity, HeartbeatPage, HeartbeatWriter
from cortex.ipc.messages import (
    PROTOCOL_VERSION,
    Bye,
    Command,
    Footprint,
    Generate,
    Hello,
    LoadModel,
    ModelLoaded,
    Ping,
    Pong,
    Shutdown,
)
from cortex.ipc.ring import Flag, TokenProducer, TokenRecord, TokenRing

BUSY_SECONDS = 60


def main(
    *,
    device_name: str,
    memory_bytes: int,
    threads: int | None,
    address: str,
    ring: TokenRing,
    heartbeat: HeartbeatPage,
    tap_directory: str | None,
    log_level: str,
    test_faults: str,
    options: EngineOptions,
    post: Descriptor,
    preloaded: bool,
    server_threads: int,
) -> None:
    """Be a device process, with the arguments of a real one."""
    producer, beats = TokenProducer(ring), HeartbeatWriter(heartbeat)
    with DeviceEnd(address) as channel:
        channel.send(
            Hello(PROTOCOL_VERSION, device_name, os.getpid(), preloaded, server_threads, "none")
        )
        while True:
            beats.main(Activity.IDLE)
            channel.wait(None)
            beats.main(Activity.STEPPING)
            command = channel.receive_waiting()
            if isinstance(command, Shutdown):
                channel.send(Bye(command.command_id))
                return
            if command is not None:
                obey(command, channel, producer)


def obey(command: Command, channel: DeviceEnd, producer: TokenProducer) -> None:
    """Do one thing."""
    match command:
        case Ping():
            channel.send(Pong(command.command_id))
        case LoadModel():
            footprint = Footprint(1, 1, 1)
            channel.send(
                ModelLoaded(command.command_id, command.model, footprint, 2048, 8, 4096, 0.0)
            )
        case Generate():
            generate(command, producer)
        case _:
            raise NotImplementedError(command)


def generate(command: Generate, producer: TokenProducer) -> None:
    """Say something, or be busy."""
    id_ = command.sequence_id
    producer.publish(
        [TokenRecord(id_, token, 0.0, Flag.TOKEN) for token in command.prompt_token_ids]
    )
    match command.model:
        case "gil":
            ctypes.PyDLL(None).sleep(BUSY_SECONDS)  # PyDLL keeps the lock
        case "spin":
            end = time.monotonic() + BUSY_SECONDS
            while time.monotonic() < end:
                pass
        case "crash":
            os.kill(os.getpid(), 11)
        case _:
            producer.publish([TokenRecord(id_, 0, 0.0, Flag.STOP)])
