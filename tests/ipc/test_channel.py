"""Commands reach the device end and events the supervisor end, whole and typed."""

import os

import pytest
import zmq
import zmq.asyncio

from cortex.ipc.channel import DeviceEnd, SupervisorEnd, private_address
from cortex.ipc.errors import ProtocolError
from cortex.ipc.messages import Cancel, Ping, Pong


async def test_a_command_reaches_the_device_end() -> None:
    with zmq.asyncio.Context() as context:
        supervisor = SupervisorEnd(context)
        with DeviceEnd(supervisor.address) as device:
            await supervisor.send(Cancel(command_id=1, sequence_id=7))
            device.wait(10.0)

            assert device.receive_waiting() == Cancel(command_id=1, sequence_id=7)
            assert device.receive_waiting() is None
        supervisor.close()


async def test_an_event_reaches_the_supervisor_end() -> None:
    with zmq.asyncio.Context() as context:
        supervisor = SupervisorEnd(context)
        with DeviceEnd(supervisor.address) as device:
            device.send(Pong(command_id=3))

            assert await supervisor.receive() == Pong(command_id=3)
        supervisor.close()


async def test_waiting_ends_when_another_descriptor_is_readable() -> None:
    with zmq.asyncio.Context() as context:
        supervisor = SupervisorEnd(context)
        reader, writer = os.pipe()
        with DeviceEnd(supervisor.address) as device:
            os.write(writer, b"x")
            device.wait(None, reader)

            assert device.receive_waiting() is None
        os.close(reader)
        os.close(writer)
        supervisor.close()


async def test_a_frame_that_is_no_command_is_refused_in_words() -> None:
    with zmq.asyncio.Context() as context:
        socket = context.socket(zmq.PAIR)
        socket.linger = 0
        address = private_address()
        socket.bind(address)
        with DeviceEnd(address) as device:
            await socket.send(b"nonsense")
            device.wait(10.0)

            with pytest.raises(ProtocolError, match="not a command"):
                device.receive_waiting()
        socket.close()


async def test_a_frame_that_is_no_event_is_refused_in_words() -> None:
    with zmq.asyncio.Context() as context:
        supervisor = SupervisorEnd(context)
        peer = context.socket(zmq.PAIR)
        peer.linger = 0
        peer.connect(supervisor.address)
        await peer.send(b"nonsense")

        with pytest.raises(ProtocolError, match="not an event"):
            await supervisor.receive()
        peer.close()
        supervisor.close()


async def test_two_lives_never_share_an_address() -> None:
    assert private_address() != private_address()


async def test_closing_a_supervisor_end_drops_what_nobody_read() -> None:
    with zmq.asyncio.Context() as context:
        supervisor = SupervisorEnd(context)
        device = DeviceEnd(supervisor.address)
        await supervisor.send(Ping(command_id=1))
        supervisor.close()
        device.close()
