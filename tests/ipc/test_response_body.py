"""A streaming body reaches its client whole, in either version of HTTP, or says to wait."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
from aiohttp import web
from aiohttp.test_utils import BaseTestServer, TestServer

from cortex.ipc.response_body import UNREAD_BYTES, ResponseBody

Writing = Callable[[ResponseBody], Awaitable[None]]


@asynccontextmanager
async def streaming(writing: Writing) -> AsyncIterator[BaseTestServer]:
    """Serve a stream whose body *writing* writes."""

    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await writing(ResponseBody(request, response))
        return response

    app = web.Application()
    app.add_routes([web.get("/", answer)])
    async with TestServer(app, handler_cancellation=True) as server:
        yield server


async def in_turns(body: ResponseBody) -> None:
    assert body.write_at_once(b"one,")
    await body.write(b"two,")
    assert body.write_at_once(b"three")


@pytest.mark.parametrize(
    ("version", "sent"),
    [
        ("1.0", b"one,two,three"),
        ("1.1", b"4\r\none,\r\n4\r\ntwo,\r\n5\r\nthree\r\n0\r\n\r\n"),
    ],
)
async def test_both_ways_of_writing_make_one_body(version: str, sent: bytes) -> None:
    async with streaming(in_turns) as server:
        reader, writer = await asyncio.open_connection(server.host, server.port)
        writer.write(f"GET / HTTP/{version}\r\nhost: x\r\nconnection: close\r\n\r\n".encode())
        _, _, body = (await reader.read()).partition(b"\r\n\r\n")
        writer.close()

    assert body == sent


async def test_a_client_that_does_not_read_is_not_written_to_at_once() -> None:
    written: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def until_it_is_behind(body: ResponseBody) -> None:
        count = 0
        while body.write_at_once(bytes(UNREAD_BYTES)):
            count += 1
            await asyncio.sleep(0)
        written.set_result(count)

    async with streaming(until_it_is_behind) as server:
        _, writer = await asyncio.open_connection(server.host, server.port, limit=1)
        writer.write(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        assert await written > 1
        writer.close()


async def test_a_client_that_has_gone_is_not_written_to_at_once() -> None:
    answering = asyncio.Event()
    gone: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

    async def until_it_is_gone(body: ResponseBody) -> None:
        answering.set()
        try:
            await asyncio.Event().wait()
        finally:
            gone.set_result(not body.write_at_once(b"x"))

    async with streaming(until_it_is_gone) as server:
        _, writer = await asyncio.open_connection(server.host, server.port)
        writer.write(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        await answering.wait()
        writer.close()

        assert await gone
