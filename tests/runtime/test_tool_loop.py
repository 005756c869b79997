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


async def test_a_conversation_with_calls_goes_on_without_tools() -> None:
    node = FakeNode("m")
    node.models["m"].text = text_side(CHATML)
    node.models["m"].limits = Limits(2048, 8, 4096)
    call = {"id": "c", "function": {"name": "add", "arguments": '{"a": 1}'}}
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "2"},
        {"role": "system", "content": "In words."},
        {"role": "user", "content": "So?"},
    ]
    node.script = says('<tool_call>{"name": "add", "arguments": {}}</tool_call>')

    body = {"model": "m", "messages": messages, "tools": [ADD], "tool_choice": "none"}
    async with serving(node) as client, client.post("/v1/chat/completions", json=body) as response:
        answer = await response.json()

    assert response.status == 200, answer
    said = answer["choices"][0]["message"]
    assert "tool_calls" not in said, "what looks like a call is text where none may come"
    assert said["content"].startswith("<tool_call>")
    prompt = prompt_of(node)
    assert "<tools>" not in prompt
    assert [prompt.index(w) for w in ("Be brief.", '"name": "add"', "2\n</tool_response>")]
    assert prompt.index("In words.") < prompt.index("So?")
