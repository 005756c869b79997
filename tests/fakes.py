"""Doubles that keep the real contract; ``tests/test_fakes.py`` holds them to it."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import msgspec
from aiohttp import web
from aiohttp.typedefs import Handler

from cortex.gateway.config import GatewayConfig, Listening, Neuron, Timeouts
from cortex.ipc.errors import ApiError, InvalidApiKey
from cortex.ipc.node_api import (
    Activation,
    DeviceHealth,
    DeviceInfo,
    Discovery,
    Health,
    Limit,
    ModelDevice,
    ModelInfo,
    ModelLoad,
    ModelStatus,
    Progress,
    Refusal,
    Servable,
)
from cortex.ipc.requests import decode_object

QUICK = Timeouts(
    connect_seconds=5.0,
    control_seconds=5.0,
    load_seconds=20.0,
    between_bytes_seconds=10.0,
    client_stalled_seconds=10.0,
    drain_seconds=10.0,
    poll_seconds=0.05,
    poll_while_loading_seconds=0.02,
    keep_alive_seconds=0.05,
)
"""For tests against fakes: nothing there takes long unless meant to, but the host may be busy."""


@dataclass(frozen=True)
class Received:
    """One request that a fake has got."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]


@dataclass
class FakeModel:
    """A model as a fake neuron shows it; tests change it as they like."""

    id: str
    status: ModelStatus = "loaded"
    servable: Servable = field(default_factory=lambda: Servable(ok=True))
    context: int | None = 4096
    in_flight: int = 0
    queue_depth: int = 0
    failure: str | None = None
    refusal: Refusal | None = None
    output: int | None = None
    capabilities: list[str] = field(default_factory=list)
    tool_call: bool = False
    reasoning: bool = False

    def info(self) -> ModelInfo:
        """Return its entry in ``GET /models``."""
        loading = self.status == "loading"
        is_told = self.status == "loaded" or not self.servable.ok
        return ModelInfo(
            id=self.id,
            harness="torch",
            status=self.status,
            devices=[ModelDevice(0, weights_mb=100)],
            servable=self.servable if is_told else Servable(ok=False),
            limit=Limit(self.context, output=self.output) if self.context else None,
            capabilities=self.capabilities,
            tool_call=self.tool_call,
            reasoning=self.reasoning,
            progress=Progress("downloading", 40, 100) if loading else None,
            failure=self.failure,
            refusal=self.refusal,
        )


