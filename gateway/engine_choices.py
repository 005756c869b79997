"""What an engine says in its choices, as a neuron says it; pure.

    engine                                       neuron
    reasoning (vLLM, OpenRouter)                 reasoning_content
    function_call                                a call among tool_calls
    a call without a number, or with that of     a number of its own
    another one (Ollama)
    a call without an id                         an id
    arguments as an object, or none at all       as text: ``{}``
    finish_reason function_call, and stop        tool_calls
    where something is called

Only for dialects that translate it: OpenAI's own passes as it is.
"""

from __future__ import annotations

import uuid
from typing import Any

import orjson

Json = dict[str, Any]

FINISHES = {"function_call": "tool_calls", "eos": "stop", "eos_token": "stop"}
OURS_ALONE = ("reasoning", "function_call")


class Speech:
    """One answer, whole or in deltas, of one choice."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}
        """Of the calls, by the ids that the engine has for them."""
        self._without_arguments: set[int] = set()

    def said(self, choice: Json) -> Json:
        """Return *choice*, with its message or its delta."""
        kind = "message" if "message" in choice else "delta"
        spoken = object_in(choice.get(kind))
        said = {name: value for name, value in spoken.items() if name not in OURS_ALONE}
        if reasoning := spoken.get("reasoning_content") or spoken.get("reasoning"):
            said["reasoning_content"] = reasoning
        calls = list(map(self._call, _calls_in(spoken)))
        finish = choice.get("finish_reason")
        finish = FINISHES.get(str(finish), finish)
        if finish == "stop" and self._numbers:
            finish = "tool_calls"
        if finish == "tool_calls":
            calls = self._completed(calls)
        if calls:
            said["tool_calls"] = calls
        return {**choice, kind: said, "finish_reason": finish}

    def _call(self, call: Json) -> Json:
        function = object_in(call.get("function"))
        number, is_new = self._number(call, function)
        arguments = function.get("arguments")
        if isinstance(arguments, dict):
            arguments = orjson.dumps(arguments).decode()
        if is_new:
            self._without_arguments.add(number)
        if arguments:
            self._without_arguments.discard(number)
        return {
            "index": number,
            "id": call.get("id") or (f"call_{uuid.uuid4().hex[:24]}" if is_new else None),
            "type": "function",
            "function": {"name": function.get("name"), "arguments": arguments or ""},
        }

    def _number(self, call: Json, function: Json) -> tuple[int, bool]:
        """Return the number of *call*, and whether it begins here."""
        own, told, taken = (
            str(call.get("id") or ""),
            call.get("index"),
            list(self._numbers.values()),
        )
        if own in self._numbers:
            return self._numbers[own], False
        goes_on = not function.get("name")  # whatever its id is now
        says_it_again = not own and told in taken
        if taken and (goes_on or says_it_again):
            return taken[taken.index(told) if told in taken else -1], False
        number = max(taken, default=-1) + 1
        if isinstance(told, int) and told not in taken:
            number = told
        self._numbers[own or f"#{number}"] = number
        return number, True

    def _completed(self, calls: list[Json]) -> list[Json]:
        """Return *calls*, with arguments for those that have none when all is said."""
        there = {call["index"]: call for call in calls}
        for number in sorted(self._without_arguments):
            call = there.setdefault(number, {"index": number, "function": {}})
            call["function"]["arguments"] = "{}"
        return list(there.values())


def _calls_in(spoken: Json) -> list[Json]:
    calls = objects_in(spoken.get("tool_calls"))
    if not calls and (function := object_in(spoken.get("function_call"))):
        return [{"index": 0, "function": function}]
    return calls


def object_in(value: Any) -> Json:
    """Return *value* if it is an object, else an empty one."""
    return value if isinstance(value, dict) else {}


def objects_in(value: Any) -> list[Json]:
    """Return the objects among *value*, if it is an array."""
    return [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []
