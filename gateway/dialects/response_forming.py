"""The items of a response while they form: each tells its beginning, what is added, its end.

    reasoning   content_part.added, reasoning_text.delta ..., reasoning_text.done,
                content_part.done; the same as a summary where the client asks for one
    message     content_part.added, output_text.delta ..., output_text.done, content_part.done
    call        function_call_arguments.delta ..., function_call_arguments.done

Every item stands between output_item.added and output_item.done, which ``response_events.py`` says.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

from cortex.gateway.dialects.response_objects import Item, Outline, output_text

Told = Iterator[tuple[str, dict[str, Any]]]
"""Events: their types and their fields."""
Tokens = list[dict[str, Any]]
"""Log probabilities, as Responses has them."""


class Forming(ABC):
    """The item *index* of the response, with no text yet."""

    def __init__(self, outline: Outline, index: int) -> None:
        self.index = index
        self._outline = outline
        self._said: list[str] = []
        item_id: str = self.item("in_progress")["id"]
        self._at = {"item_id": item_id, "output_index": index}

    @property
    def text(self) -> str:
        """All that has been added."""
        return "".join(self._said)

    @abstractmethod
    def item(self, status: str) -> Item:
        """Return the item as far as it has come."""

    @abstractmethod
    def begin(self) -> Told:
        """Yield what comes before the first delta."""

    @abstractmethod
    def delta(self, text: str, tokens: Tokens) -> Told:
        """Yield what tells of more *text*."""

    @abstractmethod
    def end(self) -> Told:
        """Yield what comes after the last delta."""

    def add(self, text: str, tokens: Tokens) -> Told:
        """Take more *text*, and the *tokens* it was made of where they are asked for."""
        self._said.append(text)
        return self.delta(text, tokens)


class FormingReasoning(Forming):
    """Words of the model to itself."""

    def item(self, status: str) -> Item:
        """Return the item as far as it has come."""
        return self._outline.reasoning(self.index, self.text if self._said else None, status)

    def begin(self) -> Told:
        """Yield the empty part, and the empty summary."""
        yield "response.content_part.added", {**self._content, "part": _reasoning_text("")}
        if self._outline.wants_summary:
            part = {"part": _summary_text("")}
            yield "response.reasoning_summary_part.added", {**self._summary, **part}

    def delta(self, text: str, tokens: Tokens) -> Told:
        """Yield the delta, and that of the summary."""
        del tokens
        yield "response.reasoning_text.delta", {**self._content, "delta": text}
        if self._outline.wants_summary:
            yield "response.reasoning_summary_text.delta", {**self._summary, "delta": text}

    def end(self) -> Told:
        """Yield the whole text, and the whole summary."""
        text = self.text
        yield "response.reasoning_text.done", {**self._content, "text": text}
        yield "response.content_part.done", {**self._content, "part": _reasoning_text(text)}
        if self._outline.wants_summary:
            yield "response.reasoning_summary_text.done", {**self._summary, "text": text}
            part = {"part": _summary_text(text)}
            yield "response.reasoning_summary_part.done", {**self._summary, **part}

    @property
    def _content(self) -> dict[str, Any]:
        return {**self._at, "content_index": 0}

    @property
    def _summary(self) -> dict[str, Any]:
        return {**self._at, "summary_index": 0}


class FormingMessage(Forming):
    """Words to the user."""

    def __init__(self, outline: Outline, index: int) -> None:
        self._tokens: Tokens = []
        super().__init__(outline, index)
        self._at["content_index"] = 0

    def item(self, status: str) -> Item:
        """Return the item as far as it has come."""
        content = [output_text(self.text, self._tokens)] if self._said else []
        return self._outline.message(self.index, content, status)

    def begin(self) -> Told:
        """Yield the empty part."""
        yield "response.content_part.added", {**self._at, "part": output_text("", [])}

    def delta(self, text: str, tokens: Tokens) -> Told:
        """Yield the delta."""
        self._tokens.extend(tokens)
        yield "response.output_text.delta", {**self._at, "delta": text, "logprobs": tokens}

    def end(self) -> Told:
        """Yield the whole text."""
        text, tokens = self.text, self._tokens
        yield "response.output_text.done", {**self._at, "text": text, "logprobs": tokens}
        yield "response.content_part.done", {**self._at, "part": output_text(text, tokens)}


class FormingCall(Forming):
    """A call of a function; the node's chunks know it by *number*."""

    def __init__(
        self, outline: Outline, index: int, *, number: int, call_id: str, name: str
    ) -> None:
        self.number = number
        self._call_id, self._name = call_id, name
        super().__init__(outline, index)

    def item(self, status: str) -> Item:
        """Return the item as far as it has come."""
        return self._outline.call(self.index, self._call_id, self._name, self.text, status)

    def begin(self) -> Told:
        """Yield nothing: a call has no parts."""
        yield from ()

    def delta(self, text: str, tokens: Tokens) -> Told:
        """Yield the next characters of the arguments."""
        del tokens
        yield "response.function_call_arguments.delta", {**self._at, "delta": text}

    def end(self) -> Told:
        """Yield the whole arguments."""
        yield "response.function_call_arguments.done", {**self._at, "arguments": self.text}


def _reasoning_text(text: str) -> dict[str, Any]:
    return {"type": "reasoning_text", "text": text}


def _summary_text(text: str) -> dict[str, Any]:
    return {"type": "summary_text", "text": text}
