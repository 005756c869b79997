"""The sandbox that chat templates run in.

Templates are programs that come with the weights, so they are not trusted: no attribute that
begins with an underscore, nothing of theirs changes what they are given, and what they write is
bounded. They are given what transformers gives them (``tojson`` without HTML escaping,
``raise_exception``, ``strftime_now``, loop controls), so that prompts equal the reference's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from cortex.ipc.node_api import MAX_BODY_BYTES

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


class SandboxedTemplate:
    """A compiled template; ``run`` may be called from several threads.

    Making one and running it raise TEMPLATE_FAILURES. *now* is the clock of ``strftime_now``.
    """

    def __init__(self, source: str, now: Callable[[], datetime]) -> None:
        self._template = _environment(now).from_string(source)

    def run(self, variables: Mapping[str, Any]) -> str:
        """Return what the template writes."""
        pieces: list[str] = []
        characters = 0
        for piece in self._template.generate(variables):
            characters += len(piece)
            _refuse_size(characters)
            pieces.append(piece)
        return "".join(pieces)


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