class FakeNeuron:
    """A neuron that speaks the public HTTP API and says exactly what the test told it to.

    >>> neuron = FakeNeuron(models=["qwen3-8b"])   # doctest: +SKIP
    >>> neuron.tokens = ["Hel", "lo"]              # doctest: +SKIP
    >>> neuron.dies_after_tokens = 1               # doctest: +SKIP

    A stream is: role chunk, tokens, finish chunk, usage comment, ``[DONE]``. Answers:

        refuses            every inference request, with this error
        breaks             the connection, before any byte of an answer
        dies_after_tokens  the connection, after so many tokens (0: after the role chunk)
        fails_after_tokens with an error frame and no ``[DONE]``
        ends_after_tokens  cleanly, but without finish and ``[DONE]``
        keep_alives        comments before the first token
        may_finish         a gate before the finish chunk, or before an answer that does not stream
        may_begin          a gate before anything is answered to an inference request
        may_count          a gate before the tokens of a prompt are told

    A chat says ``deltas``, if there are any, instead of ``tokens``: reasoning and calls too.

    Control: ``may_load`` is a gate for loads, ``refuses_load`` and ``fails_load`` make them go
    wrong, ``is_out_of_order`` breaks every control connection, ``may_poll`` is a gate for polls.
    ``cycles`` are those of its device until that is restarted, unless it ``refuses_restart``.
    Without ``devices`` its ``/discovery`` fails.

    With a ``key`` whoever has another one is refused; with an ``ssl_context`` it speaks TLS.
    """

    failure = "the device process has died"

    def __init__(
        self,
        models: Sequence[str] = (),
        name: str = "a",
        port: int = 0,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        self.name = name
        self.key: str | None = None
        self._port = port
        self._ssl_context = ssl_context
        self.models = {model: FakeModel(model) for model in models}
        self.tokens = ["Hello", " world"]
        self.deltas: list[dict[str, Any]] = []
        self.reasoning_tokens: int | None = None
        self.prompt_tokens = 7
        self.cached_tokens: int | None = None
        self.finish_reason = "stop"
        self.stop_reason: str | None = None
        self.refuses: ApiError | None = None
        self.breaks = False
        self.dies_after_tokens: int | None = None
        self.fails_after_tokens: int | None = None
        self.ends_after_tokens: int | None = None
        self.keep_alives = 0
        self.free_mb = 1000
        self.cycles = 0
        self.uptime_seconds = 1.0
        self.polls = 0
        self.devices: list[DeviceInfo] | None = [DeviceInfo(0, "cpu:0", 1010)]
        self.draining = False
        self.activation = Activation()
        self.refuses_load: ApiError | None = None
        self.refuses_restart: ApiError | None = None
        self.fails_load: str | None = None
        self.fails_load_with: Refusal | None = None
        self.is_out_of_order = False
        self.cached_models: set[str] = set()
        self.received: list[Received] = []
        self.answering = asyncio.Event()
        self.cancelled = asyncio.Event()
        self.may_begin = _open_gate()
        self.may_finish = _open_gate()
        self.may_count = _open_gate()
        self.may_load = _open_gate()
        self.may_poll = _open_gate()
        self._runner = web.AppRunner(self._app(), access_log=None, handler_cancellation=True)
        self.url = ""

    def _app(self) -> web.Application:
        middlewares = [_errors_as_json, self._admit]
        app = web.Application(client_max_size=64 * 2**20, middlewares=middlewares)
        app.add_routes(
            [
                web.get("/health", self._health),
                web.get("/discovery", self._discovery),
                web.get("/models", self._models),
                web.post("/models/load", self._load),
                web.post("/models/unload", self._unload),
                web.post("/devices/0/restart", self._restart),
                web.post("/tokenize", self._tokenize),
                web.post("/v1/chat/completions", self._infer),
                web.post("/v1/completions", self._infer),
                web.post("/v1/embeddings", self._infer),
            ]
        )
        return app

    async def __aenter__(self) -> Self:
        await self._runner.setup()
        context = self._ssl_context
        site = web.TCPSite(self._runner, "127.0.0.1", self._port, ssl_context=context, backlog=2048)
        await site.start()
        scheme = "https" if context else "http"
        self.url = f"{scheme}://127.0.0.1:{self._runner.addresses[0][1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        for gate in (self.may_begin, self.may_finish, self.may_count, self.may_poll):
            gate.set()
        await self._runner.cleanup()

    async def stop(self) -> None:
        """Go away, as a host that is switched off."""
        await self._runner.cleanup()

    def requests(self, path: str) -> list[Received]:
        """Return what came to *path*."""
        return [request for request in self.received if request.path == path]

    @web.middleware
    async def _admit(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if self.key and request.headers.get("Authorization") != f"Bearer {self.key}":
            raise InvalidApiKey("a key of this node is needed")
        return await handler(request)

    async def _note(self, request: web.Request) -> dict[str, Any]:
        body = decode_object(await request.read())
        headers = {name.lower(): value for name, value in request.headers.items()}
        self.received.append(Received(request.path, headers, body))
        return body

    async def _health(self, request: web.Request) -> web.Response:
        await self._polled(request)
        loads = [
            ModelLoad(model.id, in_flight=model.in_flight, queue_depth=model.queue_depth)
            for model in self.models.values()
            if model.status == "loaded"
        ]
        device = DeviceHealth(
            0,
            "cpu:0",
            "ready",
            vram_used_mb=10,
            vram_free_mb=self.free_mb,
            lifecycle_cycles=self.cycles,
        )
        uptime, activation = self.uptime_seconds, self.activation
        return _json(Health(uptime, [device], activation, loads, draining=self.draining))

    async def _discovery(self, request: web.Request) -> web.Response:
        await self._polled(request)
        if self.devices is None:
            return _error(500, "internal_error", "the driver does not answer")
        return _json(Discovery(self.name, "Linux", "6.1", self.devices, ["torch"]))

    async def _models(self, request: web.Request) -> web.Response:
        await self._polled(request)
        for model in self.models.values():
            if model.status == "loading" and self.may_load.is_set():
                model.status = "failed" if self.fails_load else "loaded"
                model.failure, model.refusal = self.fails_load, self.fails_load_with
        return _json([model.info() for model in self.models.values()])

    async def _polled(self, request: web.Request) -> None:
        self.polls += 1
        if self.is_out_of_order:
            _abort(request)
        await self.may_poll.wait()

    async def _load(self, request: web.Request) -> web.Response:
        body = await self._note(request)
        if self.refuses_load:
            return refusal(self.refuses_load)
        self.models[body["model_id"]] = FakeModel(body["model_id"], "loading")
        return web.json_response({"status": "loading"}, status=202)

    async def _unload(self, request: web.Request) -> web.Response:
        body = await self._note(request)
        model = self.models.get(body["model_id"])
        if model and model.in_flight and not body.get("force"):
            return _error(409, "conflict", "requests are running")
        if self.models.pop(body["model_id"], None) is None:
            return _error(404, "model_not_found", "not loaded")
        return web.json_response({"status": "unloaded"})

    async def _restart(self, request: web.Request) -> web.Response:
        await self._note(request)
        if self.refuses_restart:
            return refusal(self.refuses_restart)
        self.cycles = 0
        return web.json_response({"status": "restarted"})

    async def _tokenize(self, request: web.Request) -> web.Response:
        body = await self._note(request)
        await self.may_count.wait()
        if body["model"] not in {*self.models, *self.cached_models}:
            return _error(404, "model_not_found", "not in the cache")
        return web.json_response(
            {"tokens": list(range(self.prompt_tokens)), "count": self.prompt_tokens}
        )

    async def _infer(self, request: web.Request) -> web.StreamResponse:
        body = await self._note(request)
        self.answering.set()
        try:
            await self.may_begin.wait()
            if self.breaks:
                _abort(request)
            if self.refuses:
                return refusal(self.refuses)
            if body["model"] not in self.models:
                return _error(404, "model_not_found", "not loaded; see /models/load")
            if not body.get("stream"):
                await self.may_finish.wait()
                return web.json_response(self._whole(body, request.path))
            return await self._stream(request, body)
        except _Aborted:
            raise
        except asyncio.CancelledError:
            self.cancelled.set()
            raise

    async def _stream(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        async for event in self._events(request, body):
            await response.write(f"{event}\n\n".encode())
        await response.write_eof()
        return response

    async def _events(self, request: web.Request, body: dict[str, Any]) -> AsyncIterator[str]:
        chat = request.path == "/v1/chat/completions"
        if chat:
            yield self._chunk(body, {"role": "assistant", "content": ""})
        for _ in range(self.keep_alives):
            yield ": keep-alive"
        for position, token in enumerate([*self._says(body), ""]):
            if position == self.dies_after_tokens:
                _abort(request)
            if position == self.fails_after_tokens:
                yield _data(_error_object("node_failed", self.failure))
                return
            if position == self.ends_after_tokens:
                return
            if token:
                said = {"content": token} if isinstance(token, str) else token
                yield self._chunk(body, said if chat else token)
        await self.may_finish.wait()
        yield self._chunk(body, {} if chat else "", self.finish_reason)
        if (body.get("stream_options") or {}).get("include_usage"):
            yield _data({**self._head(body, "chat.completion.chunk"), "choices": []} | self._cost())
        if request.headers.get("x-cortex-usage") == "1":
            yield f": usage {msgspec.json.encode(self._cost()['usage']).decode()}"
        yield "data: [DONE]"

    def _says(self, body: dict[str, Any]) -> Sequence[str | dict[str, Any]]:
        return self.deltas if "messages" in body and self.deltas else self.tokens

    def _chunk(self, body: dict[str, Any], said: Any, finish_reason: str | None = None) -> str:
        choice: dict[str, Any] = {"index": 0, "finish_reason": finish_reason, "logprobs": None}
        if finish_reason and self.stop_reason:
            choice["stop_reason"] = self.stop_reason
        if isinstance(said, str):
            return _data(
                {**self._head(body, "text_completion"), "choices": [choice | {"text": said}]}
            )
        return _data(
            {**self._head(body, "chat.completion.chunk"), "choices": [choice | {"delta": said}]}
        )

    def _whole(self, body: dict[str, Any], path: str) -> dict[str, Any]:
        if path == "/v1/embeddings":
            vector = {"object": "embedding", "index": 0, "embedding": [0.6, 0.8]}
            cost = {"prompt_tokens": self.prompt_tokens, "total_tokens": self.prompt_tokens}
            return {"object": "list", "model": body["model"], "data": [vector], "usage": cost}
        text = "".join(self.tokens)
        choice: dict[str, Any] = {
            "index": 0,
            "finish_reason": self.finish_reason,
            "logprobs": None,
        }
        if self.stop_reason:
            choice["stop_reason"] = self.stop_reason
        if path == "/v1/completions":
            return {**self._head(body, "text_completion"), "choices": [choice | {"text": text}]} | (
                self._cost()
            )
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if self.deltas:
            message |= whole_message(self.deltas)
        return {
            **self._head(body, "chat.completion"),
            "choices": [choice | {"message": message}],
        } | self._cost()

    def _head(self, body: dict[str, Any], kind: str) -> dict[str, Any]:
        return {"id": "chatcmpl-1", "object": kind, "created": 1, "model": body["model"]}

    def _cost(self) -> dict[str, Any]:
        usage: dict[str, Any] = {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": len(self.tokens),
            "total_tokens": self.prompt_tokens + len(self.tokens),
        }
        if self.cached_tokens is not None:
            usage["prompt_tokens_details"] = {"cached_tokens": self.cached_tokens}
        if self.reasoning_tokens is not None:
            usage["completion_tokens_details"] = {"reasoning_tokens": self.reasoning_tokens}
        return {"usage": usage}


def whole_message(deltas: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return what *deltas* of a chat stream come to in an answer that does not stream."""
    message: dict[str, Any] = {"content": None}
    calls: dict[int, dict[str, Any]] = {}
    for delta in deltas:
        for name in ("content", "reasoning_content"):
            if name in delta:
                message[name] = (message.get(name) or "") + delta[name]
        for call in delta.get("tool_calls", ()):
            if "id" in call:
                calls[call["index"]] = {
                    "id": call["id"],
                    "type": "function",
                    "function": {"name": call["function"]["name"], "arguments": ""},
                }
            calls[call["index"]]["function"]["arguments"] += call["function"]["arguments"]
    return {**message, "tool_calls": list(calls.values())} if calls else message


class _Aborted(asyncio.CancelledError):
    """The fake has broken the connection itself; the server has nothing to say about it."""


def _open_gate() -> asyncio.Event:
    gate = asyncio.Event()
    gate.set()
    return gate


def _abort(request: web.Request) -> None:
    """Break the connection; the handler ends with it."""
    assert request.transport is not None
    request.transport.abort()
    raise _Aborted


@web.middleware
async def _errors_as_json(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except ApiError as error:
        return refusal(error)


def _json(value: Any) -> web.Response:
    return web.Response(body=msgspec.json.encode(value), content_type="application/json")


def _data(value: dict[str, Any]) -> str:
    return f"data: {msgspec.json.encode(value).decode()}"


def _error_object(code: str, message: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": "server_error", "param": None, "code": code}}


def _error(status: int, code: str, message: str) -> web.Response:
    return web.json_response(_error_object(code, message), status=status)


def refusal(error: ApiError) -> web.Response:
    """Return *error* as a neuron answers it."""
    seconds = error.retry_after_seconds
    headers = {} if seconds is None else {"Retry-After": str(seconds)}
    return web.json_response(error.body(), status=error.status, headers=headers)


def gateway_config(*neurons: FakeNeuron, **changes: Any) -> GatewayConfig:
    """Return a configuration for a gateway in front of *neurons*, on free ports."""
    options: dict[str, Any] = {"timeouts": QUICK, **changes}
    return GatewayConfig(
        gateway=Listening("127.0.0.1:0", "127.0.0.1:0"),
        neurons=tuple(Neuron(neuron.name, neuron.url) for neuron in neurons),
        **options,
    )


async def until(condition: Callable[[], bool], within_seconds: float = 10.0) -> None:
    """Return as soon as *condition* holds; fail the test where it never does."""
    async with asyncio.timeout(within_seconds):
        while not condition():  # noqa: ASYNC110  # what is waited for has no event to offer
            await asyncio.sleep(0.005)
