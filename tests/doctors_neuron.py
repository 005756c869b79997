"""A neuron that does whatever it is asked to, for the doctor: calls that are demanded, formats."""

from __future__ import annotations

from typing import Any

import msgspec
from aiohttp import web

from cortex.ipc.errors import ContextLengthExceeded, UnsupportedParameter
from fakes import FakeNeuron, Received

CONTEXT_TOKENS = 20_000
"""Enough for every client."""
MANY = 10**6
PLACE = '{"city":"Paris"}'
CACHED_TOKENS = 5


class ObedientNeuron(FakeNeuron):
    """Serves one request after the other; a word is a token of its prompts."""

    def __init__(self, *models: str) -> None:
        super().__init__(models)
        for model in self.models.values():
            model.context = CONTEXT_TOKENS
        self.can_call = True
        self.can_embed = True
        self.can_fill_in = True
        self.cached_tokens = CACHED_TOKENS

    async def _note(self, request: web.Request) -> dict[str, Any]:
        body = await super()._note(request)
        if "messages" in body or "prompt" in body:
            self.prompt_tokens = CACHED_TOKENS + _words(body)
        if request.path.startswith("/v1/"):
            self._prepare(self.received[-1])
        return body

    def _prepare(self, asked: Received) -> None:
        body = asked.body
        self.refuses = self._refusal(asked)
        self.tokens = [] if body.get("max_tokens") == 0 else ["Paris", ", surely."]
        self.deltas, self.finish_reason = [], "stop"
        if "response_format" in body:
            self.tokens = [PLACE]
        if isinstance(choice := body.get("tool_choice"), dict):
            self.finish_reason = "tool_calls"
            self.deltas = [_call(choice["function"]["name"], ""), _call(None, PLACE)]

    def _refusal(self, asked: Received) -> Any:
        context = min((model.context or MANY for model in self.models.values()), default=MANY)
        if self.prompt_tokens > context:
            return ContextLengthExceeded.of(self.prompt_tokens, context)
        for name, can in (("tools", self.can_call), ("suffix", self.can_fill_in)):
            if asked.body.get(name) and not can:
                return UnsupportedParameter(f"this model knows no {name}", param=name)
        if asked.path.endswith("embeddings") and not self.can_embed:
            return UnsupportedParameter("this model makes no embeddings", param="model")
        return None

    def _whole(self, body: dict[str, Any], path: str) -> dict[str, Any]:
        whole = super()._whole(body, path)
        if path.endswith("embeddings"):
            whole["data"] *= len(body["input"])
        if body.get("logprobs"):
            likely = {"token": "P", "logprob": -0.5, "bytes": [80]}
            whole["choices"][0]["logprobs"] = {
                "content": [{**likely, "top_logprobs": [likely] * 2}]
            }
        return whole


def _words(body: dict[str, Any]) -> int:
    said = [body.get("messages"), body.get("tools"), body.get("prompt")]
    return len(msgspec.json.encode(said).split(b" "))


def _call(name: str | None, arguments: str) -> dict[str, Any]:
    begin = {"id": "call_1", "type": "function"} if name else {}
    function = {"name": name, "arguments": arguments} if name else {"arguments": arguments}
    return {"tool_calls": [{"index": 0, **begin, "function": function}]}
