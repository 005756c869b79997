"""One answer in the making: its text, its objects, and what is measured of it."""

from __future__ import annotations

from collections.abc import Callable

from cortex.ipc.errors import NodeFailed
from cortex.ipc.openai import ChatCompletionRequest, CompletionRequest, FinishReason, Usage
from cortex.ipc.ring import TokenRecord
from cortex.runtime.completions import Answer, Answers, ChatAnswers, TextAnswers, usage_of
from cortex.runtime.request_record import RequestRecord
from cortex.runtime.traffic import TokensHeld, Traffic

Asked = ChatCompletionRequest | CompletionRequest


class Turn:
    """One answer in the making: its text, its objects, and what is measured of it."""

    def __init__(
        self,
        asked: Asked,
        answer: Answer,
        traffic: Traffic,
        record: RequestRecord,
        clock: Callable[[], float],
    ) -> None:
        kind = ChatAnswers if isinstance(asked, ChatCompletionRequest) else TextAnswers
        self.asked = asked
        self.answer = answer
        self.answers: Answers = kind(asked.model, nullable=asked.wants_usage_chunk)
        self.record = record
        self.traffic = traffic
        self._clock = clock
        self._submitted = clock()
        self._first_token = 0.0

    @property
    def usage(self) -> Usage:
        """Tokens so far."""
        return usage_of(self.record.prompt_tokens, self.answer.completion_tokens)

    def add(self, records: list[TokenRecord], held: TokensHeld) -> str:
        """Return the text that *records* finish; measure what they say."""
        text = self.answer.add(records)
        held.add(self.answer.completion_tokens - self.record.completion_tokens)
        self.record.completion_tokens = self.answer.completion_tokens
        self.record.finish_reason = self.answer.finish_reason
        self._measure(self._clock())
        return text

    def reason(self) -> FinishReason:
        """Return why it ended; raise NodeFailed where its tokens just stopped."""
        if self.answer.finish_reason is None:
            raise NodeFailed("the generation ended without a finish")
        return self.answer.finish_reason

    def _measure(self, now: float) -> None:
        if self.record.first_token_seconds is None:
            self._first_token = now
            self.record.first_token_seconds = now - self.record.arrived
            self.traffic.rates.prefilled(self.record.prompt_tokens, now - self._submitted)
        elif self.answer.finish_reason is not None:
            tokens = self.answer.completion_tokens - 1
            self.traffic.rates.decoded(tokens, now - self._first_token)
