"""Calls that are tags: ``<function=f><parameter=k>1</parameter></function>``.

Values are plain text, and become what the tool's schema says (``parameter_values.py``).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable

from cortex.runtime.json_text import SPACE
from cortex.runtime.parameter_values import takes_only_text, written_value
from cortex.runtime.tool_call_parsing import Calls, Characters, Malformed, Parsing

FUNCTION_END = "</function>"
PARAMETER, PARAMETER_END = "<parameter=", "</parameter>"
BLOCK_END = "</tool_call>"
TAGS = (PARAMETER, FUNCTION_END, BLOCK_END)
"""What may follow a parameter."""
ENDS = (PARAMETER_END, f"\n{PARAMETER_END}")
PLAIN_TEXT = re.compile(r"[^\n<]+")
"""What cannot be the beginning of a parameter's end."""


def function_call(characters: Characters, calls: Calls) -> Parsing[None]:
    """Read one call from behind ``<function=``, up to ``</function>`` or ``</tool_call>``."""
    name = yield from _tag_name(characters)
    calls.check(name)
    schemas = calls.offered[name].get("properties")
    tag = yield from _tag(characters)
    if tag is None:
        raise Malformed("a parameter is missing")
    calls.begin(name)
    write = calls.write
    write("{")
    separator = ""
    while tag == PARAMETER:
        key = yield from _tag_name(characters)
        write(f"{separator}{json.dumps(key, ensure_ascii=False)}: ")
        schema = schemas.get(key) if isinstance(schemas, dict) else None
        tag = yield from _parameter(characters, write, schema)
        separator = ", "
    write("}")
    calls.end(characters)


def _tag_name(characters: Characters) -> Parsing[str]:
    """Read up to the ``>``."""
    name = ""
    while (c := (yield from characters.take())) != ">":
        name += c
        if c in "<\n":
            raise Malformed("a tag does not end")
    return name.strip()


def _tag(characters: Characters) -> Parsing[str | None]:
    """Take the tag that may follow a parameter; None, and nothing taken, where none does.

    "" is the end of the answer.
    """
    space = 0
    while (c := (yield from characters.look(space + 1))[space:]) and c in SPACE:
        space += 1
    tag = yield from characters.next_of(TAGS, behind=space)
    if c and not tag:
        return None
    characters.skip(space + len(tag))
    return tag


def _parameter(
    characters: Characters, write: Callable[[str], None], schema: object
) -> Parsing[str | None]:
    """Read one value; return the tag behind it.

    It ends at the ``</parameter>`` that a tag follows: others belong to it. One newline at each end
    belongs to the format. A text is written as it comes, any other value when it is known.
    """
    is_text = takes_only_text(schema)
    parts: list[str] = []
    show = (lambda t: write(json.dumps(t, ensure_ascii=False)[1:-1])) if is_text else parts.append
    if is_text:
        write('"')
    if (yield from characters.peek()) == "\n":
        yield from characters.take()
    while True:
        show(characters.run(PLAIN_TEXT))
        end = yield from characters.next_of(ENDS)
        if not end:
            show((yield from characters.take()))
            continue
        characters.skip(len(end))
        tag = yield from _tag(characters)
        if tag is not None:
            write('"' if is_text else written_value("".join(parts), schema))
            return tag
        show(end)
