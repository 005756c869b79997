"""What a chat template can express, found out when it is loaded by rendering marked words.

    probe                                         where a word is lost, or the template refuses
    [user]                                        content is given as a list of parts, no tools as
                                                  an empty list; else the template is refused
    [system, user]                                system turns are folded into user turns
    a system turn further down, or a second one   those are folded, see turn_shapes.fold_systems;
                                                  both are also tried with tools
    [user with a name]                            a request that names its speakers is refused
    a tool: name, description, parameter          tools are refused, or described as text
    a call (name, argument) and its result        tried by turns: arguments as an object or as
                                                  JSON text, ids as given or of nine characters,
                                                  no content as null or as empty text; else
                                                  refused, or written as text
    two calls in a turn, two results              a turn for each call, its result behind it
    text beside a call                            a turn of its own before it; else it is refused
    each of ``reasoning.SWITCHES``, on and off    no difference: the template has no such switch
    each effort that it names                     no difference: it has no word for an effort

A template that names fewer than two efforts passes on any word: it gets low, medium or high.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from cortex.runtime.chat_messages import Turn
from cortex.runtime.reasoning import EFFORTS, SWITCHES
from cortex.runtime.template_sandbox import TEMPLATE_FAILURES
from cortex.runtime.tool_formats import format_written_in
from cortex.runtime.turn_shapes import CallShape, as_parts, shaped_calls

Tools = Sequence[Mapping[str, Any]]
Render = Callable[[Sequence[Turn], Tools | None, Mapping[str, Any]], str]
"""Runs the template on turns, tools and further variables."""

TOOL = {
    "type": "function",
    "function": {
        "name": "PROBETOOL",
        "description": "PROBEWHAT",
        "parameters": {
            "type": "object",
            "properties": {"PROBEPARAM": {"type": "string", "description": "PROBEWHY"}},
            "required": ["PROBEPARAM"],
        },
    },
}
NOTHING: tuple[Literal[""] | None, ...] = (None, "")
USUAL_EFFORTS = ("low", "medium", "high")


@dataclass(frozen=True, slots=True)
class Expressible:
    """What one template can express; see the table above."""

    content_as_parts: bool = False
    no_tools: tuple[()] | None = None
    """What the template gets for tools where there are none."""
    systems: Literal["anywhere", "first", "none"] = "anywhere"
    names: bool = False
    tools: bool = False
    calls: CallShape | None = None
    call_format: str | None = None
    """A name of ``tool_formats.FORMATS``; None where it writes calls in a way we cannot read."""
    switch: str | None = None
    efforts: tuple[str, ...] = ()


class TemplateProbe:
    """Renders probes; *source* is the template's own text."""

    def __init__(self, render: Render, source: str) -> None:
        self._render = render
        self._source = source
        self._plain = Expressible()

    def result(self) -> Expressible | None:
        """Return what the template can express; None where not even what a user says."""
        empty: tuple[()] = ()
        for as_parts_only, no_tools in itertools.product((False, True), (None, empty)):
            self._plain = Expressible(content_as_parts=as_parts_only, no_tools=no_tools)
            if self._shows([_turn("user", "ASK")], ["ASK"]):
                return self._beyond()
        return None

    def _beyond(self) -> Expressible:
        tools = self._shows([_turn("user", "ASK")], ["ASK"], tools=[TOOL]) and all(
            self._shows([_turn("user", "ASK")], [word], tools=[TOOL])
            for word in ("TOOL", "WHAT", "PARAM")
        )
        offered = [TOOL] if tools else []
        calls, prompt = self._calls(offered)
        switch = self._switch()
        return replace(
            self._plain,
            systems=self._systems(offered),
            names=self._shows([{**_turn("user", "ASK"), "name": "PROBEWHO"}], ["WHO"]),
            tools=tools,
            calls=calls,
            call_format=format_written_in(prompt),
            switch=switch,
            efforts=self._efforts({switch: True} if switch else {}),
        )

    def _systems(self, tools: Tools) -> Literal["anywhere", "first", "none"]:
        def expresses(*roles: str) -> bool:
            words = ["ASK", "SAY", "NEXT", "MORE", "LAST"][: len(roles)]
            turns = [_turn(role, word) for role, word in zip(roles, words, strict=True)]
            return self._shows(turns, words) and self._shows(turns, words, tools=tools)

        if not expresses("system", "user"):
            return "none"
        everywhere = (
            ("system", "system", "user"),
            ("user", "system"),
            ("system", "user", "system", "user"),
            ("system", "user", "assistant", "system", "user"),
            ("user", "assistant", "system"),
        )
        return "anywhere" if all(expresses(*roles) for roles in everywhere) else "first"

    def _calls(self, tools: Tools) -> tuple[CallShape | None, str]:
        """Return how calls are given to the template, and a prompt that holds one."""
        one = [_turn("user", "ASK"), _calling("", "CALL"), _result("CALL", "RESULT")]
        one += [_turn("assistant", "SAY"), _turn("user", "NEXT")]
        words = ["ASK", "CALL", "VALUE", "RESULT", "SAY", "NEXT"]
        for as_text, nine, nothing in itertools.product((False, True), (False, True), NOTHING):
            shape = CallShape(arguments_as_text=as_text, nine_letter_ids=nine, no_content=nothing)
            prompt = self._prompt(shaped_calls(one, shape), tools)
            if _holds(prompt, words) and not _is_python(prompt):
                return self._with_more(shape, tools), prompt
        return None, ""

    def _with_more(self, shape: CallShape, tools: Tools) -> CallShape:
        two = [_turn("user", "ASK"), _calling("", "CALL", "MORE"), _result("CALL", "RESULT")]
        two += [_result("MORE", "SECOND"), _turn("assistant", "SAY"), _turn("user", "NEXT")]
        text = [_turn("user", "ASK"), _calling("TEXT", "CALL"), _result("CALL", "RESULT")]
        text += [_turn("assistant", "SAY"), _turn("user", "NEXT")]

        def expresses(turns: Sequence[Turn], words: str, shape: CallShape) -> bool:
            prompt = self._prompt(shaped_calls(turns, shape), tools)
            return _holds(prompt, words.split())

        if not expresses(two, "ASK CALL MORE RESULT SECOND SAY NEXT", shape):
            shape = replace(shape, one_by_one=True)
        places: tuple[Literal["beside", "before"], ...] = ("beside", "before")
        for place in places:
            tried = replace(shape, text=place)
            if expresses(text, "ASK TEXT CALL RESULT SAY NEXT", tried):
                return tried
        return shape

    def _switch(self) -> str | None:
        ask = [_turn("user", "ASK")]
        for name in SWITCHES:
            on, off = (self._prompt(ask, [], {name: value}) for value in (True, False))
            if on and off and on != off:
                return name
        return None

    def _efforts(self, variables: Mapping[str, Any]) -> tuple[str, ...]:
        words = [w for w in EFFORTS[1:] if re.search(f"[\"']{w}[\"']", self._source)]
        ask = [_turn("user", "ASK")]
        prompts = {
            word: self._prompt(ask, [], {**variables, "reasoning_effort": word})
            for word in (words if len(words) > 1 else USUAL_EFFORTS)
        }
        rendered = {word: prompt for word, prompt in prompts.items() if prompt}
        return tuple(rendered) if len(set(rendered.values())) > 1 else ()

    def _shows(
        self,
        turns: Sequence[Turn],
        words: Sequence[str],
        *,
        tools: Tools = (),
    ) -> bool:
        return _holds(self._prompt(turns, tools), words)

    def _prompt(
        self,
        turns: Sequence[Turn],
        tools: Tools,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """Return what the template makes of it; "" where it refuses."""
        given = [as_parts(turn) for turn in turns] if self._plain.content_as_parts else turns
        try:
            return self._render(given, tools or self._plain.no_tools, variables or {})
        except TEMPLATE_FAILURES:
            return ""


def _turn(role: str, word: str) -> Turn:
    return {"role": role, "content": f"PROBE{word}"}


def _calling(text: str, *names: str) -> Turn:
    """Return a turn of the assistant that calls; the first call has an argument to be found."""
    values = [{"PROBEKEY": "PROBEVALUE"}, {"PROBEOTHER": "PROBEELSE"}]
    calls = [
        {
            "id": f"call_of_{name}",
            "type": "function",
            "function": {"name": f"PROBE{name}", "arguments": arguments},
        }
        for name, arguments in zip(names, values, strict=False)
    ]
    return {"role": "assistant", "content": text and f"PROBE{text}", "tool_calls": calls}


def _result(name: str, word: str) -> Turn:
    call = {"name": f"PROBE{name}", "tool_call_id": f"call_of_{name}"}
    return {"role": "tool", "content": f"PROBE{word}", **call}


def _holds(prompt: str, words: Sequence[str]) -> bool:
    """Whether all of *words* are there, in this order."""
    places = [prompt.find(f"PROBE{word}") for word in words]
    return -1 not in places and places == sorted(places)


def _is_python(prompt: str) -> bool:
    """Whether the template has written a call, or a content that is null, as Python shows it."""
    before_call = prompt[prompt.find("PROBEASK") : prompt.find("PROBECALL")]
    return any(f"'PROBE{word}'" in prompt for word in ("CALL", "KEY")) or "None" in before_call
