"""OpenAI's chat and text completions: passed on as they are, answered as the node answers.

The body goes to the node byte for byte, and what the node says to the client, with two exceptions:

    the client named the model otherwise     the name changes on both ways
    than the node does
    the body has Ollama's ``keep_alive``     it is ours to honour, so the node does not get it
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import msgspec
from msgspec import UNSET

from cortex.gateway.affinity import head_of, head_of_text, named_in_body
from cortex.gateway.dialects.dialect import CountTokens, Translation
from cortex.gateway.dialects.openai import OPENAI, OpenAI
from cortex.gateway.renaming import RenamedStream, Renaming
from cortex.ipc.errors import ApiError, InvalidRequest
from cortex.ipc.requests import MAX_COMMAS, decode_object, model_of

ABSENT = msgspec.Raw(b"")
DURATION = re.compile(r"(-?)((?:\d+(?:\.\d+)?(?:ms|h|m|s))+|\d+(?:\.\d+)?)")
PART = re.compile(r"(\d+(?:\.\d+)?)(ms|h|m|s|\Z)")
LIFETIME = 10**10
"""In seconds; more is for ever."""
SEVERAL = re.compile(rb'\s*\[\s*["\[]')
"""How a list begins of texts, or of lists of token ids."""
SECONDS = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 0.001, "": 1.0}


class RoutingFields(msgspec.Struct):
    """What routing needs of a body; the rest is skipped, and is the node's to judge."""

    model: Any = None
    stream: Any = None
    keep_alive: Any = UNSET
    max_completion_tokens: Any = None
    max_tokens: Any = None
    n: Any = None
    prompt_cache_key: Any = None
    metadata: Any = None
    prompt: msgspec.Raw = ABSENT

    def turns(self) -> list[msgspec.Raw]:
        """Return the turns of the conversation, if they could be told apart."""
        return []

    def affinity(self) -> str | None:
        """Return what the session is known by, or None."""
        named = named_in_body(self.prompt_cache_key, self.metadata) or head_of(self.turns())
        if named or self.prompt is ABSENT:
            return named
        return head_of_text(memoryview(self.prompt))

    def output_limit(self) -> int | None:
        """Return the tokens that all choices together may have, or None."""
        limits = (self.max_completion_tokens, self.max_tokens)
        limit = next((limit for limit in limits if _is_count(limit)), None)
        choices = self.n if _is_count(self.n) else 1
        return limit if limit is None else limit * choices * self._prompts()

    def _prompts(self) -> int:
        """Return how many prompts a text completion has; token ids are one."""
        prompt = memoryview(self.prompt)
        if not SEVERAL.match(prompt) or bytes(prompt).count(b",") > MAX_COMMAS:
            return 1  # the node refuses so many values, unread
        return len(msgspec.json.decode(prompt, type=list[msgspec.Raw]))


class WithTurns(RoutingFields):
    """The same, with its turns cut out and not read: of them only the head matters."""

    messages: list[msgspec.Raw] = []

    def turns(self) -> list[msgspec.Raw]:
        """Return them."""
        return self.messages


def routing_fields(raw: bytes) -> RoutingFields:
    """Return those of the body *raw*; raise MalformedJson and InvalidRequest."""
    if len(raw) <= 2 * MAX_COMMAS or raw.count(b",") <= MAX_COMMAS:
        try:
            return msgspec.json.decode(raw, type=WithTurns)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            pass  # turns that are none are the node's to refuse
    try:
        return msgspec.json.decode(raw, type=RoutingFields)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        decode_object(raw)  # says what is wrong in our words
        raise


def stay_of(keep_alive: Any) -> float | None:
    """Return how many seconds Ollama's *keep_alive* means; below zero: for ever; None: no word.

    A number, or text: ``"90"``, ``"5m"``, ``"1h30m"``, ``"-1"``. Raise InvalidRequest.
    """
    if keep_alive is None or keep_alive is UNSET:
        return None
    if isinstance(keep_alive, str) and (found := DURATION.fullmatch(keep_alive)):
        seconds = sum(float(n) * SECONDS[unit] for n, unit in PART.findall(found[2]))
        return math.inf if found[1] else seconds
    if isinstance(keep_alive, (int, float)) and not isinstance(keep_alive, bool):
        return math.inf if keep_alive < 0 or keep_alive > LIFETIME else float(keep_alive)
    raise InvalidRequest(
        f"keep_alive must be a number of seconds or a duration such as '5m': {keep_alive!r:.80}",
        param="keep_alive",
    )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


@dataclass(frozen=True)
class PassedOn:
    """A call that needs no translation."""

    path: str
    model: str
    wants_stream: bool
    raw: bytes
    dialect: OpenAI = OPENAI
    affinity: str | None = None
    output_limit: int | None = None
    stay_seconds: float | None = None
    has_keep_alive: bool = False
    is_translated: bool = False

    @classmethod
    def of(cls, path: str, raw: bytes) -> PassedOn:
        """Return the call in the body *raw*; raise MalformedJson, MissingModelField, ..."""
        fields = routing_fields(raw)
        stream = fields.stream
        if stream is not None and not isinstance(stream, bool):
            raise InvalidRequest("stream must be true, false or null", param="stream")
        return cls(
            path,
            model_of({"model": fields.model}),
            bool(stream),
            raw,
            affinity=fields.affinity(),
            output_limit=fields.output_limit(),
            stay_seconds=stay_of(fields.keep_alive),
            has_keep_alive=fields.keep_alive is not UNSET,
        )

    def keep_alive(self, text: str) -> bytes:
        """Return a comment."""
        return self.dialect.keep_alive(text)

    def error_frame(self, error: ApiError, request_id: str) -> bytes:
        """Return the error object as the last event; no ``[DONE]`` follows."""
        return self.dialect.error_frame(error, request_id)

    def refusal(self, error: ApiError) -> ApiError:
        """Return *error*: the client has said what the node was asked."""
        return error

    def body(self, node_id: str) -> bytes:
        """Return the body as it came, with the node's name of the model, without keep_alive."""
        if node_id == self.model and not self.has_keep_alive:
            return self.raw
        body = {**decode_object(self.raw), "model": node_id}
        body.pop("keep_alive", None)
        return msgspec.json.encode(body)

    def answer(self, node_id: str, body: bytes) -> bytes:
        """Return *body*, with the client's name of the model in it."""
        renaming = Renaming(node_id, self.model)
        return renaming.answer(body) if renaming.is_needed else body

    async def translation(self, node_id: str, count: CountTokens) -> Translation:
        """Return what passes bytes on, or events with the client's name of the model in them."""
        del count
        renaming = Renaming(node_id, self.model)
        return RenamedStream(renaming) if renaming.is_needed else Verbatim()


class Verbatim:
    """Passes bytes on, the node's words about an error too."""

    error: ApiError | None = None

    def feed(self, chunk: bytes) -> bytes:
        """Return *chunk*."""
        return chunk
