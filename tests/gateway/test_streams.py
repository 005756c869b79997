"""Many streams at once through one gateway."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import orjson
from aiohttp import web

from cortex.gateway.app import Gateway
from fakes import FakeNeuron, gateway_config, until

STREAMS, TOKENS = 200, 20


class Echo(FakeNeuron):
    """Says what it was asked, a number behind it, so that streams can be told apart."""

    def _says(self, body: dict[str, Any]) -> list[str]:
        return [f"{body['messages'][0]['content']}-{i} " for i in range(TOKENS)]

    async def _events(self, request: web.Request, body: dict[str, Any]) -> AsyncIterator[str]:
        async for event in super()._events(request, body):
            yield event
            await asyncio.sleep(0)  # lets the others in between


async def answer(session: aiohttp.ClientSession, url: str, said: str, path: str) -> str:
    """Return the text of one stream."""
    turn = {"role": "user", "content": said}
    body = {"model": "qwen3-8b", "max_tokens": 99, "stream": True, "messages": [turn]}
    text = ""
    async with session.post(url + path, json=body) as response:
        async for line in response.content:
            if line.startswith(b"data: {"):
                text += said_in(orjson.loads(line.removeprefix(b"data: ")))
    return text


def said_in(event: dict[str, Any]) -> str:
    """Return the text in an event of either dialect."""
    deltas = [choice["delta"] for choice in event.get("choices", [])] or [event.get("delta", {})]
    return "".join(delta.get("content") or delta.get("text") or "" for delta in deltas)


async def test_of_two_hundred_streams_none_is_lost_or_mixed() -> None:
    paths = ["/v1/chat/completions", "/v1/messages"]
    async with (
        Echo(["qwen3-8b"]) as echo,
        Gateway(gateway_config(echo)) as gateway,
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session,
        asyncio.TaskGroup() as group,
    ):
        echo.may_begin.clear()
        tasks = [
            group.create_task(answer(session, gateway.url, f"s{i}", paths[i % 2]))
            for i in range(STREAMS)
        ]
        await until(lambda: gateway.fleet.own("a") == {"qwen3-8b": STREAMS})
        echo.may_begin.set()
        answers = [await task for task in tasks]
        left = gateway.fleet.own("a")

    assert answers == ["".join(f"s{i}-{n} " for n in range(TOKENS)) for i in range(STREAMS)]
    assert left == {}
