"""How a conversation ends for the model: asked for a new turn, left as it is, or its last one open.

    add_generation_prompt  continue_final_message   the prompt ends
    unsaid or true         unsaid or false          where the assistant's next turn begins
    false                  unsaid or false          behind the last turn
    unsaid or false        true                     inside the last turn, which is the assistant's

The names and rules are vLLM's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from cortex.ipc.errors import InvalidRequest


class Message(Protocol):
    """A turn, as far as it can be continued."""

    @property
    def role(self) -> str:
        """Whose it is."""

    @property
    def tool_calls(self) -> Sequence[object] | None:
        """What it calls."""


class EndsInTurn:
    """What chat and its tokens share; a struct cannot inherit the fields of two."""

    __slots__ = ()

    add_generation_prompt: bool | None
    continue_final_message: bool | None

    @property
    def asks_for_turn(self) -> bool:
        """Whether the prompt ends where a new turn begins."""
        return self.add_generation_prompt is not False and not self.continue_final_message

    def refuse_bad_end(self, messages: Sequence[Message] | None) -> None:
        """Raise InvalidRequest where no turn of *messages* can be continued as is asked."""
        if not self.continue_final_message:
            return
        if self.add_generation_prompt:
            raise InvalidRequest(
                "'continue_final_message' leaves the last turn open, and 'add_generation_prompt' "
                "begins a new one: ask for one of them",
                param="continue_final_message",
            )
        if not messages:
            raise InvalidRequest(
                "'continue_final_message' needs messages", param="continue_final_message"
            )
        place = f"messages[{len(messages) - 1}]"
        if messages[-1].role != "assistant":
            raise InvalidRequest(
                f"only a turn of the assistant can be continued, not one of {messages[-1].role!r}",
                param=f"{place}.role",
            )
        if messages[-1].tool_calls:
            raise InvalidRequest(
                "a turn that calls tools cannot be continued", param=f"{place}.tool_calls"
            )
