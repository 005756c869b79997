"""What answers have said, as the objects of OpenAI's dialect.

ChatAnswers      chat.completion and chat.completion.chunk
TextAnswers      text_completion, whole and in part
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import msgspec
from msgspec import UNSET

from cortex.ipc.errors import MalformedToolCall
from cortex.ipc.openai_answers import (
    AnswerMessage,
    ChatCompletion,
    ChatCompletionChunk,
    ChatLogprobs,
    Choice,
    ChunkChoice,
    Completion,
    CompletionTokensDetails,
    Delta,
    FinishReason,
    FunctionDelta,
    PromptTokensDetails,
    StopReason,
    TextChoice,
    TextLogprobs,
    ToolCallDelta,
    Usage,
)
from cortex.runtime.answer import Said
from cortex.runtime.logprobs import Scored
from cortex.runtime.pieces import (
    CallArguments,
    CallBegins,
    CallMalformed,
    Piece,
    Reasoning,
    Text,
)

Logged = Sequence[Scored] | None
"""Log probabilities that go with a chunk; None where nobody asked for any."""

Chunk = msgspec.Struct | msgspec.Raw
"""What a stream sends as one event: an object, or its JSON."""


class Ended(NamedTuple):
    """How one answer ended."""

    finish_reason: FinishReason
    stop_reason: str | int | None


def usage_of(
    prompt_tokens: int, cached_tokens: int, completion_tokens: int, reasoning_tokens: int | None
) -> Usage:
    """Return the tokens of one request; *cached_tokens* of the prompt were in the prefix cache.

    Of several choices the first one's count, as the prompt does once: it is the first one that may
    have had to compute it. *reasoning_tokens* are None for a model that does not reason.
    """
    return Usage(
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        total_tokens=prompt_tokens + completion_tokens,
        prompt_tokens_details=PromptTokensDetails(cached_tokens),
        completion_tokens_details=(
            None if reasoning_tokens is None else CompletionTokensDetails(reasoning_tokens)
        ),
    )


class Answers(Protocol):
    """One dialect's objects for the choices of one request."""

    def opening(self, index: int, /) -> msgspec.Struct:
        """Return the first chunk of a choice, which is sent before anything is computed."""

    def piece(self, index: int, piece: Piece, logprobs: Logged, /) -> Chunk:
        """Return the chunk that adds *piece*; raise MalformedToolCall where it takes back."""

    def ending(self, index: int, ended: Ended, logprobs: Logged, /) -> msgspec.Struct:
        """Return the chunk that says why a choice ended."""

    def usage(self, usage: Usage, /) -> msgspec.Struct:
        """Return the chunk that carries the usage and no choice."""

    def whole(self, choices: Sequence[tuple[Said, Ended]], usage: Usage, /) -> msgspec.Struct:
        """Return the answer that does not stream."""


def _now() -> int:
    return int(time.time())


class Envelope:
    """The JSON of *chunk*, all of it but the text that goes in its empty *field*."""

    def __init__(self, chunk: msgspec.Struct, field: str) -> None:
        empty = f'"{field}":""'.encode()  # as it can stand nowhere else: a text has no plain quotes
        head, found, self._tail = msgspec.json.encode(chunk).partition(empty)
        assert found, f"the chunk has an empty {field}"
        self._head = head + empty[:-2]

    def around(self, text: str) -> msgspec.Raw:
        """Return the chunk with *text*."""
        return msgspec.Raw(self._head + msgspec.json.encode(text) + self._tail)


