"""What is done to turns so that a chat template loses nothing of them.

Which of it is done says the template's probe (``template_probe.py``).
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from cortex.ipc.errors import UnsupportedParameter
from cortex.runtime.chat_messages import Turn

FOLD_SEPARATOR = "\n\n"


def as_parts(turn: Turn) -> Turn:
    """Return *turn* with its text as a list of one part."""
    if not isinstance(turn["content"], str):
        return turn
    return {**turn, "content": [{"type": "text", "text": turn["content"]}]}


@dataclass(frozen=True, slots=True)
class CallShape:
    """How a template wants the calls and results of a conversation."""

    arguments_as_text: bool = False
    nine_letter_ids: bool = False
    no_content: Literal[""] | None = None
    """The content of a turn that only calls."""
    one_by_one: bool = False
    """One call per turn, its result behind it."""
    text: Literal["beside", "before"] | None = None
    """Where the text of a turn that also calls goes; None where the template would lose it."""


def shaped_calls(turns: Iterable[Turn], shape: CallShape) -> list[Turn]:
    """Return *turns* with their calls and results in *shape*; raise UnsupportedParameter."""
    parted = list(_text_apart(turns, shape))
    if shape.one_by_one:
        parted = list(_one_by_one(parted))
    return [_shaped(turn, shape) for turn in parted]


def _text_apart(turns: Iterable[Turn], shape: CallShape) -> Iterator[Turn]:
    for i, turn in enumerate(turns):
        if not turn.get("tool_calls") or not turn["content"] or shape.text == "beside":
            yield turn
            continue
        if shape.text is None:
            raise UnsupportedParameter(
                "this model's chat template has no place for text beside a call of a tool",
                param=f"messages[{i}].content",
            )
        yield {name: value for name, value in turn.items() if name != "tool_calls"}
        yield {"role": turn["role"], "content": "", "tool_calls": turn["tool_calls"]}


def _one_by_one(turns: Sequence[Turn]) -> Iterator[Turn]:
    at = 0
    while at < len(turns):
        turn = turns[at]
        at += 1
        if len(turn.get("tool_calls", ())) < 2:
            yield turn
            continue
        results = list(itertools.takewhile(lambda t: t["role"] == "tool", turns[at:]))
        at += len(results)
        for i, call in enumerate(turn["tool_calls"]):
            own = [result for result in results if result.get("tool_call_id") == call["id"]]
            yield {
                **(turn if i == 0 else {"role": turn["role"], "content": ""}),
                "tool_calls": [call],
            }
            yield from own
            results = [result for result in results if result not in own]
        yield from results


def _shaped(turn: Turn, shape: CallShape) -> Turn:
    shaped = dict(turn)
    if turn.get("tool_calls"):
        shaped["content"] = turn["content"] or shape.no_content
        shaped["tool_calls"] = [_shaped_call(call, shape) for call in turn["tool_calls"]]
    if shape.nine_letter_ids and "tool_call_id" in turn:
        shaped["tool_call_id"] = _nine_letters(turn["tool_call_id"])
    return shaped


def _shaped_call(call: dict[str, Any], shape: CallShape) -> dict[str, Any]:
    function = call["function"]
    arguments = function["arguments"]
    if shape.arguments_as_text:
        arguments = json.dumps(arguments, ensure_ascii=False)
    return {
        **call,
        "id": _nine_letters(call["id"]) if shape.nine_letter_ids else call["id"],
        "function": {**function, "arguments": arguments},
    }


def _nine_letters(call_id: str) -> str:
    """Return *call_id*, or nine characters in its place, as Mistral's templates want them."""
    if re.fullmatch("[a-zA-Z0-9]{9}", call_id):
        return call_id
    return hashlib.sha256(call_id.encode()).hexdigest()[:9]


def fold_systems(turns: Iterable[Turn], *, keep_first: bool) -> list[Turn]:
    """Return *turns* with no system turn, save a leading one if *keep_first*.

    Leading system turns become one. Any other joins the user turn that follows it, else the one
    before it, else becomes a user turn where it stands, behind the results of calls. Every word is
    kept.
    """
    folded: list[Turn] = []
    pending: list[str] = []  # system texts that wait for a user turn right behind them
    for turn in turns:
        if turn["role"] == "system":
            if keep_first and not pending and [t["role"] for t in folded] in ([], ["system"]):
                _append(folded, turn)
            else:
                pending.append(turn["content"])
        elif turn["role"] == "tool":  # nothing comes between a call and its result
            folded.append(turn)
        elif turn["role"] == "user":
            texts = [*pending, turn["content"]]
            folded.append({**turn, "content": FOLD_SEPARATOR.join(texts)})
            pending = []
        else:
            _settle(folded, pending)
            pending = []
            folded.append(turn)
    _settle(folded, pending)
    return folded


def _append(folded: list[Turn], turn: Turn) -> None:
    """Start the leading system turn, or add to it."""
    if folded:
        joined = FOLD_SEPARATOR.join([folded[0]["content"], turn["content"]])
        folded[0] = {**folded[0], "content": joined}
    else:
        folded.append(turn)


def _settle(folded: list[Turn], pending: Sequence[str]) -> None:
    """Put texts that no user turn follows where they stand: into the user turn before them."""
    if not pending:
        return
    text = FOLD_SEPARATOR.join(pending)
    if folded and folded[-1]["role"] == "user":
        joined = FOLD_SEPARATOR.join([folded[-1]["content"], text])
        folded[-1] = {**folded[-1], "content": joined}
    else:
        folded.append({"role": "user", "content": text})
