"""What is wrong with an option, told to whoever wrote it rather than to whoever wrote the type."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterator
from typing import Any, Literal, get_args, get_origin

import msgspec
from msgspec import Meta

from cortex.ipc.toml_lines import Keys
from cortex.ipc.validation import MISSING, UNKNOWN, words_and_place

_TOML_NAMES = {"`object`": "a table", "`array`": "an array"}


def what_is_wrong(
    error: msgspec.ValidationError, shape: type[msgspec.Struct], not_yet: Collection[str] = ()
) -> tuple[Keys, str]:
    """Return which option of *shape* is wrong, and what is.

    Options that are *not_yet* there are told from those that nobody has heard of.
    """
    words, place = words_and_place(error)
    keys = keys_of(place)
    if unknown := UNKNOWN.fullmatch(words):
        name = unknown["name"]
        return (*keys, name), _unknown(name, type_at(shape, keys), not_yet)
    if missing := MISSING.fullmatch(words):
        return keys, f"{missing['name']} is missing"
    return keys, _of_value(words, type_at(shape, keys))


def keys_of(place: str) -> Keys:
    """``models[0].quant`` -> ``("models", 0, "quant")``; the key of a mapping is not told."""
    found = re.findall(r"([^.\[\]]+)|\[(\d+)\]", place)
    return tuple(name or int(index) for name, index in found)


def place_of(keys: Keys) -> str:
    """``("models", 0, "quant")`` -> ``models[0].quant``."""
    return "".join(f"[{k}]" if isinstance(k, int) else f".{k}" for k in keys).lstrip(".")


def type_at(shape: type[msgspec.Struct], keys: Keys) -> Any:
    """Return the type of the option at *keys*, or None where *shape* has none."""
    kind: Any = shape
    for key in keys:
        if isinstance(key, str):
            kind = _options_of(kind).get(key)
    return kind


def is_table(kind: Any) -> bool:
    """Return whether *kind* is a struct, and nothing else besides."""
    return isinstance(kind, type) and issubclass(kind, msgspec.Struct)


def _options_of(kind: Any) -> dict[str, Any]:
    structs = (part for part in _parts_of(kind) if is_table(part))
    return {field.encode_name: field.type for s in structs for field in msgspec.structs.fields(s)}


def _parts_of(kind: Any) -> Iterator[Any]:
    """Yield *kind* and what it is made of: the members of a union, the items of an array."""
    yield kind
    for part in get_args(kind):
        yield from _parts_of(part)


def _unknown(name: str, table: Any, not_yet: Collection[str]) -> str:
    if name in not_yet:
        return "not supported by this version"
    near = difflib.get_close_matches(name, _options_of(table), n=1)
    return f"unknown option; did you mean {near[0]}?" if near else "unknown option"


def _of_value(words: str, kind: Any) -> str:
    if "matching regex" in words:
        told = (part.description for part in _parts_of(kind) if isinstance(part, Meta))
        return f"expected {next(filter(None, told), 'another text')}"
    if words.startswith("Invalid enum value"):
        literals = (part for part in _parts_of(kind) if get_origin(part) is Literal)
        choices = ", ".join(str(choice) for part in literals for choice in get_args(part))
        return f"expected one of {choices}"
    for theirs, ours in _TOML_NAMES.items():
        words = words.replace(theirs, ours)
    return words[:1].lower() + words[1:]
