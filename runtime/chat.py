"""How one model chats: its template, and the formats of its calls and of its reasoning.

A load says how (``ChatOptions``), else the template's probe decides:

    tool_prompt   tools are
    auto          as template where that can be, else refused, in words that name hermes
    template      given to the template; a load whose template cannot express them is refused
    hermes        written as text into ordinary turns (``hermes_turns.py``)
    refuse        refused

Tools need three things of a template: it shows them, it shows calls and results, and it writes
calls in a format that we can read (``tool_formats.py``, or one that ``tool_parser`` names).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from cortex.ipc.errors import InvalidRequest, Unloadable, UnsupportedParameter
from cortex.ipc.messages import ReasoningBudget
from cortex.ipc.node_api import EMBEDDED_MODEL, LoadRequest, ReasoningParser, ToolParser, ToolPrompt
from cortex.runtime import hermes_turns
from cortex.runtime.answer_grammar import of_answer
from cortex.runtime.chat_messages import turns_of
from cortex.runtime.chat_template import ChatTemplate
from cortex.runtime.conversation import ChatPrompt, Conversation, ReasoningWish
from cortex.runtime.parameter_values import resolved
from cortex.runtime.pieces import PlainReader, Reader
from cortex.runtime.reasoning import (
    EFFORT_BUDGETS,
    ReasoningFormat,
    ReasoningReader,
    format_of,
    nearest_word,
    settled,
)
from cortex.runtime.tokenizer import Tokenizer
from cortex.runtime.tool_calls import ToolCallReader
from cortex.runtime.tool_formats import FORMATS, ToolFormat


@dataclass(frozen=True, slots=True)
class ChatOptions:
    """What the operator settled about a model's chats."""

    tool_prompt: ToolPrompt = "auto"
    tool_parser: ToolParser = "auto"
    reasoning_parser: ReasoningParser = "auto"

    @classmethod
    def of(cls, request: LoadRequest) -> ChatOptions:
        """Return what a load asks for; the embedded model's template knows no tools."""
        tool_prompt = request.tool_prompt
        if tool_prompt == "auto" and request.model_id == EMBEDDED_MODEL:
            tool_prompt = "hermes"
        return cls(tool_prompt, request.tool_parser, request.reasoning_parser)


@dataclass(frozen=True, slots=True)
class Begun:
    """How far an answer is where the prompt ends."""

    reasoning: ReasoningFormat | None = None
    """What is read at its beginning; None within a text."""
    to_come: ReasoningFormat | None = None
    """What the model may still write."""
    is_open: bool = False
    """Whether it is inside of the reasoning."""
    is_within: bool = False
    """Whether it has said something."""

    @classmethod
    def of(cls, form: ReasoningFormat | None, prompt: str, conversation: Conversation) -> Begun:
        """Return where the answer to *prompt*, which *conversation* became, begins."""
        said = _continued(conversation)
        if form is None:
            return cls(is_within=bool(said))
        if said:
            rest = form if form.is_open_in(said) else None
            return cls(rest, rest, is_open=rest is not None, is_within=True)
        to_come = None if form.is_over_after(prompt) else form
        return cls(form, to_come, is_open=form.is_open_after(prompt))


