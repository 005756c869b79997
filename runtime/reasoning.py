"""Reasoning: how much of it is wished for, and which part of an answer it is.

One rule for all dialects. Whether to think: the first line that says so decides.

    said                                               thinking   effort     at most
    chat_template_kwargs: enable_thinking, thinking    as said    -          -
    thinking {type: disabled}                          off        -          -
    thinking {type: enabled, budget_tokens: n}         on         -          n tokens
    thinking {type: adaptive}                          -          -          -
    reasoning_effort none                              off        -          -
    reasoning_effort minimal ... max                   on         the word   by the word
    nothing of this                                    the template decides

The template is told by its own switch (``SWITCHES``) and its own word for the effort, the nearest
that it knows. Where it has no word, the effort is a budget (``EFFORT_BUDGETS``), unless a budget is
given; where it has no switch, off is a budget of nothing: the block is closed as soon as it opens.
What ``chat_template_kwargs`` says goes to the template as it is.

A wish for reasoning gives leave to think; a model that does not reason makes no use of it, so the
wish is kept (clients send an effort to every model). A wish against it is an order.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from cortex.ipc.openai import Thinking
from cortex.runtime.conversation import ReasoningWish
from cortex.runtime.held_text import could_begin
from cortex.runtime.pieces import Piece, Reader, Reasoning

EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
"""From least to most."""

EFFORT_BUDGETS = {"minimal": 512, "low": 1024, "medium": 4096}
"""Tokens, for templates that have no word for an effort; above medium there is no bound."""

SWITCHES = ("enable_thinking", "thinking")
"""The variables by which published templates switch reasoning on and off."""


def wish_of(effort: str | None, thinking: Thinking | None) -> ReasoningWish:
    """Return what a request wishes, by the table above."""
    word = None if effort in {None, "none"} else effort
    budget_tokens = thinking.budget_tokens if thinking else None
    if thinking is not None and thinking.type != "adaptive":
        is_enabled: bool | None = thinking.type == "enabled"
    else:
        is_enabled = None if effort is None else effort != "none"
    return ReasoningWish(is_enabled, word, budget_tokens)


def settled(wish: ReasoningWish, template_kwargs: Mapping[str, Any]) -> ReasoningWish:
    """Return *wish* where the template's own arguments do not say otherwise."""
    for switch in SWITCHES:
        if isinstance(said := template_kwargs.get(switch), bool):
            return replace(wish, is_enabled=said)
    return wish


def nearest_word(effort: str, words: Collection[str]) -> str:
    """Return that of *words*, efforts all, which is nearest to *effort*; of two the greater."""
    place = EFFORTS.index(effort)
    return min(words, key=lambda word: (abs(EFFORTS.index(word) - place), -EFFORTS.index(word)))


@dataclass(frozen=True, slots=True)
class ReasoningFormat:
    """What a model writes around its reasoning."""

    begin: str
    end: str

    def is_open_after(self, prompt: str) -> bool:
        """Whether the prompt has begun the block, so that the answer begins inside of it."""
        return prompt.rstrip().endswith(self.begin)

    def is_open_in(self, answer: str) -> bool:
        """Whether an *answer* that has begun is inside of the block."""
        return answer.rfind(self.begin) > answer.rfind(self.end)

    def is_over_after(self, prompt: str) -> bool:
        """Whether the prompt has ended the block before the answer begins."""
        return prompt.rstrip().endswith(self.end)


FORMATS = {
    "think": ReasoningFormat("<think>", "</think>"),
    "mistral": ReasoningFormat("[THINK]", "[/THINK]"),
    "reasoning": ReasoningFormat("<reasoning>", "</reasoning>"),
    "thought": ReasoningFormat("<thought>", "</thought>"),
    "seed": ReasoningFormat("<seed:think>", "</seed:think>"),
}


def format_of(template: str, parser: str) -> ReasoningFormat | None:
    """Return the format named *parser*, or by ``auto`` the first that *template* writes."""
    if parser != "auto":
        return FORMATS.get(parser)
    written = (f for f in FORMATS.values() if f.begin in template and f.end in template)
    return next(written, None)


class ReasoningReader:
    """Parts the reasoning at the beginning of an answer from the rest, which *rest* reads.

    Newlines at the ends of the block and behind it belong to the format. What is inside is
    reasoning, also where it looks like a call; a block further down is text, for whoever writes
    about such blocks.
    """

    def __init__(self, form: ReasoningFormat, rest: Reader, *, is_open: bool) -> None:
        self._form = form
        self._rest = rest
        self._held = ""
        self._state = self._inside if is_open else self._before
        self._has_reasoned = False

    @property
    def is_in_call(self) -> bool:
        """What stands behind the reasoning knows."""
        return self._rest.is_in_call

    def add(self, text: str) -> list[Piece]:
        """Return the pieces that became final with *text*."""
        self._held += text
        return self._state()

    def flush(self, *, ended: bool = False) -> list[Piece]:
        """Return what was held back: a block that was never closed is reasoning."""
        held, self._held = self._held, ""
        if self._state == self._inside:
            return self._reasoning(held.rstrip("\n"))
        said = self._rest.add(held) if held else []
        return said + self._rest.flush(ended=ended)

    def _before(self) -> list[Piece]:
        text = self._held.lstrip()
        if text.startswith(self._form.begin):
            self._held = text.removeprefix(self._form.begin)
            self._state = self._inside
            return self._state()
        if self._form.begin.startswith(text):
            return []
        self._state = self._after
        return self._state()

    def _inside(self) -> list[Piece]:
        if not self._has_reasoned:
            self._held = self._held.lstrip("\n")
        block, end, rest = self._held.partition(self._form.end)
        if end:
            self._held, self._state = rest, self._behind
            return self._reasoning(block.rstrip("\n")) + self._state()
        sent = block[: len(block) - could_begin(block, [self._form.end])].rstrip("\n")
        self._held = block[len(sent) :]
        return self._reasoning(sent)

    def _behind(self) -> list[Piece]:
        self._held = self._held.lstrip("\n")
        if not self._held:
            return []
        self._state = self._after
        return self._state()

    def _after(self) -> list[Piece]:
        text, self._held = self._held, ""
        return self._rest.add(text)

    def _reasoning(self, text: str) -> list[Piece]:
        if not text:
            return []
        self._has_reasoned = True
        return [Reasoning(text)]
