"""A conversation to a prompt: the chat template of a checkpoint.

What the template would lose is known from its probe (``template_probe.py``) and is expressed in
another way (``turn_shapes.py``, ``hermes_turns.py``), or refused in words that name the place. The
program itself runs in a sandbox (``template_sandbox.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

from cortex.ipc.errors import InvalidRequest, Unloadable, UnsupportedParameter
from cortex.ipc.openai import ChatMessage
from cortex.runtime.chat_messages import Turn, turns_of
from cortex.runtime.hermes_turns import hermes_turns
from cortex.runtime.template_probe import TemplateProbe, Tools
from cortex.runtime.template_sandbox import TEMPLATE_FAILURES, SandboxedTemplate
from cortex.runtime.turn_shapes import as_parts, fold_systems, shaped_calls

END_MARK = "THE-LAST-TURN-IS-OPEN "
"""Put behind a turn that is to be continued: what the template writes from there on is cut off. Its
last character tells whether the template keeps the spaces at a text's end."""

RESERVED = frozenset({"messages", "tools", "documents", "add_generation_prompt"})


class ChatTemplate:
    """A compiled template; ``render`` may be called from several threads.

    *special_tokens* are the variables ``bos_token``, ``eos_token`` and so on. Raise Unloadable for
    a template that is no template, or cannot say what a user said.
    """

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str],
        *,
        now: Callable[[], datetime] = lambda: datetime.now().astimezone(),
    ) -> None:
        self.source = source
        self._special_tokens = dict(special_tokens)
        try:
            self._template = SandboxedTemplate(source, now)
        except TEMPLATE_FAILURES as exc:
            raise _unusable(f"it does not compile: {exc}") from exc
        expressible = TemplateProbe(self._run, source).result()
        if expressible is None:
            raise _unusable("it does not show what a user says")
        self.expressible = expressible

    def render(
        self,
        messages: Sequence[ChatMessage],
        template_kwargs: Mapping[str, Any] | None = None,
        *,
        tools: Tools = (),
        tools_as_words: bool = False,
        add_generation_prompt: bool = True,
        continues_last: bool = False,
    ) -> str:
        """Return the prompt; raise InvalidRequest or UnsupportedParameter, naming the place.

        *template_kwargs* (``enable_thinking``, ...) become variables of the template.
        *tools_as_words* writes tools, calls and results in the Hermes format. *continues_last* ends
        the prompt behind the text of the last turn, as transformers' ``continue_final_message``.
        """
        template_kwargs = template_kwargs or {}
        for name in template_kwargs:
            if name in RESERVED or name in self._special_tokens:
                raise UnsupportedParameter(
                    f"{name!r} cannot be set from outside of the chat template",
                    param=f"chat_template_kwargs.{name}",
                )
        turns = turns_of(messages)
        said = turns[-1]["content"]
        if continues_last:
            turns[-1]["content"] += END_MARK
        variables = {**template_kwargs, "add_generation_prompt": add_generation_prompt}
        try:
            if tools_as_words:
                turns, tools = hermes_turns(turns, tools), ()
            text = self._run(self._given(turns), tools or self.expressible.no_tools, variables)
        except TEMPLATE_FAILURES as exc:
            raise InvalidRequest(
                f"the model's chat template refuses this conversation: {exc}", param="messages"
            ) from exc
        return _left_open(text, said, f"messages[{len(messages) - 1}]") if continues_last else text

    def _run(self, turns: Iterable[Turn], tools: Tools | None, variables: Mapping[str, Any]) -> str:
        return self._template.run(
            {
                "add_generation_prompt": True,
                **self._special_tokens,
                **variables,
                "messages": list(turns),
                "tools": tools if tools is None else list(tools),
                "documents": None,
            }
        )

    def _given(self, turns: list[Turn]) -> list[Turn]:
        """Return *turns* in a form of which this template loses nothing."""
        can = self.expressible
        for i, turn in enumerate(turns):
            self._refuse(turn, f"messages[{i}]")
        if can.calls is not None:
            turns = shaped_calls(turns, can.calls)
        if can.systems != "anywhere":
            turns = fold_systems(turns, keep_first=can.systems == "first")
        return [as_parts(turn) for turn in turns] if can.content_as_parts else turns

    def _refuse(self, turn: Turn, place: str) -> None:
        if "name" in turn and turn["role"] != "tool" and not self.expressible.names:
            raise UnsupportedParameter(
                "this model's chat template has no place for a speaker's name",
                param=f"{place}.name",
            )
        is_of_tools = turn["role"] == "tool" or "tool_calls" in turn
        if is_of_tools and self.expressible.calls is None:
            raise UnsupportedParameter(
                "this model's chat template has no place for calls of tools and their results; "
                'loaded with tool_prompt = "hermes" it gets them as text',
                param=f"{place}.tool_calls" if "tool_calls" in turn else f"{place}.role",
            )


def _left_open(prompt: str, said: str, place: str) -> str:
    """Return *prompt* up to where the last turn has *said* its text; raise InvalidRequest."""
    at = prompt.rfind(END_MARK.rstrip())
    if at < 0 or said.strip() not in prompt[:at]:
        raise InvalidRequest(
            "this model's chat template does not show the last turn as it is, so it cannot be "
            "continued",
            param=place,
        )
    return prompt[:at] if prompt.startswith(END_MARK, at) else prompt[:at].rstrip()


def _unusable(why: str) -> Unloadable:
    return Unloadable(
        f"the checkpoint's chat template cannot be used: {why}", kind="chat_template_unsupported"
    )
