"""An answer may continue the assistant's last turn: its reading and its grammar begin there."""

from __future__ import annotations

from typing import Any

import pytest

from completion_calls import CHAT
from cortex.ipc.errors import InvalidRequest
from cortex.ipc.messages import ReasoningBudget
from cortex.ipc.openai import ChatMessage
from cortex.runtime.conversation import ChatPrompt, ReasoningWish
from cortex.runtime.pieces import CallBegins, Piece, Reasoning, Text
from cortex.runtime.structured import Demand
from fake_node import FakeNode, serving
from tiny_chat import ALWAYS, ASK, PLAIN, TOOL, TOOLS_AND_THOUGHT, chat, ids, prompt_of, text_of

TRIMMED = "{%- for m in messages %}[{{ m.role }}]{{ m.content | trim }};{% endfor %}"
LOST = "{%- for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
LLAMA = (
    "{%- for t in tools or [] %}{{ t | tojson }}{% endfor %}"
    "{%- for m in messages %}[{{ m.role }}]{{ m.content }}{% for c in m.tool_calls or [] %}"
    '{"name": "{{ c.function.name }}", "parameters": {{ c.function.arguments | tojson }}}'
    "{% endfor %}{% endfor %}"
)


def continued(template: str, said: str | list[Any], **more: Any) -> ChatPrompt:
    options = {"add_generation_prompt": False, "continues_last": True, **more}
    return prompt_of(chat(template), ASK, ChatMessage("assistant", said), **options)


def read(prompt: ChatPrompt, answer: str) -> list[Piece]:
    reader = prompt.reader()
    return reader.add(answer) + reader.flush()


@pytest.mark.parametrize("said", ["One and", "One and ", "", [{"type": "text", "text": "One and"}]])
def test_a_prompt_ends_where_the_last_turn_does(said: Any) -> None:
    text = said if isinstance(said, str) else "One and"

    assert text_of(continued(PLAIN, said)).endswith(f"[assistant]{text}")


def test_spaces_that_a_template_trims_are_not_there() -> None:
    assert text_of(continued(TRIMMED, "One and ")).endswith("[assistant]One and")


def test_a_template_that_does_not_show_the_turn_is_named() -> None:
    with pytest.raises(InvalidRequest, match="cannot be continued") as refused:
        continued(LOST, "One and")

    assert refused.value.param == "messages[1]"


def test_what_continues_a_text_is_text_and_takes_no_reasoning() -> None:
    wish = ReasoningWish(is_enabled=True, budget_tokens=5)

    prompt = continued(ALWAYS, "One and", reasoning=wish)

    assert prompt.reasoning_budget is None
    assert read(prompt, "<think> no") == [Text("<think> no")]


def test_what_continues_a_thought_is_a_thought_up_to_its_end() -> None:
    wish = ReasoningWish(is_enabled=True, budget_tokens=5)

    prompt = continued(ALWAYS, "<think>One and", reasoning=wish)

    [end] = ids("</think>")
    assert end is not None
    assert prompt.reasoning_budget == ReasoningBudget(5, (), (end,))
    assert read(prompt, " one</think>Two") == [Reasoning(" one"), Text("Two")]


def test_a_turn_that_has_said_nothing_is_as_new() -> None:
    assert read(continued(ALWAYS, ""), "<think>x</think>Two") == [Reasoning("x"), Text("Two")]


def test_a_grammar_covers_only_what_is_generated() -> None:
    demand = Demand("start: /[0-9]+/", "structured_outputs.regex")

    grammar = continued(ALWAYS, "It is ", text_demand=demand).grammar

    assert grammar is not None
    assert "start: @text" in grammar, "no reasoning comes before it"


def test_a_call_may_follow_a_text_that_was_begun() -> None:
    prompt = continued(TOOLS_AND_THOUGHT, "I call ", tools=[TOOL])

    pieces = read(prompt, '<tool_call>{"name": "add", "arguments": {}}</tool_call>')

    assert any(isinstance(piece, CallBegins) for piece in pieces)


def test_what_would_be_a_call_only_at_the_start_is_text_within() -> None:
    answer = '{"name": "add", "parameters": {}}'

    assert read(continued(LLAMA, "So ", tools=[TOOL]), answer) == [Text(answer)]
    assert isinstance(read(continued(LLAMA, "", tools=[TOOL]), answer)[0], CallBegins)


async def test_a_turn_is_continued_over_http_as_it_is_tokenised() -> None:
    node = FakeNode("m")
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "The fo"}]
    body = {"model": "m", "messages": messages, "continue_final_message": True}

    async with serving(node) as client:
        async with client.post("/tokenize", json=body) as response:
            tokens = (await response.json())["tokens"]
        async with client.post(CHAT, json=body) as response:
            assert response.status == 200
        async with client.post(CHAT, json=body | {"add_generation_prompt": True}) as response:
            assert response.status == 400

    side = node.models["m"].text
    said = b"".join(map(side.token_bytes, tokens)).decode()
    assert said.endswith("<|im_start|>assistant\nThe fo")
    assert node.asked[0][1] == tokens


async def test_a_conversation_may_be_left_as_it_is() -> None:
    node = FakeNode("m")
    messages = [{"role": "user", "content": "Hi"}]

    async with serving(node) as client:
        body = {"model": "m", "messages": messages, "add_generation_prompt": False}
        async with client.post(CHAT, json=body) as response:
            assert response.status == 200

    said = b"".join(map(node.models["m"].text.token_bytes, node.asked[0][1])).decode()
    assert said.endswith("Hi<|im_end|>\n")
