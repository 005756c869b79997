"""A request's body, read strictly in every dialect: what is accepted is honoured.

``decode_object`` and ``model_of`` find what routing needs, ``Parameters`` refuses by its name what
would be ignored, ``typed`` by its place what is of the wrong type or size.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

from cortex.ipc.errors import (
    BodyTooLarge,
    InvalidRequest,
    MalformedJson,
    MissingModelField,
    UnsupportedParameter,
)
from cortex.ipc.validation import MISSING, UNKNOWN, words_and_place

S = TypeVar("S", bound=msgspec.Struct)

NOTHING: Mapping[str, str] = MappingProxyType({})

HIGH, LOW = rb"\\u[dD][89abAB]..", rb"\\u[dD][c-fC-F].."
LONE_SURROGATE = re.compile(rb"%b(?!%b)|(?<!%b)%b" % (HIGH, LOW, HIGH, LOW))
"""Half a character. Of a body that cannot be read: elsewhere a backslash may be escaped."""

HALF = "half of a surrogate pair (\\uD800 to \\uDFFF) is no text"


@dataclass(frozen=True)
class Parameters:
    """What a dialect knows of beyond what this version honours, and its words for a refusal."""

    without_effect: frozenset[str]
    """Cannot change the tokens of an answer; accepted with any value."""
    neutral: Mapping[str, tuple[Any, ...]]
    """Known and not honoured; the values are those that ask for nothing."""
    unknown: str
    unsupported: str
    """Both with ``{name}``."""

    def refuse_unsupported(
        self,
        raw: dict[str, Any],
        honoured: frozenset[str],
        place: str = "",
        instead: Mapping[str, str] = NOTHING,
    ) -> None:
        """Raise UnsupportedParameter for the first field of *raw*, at *place*, to be ignored.

        *instead* are sentences about what stands for a field.
        """
        for name, value in raw.items():
            if name in honoured or name in self.without_effect:
                continue
            param = f"{place}.{name}" if place else name
            if name not in self.neutral:
                raise UnsupportedParameter(self.unknown.format(name=name), param=param)
            if not any(_is_same(value, neutral) for neutral in self.neutral[name]):
                words = [self.unsupported.format(name=name), instead.get(name)]
                raise UnsupportedParameter("; ".join(filter(None, words)), param=param)


MAX_NAME = 4096
"""Characters of a model's id, which comes back in messages and lists: the longest path of Linux."""
ModelId = Annotated[str, Meta(min_length=1, max_length=MAX_NAME)]

MAX_COMMAS = 2**20
"""More values than a prompt has tokens anywhere, and what decodes in 0.2 s at most: a body of the
largest size can be ten million empty objects, which take 0.7 GB and stop everything for seconds."""


def decode_object(body: bytes) -> dict[str, Any]:
    """Return the JSON object in *body*; raise MalformedJson, InvalidRequest or BodyTooLarge."""
    if body.count(b",") > MAX_COMMAS:
        raise BodyTooLarge(f"the body has more than {MAX_COMMAS} commas: that many values, or text")
    try:
        raw = msgspec.json.decode(body)
    except msgspec.ValidationError as exc:
        words, _ = words_and_place(exc)
        raise InvalidRequest(f"the body holds what cannot be read: {words}") from exc
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        raise MalformedJson(f"the body is not JSON: {_fault(body, exc)}") from exc
    except RecursionError as exc:
        raise MalformedJson("the body is nested too deeply") from exc
    if not isinstance(raw, dict):
        raise InvalidRequest("the body must be a JSON object")
    return raw


def _fault(body: bytes, exc: Exception) -> str:
    """Return what is wrong with *body*; the decoder counts bytes from where a text begins."""
    if LONE_SURROGATE.search(body):
        return HALF
    try:
        body.decode()
    except UnicodeDecodeError as found:
        return f"it is not UTF-8 (byte {found.start})"
    return str(exc)


def model_of(raw: dict[str, Any]) -> str:
    """Return the model that a request names; raise MissingModelField or InvalidRequest."""
    model = raw.get("model")
    if not isinstance(model, str) or not model:
        raise MissingModelField("the body must name a model: a non-empty string", param="model")
    if len(model) > MAX_NAME:
        raise InvalidRequest(f"a model's name has at most {MAX_NAME} characters", param="model")
    return model


def string_of(raw: dict[str, Any], name: str, where: str) -> str:
    """Return the text *name* of *raw*, which stands at *where*; raise InvalidRequest."""
    value = raw.get(name)
    if not isinstance(value, str):
        raise InvalidRequest(f"{where}.{name}: a string is needed", param=f"{where}.{name}")
    return value


def typed(raw: dict[str, Any], shape: type[S], where: str = "") -> S:
    """Return *raw*, which stands at *where*, as a *shape*; raise InvalidRequest with the place."""
    try:
        return msgspec.convert(raw, shape, str_keys=True)
    except msgspec.ValidationError as exc:
        words, inside = _of_field(*words_and_place(exc))
        place = ".".join(filter(None, (where, inside)))
        raise InvalidRequest(f"{place}: {words}" if place else words, param=place or None) from exc


def _of_field(words: str, place: str) -> tuple[str, str]:
    """Return *words* of a field that *place* lacks or should not have as words about the field."""
    for pattern, wrong in ((MISSING, "field required"), (UNKNOWN, "unknown field")):
        if found := pattern.fullmatch(words):
            return wrong, ".".join(filter(None, (place, found["name"])))
    return words, place


def decode_body(body: bytes, shape: type[S]) -> S:
    """Return *body* as a *shape*; raise MalformedJson, or InvalidRequest with the place."""
    if not body.strip():
        names = [f.encode_name for f in msgspec.structs.fields(shape) if f.required]
        wanted = ", ".join(f'"{name}": ...' for name in names)
        raise MalformedJson(f"the body is not JSON: it is empty, and must be {{{wanted}}}")
    return typed(decode_object(body), shape)


def _is_same(value: Any, other: Any) -> bool:
    """Return whether they are one value of JSON, where 1 is not true."""
    return bool(value == other) and type(value) is type(other)
