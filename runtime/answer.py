"""One answer in the making: token records in, pieces out; it knows how the sequence ended.

    records ─► detokenizer ─► stop strings ─► reader ─► pieces

Tokens are taken one by one, so an answer, its usage and its log probabilities are the same however
the tokens arrive in batches. Tokens behind a stop string, or behind the only call that was asked
for, do not count: how many there are is a matter of timing. An echo of the prompt comes first, and
is looked at by nobody.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Protocol

from cortex.ipc.errors import NodeFailed
from cortex.ipc.openai_answers import CONTEXT_FULL, FinishReason
from cortex.ipc.ring import Flag, TokenRecord
from cortex.ipc.tools import FunctionCall, ToolCall
from cortex.runtime.logprobs import Logprobs, Scored
from cortex.runtime.pieces import (
    CallArguments,
    CallBegins,
    CallMalformed,
    Piece,
    Reader,
    Reasoning,
    Text,
)

TOKEN, TOP, PROMPT, SCORE = int(Flag.TOKEN), int(Flag.TOP), int(Flag.PROMPT), int(Flag.SCORE)
STOP, LENGTH, CANCELLED = int(Flag.STOP), int(Flag.LENGTH), int(Flag.CANCELLED)
FINISH = int(Flag.FINISH)
"""As plain numbers: one ``&`` of an IntFlag takes longer than to make a token text."""


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


@dataclass(frozen=True, slots=True)
class Reading:
    """How the tokens of an answer are read."""

    detokenizer: TokensToText
    stops: TextUntilStop
    reader: Reader
    logprobs: Logprobs | None = None
    named_stops: Collection[int] = ()
    """Tokens that the client named as ends."""
    is_one_call: bool = False
    """Whether the answer ends where a second call would begin."""
    is_calls_only: bool = False
    """Whether calls are demanded: what an answer that is cut leaves of a marker is no text then."""
    echo: str = ""
    """The prompt, where the answer begins with it."""
    is_room_the_limit: bool = False
    """Whether the context ends before what the request allows."""


class Answer:
    """The pieces of one sequence; ``finish_reason`` is None while it runs."""

    def __init__(self, reading: Reading) -> None:
        self.completion_tokens = 0
        self.cached_tokens = 0
        """Tokens of the prompt that the device did not have to compute."""
        self.reasoning_tokens = 0
        """Tokens that became reasoning; one that became nothing yet counts with what follows."""
        self.calls = 0
        self.finish_reason: FinishReason | None = None
        self.stop_reason: str | int | None = None
        self._is_cut_in_call = False
        self._reading = reading
        self._shown_characters = 0
        self._unread_tokens = 0

    def add(self, records: list[TokenRecord]) -> list[Piece]:
        """Return the pieces that *records* finish, those of one kind joined.

        Raise NodeFailed where somebody else cancelled.
        """
        if len(records) == 1:
            return self._add(records[0])
        pieces: list[Piece] = []
        for record in records:
            for piece in self._add(record):
                _append(pieces, piece)
            if self.finish_reason is not None:
                break
        return pieces

    def take_logprobs(self) -> list[Scored]:
        """Return the log probabilities that have not been taken, of text that may be shown."""
        return self._reading.logprobs.take() if self._reading.logprobs else []

    def _add(self, record: TokenRecord) -> list[Piece]:
        flags, reading = record.flags, self._reading
        if not flags & (TOKEN | FINISH):
            return self._note(record)
        text = self._text_of(record) if flags & TOKEN else ""
        if flags & (STOP | LENGTH):
            rest = reading.detokenizer.flush()
            if reading.logprobs:
                reading.logprobs.text(rest)
            text += rest
        pieces = self._read(text)
        if flags & FINISH and self.finish_reason is None:
            pieces += self._finish(record)
        return self._noted(pieces, flags)

    def _note(self, record: TokenRecord) -> list[Piece]:
        """Remember what a record says that is no token of the answer; return the echo, at last."""
        logprobs = self._reading.logprobs
        if record.flags & PROMPT:
            self.cached_tokens = record.token_id
            if logprobs:
                logprobs.prompt()
            return [Text(self._reading.echo)] if self._reading.echo else []
        if logprobs and record.flags & TOP:
            logprobs.top(record)
        elif logprobs and record.flags & SCORE:
            logprobs.prompt_token(record)
        return []

    def _text_of(self, record: TokenRecord) -> str:
        """Return the text that a token makes final; the one that ends a sequence has none."""
        self.completion_tokens += 1
        if record.flags & STOP:
            return ""
        text = self._reading.detokenizer.add([record.token_id])
        if self._reading.logprobs:
            self._reading.logprobs.token(record, text)
        return text

    def _read(self, text: str) -> list[Piece]:
        """Return the pieces of *text* that lie before a stop string."""
        if not text:
            return []
        text, is_stopped = self._reading.stops.add(text)
        self._shown_characters += len(text)
        if is_stopped:
            self.stop_reason = self._reading.stops.hit
            if self._reading.logprobs:
                self._reading.logprobs.cut(self._shown_characters)
            return self._last(text, "stop", has_ended=False)
        if self._reading.logprobs:
            self._reading.logprobs.shown(self._shown_characters)
        return self._reading.reader.add(text) if text else []

    def _finish(self, record: TokenRecord) -> list[Piece]:
        """Return what was held back, now that no token follows."""
        if record.flags & CANCELLED:
            raise NodeFailed("the generation was cancelled by the node")
        if self._reading.logprobs:
            self._reading.logprobs.end()
        if record.flags & STOP and record.token_id in self._reading.named_stops:
            self.stop_reason = record.token_id
        text = self._reading.stops.flush()
        if record.flags & LENGTH:
            if self._reading.is_room_the_limit:
                self.stop_reason = CONTEXT_FULL
            return self._last(text, "length", has_ended=False)
        return self._last(text, "stop", has_ended=True)

    def _last(self, text: str, reason: FinishReason, *, has_ended: bool) -> list[Piece]:
        """Return the last pieces; *has_ended* says that the model came to an end by itself."""
        self.finish_reason = reason
        pieces = self._reading.reader.add(text)
        rest = self._reading.reader.flush(ended=has_ended)
        self._is_cut_in_call = self._reading.reader.is_in_call
        if self._reading.is_calls_only and not has_ended:
            rest = [piece for piece in rest if not isinstance(piece, Text)]
        return pieces + rest

    def _noted(self, pieces: list[Piece], flags: int) -> list[Piece]:
        """Count the calls and the reasoning; return *pieces* up to a call that is not wanted."""
        kept = pieces
        for at, piece in enumerate(pieces):
            if isinstance(piece, CallBegins):
                if self._reading.is_one_call and self.calls == 1:
                    kept, self.finish_reason = pieces[:at], "stop"
                    self._is_cut_in_call = False
                    break
                self.calls += 1
            elif isinstance(piece, CallMalformed):
                self.calls -= 1
        self._unread_tokens += flags & TOKEN
        if pieces:
            if isinstance(pieces[-1], Reasoning):
                self.reasoning_tokens += self._unread_tokens
            self._unread_tokens = 0
        if self.finish_reason == "stop" and self.calls and not self._is_cut_in_call:
            self.finish_reason = "tool_calls"
        return kept


class Said:
    """All that one answer has said; ``logprobs`` are None where nobody asked for them."""

    def __init__(self, *, is_scored: bool) -> None:
        self.logprobs: list[Scored] | None = [] if is_scored else None
        self._texts: list[str] = []
        self._reasoning: list[str] = []
        self._calls: dict[int, tuple[CallBegins, list[str]]] = {}

    def add(self, pieces: list[Piece], logprobs: list[Scored]) -> None:
        """Take what comes next; a call that is none becomes text."""
        if self.logprobs is not None:
            self.logprobs += logprobs
        for piece in pieces:
            match piece:
                case Text(text):
                    self._texts.append(text)
                case Reasoning(text):
                    self._reasoning.append(text)
                case CallBegins(index):
                    self._calls[index] = (piece, [])
                case CallArguments(index, text):
                    self._calls[index][1].append(text)
                case CallMalformed(index, block):
                    del self._calls[index]
                    self._texts.append(block)

    @property
    def text(self) -> str:
        """The words to the user."""
        return "".join(self._texts)

    @property
    def reasoning(self) -> str:
        """The words of the model to itself."""
        return "".join(self._reasoning)

    @property
    def calls(self) -> list[ToolCall]:
        """The calls, in order."""
        return [
            ToolCall(call.id, FunctionCall(call.name, "".join(arguments)))
            for call, arguments in self._calls.values()
        ]


def _append(pieces: list[Piece], piece: Piece) -> None:
    """Append *piece*, joining it to one of its kind."""
    last = pieces[-1] if pieces else None
    match last, piece:
        case (Text(before), Text(text)):
            pieces[-1] = Text(before + text)
        case (Reasoning(before), Reasoning(text)):
            pieces[-1] = Reasoning(before + text)
        case (CallArguments(index, before), CallArguments(same, text)) if index == same:
            pieces[-1] = CallArguments(index, before + text)
        case _:
            pieces.append(piece)
