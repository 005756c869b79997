"""The answers to one request in the making: their objects, and what is measured of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import msgspec

from cortex.ipc.errors import GrammarFailed, NodeFailed
from cortex.ipc.openai import ChatCompletionRequest, CompletionRequest
from cortex.ipc.openai_answers import Usage
from cortex.ipc.ring import TokenRecord
from cortex.runtime.answer import TOP, Answer, Reading, Said
from cortex.runtime.completions import (
    Answers,
    ChatAnswers,
    Chunk,
    Ended,
    TextAnswers,
    usage_of,
)
from cortex.runtime.conversation import ChatPrompt
from cortex.runtime.detokenizer import StopStrings
from cortex.runtime.logprobs import Logprobs, Scored
from cortex.runtime.node import TextView
from cortex.runtime.pieces import Piece
from cortex.runtime.request_record import RequestRecord
from cortex.runtime.sampling import limit_of
from cortex.runtime.traffic import Traffic

Asked = ChatCompletionRequest | CompletionRequest


class Turn:
    """The answers to one request, in one dialect; either gathered or given out in chunks."""

    def __init__(
        self,
        asked: Asked,
        answers: Sequence[Answer],
        traffic: Traffic,
        record: RequestRecord,
        clock: Callable[[], float],
        *,
        reasons: bool,
        grammar_place: str | None = None,
    ) -> None:
        kind = ChatAnswers if isinstance(asked, ChatCompletionRequest) else TextAnswers
        self.asked = asked
        self.answers = answers
        self.objects: Answers = kind(asked.model, nullable=asked.wants_usage_chunk)
        self.record = record
        self.traffic = traffic
        self.running = len(answers)
        """Answers that have not ended."""
        self._reasons = reasons
        self._grammar_place = grammar_place
        self._clock = clock
        self._submitted = clock()
        self._first_token: list[float | None] = [None] * len(answers)
        self._is_scored = asked.wanted_logprobs is not None
        self._said = [Said(is_scored=self._is_scored) for _ in answers]

    @property
    def usage(self) -> Usage:
        """Tokens so far; of reasoning only where the model may reason."""
        reasoning = self.record.reasoning_tokens if self._reasons else None
        record = self.record
        return usage_of(
            record.prompt_tokens, record.cached_tokens, record.completion_tokens, reasoning
        )

    @contextlib.contextmanager
    def naming_grammar(self) -> Iterator[None]:
        """Name the place in the request where its grammar turns out to lead nowhere."""
        try:
            yield
        except GrammarFailed as exc:
            exc.param = self._grammar_place
            raise

    def is_over(self, index: int) -> bool:
        """Whether the answer *index* has ended."""
        return self.answers[index].finish_reason is not None

    def gather(self, index: int, records: list[TokenRecord]) -> None:
        """Take a batch of an answer that will be given whole; nothing where it has ended."""
        if not self.is_over(index):
            pieces = self._add(index, records)
            self._said[index].add(pieces, self.answers[index].take_logprobs())

    def whole(self) -> msgspec.Struct:
        """Return the answer that does not stream; raise NodeFailed where it is not whole."""
        self.refuse_unfinished()
        ended = [
            (said, _ended(answer)) for said, answer in zip(self._said, self.answers, strict=True)
        ]
        return self.objects.whole(ended, self.usage)

    def chunks(self, index: int, records: list[TokenRecord]) -> Iterator[Chunk]:
        """Yield what a batch adds to an answer, and its end; nothing where it has ended.

        Raise MalformedToolCall where what was given out would have to be taken back.
        """
        answer = self.answers[index]
        for part in _tokens(records) if self._is_scored else (records,):
            if answer.finish_reason is not None:
                return
            for piece in self._add(index, part):
                yield self.objects.piece(index, piece, self._scored(index))
            if answer.finish_reason is not None:
                yield self.objects.ending(index, _ended(answer), self._scored(index))

    def refuse_unfinished(self) -> None:
        """Raise NodeFailed where the tokens of an answer just stopped."""
        if self.running:
            raise NodeFailed("the generation ended without a finish")

    def _add(self, index: int, records: list[TokenRecord]) -> list[Piece]:
        """Return the pieces that *records* finish; measure what they say."""
        answer, record = self.answers[index], self.record
        tokens, reasoning, calls = answer.completion_tokens, answer.reasoning_tokens, answer.calls
        cached = answer.cached_tokens
        pieces = answer.add(records)
        record.completion_tokens += answer.completion_tokens - tokens
        record.reasoning_tokens += answer.reasoning_tokens - reasoning
        record.tool_calls += answer.calls - calls
        if index % (self.asked.n or 1) == 0:  # the first of its prompt
            record.cached_tokens += answer.cached_tokens - cached
        if self._first_token[index] is None or answer.finish_reason is not None:
            self._measure(index, self._clock())
        return pieces

    def _scored(self, index: int) -> list[Scored] | None:
        """Return the log probabilities that the next chunk carries; they are of text so far."""
        return self.answers[index].take_logprobs() if self._is_scored else None

    def _measure(self, index: int, now: float) -> None:
        """Note when the first token came and how the answer ended; neither may have happened."""
        answer, first = self.answers[index], self._first_token[index]
        if not answer.completion_tokens and answer.finish_reason is None:
            return
        if self.record.first_token_seconds is None:
            self.record.first_token_seconds = now - self.record.arrived
            computed = self.record.prompt_tokens - self.record.cached_tokens
            self.traffic.rates.prefilled(computed, now - self._submitted)
        if first is None:
            self._first_token[index] = first = now
        if answer.finish_reason is not None:
            self.running -= 1
            self.traffic.rates.decoded(answer.completion_tokens - 1, now - first)
            if index == 0:
                self.record.finish_reason = answer.finish_reason


def answers_of(asked: Asked, text: TextView, prompt: ChatPrompt, room_tokens: int) -> list[Answer]:
    """Return the answers to one *prompt*, to be read as it says, each of at most *room_tokens*."""
    limit = limit_of(asked)
    is_room_the_limit = limit is None or limit > room_tokens
    return [
        Answer(_reading(asked, text, prompt, is_room_the_limit=is_room_the_limit))
        for _ in range(asked.n or 1)
    ]


def _reading(
    asked: Asked, text: TextView, prompt: ChatPrompt, *, is_room_the_limit: bool
) -> Reading:
    echo = prompt.echo
    return Reading(
        text.detokenizer(prompt.shown_ids),
        StopStrings(asked.stop_strings),
        prompt.reader(),
        None if asked.wanted_logprobs is None else Logprobs(text.token_bytes, echo),
        named_stops=frozenset(asked.stop_token_ids or ()),
        is_one_call=isinstance(asked, ChatCompletionRequest) and asked.parallel_tool_calls is False,
        is_calls_only=isinstance(asked, ChatCompletionRequest) and asked.demands_call,
        echo=echo.text if echo else "",
        is_room_the_limit=is_room_the_limit,
    )


def _ended(answer: Answer) -> Ended:
    assert answer.finish_reason is not None, "it has ended"
    return Ended(answer.finish_reason, answer.stop_reason)


def _tokens(records: list[TokenRecord]) -> Iterator[list[TokenRecord]]:
    """Cut a batch into parts of one token each, with what is said of it before it.

    The last part may have no token: a full ring cuts anywhere.
    """
    part: list[TokenRecord] = []
    for record in records:
        part.append(record)
        if not record.flags & TOP:
            yield part
            part = []
    if part:
        yield part
