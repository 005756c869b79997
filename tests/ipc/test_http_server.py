"""What is said below the middlewares, and to connections that say nothing."""

import contextlib
from collections.abc import AsyncIterator

import msgspec
from aiohttp import web
from structlog.testing import capture_logs

from cortex.ipc.errors import ApiError
from cortex.ipc.http_server import HttpRunner, printable
from raw_http import head, wire


def refuse(request: web.BaseRequest, error: ApiError) -> web.Response:
    return web.Response(status=error.status, body=msgspec.json.encode(error.body()))


async def fine(_: web.Request) -> web.Response:
    return web.Response(text="fine")


async def broken(_: web.Request) -> web.Response:
    raise ZeroDivisionError("the secret")


@contextlib.asynccontextmanager
async def listening(idle_seconds: float = 60.0) -> AsyncIterator[int]:
    """Serve a little application; yield the port."""
    app = web.Application()
    app.router.add_get("/fine", fine)
    app.router.add_get("/broken", broken)
    runner = HttpRunner(app, refuse, shutdown_timeout=1.0, idle_seconds=idle_seconds)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        yield runner.addresses[0][1]
    finally:
        await runner.cleanup()


async def test_a_head_that_never_ends_loses_its_connection() -> None:
    async with listening(idle_seconds=0.05) as port, wire(port) as slow:
        await slow.send(b"GET /fine HTTP/1.1\r\nHost:")

        assert await slow.closed()


async def test_a_connection_that_says_nothing_more_is_closed() -> None:
    async with listening(idle_seconds=0.05) as port, wire(port) as silent:
        await silent.send(head("GET", "/fine"))
        answered = await silent.answer()

        assert (answered.status, await silent.closed()) == (200, True)


async def test_a_bug_outside_of_the_middlewares_keeps_its_text_to_itself() -> None:
    with capture_logs() as lines:
        async with listening() as port, wire(port) as asking:
            await asking.send(head("GET", "/broken"))
            answered = await asking.answer()

    assert answered.refusal == (500, "internal_error")
    assert "secret" not in str(answered.error)
    assert [line["event"] for line in lines] == ["request failed"]


async def test_what_is_not_http_is_one_quiet_line_in_the_log() -> None:
    with capture_logs() as lines:
        async with listening() as port, wire(port) as asking:
            await asking.send(b"\x00\xff\r\n\r\n")
            answered = await asking.answer()

    assert answered.refusal == (400, "invalid_request")
    assert [(line["event"], line["log_level"]) for line in lines] == [
        ("request not understood", "info")
    ]


def test_words_of_a_client_are_made_harmless() -> None:
    assert printable("  bad \x1b[31m\u202e thing:\n more") == "bad [31m thing"
