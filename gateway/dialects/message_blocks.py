"""The content blocks of Anthropic's turns as parts of chat messages; nothing is dropped unsaid.

block                                   becomes
text                                    a text part
image                                   an image_url part; the node refuses it if the model is blind
document, search_result                 its title, its context and its text; PDFs are refused
compaction                              the text of the summary
tool_reference, in a result             the name of the tool, which is offered since
tool_use                                a call of the assistant
tool_result                             a tool's message; ``is_error`` puts "Error: " before it
redacted_thinking                       nothing: only its author can read it
fallback                                nothing, as at Anthropic's
tool_addition, tool_removal             nothing here: they change what is offered (message_tools.py)
another                                 refused by its type and place
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import msgspec

from cortex.gateway.dialects.message_request import Block
from cortex.gateway.dialects.message_tools import CHANGES
from cortex.ipc.errors import InvalidRequest, UnsupportedParameter
from cortex.ipc.requests import string_of

UNSAID = ("fallback", "redacted_thinking", *CHANGES)
IN_A_DOCUMENT = ("text", "image")
IN_A_RESULT = (*IN_A_DOCUMENT, "document", "search_result", "tool_reference")
ERROR = "Error: "
SEALED = frozenset({"encrypted_content", "encrypted_index", "encrypted_stdout"})
"""Fields of foreign results that only their author can read."""


def placed(blocks: list[Block], place: str) -> Iterator[tuple[Block, str]]:
    """Yield *blocks*, which stand at *place*, and the place of each."""
    for position, block in enumerate(blocks):
        yield block, f"{place}.{position}"


def content_of(parts: list[Block]) -> str | list[Block]:
    """Return *parts*, or the text of the only one."""
    if not parts:
        return ""
    if len(parts) == 1 and parts[0]["type"] == "text":
        return str(parts[0]["text"])
    return parts


def parts_of(blocks: list[Block], place: str) -> list[Block]:
    """Return what *blocks* say, as parts of a chat message; raise ApiError, naming the place."""
    return [part for block, where in placed(blocks, place) for part in part_of(block, where)]


def part_of(block: Block, place: str) -> list[Block]:
    """Return what one block says."""
    kind = block.get("type")
    if kind in UNSAID:
        return []
    if not isinstance(kind, str) or kind not in _READERS:
        raise _refused(f"blocks of type {kind!r} are not supported by this version", place)
    return _READERS[kind](block, place)


def _text(text: str) -> Block:
    return {"type": "text", "text": text}


def _of_text(block: Block, place: str) -> list[Block]:
    return [_text(string_of(block, "text", place))]


def _of_reference(block: Block, place: str) -> list[Block]:
    return [_text(string_of(block, "tool_name", place))]


def _of_compaction(block: Block, place: str) -> list[Block]:
    return [] if block.get("content") is None else [_text(string_of(block, "content", place))]


def _of_image(block: Block, place: str) -> list[Block]:
    source = _object(block, "source", place)
    where = f"{place}.source"
    match source.get("type"):
        case "base64":
            kind, data = string_of(source, "media_type", where), string_of(source, "data", where)
            url = f"data:{kind};base64,{data}"
        case "url":
            url = string_of(source, "url", where)
        case kind:
            raise _refused(f"images by {kind!r} are not supported: send base64 or a url", where)
    return [{"type": "image_url", "image_url": {"url": url}}]


def _of_document(block: Block, place: str) -> list[Block]:
    _refuse_citations(block, place)
    source = _object(block, "source", place)
    where = f"{place}.source"
    match source.get("type"):
        case "text":
            said = [_text(string_of(source, "data", where))]
        case "content":
            said = _said_in(source.get("content"), f"{where}.content", IN_A_DOCUMENT)
        case kind:
            raise _refused(f"documents by {kind!r} cannot be read here: send their text", where)
    return [*_heading(block.get("title"), block.get("context")), *said]


def _of_search_result(block: Block, place: str) -> list[Block]:
    _refuse_citations(block, place)
    said = _said_in(block.get("content"), f"{place}.content", IN_A_DOCUMENT)
    return [*_heading(block.get("title"), block.get("source")), *said]


_READERS = {
    "compaction": _of_compaction,
    "document": _of_document,
    "image": _of_image,
    "search_result": _of_search_result,
    "text": _of_text,
    "tool_reference": _of_reference,
}


def _heading(*lines: Any) -> list[Block]:
    said = [line for line in lines if isinstance(line, str) and line]
    return [_text("\n".join(said) + "\n")] if said else []


def _refuse_citations(block: Block, place: str) -> None:
    citations = block.get("citations")
    if isinstance(citations, dict) and citations.get("enabled"):
        raise _refused("citations are not supported by this version", f"{place}.citations")


def _said_in(content: Any, place: str, kinds: Collection[str]) -> list[Block]:
    """Return the parts of *content*: nothing, text, or blocks of these *kinds*."""
    if content is None:
        return []
    if isinstance(content, str):
        return [_text(content)]
    if not isinstance(content, list) or not all(isinstance(block, dict) for block in content):
        raise InvalidRequest(f"{place}: a string or a list of blocks is needed", param=place)
    for block, where in placed(content, place):
        if (kind := block.get("type")) not in kinds:
            raise _refused(f"no place for a block of type {kind!r}", where)
    return _lines(parts_of(content, place), content)


def _lines(parts: list[Block], blocks: list[Block]) -> list[Block]:
    """Return *parts*; names of tools, where there is nothing else, one in a line."""
    if len(parts) > 1 and all(block.get("type") == "tool_reference" for block in blocks):
        return [_text("\n".join(part["text"] for part in parts))]
    return parts


def call_of(block: Block, place: str) -> Block:
    """Return a block that calls a tool as a call of the assistant's message."""
    arguments = msgspec.json.encode(_object(block, "input", place)).decode()
    name = string_of(block, "name", place)
    function = {"name": name, "arguments": arguments}
    return {"id": string_of(block, "id", place), "type": "function", "function": function}


