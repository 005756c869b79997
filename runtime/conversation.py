"""What a chat request says, and what a model's text side makes of it.

The HTTP side fills a ``Conversation``; ``text.TextSide.chat_prompt`` answers with a ``ChatPrompt``:
the tokens, and how the answer to them has to be read. So is the prompt of a text completion.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cortex.ipc.messages import ReasoningBudget
from cortex.ipc.openai import ChatMessage
from cortex.runtime.echo import Echo
from cortex.runtime.grammar_check import Part
from cortex.runtime.pieces import Reader
from cortex.runtime.structured import Demand
from cortex.runtime.tool_grammars import OfferedTool


@dataclass(frozen=True, slots=True)
class ReasoningWish:
    """How much the model should think; None leaves it to the template.

    One rule for all dialects fills it (``reasoning.py``).
    """

    is_enabled: bool | None = None
    effort: str | None = None
    """A word of ``reasoning.EFFORTS``, from ``minimal`` on."""
    budget_tokens: int | None = None
    """Tokens of reasoning after which its end is forced."""


@dataclass(frozen=True, slots=True)
class CallDemand:
    """What a request says of calls beyond offering tools; at first nothing."""

    tools: Sequence[OfferedTool] = ()
    """All that may be called; where one is named only that."""
    is_forced: bool = False
    is_many: bool = True

    @property
    def needs_grammar(self) -> bool:
        """Whether calls have to be what the request says."""
        return self.is_forced or any(tool.is_enforced for tool in self.tools)


@dataclass(frozen=True, slots=True)
class Conversation:
    """Everything of a request that becomes part of the prompt, or of its answer's grammar."""

    messages: Sequence[ChatMessage]
    tools: Sequence[Mapping[str, Any]] = ()
    """As OpenAI spells them: ``{"type": "function", "function": {"name": ...}}``."""
    reasoning: ReasoningWish = ReasoningWish()
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    add_generation_prompt: bool = True
    """Whether the prompt asks for an answer."""
    continues_last: bool = False
    """Whether the answer continues the last turn, which is the assistant's."""
    text_demand: Demand | None = None
    call_demand: CallDemand = CallDemand()


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """A rendered conversation, or the prompt of a text completion."""

    token_ids: list[int]
    reader: Callable[[], Reader]
    """Makes the reader of one answer; it knows whether the prompt opened a reasoning block."""
    shown_ids: frozenset[int] = frozenset()
    """Control tokens that the reader must see in the text although nobody else does."""
    end_ids: tuple[int, ...] = ()
    """Tokens that end the answer to this prompt, beside those that end every one."""
    echo: Echo | None = None
    """What the answer begins with."""
    reasoning_budget: ReasoningBudget | None = None
    grammar: str | None = None
    """Of the whole answer, as llguidance reads it; None where any answer will do."""
    grammar_parts: Sequence[Part] = ()
    """What has to be checked of it, which a text side does not; the last is the whole."""

    @property
    def grammar_place(self) -> str | None:
        """The place in the request that the grammar comes from."""
        return self.grammar_parts[-1].place if self.grammar_parts else None
