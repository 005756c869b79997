"""Token records to answers: text as it finishes, and the OpenAI objects that carry it.

Answer           records in, text that may be sent out; knows how the sequence ended
ChatAnswers      chat.completion and chat.completion.chunk
TextAnswers      text_completion, whole and in part
"""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass, field
from typing import Protocol

import msgspec
from msgspec import UNSET, UnsetType

from cortex.ipc.errors import NodeFailed
from cortex.ipc.openai import (
    AnswerMessage,
    ChatCompletion,
    ChatCompletionChunk,
    Choice,
    ChunkChoice,
    Completion,
    Delta,
    FinishReason,
    PromptTokensDetails,
    TextChoice,
    Usage,
)
from cortex.ipc.ring import Flag, TokenRecord


class TokensToText(Protocol):
    """What we need of a detokeniser: finished UTF-8 only, the rest at the end."""

    def add(self, token_ids: list[int]) -> str:
        """Return the text that became final."""

    def flush(self) -> str:
        """Return what is left."""


class TextUntilStop(Protocol):
    """What we need of the stop strings: text that cannot be part of one any more."""

    hit: str | None
    """The one that was found."""

    def add(self, text: str) -> tuple[str, bool]:
        """Return text safe to send, and whether a stop string was hit."""

    def flush(self) -> str:
        """Return what was held back."""


class Answer:
    """The text of one sequence; ``finish_reason`` is None while it runs."""

    def __init__(self, detokenizer: TokensToText, stops: TextUntilStop) -> None:
        self.completion_tokens = 0
        self.finish_reason: FinishReason | None = None
        self.stop_string: str | None = None
        self._detokenizer = detokenizer
        self._stops = stops

    def add(self, records: list[TokenRecord]) -> str:
        """Return the text that *records* finish; raise NodeFailed where somebody else cancelled.

        Tokens behind a stop string do not count: how many there are is a matter of timing.
        """
        pieces: list[str] = []
        for record in records:
            pieces.append(self._add(record))
            if self.finish_reason is not None:
                break
        return "".join(pieces)

    def _add(self, record: TokenRecord) -> str:
        shown: list[int] = []
        if record.flags & Flag.TOKEN:
            self.completion_tokens += 1
            if not record.flags & Flag.STOP:
                shown = [record.token_id]
        text, is_stopped = self._stops.add(self._detokenizer.add(shown))
        if is_stopped:
            return self._stop(text)
        if record.flags & Flag.CANCELLED:
            raise NodeFailed("the generation was cancelled by the node")
        return text + self._finish(record.flags) if record.flags & Flag.FINISH else text

    def _finish(self, flags: int) -> str:
        """Return what was held back, now that no token follows."""
        text, is_stopped = self._stops.add(self._detokenizer.flush())
        if is_stopped:
            return self._stop(text)
        self.finish_reason = "length" if flags & Flag.LENGTH else "stop"
        return text + self._stops.flush()

    def _stop(self, text: str) -> str:
        self.finish_reason = "stop"
        self.stop_string = self._stops.hit
        return text


def usage_of(prompt_tokens: int, completion_tokens: int) -> Usage:
    """Return the tokens of one answer; this engine has no prefix cache, so none was cached."""
    return Usage(
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        total_tokens=prompt_tokens + completion_tokens,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=0),
    )


class Answers(Protocol):
    """One dialect's objects for one answer."""

    def opening(self) -> msgspec.Struct:
        """Return the first chunk, which is sent before anything is computed."""

    def piece(self, text: str) -> msgspec.Struct:
        """Return the chunk that adds *text*."""

    def ending(self, reason: FinishReason, stop_string: str | None, /) -> msgspec.Struct:
        """Return the chunk that says why it ended."""

    def usage(self, usage: Usage) -> msgspec.Struct:
        """Return the chunk that carries the usage and no choice."""

    def whole(
        self, text: str, reason: FinishReason, stop_string: str | None, usage: Usage, /
    ) -> msgspec.Struct:
        """Return the answer that does not stream."""


def _now() -> int:
    return int(time.time())


@dataclass(frozen=True, slots=True)
class ChatAnswers:
    """The objects of one chat completion; *nullable* chunks say ``"usage": null``, as OpenAI's."""

    model: str
    nullable: bool = False
    id: str = field(default_factory=lambda: f"chatcmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=_now)

    def opening(self) -> ChatCompletionChunk:
        """Return the chunk with the role."""
        return self._chunk(ChunkChoice(Delta(role="assistant", content="")))

    def piece(self, text: str) -> ChatCompletionChunk:
        """Return a chunk with content."""
        return self._chunk(ChunkChoice(Delta(content=text)))

    def ending(self, reason: FinishReason, stop_string: str | None) -> ChatCompletionChunk:
        """Return the chunk with the finish reason."""
        return self._chunk(
            ChunkChoice(Delta(), finish_reason=reason, stop_reason=_or_unset(stop_string))
        )

    def usage(self, usage: Usage) -> ChatCompletionChunk:
        """Return the chunk with the usage."""
        return ChatCompletionChunk(self.id, self.created, self.model, [], usage=usage)

    def whole(
        self, text: str, reason: FinishReason, stop_string: str | None, usage: Usage
    ) -> ChatCompletion:
        """Return the whole completion."""
        choice = Choice(AnswerMessage(text), reason, stop_reason=_or_unset(stop_string))
        return ChatCompletion(self.id, self.created, self.model, [choice], usage)

    def _chunk(self, choice: ChunkChoice) -> ChatCompletionChunk:
        usage = None if self.nullable else UNSET
        return ChatCompletionChunk(self.id, self.created, self.model, [choice], usage=usage)


@dataclass(frozen=True, slots=True)
class TextAnswers:
    """The objects of one text completion; the opening chunk is empty text."""

    model: str
    nullable: bool = False
    id: str = field(default_factory=lambda: f"cmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=_now)

    def opening(self) -> Completion:
        """Return the empty first chunk."""
        return self.piece("")

    def piece(self, text: str) -> Completion:
        """Return a chunk with text."""
        return self._chunk(TextChoice(text))

    def ending(self, reason: FinishReason, _stop_string: str | None) -> Completion:
        """Return the chunk with the finish reason; this dialect has no place for the string."""
        return self._chunk(TextChoice("", reason))

    def usage(self, usage: Usage) -> Completion:
        """Return the chunk with the usage."""
        return Completion(self.id, self.created, self.model, [], usage=usage)

    def whole(
        self, text: str, reason: FinishReason, _stop_string: str | None, usage: Usage
    ) -> Completion:
        """Return the whole completion."""
        choice = TextChoice(text, reason)
        return Completion(self.id, self.created, self.model, [choice], usage=usage)

    def _chunk(self, choice: TextChoice) -> Completion:
        usage = None if self.nullable else UNSET
        return Completion(self.id, self.created, self.model, [choice], usage=usage)


def _or_unset(text: str | None) -> str | UnsetType:
    return UNSET if text is None else text