@dataclass(frozen=True, slots=True)
class ChatAnswers:
    """The objects of one chat completion; *nullable* chunks say ``"usage": null``, as OpenAI's."""

    model: str
    nullable: bool = False
    id: str = field(default_factory=lambda: f"chatcmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=_now)
    _envelopes: dict[int, Envelope] = field(default_factory=dict)
    """Of the text of each choice: it is most of a stream, and little of each chunk."""

    def opening(self, index: int) -> ChatCompletionChunk:
        """Return the chunk with the role."""
        return self._chunk(ChunkChoice(Delta(role="assistant", content=""), index=index))

    def piece(self, index: int, piece: Piece, logprobs: Logged) -> Chunk:
        """Return a chunk with content, reasoning, or a part of a call."""
        if logprobs is None and isinstance(piece, Text):
            return self._envelope(index).around(piece.text)
        delta = _delta(piece)
        return self._chunk(ChunkChoice(delta, index=index, logprobs=_of_chat(logprobs)))

    def ending(self, index: int, ended: Ended, logprobs: Logged) -> ChatCompletionChunk:
        """Return the chunk with the finish reason."""
        return self._chunk(
            ChunkChoice(
                Delta(),
                ended.finish_reason,
                index,
                _of_chat(logprobs) if logprobs else None,
                _or_unset(ended.stop_reason),
            )
        )

    def usage(self, usage: Usage) -> ChatCompletionChunk:
        """Return the chunk with the usage."""
        return ChatCompletionChunk(self.id, self.created, self.model, [], usage=usage)

    def whole(self, choices: Sequence[tuple[Said, Ended]], usage: Usage) -> ChatCompletion:
        """Return the whole completion."""
        made = [
            Choice(
                _message(said),
                ended.finish_reason,
                index,
                _of_chat(said.logprobs),
                _or_unset(ended.stop_reason),
            )
            for index, (said, ended) in enumerate(choices)
        ]
        return ChatCompletion(self.id, self.created, self.model, made, usage)

    def _envelope(self, index: int) -> Envelope:
        if index not in self._envelopes:
            empty = self._chunk(ChunkChoice(Delta(content=""), index=index))
            self._envelopes[index] = Envelope(empty, "content")
        return self._envelopes[index]

    def _chunk(self, choice: ChunkChoice) -> ChatCompletionChunk:
        usage = None if self.nullable else UNSET
        return ChatCompletionChunk(self.id, self.created, self.model, [choice], usage=usage)


@dataclass(frozen=True, slots=True)
class TextAnswers:
    """The objects of one text completion, whose pieces are texts; the opening one is empty."""

    model: str
    nullable: bool = False
    id: str = field(default_factory=lambda: f"cmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=_now)
    _envelopes: dict[int, Envelope] = field(default_factory=dict)

    def opening(self, index: int) -> Completion:
        """Return the empty first chunk."""
        return self._chunk(TextChoice("", index=index))

    def piece(self, index: int, piece: Piece, logprobs: Logged) -> Chunk:
        """Return a chunk with text."""
        assert isinstance(piece, Text), "a text completion is read as it is"
        if logprobs is None:
            return self._envelope(index).around(piece.text)
        return self._chunk(TextChoice(piece.text, index=index, logprobs=_of_text(logprobs)))

    def ending(self, index: int, ended: Ended, logprobs: Logged) -> Completion:
        """Return the chunk with the finish reason."""
        said = _of_text(logprobs) if logprobs else None
        reason = _or_unset(ended.stop_reason)
        return self._chunk(TextChoice("", ended.finish_reason, index, said, reason))

    def usage(self, usage: Usage) -> Completion:
        """Return the chunk with the usage."""
        return Completion(self.id, self.created, self.model, [], usage=usage)

    def whole(self, choices: Sequence[tuple[Said, Ended]], usage: Usage) -> Completion:
        """Return the whole completion."""
        made = [
            TextChoice(
                said.text,
                ended.finish_reason,
                index,
                _of_text(said.logprobs),
                _or_unset(ended.stop_reason),
            )
            for index, (said, ended) in enumerate(choices)
        ]
        return Completion(self.id, self.created, self.model, made, usage=usage)

    def _envelope(self, index: int) -> Envelope:
        if index not in self._envelopes:
            self._envelopes[index] = Envelope(self._chunk(TextChoice("", index=index)), "text")
        return self._envelopes[index]

    def _chunk(self, choice: TextChoice) -> Completion:
        usage = None if self.nullable else UNSET
        return Completion(self.id, self.created, self.model, [choice], usage=usage)


def _delta(piece: Piece) -> Delta:
    match piece:
        case Text(text):
            return Delta(content=text)
        case Reasoning(text):
            return Delta(reasoning_content=text)
        case CallArguments(index, text):
            return Delta(tool_calls=[ToolCallDelta(index, FunctionDelta(text))])
        case CallBegins(index, call_id, name):
            call = ToolCallDelta(index, FunctionDelta("", name), call_id, "function")
            return Delta(tool_calls=[call])
        case CallMalformed():
            raise MalformedToolCall(
                "the model began a call of a tool and wrote no JSON object as its arguments"
            )


def _message(said: Said) -> AnswerMessage:
    """Return the turn; content is null where there is nothing but calls."""
    calls = said.calls
    return AnswerMessage(
        said.text or (None if calls else ""),
        reasoning_content=said.reasoning or UNSET,
        tool_calls=calls or UNSET,
    )


def _of_chat(logprobs: Logged) -> ChatLogprobs | None:
    return None if logprobs is None else ChatLogprobs([scored.token for scored in logprobs])


def _of_text(logprobs: Logged) -> TextLogprobs | None:
    if logprobs is None:
        return None
    return TextLogprobs(
        tokens=[_named(scored.token.bytes) for scored in logprobs],
        token_logprobs=[scored.token.logprob for scored in logprobs],
        top_logprobs=[_tops(scored) for scored in logprobs],
        text_offset=[scored.offset for scored in logprobs],
    )


def _tops(scored: Scored) -> dict[str, float] | None:
    """Return the likeliest tokens by name, the chosen one always among them; None for none."""
    token = scored.token
    if token.logprob is None and not token.top_logprobs:
        return None
    chosen = {} if token.logprob is None else {_named(token.bytes): token.logprob}
    likeliest: dict[str, float] = {}
    for top in token.top_logprobs:
        likeliest.setdefault(_named(top.bytes), top.logprob)  # of one name, the likeliest
    return likeliest | {name: p for name, p in chosen.items() if name not in likeliest}


def _named(token: list[int]) -> str:
    r"""Return a token as this dialect names it: ``bytes:\xf0\x9f`` where it is no whole text."""
    raw = bytes(token)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _or_unset(reason: str | int | None) -> StopReason:
    return UNSET if reason is None else reason
