"""OpenAI's chat and text completions: passed on as they are, answered as the node answers.

The body goes to the node byte for byte, and what the node says to the client, unless the client
named the model otherwise than the node does: then the name changes on both ways.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec

from cortex.gateway.dialects.dialect import AskNode, Translation
from cortex.gateway.dialects.openai import OPENAI, OpenAI
from cortex.gateway.renaming import RenamedStream, Renaming
from cortex.ipc.errors import InvalidRequest
from cortex.ipc.requests import decode_object, model_of


class RoutingFields(msgspec.Struct):
    """What routing needs of a body; the rest is skipped, and is the node's to judge."""

    model: Any = None
    stream: Any = None


@dataclass(frozen=True)
class PassedOn:
    """A call that needs no translation."""

    path: str
    model: str
    wants_stream: bool
    raw: bytes
    dialect: OpenAI = OPENAI

    @classmethod
    def of(cls, path: str, raw: bytes) -> PassedOn:
        """Return the call in the body *raw*; raise MalformedJson, MissingModelField, ..."""
        try:
            fields = msgspec.json.decode(raw, type=RoutingFields)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            decode_object(raw)  # says what is wrong in our words
            raise
        stream = fields.stream
        if stream is not None and not isinstance(stream, bool):
            raise InvalidRequest("stream must be true, false or null", param="stream")
        return cls(path, model_of({"model": fields.model}), bool(stream), raw)

    def body(self, node_id: str) -> bytes:
        """Return the body as it came, with the node's name of the model in it."""
        if node_id == self.model:
            return self.raw
        return msgspec.json.encode({**decode_object(self.raw), "model": node_id})

    def answer(self, node_id: str, body: bytes) -> bytes:
        """Return *body*, with the client's name of the model in it."""
        renaming = Renaming(node_id, self.model)
        return renaming.answer(body) if renaming.is_needed else body

    async def translation(self, node_id: str, ask: AskNode) -> Translation:
        """Return what passes bytes on, or events with the client's name of the model in them."""
        del ask
        renaming = Renaming(node_id, self.model)
        return RenamedStream(renaming) if renaming.is_needed else Verbatim()


class Verbatim:
    """Passes bytes on."""

    def feed(self, chunk: bytes) -> bytes:
        """Return *chunk*."""
        return chunk
