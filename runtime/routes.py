"""The public HTTP of a neuron: one short handler per route of ``route_table.py``.

Handlers read the request, call what does the work, and encode the answer; what is refused is raised
and rendered in ``middlewares.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import msgspec
from aiohttp import web

from cortex.ipc.errors import ApiError, InvalidRequest, ModelNotFound, RouteNotFound
from cortex.ipc.http_body import decoded, read_body
from cortex.ipc.node_api import (
    ClearPrefixCacheAnswer,
    ClearPrefixCacheRequest,
    Endpoint,
    LoadAnswer,
    LoadRequest,
    RestartAnswer,
    RestartRequest,
    UnloadAnswer,
    UnloadRequest,
)
from cortex.ipc.openai import (
    ChatCompletionRequest,
    CompletionRequest,
    TokenizeRequest,
    decode_request,
)
from cortex.ipc.openai_answers import ModelEntry, ModelList, Tokenized
from cortex.ipc.requests import decode_body
from cortex.runtime.access import Access
from cortex.runtime.admission import shutting_down
from cortex.runtime.cached_models import CachedModels
from cortex.runtime.door import Door
from cortex.runtime.embeddings import Embeddings
from cortex.runtime.grammar_check import GrammarCheck
from cortex.runtime.health import Report
from cortex.runtime.health import capabilities as loaded_capabilities
from cortex.runtime.inference import Inference, Timing, servable
from cortex.runtime.metrics import Metrics
from cortex.runtime.node import ModelView, Node, TextView
from cortex.runtime.prompts import TextThreads, tokenized
from cortex.runtime.served_model import not_loaded
from cortex.runtime.version import Build

T = TypeVar("T")

OWNER = "cortex"


@dataclass(frozen=True, slots=True)
class Services:
    """What the handlers call."""

    node: Node
    timing: Timing
    access: Access
    report: Report
    door: Door
    threads: TextThreads
    grammars: GrammarCheck
    inference: Inference
    embeddings: Embeddings
    cached: CachedModels
    metrics: Metrics
    build: Build
    started: int
    """Unix seconds; ``created`` of every model."""


SERVICES: web.AppKey[Services] = web.AppKey("services", Services)
DOCUMENT: web.AppKey[bytes] = web.AppKey("document", bytes)


async def health(request: web.Request) -> web.Response:
    """``GET /health``."""
    return _json(request.app[SERVICES].report.health())


async def discovery(request: web.Request) -> web.Response:
    """``GET /discovery``."""
    return _json(request.app[SERVICES].report.discovery())


async def get_version(request: web.Request) -> web.Response:
    """``GET /version``."""
    services = request.app[SERVICES]
    hellos = (device.hello for device in services.node.devices)
    return _json(services.build.version(next(filter(None, hellos), None)))


async def get_metrics(request: web.Request) -> web.Response:
    """``GET /metrics``, in the text format of Prometheus."""
    text = request.app[SERVICES].metrics.render()
    return web.Response(body=text, headers={"Content-Type": "text/plain; version=0.0.4"})


async def openapi(request: web.Request) -> web.Response:
    """``GET /openapi.json``: this very interface."""
    return web.Response(body=request.app[DOCUMENT], content_type="application/json")


async def models(request: web.Request) -> web.Response:
    """``GET /models``: a bare array."""
    return _json(request.app[SERVICES].report.models())


async def endpoint(request: web.Request) -> web.Response:
    """``GET /models/{id}/endpoint``: where the caller reaches the model: here."""
    model = _loaded(request)
    model.refuse_unless_loaded()
    if not request.host.isascii():
        raise InvalidRequest("the Host header names no host", param="Host")
    return _json(Endpoint(url=f"{request.scheme}://{request.host}"))


async def capabilities(request: web.Request) -> web.Response:
    """``GET /models/{id}/capabilities``, of a loaded model or of one that is only on the disk."""
    services = request.app[SERVICES]
    model = services.node.models.get(request.match_info["id"])
    if model is not None and model.status == "loaded":
        return _json(loaded_capabilities(model))
    return _json(await services.cached.capabilities(request.match_info["id"]))


async def load(request: web.Request) -> web.Response:
    """``POST /models/load``: 202 once queued, 200 where it is, or with ``wait`` becomes, loaded."""
    services = request.app[SERVICES]
    if services.door.is_closed:
        raise shutting_down()
    asked = await _asked(request, lambda body: decode_body(body, LoadRequest))
    model = await services.node.load(asked)
    if asked.wait:
        model = await services.node.loaded(asked.model_id)
    if model.status == "loaded":
        return _json(LoadAnswer("loaded"))
    return _json(LoadAnswer("loading"), status=202)


async def estimate(request: web.Request) -> web.Response:
    """``POST /models/estimate``: what a load would take, without loading."""
    asked = await _asked(request, lambda body: decode_body(body, LoadRequest))
    return _json(await request.app[SERVICES].node.estimate(asked))


async def unload(request: web.Request) -> web.Response:
    """``POST /models/unload``."""
    asked = await _asked(request, lambda body: decode_body(body, UnloadRequest))
    await request.app[SERVICES].node.unload(asked.model_id, asked.force)
    return _json(UnloadAnswer())


async def clear_prefix_cache(request: web.Request) -> web.Response:
    """``POST /models/clear_prefix_cache``: no prompt after it is found to be computed already."""
    asked = await _asked(request, lambda body: decode_body(body, ClearPrefixCacheRequest))
    blocks = await request.app[SERVICES].node.clear_prefix_cache(asked.model_id)
    return _json(ClearPrefixCacheAnswer(blocks))


async def restart_device(request: web.Request) -> web.Response:
    """``POST /devices/{index}/restart``; the body is optional."""
    node = request.app[SERVICES].node
    index = int(request.match_info["index"])
    if not any(device.spec.index == index for device in node.devices):
        raise RouteNotFound(f"there is no device {index}; /health lists them")
    asked = RestartRequest()
    if request.can_read_body:
        asked = await _asked(request, lambda body: decode_body(body, RestartRequest))
    await node.restart_device(index, asked.force)
    return _json(RestartAnswer())


async def chat_completions(request: web.Request) -> web.StreamResponse:
    """``POST /v1/chat/completions``."""
    return await request.app[SERVICES].inference.serve(request, ChatCompletionRequest)


async def completions(request: web.Request) -> web.StreamResponse:
    """``POST /v1/completions``."""
    return await request.app[SERVICES].inference.serve(request, CompletionRequest)


async def embeddings(request: web.Request) -> web.Response:
    """``POST /v1/embeddings``."""
    return await request.app[SERVICES].embeddings.serve(request)


async def tokenize(request: web.Request) -> web.Response:
    """``POST /tokenize``: what a prompt becomes, also of a model that is only on the disk."""
    services = request.app[SERVICES]
    asked = await _asked(request, lambda body: decode_request(body, TokenizeRequest))
    text = await _text_side(services, asked.model)
    token_ids = await services.threads.run(lambda: tokenized(text, asked))
    return _json(Tokenized(token_ids, len(token_ids)))


async def v1_models(request: web.Request) -> web.Response:
    """``GET /v1/models``: what answers now, by id."""
    services = request.app[SERVICES]
    loaded = [m for _, m in sorted(services.node.models.items()) if m.status == "loaded"]
    return _json(ModelList([_entry(model, services.started) for model in loaded]))


async def v1_model(request: web.Request) -> web.Response:
    """``GET /v1/models/{id}``."""
    model = _loaded(request)
    if model.status != "loaded":
        raise not_loaded(model.id)
    return _json(_entry(model, request.app[SERVICES].started))


def _json(body: object, status: int = 200) -> web.Response:
    return web.Response(
        status=status, body=msgspec.json.encode(body), content_type="application/json"
    )


async def _asked(request: web.Request, decode: Callable[[bytes], T]) -> T:
    patience_seconds = request.app[SERVICES].timing.body_patience_seconds
    return await decoded(await read_body(request, patience_seconds), decode)


def _loaded(request: web.Request) -> ModelView:
    model_id = request.match_info["id"]
    model = request.app[SERVICES].node.models.get(model_id)
    if model is None:
        raise not_loaded(model_id)
    return model


def _entry(model: ModelView, created: int) -> ModelEntry:
    context = model.limits.max_context_tokens if model.limits else msgspec.UNSET
    return ModelEntry(
        id=model.id,
        created=created,
        owned_by=OWNER,
        loaded=True,
        context_length=context,
        max_model_len=context,
    )


async def _text_side(services: Services, model_id: str) -> TextView:
    try:
        return servable(services.node, model_id)[1]
    except ApiError as not_now:
        try:
            return await services.cached.text_side(model_id)
        except ModelNotFound:
            raise not_now from None
