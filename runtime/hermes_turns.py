"""Tools, calls and results as words in ordinary turns, for chat templates that know none.

In the format that the Hermes models have made common: the tools stand in a system turn, calls in
the assistant's own text, results in a user turn. Models that were not trained on it may still
follow it, for the system turn explains it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from cortex.runtime.chat_messages import Turn
from cortex.runtime.turn_shapes import FOLD_SEPARATOR

FORMAT = "hermes"

INSTRUCTIONS = """\
You can call tools. These are there, one JSON object a line:
<tools>
{tools}
</tools>
To call one, write its name and its arguments as a JSON object between <tool_call> and </tool_call>:
<tool_call>
{{"name": "the tool's name", "arguments": {{"parameter": "value"}}}}
</tool_call>
Several calls may follow each other. Their results come between <tool_response> and \
</tool_response>. Where no tool helps, answer without one."""


def hermes_turns(turns: Iterable[Turn], tools: Sequence[Mapping[str, Any]]) -> list[Turn]:
    """Return *turns* without calls and results, and with *tools* described at the beginning."""
    written: list[Turn] = []
    if tools:
        lines = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
        written.append({"role": "system", "content": INSTRUCTIONS.format(tools=lines)})
    was_tool = False
    for turn in turns:
        is_tool = turn["role"] == "tool"
        if tools and turn["role"] == "system" and len(written) == 1:
            written[0] = _joined(turn, written[0]["content"])
        elif was_tool and (is_tool or turn["role"] == "user"):
            written[-1] = _joined(written[-1], _words(turn))
        else:
            written.append(_as_words(turn))
        was_tool = is_tool
    return written


def _joined(turn: Turn, text: str) -> Turn:
    return {**turn, "content": turn["content"] + FOLD_SEPARATOR + text}


def _as_words(turn: Turn) -> Turn:
    kept = {k: v for k, v in turn.items() if k not in {"tool_calls", "tool_call_id"}}
    if turn["role"] == "tool":
        kept = {"role": "user"}
    return {**kept, "content": _words(turn)}


def _words(turn: Turn) -> str:
    if turn["role"] == "tool":
        return f"<tool_response>\n{turn['content']}\n</tool_response>"
    calls = [
        f"<tool_call>\n{json.dumps(call['function'], ensure_ascii=False)}\n</tool_call>"
        for call in turn.get("tool_calls", ())
    ]
    return "\n".join([turn["content"], *calls] if turn["content"] else calls)
