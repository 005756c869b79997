"""A conversation to a prompt: the chat template of a checkpoint, in a sandbox.

Templates are programs that come with the weights, so they are not trusted: no attribute that
begins with an underscore, nothing of theirs changes what they are given, and what they write is
bounded. They are given what transformers gives them (``tojson`` without HTML escaping,
``raise_exception``, ``strftime_now``, loop controls), so that prompts equal the reference's.

What a template would lose is found when it is loaded, by rendering probes with marked words:

    probe                                          where a word is lost, or the template refuses
    [user]                                         content is given as a list of parts; else refused
    [system, user]                                 system turns are folded into user turns
    a system turn further down, or a second one    those are folded, see chat_messages.fold_systems
    [user with a name]                             a request that names its speakers is refused
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from cortex.ipc.errors import InvalidRequest, Unloadable, UnsupportedParameter
from cortex.ipc.node_api import MAX_BODY_BYTES
from cortex.ipc.openai import ChatMessage
from cortex.runtime.chat_messages import Turn, fold_systems, turns_of

MAX_PROMPT_CHARACTERS = 2 * MAX_BODY_BYTES
"""A conversation fits a request body; a template adds little to it."""

MAX_POWER_BITS = 4096

TEMPLATE_FAILURES = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
)
"""What a template can raise; its expressions run Python operators."""

RESERVED = frozenset({"messages", "tools", "documents", "add_generation_prompt"})


class ChatTemplate:
    """A compiled template; ``render`` may be called from several threads.

    *special_tokens* are the variables ``bos_token``, ``eos_token`` and so on. Raise Unloadable for
    a template that is no template, or cannot say what a user said.
    """

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str],
        *,
        now: Callable[[], datetime] = lambda: datetime.now().astimezone(),
    ) -> None:
        self.source = source
        self._special_tokens = dict(special_tokens)
        try:
            self._template = _environment(now).from_string(source)
        except TEMPLATE_FAILURES as exc:
            raise _unusable(f"it does not compile: {exc}") from exc
        self._takes_parts = False
        self._probe()

    def render(
        self,
        messages: Sequence[ChatMessage],
        template_kwargs: Mapping[str, Any] | None = None,
        *,
        add_generation_prompt: bool = True,
    ) -> str:
        """Return the prompt; raise InvalidRequest or UnsupportedParameter, naming the place.

        *template_kwargs* (``enable_thinking``, ...) become variables of the template.
        """
        template_kwargs = template_kwargs or {}
        for name in template_kwargs:
            if name in RESERVED or name in self._special_tokens:
                raise UnsupportedParameter(
                    f"{name!r} cannot be set from outside of the chat template",
                    param=f"chat_template_kwargs.{name}",
                )
        turns = self._expressible(turns_of(messages))
        try:
            return self._run(turns, template_kwargs, add_generation_prompt=add_generation_prompt)
        except TEMPLATE_FAILURES as exc:
            raise InvalidRequest(
                f"the model's chat template refuses this conversation: {exc}", param="messages"
            ) from exc

    def _run(
        self,
        turns: Iterable[Turn],
        template_kwargs: Mapping[str, Any],
        *,
        add_generation_prompt: bool = True,
    ) -> str:
        variables = {
            **self._special_tokens,
            **template_kwargs,
            "messages": [self._as_given(turn) for turn in turns],
            "tools": None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        pieces: list[str] = []
        characters = 0
        for piece in self._template.generate(variables):
            characters += len(piece)
            _refuse_size(characters)
            pieces.append(piece)
        return "".join(pieces)

    def _as_given(self, turn: Turn) -> Turn:
        if not self._takes_parts:
            return turn
        return {**turn, "content": [{"type": "text", "text": turn["content"]}]}

    def _expressible(self, turns: list[Turn]) -> list[Turn]:
        """Return *turns* in a form of which this template loses nothing."""
        for i, turn in enumerate(turns):
            if "name" in turn and not self._takes_name:
                raise UnsupportedParameter(
                    "this model's chat template has no place for a speaker's name",
                    param=f"messages[{i}].name",
                )
        if not self._takes_system:
            return fold_systems(turns, keep_first=False)
        if not self._takes_later_systems:
            return fold_systems(turns, keep_first=True)
        return turns

    def _probe(self) -> None:
        """Find out what the template can express; see the table above."""
        if not self._expresses("user"):
            self._takes_parts = True
            if not self._expresses("user"):
                raise _unusable("it does not show what a user says")
        self._takes_system = self._expresses("system", "user")
        self._takes_later_systems = self._takes_system and all(
            self._expresses(*roles)
            for roles in (
                ("system", "system", "user"),
                ("user", "system"),
                ("system", "user", "system", "user"),
                ("system", "user", "assistant", "system", "user"),
                ("user", "assistant", "system"),
            )
        )
        self._takes_name = self._shows([{"role": "user", "content": "A", "name": "PROBEX"}], ["X"])

    def _expresses(self, *roles: str) -> bool:
        """Whether turns of these roles all appear, in order."""
        marks = [chr(ord("A") + i) for i in range(len(roles))]
        turns = [
            {"role": role, "content": f"PROBE{mark}"}
            for role, mark in zip(roles, marks, strict=True)
        ]
        return self._shows(turns, marks)

    def _shows(self, turns: Sequence[Turn], marks: Sequence[str]) -> bool:
        try:
            prompt = self._run(turns, {})
        except TEMPLATE_FAILURES:
            return False
        places = [prompt.find(f"PROBE{mark}") for mark in marks]
        return -1 not in places and places == sorted(places)


def _unusable(why: str) -> Unloadable:
    return Unloadable(
        f"the checkpoint's chat template cannot be used: {why}", kind="chat_template_unsupported"
    )


def _refuse_size(characters: int) -> None:
    if characters > MAX_PROMPT_CHARACTERS:
        raise SecurityError(f"it writes more than {MAX_PROMPT_CHARACTERS} characters")


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox, with products and powers bounded: ``'a' * 10 ** 10`` is refused."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(
        self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any
    ) -> Any:
        if operator == "**" and isinstance(left, int) and isinstance(right, int):
            if left.bit_length() * right > MAX_POWER_BITS:
                raise SecurityError("it computes a number that is too large")
            return super().call_binop(context, operator, left, right)
        for sequence, count in ((left, right), (right, left)):
            if hasattr(sequence, "__len__") and isinstance(count, int):
                _refuse_size(len(sequence) * count)
        return super().call_binop(context, operator, left, right)


class _GenerationBlock(Extension):
    """``{% generation %}``, which marks the assistant's text for training; shown as it is."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it a set

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Return the body."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Namespace(Namespace):
    """Jinja's ``namespace``, without a way to set what Python keeps behind underscores."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise SecurityError(f"a template may not set {name!r}")
        super().__setitem__(name, value)


def _environment(now: Callable[[], datetime]) -> _Environment:
    environment = _Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,  # a prompt is no HTML
        extensions=[loopcontrols, _GenerationBlock],
    )
    environment.filters["tojson"] = _to_json
    del environment.globals["lipsum"]
    environment.globals.update(
        namespace=_Namespace,
        raise_exception=_raise_exception,
        strftime_now=lambda pattern: now().strftime(pattern),
    )
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Write *value* as JSON, in the reference's spelling."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> NoReturn:
    """Let a template refuse a conversation in its own words."""
    raise jinja2.TemplateError(message)
