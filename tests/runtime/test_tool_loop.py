"""A tool loop over HTTP with nothing faked but the tokens: offer, call, result, answer."""

from __future__ import annotations

import dataclasses
from typing import Any

import openai

from cortex.runtime.chat import Chat, ChatOptions
from cortex.runtime.chat_template import ChatTemplate
from cortex.runtime.served_model import Limits
from cortex.runtime.text import TextSide
from fake_node import CHATML, FakeNode, says, serving, tiny_text

ADD: Any = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
    },
}
OPENED = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}{# </think> #}")


def text_side(template: str) -> TextSide:
    """A real text side that writes tools as words."""
    side = tiny_text()
    chat = Chat(side.tokenizer, ChatTemplate(template, {}), ChatOptions(tool_prompt="hermes"))
    return dataclasses.replace(side, chat=chat)


def prompt_of(node: FakeNode) -> str:
    """The text of the last prompt."""
    side = tiny_text().tokenizer
    return b"".join(side.bytes_of(i) for i in node.asked[-1][1]).decode()


async def test_a_call_goes_out_and_its_result_comes_back() -> None:
    node = FakeNode("m")
    node.models["m"].text = text_side(OPENED)
    node.models["m"].limits = Limits(2048, 8, 4096)
    messages: list[Any] = [{"role": "user", "content": "1+1?"}]
    async with (
        serving(node) as server,
        openai.AsyncOpenAI(base_url=str(server.make_url("/v1")), api_key="none") as client,
    ):
        create = client.chat.completions.create
        node.script = says(
            'I add.\n</think>\n\n<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'
        )
        first = await create(model="m", messages=messages, tools=[ADD])
        said = first.choices[0].message
        assert said.tool_calls
        result = {"role": "tool", "tool_call_id": said.tool_calls[0].id, "content": "2"}
        messages += [said.model_dump(exclude_none=True), result]
        node.script = says("It is two.\n</think>\n\nTwo.")

        last = await create(model="m", messages=messages, tools=[ADD])

    assert first.choices[0].finish_reason == "tool_calls"
    assert (said.content, said.model_extra) == (None, {"reasoning_content": "I add."})
    assert prompt_of(node).endswith(
        '<|im_start|>assistant\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
        "<|im_end|>\n<|im_start|>user\n<tool_response>\n2\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n<think>\n"
    )
    assert last.choices[0].message.content == "Two."