def result_of(block: Block, place: str) -> Block:
    """Return a block with a result as the tool's message."""
    parts = _said_in(block.get("content"), f"{place}.content", IN_A_RESULT)
    if block.get("is_error"):
        parts = _marked(parts)
    call = string_of(block, "tool_use_id", place)
    return {"role": "tool", "tool_call_id": call, "content": content_of(parts)}


def _marked(parts: list[Block]) -> list[Block]:
    """Return *parts* of an error, which say that they are one."""
    first = parts[0] if parts else _text("")
    if first["type"] != "text":
        return [_text(ERROR), *parts]
    said = first["text"]
    return [first if said.startswith("Error") else _text(ERROR + said), *parts[1:]]


def readable(content: Any) -> str | list[Block]:
    """Return the result of a tool that ran elsewhere: its texts, else JSON without what is sealed.

    A failed call says so in its own words.
    """
    if isinstance(content, str):
        return content
    blocks = content if isinstance(content, list) else [content]
    if all(isinstance(block, dict) and block.get("type") == "text" for block in blocks):
        return blocks
    unsealed = [_unsealed(block) for block in blocks]
    return msgspec.json.encode(unsealed if content is blocks else unsealed[0]).decode()


def _unsealed(block: Any) -> Any:
    if not isinstance(block, dict):
        return block
    return {name: value for name, value in block.items() if name not in SEALED}


def _object(block: Block, name: str, place: str) -> Block:
    value = block.get(name)
    if not isinstance(value, dict):
        raise InvalidRequest(f"{place}.{name}: an object is needed", param=f"{place}.{name}")
    return value


def _refused(why: str, place: str) -> UnsupportedParameter:
    return UnsupportedParameter(f"{place}: {why}", param=place)