class Chat:
    """Makes prompts of conversations; raises Unloadable where *options* cannot be kept."""

    def __init__(
        self, tokenizer: Tokenizer, template: ChatTemplate, options: ChatOptions | None = None
    ) -> None:
        options = options or ChatOptions()
        self._tokenizer = tokenizer
        self._template = template
        self._options = options
        self._reasoning = format_of(template.source, options.reasoning_parser)
        self._tools = self._tool_format()
        if options.tool_prompt == "template" and self._tools is None:
            raise Unloadable(
                f"{self._no_tools()}, so tool_prompt cannot be 'template'",
                kind="chat_template_unsupported",
            )

    @property
    def takes_tools(self) -> bool:
        """Whether a conversation may offer tools."""
        return self._tools is not None

    @property
    def reasons(self) -> bool:
        """Whether the model may think before it answers."""
        return self._reasoning is not None

    @property
    def takes_effort(self) -> bool:
        """Whether the template has a word for how much the model should think."""
        return bool(self._template.expressible.efforts)

    def prompt(self, conversation: Conversation) -> ChatPrompt:
        """Return the prompt; raise InvalidRequest or UnsupportedParameter, naming the place.

        The template alone decides about BOS, as in transformers, so it is never there twice.
        """
        self._refuse_tools(conversation)
        offered = _schemas(conversation.tools)
        wish = settled(conversation.reasoning, conversation.template_kwargs)
        text = self._template.render(
            conversation.messages,
            {**self._told(wish), **conversation.template_kwargs},
            tools=conversation.tools,
            tools_as_words=self._options.tool_prompt == "hermes",
            add_generation_prompt=conversation.add_generation_prompt,
            continues_last=conversation.continues_last,
        )
        begun = Begun.of(self._reasoning, text, conversation)
        return ChatPrompt(
            encoded(self._tokenizer, text, "messages"),
            reader=self._reader(begun, offered),
            shown_ids=self._shown_ids(has_tools=bool(offered)),
            reasoning_budget=self._budget(wish, begun),
            grammar=self._grammar(conversation, begun),
        )

    def _tool_format(self) -> ToolFormat | None:
        """Return the format of calls where tools can be offered."""
        can, parser = self._template.expressible, self._options.tool_parser
        name: str | None = None if parser == "auto" else parser
        if self._options.tool_prompt == "refuse":
            return None
        if self._options.tool_prompt == "hermes":
            return FORMATS[name or hermes_turns.FORMAT]
        if not can.tools or can.calls is None:
            return None
        name = name or can.call_format
        return FORMATS[name] if name else None

    def _no_tools(self) -> str:
        """Say why tools cannot be offered."""
        if not self._template.expressible.tools:
            return "this model's chat template has no place for tools"
        if self._template.expressible.calls is None:
            return "this model's chat template has no place for calls of tools and their results"
        return (
            "this model's chat template writes calls of tools in a format that this version "
            "cannot read"
        )

    def _refuse_tools(self, conversation: Conversation) -> None:
        if self._options.tool_prompt == "refuse":
            used = conversation.tools or any(
                message.tool_calls or message.role == "tool" for message in conversation.messages
            )
            if used:
                raise UnsupportedParameter(
                    'this model was loaded with tool_prompt = "refuse"', param="tools"
                )
        if conversation.tools and self._tools is None:
            raise UnsupportedParameter(
                f'{self._no_tools()}; loaded with tool_prompt = "hermes" it gets them as text',
                param="tools",
            )

    def _told(self, wish: ReasoningWish) -> dict[str, Any]:
        """Return what the template is told of the wish, in its own words."""
        can, told = self._template.expressible, dict[str, Any]()
        if can.switch and wish.is_enabled is not None:
            told[can.switch] = wish.is_enabled
        if can.efforts and wish.effort:
            told["reasoning_effort"] = nearest_word(wish.effort, can.efforts)
        return told

    def _budget(self, wish: ReasoningWish, begun: Begun) -> ReasoningBudget | None:
        """Return how long the reasoning may get; None where nothing bounds it."""
        form = begun.to_come
        if form is None:
            return None
        tokens = wish.budget_tokens
        if wish.is_enabled is False:
            tokens = 0
        elif tokens is None and not self.takes_effort:
            tokens = EFFORT_BUDGETS.get(wish.effort or "")
        if tokens is None:
            return None
        begin = () if begun.is_open else self._tokenizer.encode(form.begin)
        return ReasoningBudget(tokens, tuple(begin), tuple(self._tokenizer.encode(form.end)))

    def _grammar(self, conversation: Conversation, begun: Begun) -> str | None:
        """Return the grammar of what is generated, None where nothing is demanded."""
        return of_answer(
            conversation.text_demand,
            conversation.call_demand,
            control_id=self._control_id,
            call_grammar=self._tools.grammar if self._tools else None,
            reasoning=begun.to_come,
            is_open=begun.is_open,
        )

    def _control_id(self, marker: str) -> int | None:
        """Return the id of the control token that is written so."""
        token_id = self._tokenizer.id_of(marker)
        return token_id if token_id in self._tokenizer.control_ids else None

    def _reader(
        self, begun: Begun, offered: Mapping[str, Mapping[str, Any]]
    ) -> Callable[[], Reader]:
        """Return what makes a reader of one answer."""
        tools, reasoning = self._tools, begun.reasoning

        def reader() -> Reader:
            rest: Reader = PlainReader()
            if tools and offered:
                rest = ToolCallReader(tools, offered, is_begun=begun.is_within)
            return ReasoningReader(reasoning, rest, is_open=begun.is_open) if reasoning else rest

        return reader

    def _shown_ids(self, *, has_tools: bool) -> frozenset[int]:
        """Return the control tokens that the readers look for."""
        markers: list[str] = []
        if self._reasoning:
            markers += [self._reasoning.begin, self._reasoning.end]
        if self._tools and has_tools:
            markers += self._tools.markers
        found = (self._control_id(marker) for marker in markers)
        return frozenset(i for i in found if i is not None)


def _continued(conversation: Conversation) -> str:
    """Return what the answer continues; nothing where it begins anew."""
    if not conversation.continues_last:
        return ""
    [turn] = turns_of(conversation.messages[-1:])
    return str(turn["content"]).strip()


def encoded(tokenizer: Tokenizer, text: str, param: str, *, with_bos: bool = False) -> list[int]:
    """Return the ids of *text*; raise InvalidRequest, naming *param*."""
    try:
        return tokenizer.encode(text, with_bos=with_bos)
    except TypeError as exc:  # all that tokenizers says of half a surrogate pair
        raise InvalidRequest("the text holds half a surrogate pair", param=param) from exc


def _schemas(tools: Iterable[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Return the parameters of each tool, by its name; raise InvalidRequest."""
    found: dict[str, Mapping[str, Any]] = {}
    for i, tool in enumerate(tools):
        function = tool.get("function")
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(name, str):
            raise InvalidRequest("a tool needs a function with a name", param=f"tools[{i}]")
        parameters = function.get("parameters")
        found[name] = _readable(parameters) if isinstance(parameters, Mapping) else {}
    return found


def _readable(parameters: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return *parameters* whose members say themselves what they are, without references."""
    members = parameters.get("properties")
    if not isinstance(members, Mapping):
        return parameters
    return {
        **parameters,
        "properties": {name: resolved(member, parameters) for name, member in members.items()},
    }
