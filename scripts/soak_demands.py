"""What scripts/soak demands of an answer's text, and whether the answer is like that.

    demand     says                                         the answer is
    schema     response_format with a JSON schema           an object as the schema has it
    object     response_format json_object                  any object
    regex      structured_outputs with an expression        what it matches
    choice     structured_outputs with some texts           one of them
    call       tools, and tool_choice "required"            calls with arguments as declared

An answer that was cut for its length has only the beginning of that, and is not looked at.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

CITIES = "Paris", "Rome", "Oslo"
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
        "city": {"enum": list(CITIES)},
    },
    "required": ["name", "count", "city"],
    "additionalProperties": False,
}
PATTERN = r"[A-Z][a-z]{2,8}, [0-9]{1,3} (years|days)"
TOOL = {
    "type": "function",
    "function": {
        "name": "book",
        "description": "Book a seat to a city.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"enum": list(CITIES)},
                "seats": {"type": "integer", "minimum": 1, "maximum": 9},
            },
            "required": ["city", "seats"],
            "additionalProperties": False,
        },
    },
}
ENOUGH_TOKENS = 200
CALL = "\0"
"""Before a call in what an answer says: then its name, a space, and its arguments."""


@dataclass(frozen=True)
class Demand:
    """What a request has for it, and what an answer's text must be."""

    asks: Mapping[str, Any]
    is_met: Callable[[str], bool]


def is_thing(text: str) -> bool:
    """Whether *text* is JSON as SCHEMA has it."""
    thing = _object(text)
    return (
        thing is not None
        and thing.keys() == {"name", "count", "city"}
        and isinstance(thing["name"], str)
        and len(thing["name"]) <= 12
        and _is_between(thing["count"], 0, 99)
        and thing["city"] in CITIES
    )


def are_bookings(text: str) -> bool:
    """Whether *text* is calls of TOOL and nothing else, with CALL before each."""
    said, *calls = text.split(CALL)
    return not said and bool(calls) and all(map(_is_booking, calls))


def _is_booking(call: str) -> bool:
    name, _, arguments = call.partition(" ")
    booking = _object(arguments)
    return (
        name == "book"
        and booking is not None
        and booking.keys() == {"city", "seats"}
        and booking["city"] in CITIES
        and _is_between(booking["seats"], 1, 9)
    )


def _object(text: str) -> dict[str, Any] | None:
    try:
        found = json.loads(text)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _is_between(value: object, least: int, most: int) -> bool:
    return type(value) is int and least <= value <= most


DEMANDS = {
    "schema": Demand(
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "thing", "schema": SCHEMA, "strict": True},
            }
        },
        is_thing,
    ),
    "object": Demand(
        {"response_format": {"type": "json_object"}}, lambda text: _object(text) is not None
    ),
    "regex": Demand(
        {"structured_outputs": {"regex": PATTERN}},
        lambda text: re.fullmatch(PATTERN, text) is not None,
    ),
    "choice": Demand({"structured_outputs": {"choice": list(CITIES)}}, lambda text: text in CITIES),
    "call": Demand({"tools": [TOOL], "tool_choice": "required"}, are_bookings),
}


def draw(chance: random.Random) -> tuple[str, dict[str, Any]]:
    """Return a demand's name, and what a chat that makes it has."""
    name = chance.choice(list(DEMANDS))
    return name, {"max_tokens": ENOUGH_TOKENS, **DEMANDS[name].asks}


def wrong(name: str, text: str, finish: str) -> str | None:
    """Return what is wrong with an answer of *text* that ended with *finish*."""
    if finish == "length" or DEMANDS[name].is_met(text):
        return None
    return f"demanded {name}, got {text[:120]!r} ({finish})"
