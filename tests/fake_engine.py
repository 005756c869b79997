"""An OpenAI-compatible server that is no neuron, in the shapes that such servers really have."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Self

import orjson
from aiohttp import web

from cortex.gateway.config import Engine, GatewayConfig
from fakes import FakeNeuron, Received, gateway_config

Kind = Literal["vllm", "llama-server", "llama-cpp-python", "ollama"]
Json = dict[str, Any]

USAGE = {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9}


@dataclass
class Refusal:
    """What an engine refuses with: the body is JSON, or text as it is."""

    status: int
    body: Any
    headers: dict[str, str] = field(default_factory=dict)
    content_type: str = "application/json"


def chunk(delta: Json, finish: str | None = None, **more: Any) -> Json:
    """Return a chunk of a chat stream."""
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return {"id": "c", "object": "chat.completion.chunk", "choices": [choice], **more}


def said(*chunks: Json | str, end: str = "data: [DONE]\n\n") -> bytes:
    """Return *chunks*, or events as they are, as a stream."""
    events = [c if isinstance(c, str) else f"data: {orjson.dumps(c).decode()}\n\n" for c in chunks]
    return ("".join(events) + end).encode()


class FakeEngine:
    """Lists models, answers, counts tokens, and has nothing else of a neuron's.

    It is asked for its models, and that is all it tells by itself:

        listing      what ``GET /v1/models`` answers
        stream       the bytes of a stream; by default two tokens, and the usage if asked for
        answer       what an answer that does not stream is
        refuses      every request for inference, with this
        breaks       the connection in the middle of a stream
        count        the tokens of any prompt, told in the way of its *kind*

    ``may_begin`` is a gate before any byte of an answer, its headers too; ``may_finish`` one before
    the last bytes of a stream; ``may_list`` one for polls. With a ``key`` whoever has another one
    is refused.
    """

    def __init__(self, *models: str, name: str = "ray", kind: Kind = "vllm") -> None:
        self.name = name
        self.kind = kind
        self.key: str | None = None
        self.listing: Any = {"object": "list", "data": [{"id": model} for model in models]}
        self.stream: bytes | None = None
        self.answer: Any = {
            "object": "chat.completion",
            "model": models[0] if models else "",
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": "Hello world"},
                    "finish_reason": "stop",
                }
            ],
            "usage": USAGE,
        }
        self.refuses: Refusal | None = None
        self.breaks = False
        self.count = 42
        self.polls = 0
        self.received: list[Received] = []
        self.asked = asyncio.Event()
        self.cancelled = asyncio.Event()
        self.may_begin, self.may_finish, self.may_list = _open(), _open(), _open()
        self._runner = web.AppRunner(self._app(), access_log=None, handler_cancellation=True)
        self.url = ""

    def _app(self) -> web.Application:
        app = web.Application(middlewares=[self._admit])
        app.add_routes(
            [
                web.get("/v1/models", self._models),
                web.post("/v1/chat/completions", self._infer),
                web.post("/v1/completions", self._infer),
            ]
        )
        counting = {
            "vllm": {"/tokenize": self._count},
            "llama-server": {"/apply-template": self._template, "/tokenize": self._tokens},
            "llama-cpp-python": {"/extras/tokenize/count": self._count},
            "ollama": {},
        }
        app.add_routes([web.post(path, how) for path, how in counting[self.kind].items()])
        if self.kind != "ollama":
            app.add_routes([web.post("/v1/embeddings", self._infer)])
        return app

    async def __aenter__(self) -> Self:
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        for gate in (self.may_begin, self.may_finish, self.may_list):
            gate.set()
        await self._runner.cleanup()

    def bodies(self, path: str = "/v1/chat/completions") -> list[Json]:
        """Return what was posted to *path*."""
        return [received.body for received in self.received if received.path == path]

    @web.middleware
    async def _admit(self, request: web.Request, handler: Any) -> web.StreamResponse:
        if self.key and request.headers.get("Authorization") != f"Bearer {self.key}":
            return web.json_response({"error": "Unauthorized"}, status=401)
        answer: web.StreamResponse = await handler(request)
        return answer

    async def _note(self, request: web.Request) -> Json:
        body: Json = orjson.loads(await request.read())
        headers = {name.lower(): value for name, value in request.headers.items()}
        self.received.append(Received(request.path, headers, body))
        return body

    async def _models(self, _: web.Request) -> web.Response:
        self.polls += 1
        await self.may_list.wait()
        return web.json_response(self.listing)

    async def _count(self, request: web.Request) -> web.Response:
        body = await self._note(request)
        assert "messages" in body or "input" in body
        return web.json_response({"count": self.count, "max_model_len": 4096})

    async def _template(self, request: web.Request) -> web.Response:
        await self._note(request)
        return web.json_response({"prompt": "<user>hi"})

    async def _tokens(self, request: web.Request) -> web.Response:
        body = await self._note(request)
        tokens = list(range(self.count)) if "content" in body else []
        return web.json_response({"tokens": tokens})

    async def _infer(self, request: web.Request) -> web.StreamResponse:
        body = await self._note(request)
        self.asked.set()
        try:
            await self.may_begin.wait()
            if self.refuses:
                return _refusal(self.refuses)
            if body.get("stream"):
                return await self._stream(request, body)
            await self.may_finish.wait()
            if isinstance(self.answer, bytes):
                return web.Response(body=self.answer, content_type="text/html")
            return web.json_response(self.answer)
        except asyncio.CancelledError:
            self.cancelled.set()
            raise

    async def _stream(self, request: web.Request, body: Json) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        events = self.stream or self._default(body)
        half = len(events) // 2  # in the middle of an event, as networks cut
        await response.write(events[:half])
        await self.may_finish.wait()
        if self.breaks:
            assert request.transport is not None
            request.transport.abort()
            return response
        await response.write(events[half:])
        await response.write_eof()
        return response

    def _default(self, body: Json) -> bytes:
        options = body.get("stream_options") or {}
        cost = {"choices": [], "usage": USAGE}
        return said(
            chunk({"role": "assistant", "content": ""}),
            chunk({"content": "Hello"}),
            chunk({"content": " world"}),
            chunk({}, "stop"),
            *([cost] if options.get("include_usage") else []),
        )


def engine_config(
    *engines: FakeEngine,
    neurons: Sequence[FakeNeuron] = (),
    models: tuple[str, ...] | None = None,
    max_in_flight: int | None = None,
    **changes: Any,
) -> GatewayConfig:
    """Return a configuration for a gateway in front of *engines*, and *neurons*."""
    written = tuple(
        Engine(engine.name, engine.url, models=models, max_in_flight=max_in_flight)
        for engine in engines
    )
    return gateway_config(*neurons, engines=written, **changes)


def _open() -> asyncio.Event:
    gate = asyncio.Event()
    gate.set()
    return gate


def _refusal(refusal: Refusal) -> web.Response:
    body = refusal.body if isinstance(refusal.body, str) else orjson.dumps(refusal.body).decode()
    return web.Response(
        text=body,
        status=refusal.status,
        headers=refusal.headers,
        content_type=refusal.content_type,
    )
