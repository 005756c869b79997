"""Anthropic's turns as the messages of a chat request, in their order.

turn         becomes
system       a system message, wherever it stands; the node folds it where the template must have it
             so. With ``clear_at: next_user_message`` nothing, once the user has spoken again
user         the results in it as messages of tools, then what else it says
assistant    text, reasoning_content out of its thinking, and calls. A tool that somebody else has
             run for it (``server_tool_use`` and ``..._tool_result``) is a call and its result, as
             if the client had run it: the message so far, the tool's message, and what follows

A leading system block that is only Claude Code's billing line is dropped, unless the operator wants
it, because it differs in every conversation and would defeat every prefix cache.
"""

from __future__ import annotations

from cortex.gateway.dialects.message_blocks import (
    call_of,
    content_of,
    part_of,
    parts_of,
    placed,
    readable,
    result_of,
)
from cortex.gateway.dialects.message_request import Block, MessagesRequest, Turn
from cortex.gateway.dialects.message_thinking import thinking_of

BILLING = "x-anthropic-billing-header:"
CALLS = frozenset({"tool_use", "server_tool_use", "mcp_tool_use"})


def chat_messages(request: MessagesRequest, *, strip_billing_block: bool) -> list[Block]:
    """Return the conversation of *request*; raise ApiError, naming the place."""
    messages = _system(request.system, strip_billing_block)
    spoken = [at for at, turn in enumerate(request.messages) if turn.role == "user"]
    for at, turn in enumerate(request.messages):
        is_over = turn.clear_at == "next_user_message" and at < max(spoken, default=0)
        if not is_over:
            messages += _OF_ROLE[turn.role](turn, f"messages.{at}.content")
    return messages


def _system(given: str | list[Block] | None, strip_billing_block: bool) -> list[Block]:
    blocks = [{"type": "text", "text": given}] if isinstance(given, str) else given or []
    if strip_billing_block and blocks and _is_billing_line(blocks[0]):
        blocks = blocks[1:]
    parts = parts_of(blocks, "system")
    return [{"role": "system", "content": content_of(parts)}] if parts else []


def _is_billing_line(block: Block) -> bool:
    text = block.get("text")
    line = text.strip() if isinstance(text, str) else ""
    return line.startswith(BILLING) and "\n" not in line


def _of_system(turn: Turn, place: str) -> list[Block]:
    parts = parts_of(turn.blocks, place)
    return [{"role": "system", "content": content_of(parts)}] if parts else []


def _of_user(turn: Turn, place: str) -> list[Block]:
    results: list[Block] = []
    said: list[Block] = []
    for block, where in placed(turn.blocks, place):
        if block.get("type") == "tool_result":
            results.append(result_of(block, where))
        else:
            said += part_of(block, where)
    if results and not said:
        return results
    return [*results, {"role": "user", "content": content_of(said)}]


def _of_assistant(turn: Turn, place: str) -> list[Block]:
    answer = _Assistant()
    for block, where in placed(turn.blocks, place):
        answer.add(block, where)
    return [*answer.before, *answer.message(always=not answer.before)]


class _Assistant:
    """One turn of the assistant, in which others may have run tools for it."""

    def __init__(self) -> None:
        self.before: list[Block] = []
        """What came before the last result."""
        self._said: list[Block] = []
        self._thought: list[str] = []
        self._calls: list[Block] = []

    def add(self, block: Block, place: str) -> None:
        """Take the next block."""
        kind = str(block.get("type"))
        if kind == "thinking":
            self._thought += filter(None, [thinking_of(block)])
        elif kind in CALLS:
            self._calls.append(call_of(block, place))
        elif kind.endswith("_tool_result"):
            result = {**block, "content": readable(block.get("content"))}
            self.before += [*self.message(), result_of(result, place)]
            self._said, self._thought, self._calls = [], [], []
        else:
            self._said += part_of(block, place)

    def message(self, *, always: bool = False) -> list[Block]:
        """Return the message so far; none where nothing is said, unless *always*."""
        if not (always or self._said or self._thought or self._calls):
            return []
        message: Block = {"role": "assistant", "content": content_of(self._said)}
        if self._thought:
            message["reasoning_content"] = "\n".join(self._thought)
        if self._calls:
            message["tool_calls"] = self._calls
        return [message]


_OF_ROLE = {"system": _of_system, "user": _of_user, "assistant": _of_assistant}
