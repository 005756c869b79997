"""The official OpenAI SDK, unmodified, against a neuron: tools, reasoning, choices, logprobs."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import openai
import pytest
from openai.types.chat import ChatCompletion
from structlog.testing import capture_logs

from cortex.ipc.errors import NodeFailed
from cortex.ipc.messages import ReasoningBudget
from cortex.ipc.ring import Flag, TokenRecord
from cortex.runtime.config import AdmissionConfig, CacheConfig, NeuronConfig
from cortex.runtime.pieces import PlainReader, Reader
from cortex.runtime.reasoning import FORMATS as REASONING
from cortex.runtime.reasoning import ReasoningReader
from cortex.runtime.tool_calls import ToolCallReader
from cortex.runtime.tool_formats import FORMATS as TOOLS
from fake_node import FakeNode, FakeText, Step, posting, says, serving, tiny_text
from fakes import until

LOOK = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "Look somewhere.",
        "parameters": {"type": "object", "properties": {"at": {"type": "string"}}},
    },
}
ASK: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
WITH_TOOLS: dict[str, Any] = {**ASK, "extra_body": {"tools": [LOOK]}}
"""In the body behind the SDK's back: its ``stream`` takes tools only where they are strict."""


def calling(form: str) -> Callable[[], Reader]:
    """Return readers of an answer that may call ``look``, written in *form*."""
    return lambda: ToolCallReader(TOOLS[form], {"look": LOOK["function"]["parameters"]})  # type: ignore[index] # a literal


def node_that(reader: Callable[[], Reader], script: Sequence[Step], **more: Any) -> FakeNode:
    """Return a node whose model says *script*, which is read by *reader*."""
    node = FakeNode("m")
    node.models["m"].text = FakeText(reader, **more)
    node.script = script
    return node


@asynccontextmanager
async def sdk(node: FakeNode, **options: Any) -> AsyncIterator[openai.AsyncOpenAI]:
    """A client of a neuron in front of *node*."""
    async with (
        serving(node, **options) as server,
        openai.AsyncOpenAI(
            base_url=str(server.make_url("/v1")), api_key="none", max_retries=0
        ) as client,
    ):
        yield client


async def whole(node: FakeNode, **ask: Any) -> ChatCompletion:
    """Return the SDK's answer."""
    async with sdk(node) as client:
        answer: ChatCompletion = await client.chat.completions.create(**ask)
        return answer


async def accumulated(node: FakeNode, **ask: Any) -> ChatCompletion:
    """Return what the SDK's own helper makes of the stream."""
    async with sdk(node) as client, client.chat.completions.stream(**ask) as stream:
        return await stream.get_final_completion()


ANSWERS = pytest.mark.parametrize("answered", [whole, accumulated])

WRITTEN = {
    "hermes": '<tool_call>\n{"name": "look", "arguments": {"at": "the fox"}}\n</tool_call>',
    "qwen_xml": (
        "<tool_call>\n<function=look>\n<parameter=at>\nthe fox\n</parameter>\n</function>\n"
        "</tool_call>"
    ),
    "llama3": '{"name": "look", "parameters": {"at": "the fox"}}',
    "mistral": '[TOOL_CALLS][{"name": "look", "arguments": {"at": "the fox"}}]',
}


@ANSWERS
@pytest.mark.parametrize("form", WRITTEN)
async def test_a_call_in_every_format_reaches_the_sdk(form: str, answered: Any) -> None:
    node = node_that(calling(form), says(WRITTEN[form]))

    answer = await answered(node, **WITH_TOOLS)

    choice = answer.choices[0]
    assert choice.finish_reason == "tool_calls"
    assert not choice.message.content
    [call] = choice.message.tool_calls
    assert (call.type, call.function.name) == ("function", "look")
    assert msgspec.json.decode(call.function.arguments) == {"at": "the fox"}
    assert call.id


@ANSWERS
async def test_text_and_two_calls_come_in_order(answered: Any) -> None:
    text = f"I look. {WRITTEN['hermes']}\n{WRITTEN['hermes']}"
    node = node_that(calling("hermes"), says(text))

    message = (await answered(node, **WITH_TOOLS)).choices[0].message

    assert message.content == "I look."
    assert len({call.id for call in message.tool_calls}) == 2
    assert {call.function.arguments for call in message.tool_calls} == {'{"at": "the fox"}'}


@ANSWERS
async def test_a_client_that_wants_one_call_gets_one_and_the_generation_ends(answered: Any) -> None:
    text = f"{WRITTEN['hermes']}\n{WRITTEN['hermes']}"
    node = node_that(calling("hermes"), [*says(text, None), asyncio.Event()])

    answer = await answered(node, **ASK, extra_body={"tools": [LOOK], "parallel_tool_calls": False})

    assert len(answer.choices[0].message.tool_calls) == 1
    assert answer.choices[0].finish_reason == "tool_calls"
    assert node.generations[0].cancelled.is_set()


async def test_a_call_streams_as_it_forms() -> None:
    node = node_that(calling("hermes"), says(WRITTEN["hermes"]))

    async with sdk(node) as client:
        stream = await client.chat.completions.create(**WITH_TOOLS, stream=True)
        deltas = [chunk.choices[0].delta async for chunk in stream]

    first, *rest = [delta.tool_calls[0] for delta in deltas if delta.tool_calls]
    assert (first.index, first.type, first.function.name) == (0, "function", "look")
    assert first.function.arguments == ""
    assert len(rest) > 1
    assert {(call.index, call.id, call.type, call.function.name) for call in rest} == {
        (0, None, None, None)
    }
    assert "".join(call.function.arguments for call in rest) == '{"at": "the fox"}'


MALFORMED = '<tool_call>{"name": "look", "arguments": {"at": oops}}</tool_call> Sorry.'


async def test_a_malformed_call_is_shown_as_text_where_the_answer_is_whole() -> None:
    node = node_that(calling("hermes"), says(MALFORMED))

    choice = (await whole(node, **WITH_TOOLS)).choices[0]

    assert "oops" in (choice.message.content or "")
    assert (choice.finish_reason, choice.message.tool_calls) == ("stop", None)


async def test_a_malformed_call_ends_a_stream_with_an_error_and_the_generation() -> None:
    node = node_that(calling("hermes"), [*says(MALFORMED, None), asyncio.Event()])
    body = {**ASK, "tools": [LOOK], "stream": True}

    with capture_logs() as lines:
        async with posting(node, "/v1/chat/completions", body) as response:
            frames = (await response.text()).split("\n\n")[:-1]

    error = msgspec.json.decode(frames[-1].removeprefix("data: "))["error"]
    assert (error["code"], error["type"]) == ("malformed_tool_call", "server_error")
    assert "data: [DONE]" not in frames
    assert node.generations[0].cancelled.is_set()
    [finished] = [line for line in lines if line["event"] == "request finished"]
    assert (finished["status"], finished["error"]) == (502, "malformed_tool_call")


async def test_a_stream_that_was_cut_within_a_call_says_length() -> None:
    node = node_that(calling("hermes"), says(WRITTEN["hermes"][:55], Flag.LENGTH))

    async with sdk(node) as client:
        stream = await client.chat.completions.create(**WITH_TOOLS, stream=True)
        chunks = [chunk.choices[0] async for chunk in stream]

    assert chunks[-1].finish_reason == "length"
    arguments = [c.delta.tool_calls[0].function.arguments for c in chunks if c.delta.tool_calls]
    assert '{"at": "the fox"}'.startswith("".join(arguments))


async def test_what_a_request_says_of_tools_and_thinking_reaches_the_text_side() -> None:
    node = node_that(PlainReader, says("Yes."), budget=ReasoningBudget(9, (), (1,)))
    more = {
        "tools": [LOOK],
        "tool_choice": "auto",
        "thinking": {"type": "enabled", "budget_tokens": 9},
        "chat_template_kwargs": {"x": 1},
    }

    await whole(node, **ASK, reasoning_effort="high", extra_body=more)

    [conversation] = node.models["m"].text.conversations
    assert conversation.tools == [LOOK]
    wish = conversation.reasoning
    assert (wish.is_enabled, wish.effort, wish.budget_tokens) == (True, "high", 9)
    assert conversation.template_kwargs == {"x": 1}
    assert node.asked[0][2].reasoning_budget == ReasoningBudget(9, (), (1,))


async def test_tools_that_must_not_be_called_are_not_in_the_prompt() -> None:
    node = node_that(PlainReader, says("Yes."))

    await whole(node, **ASK, tools=[LOOK], tool_choice="none")

    assert node.models["m"].text.conversations[0].tools == []


def thinking() -> Reader:
    """Return the reader of an answer that begins with reasoning."""
    return ReasoningReader(REASONING["think"], PlainReader(), is_open=False)


@ANSWERS
async def test_reasoning_stands_beside_the_answer_and_is_counted(answered: Any) -> None:
    node = node_that(thinking, says("<think>It is hard.</think>Yes."), reasons=True)

    answer = await answered(node, **ASK, extra_body={"stream_options": {"include_usage": True}})

    message = answer.choices[0].message
    assert (message.content, message.reasoning_content) == ("Yes.", "It is hard.")
    details = answer.usage.completion_tokens_details
    assert details.reasoning_tokens == len(says("<think>It is hard.", None))


async def test_a_model_that_does_not_reason_does_not_count_it() -> None:
    answer = await whole(node_that(PlainReader, says("Yes.")), **ASK)

    assert answer.usage is not None
    assert answer.usage.completion_tokens_details is None


THREE = ["Yes.", "No, no.", "Perhaps."]


def three() -> FakeNode:
    """Return a node whose next three sequences say THREE."""
    node = FakeNode("m")
    node.scripts = [says(text) for text in THREE]
    return node


@ANSWERS
async def test_several_choices_come_by_index_and_share_a_prompt(answered: Any) -> None:
    node = three()

    answer = await answered(
        node, **ASK, n=3, seed=7, extra_body={"stream_options": {"include_usage": True}}
    )

    assert [(c.index, c.message.content) for c in answer.choices] == [*enumerate(THREE)]
    assert [sampling.seed for _, _, sampling in node.asked] == [7, 8, 9]
    assert answer.usage.prompt_tokens == len(node.asked[0][1])
    assert answer.usage.completion_tokens == sum(len(says(text)) for text in THREE)


async def test_several_completions_come_by_index() -> None:
    async with sdk(three()) as client:
        answer = await client.completions.create(model="m", prompt="hi", n=3, best_of=3)

    assert [(c.index, c.text) for c in answer.choices] == [*enumerate(THREE)]


async def test_a_choice_that_meets_its_stop_string_ends_alone() -> None:
    node = FakeNode("m")
    node.scripts = [[*says("One STOP", None), asyncio.Event()], says("Another one.")]

    answer = await whole(node, **ASK, n=2, stop="STOP")

    assert [choice.message.content for choice in answer.choices] == ["One ", "Another one."]
    assert node.generations[0].cancelled.is_set()


@pytest.mark.parametrize("stream", [True, False])
async def test_one_choice_that_fails_fails_the_request_and_cancels_the_others(stream: bool) -> None:
    node = FakeNode("m")
    node.scripts = [[asyncio.Event()], [*says("Par", None), NodeFailed("the device died")]]

    with pytest.raises(openai.APIError, match="the device died"):
        await (accumulated if stream else whole)(node, **ASK, n=2)

    assert node.generations[0].cancelled.is_set()


async def test_a_client_that_leaves_cancels_all_its_choices() -> None:
    node = FakeNode("m")
    node.script = [asyncio.Event()]

    async with sdk(node) as client:
        async with asyncio.TaskGroup() as tasks:
            asking = tasks.create_task(client.chat.completions.create(**ASK, n=3))
            await until(lambda: len(node.generations) == 3)
            asking.cancel()
        await until(lambda: all(g.cancelled.is_set() for g in node.generations))


def seats(count: int) -> NeuronConfig:
    """Return a configuration with so many seats, and no queue."""
    admission = AdmissionConfig(max_in_flight=count, max_queue_depth=0)
    return NeuronConfig(admission=admission, cache=CacheConfig("/nonexistent"))


async def test_each_choice_takes_a_seat() -> None:
    node = FakeNode("m")
    node.script = [asyncio.Event()]

    async with sdk(node, config=seats(3)) as client, asyncio.TaskGroup() as tasks:
        running = tasks.create_task(client.chat.completions.create(**ASK, n=2))
        await until(lambda: len(node.generations) == 2)
        with pytest.raises(openai.InternalServerError, match="seats"):
            await client.chat.completions.create(**ASK, n=2)
        running.cancel()


async def test_more_choices_than_there_are_seats_are_refused() -> None:
    async with sdk(FakeNode("m"), config=seats(3)) as client:
        with pytest.raises(openai.BadRequestError, match="at most 3") as refusal:
            await client.chat.completions.create(**ASK, n=4)

    assert refusal.value.param == "n"


async def test_the_line_of_a_request_counts_choices_calls_and_reasoning() -> None:
    def both() -> Reader:
        return ReasoningReader(REASONING["think"], calling("hermes")(), is_open=False)

    node = node_that(both, says(f"<think>Hm.</think>{WRITTEN['hermes']}"), reasons=True)

    with capture_logs() as lines:
        await whole(node, **ASK, n=2, tools=[LOOK])

    [finished] = [line for line in lines if line["event"] == "request finished"]
    assert (finished["choices"], finished["tool_calls"]) == (2, 2)
    assert finished["reasoning_tokens"] == 2 * len(says("<think>Hm.", None))
    assert finished["finish_reason"] == "tool_calls"


def scored(text: str) -> list[Step]:
    """Return a script that says *text* with log probabilities, two likeliest tokens each."""
    script: list[Step] = []
    for batch in says(text):
        token = batch[0]._replace(logprob=-0.5)
        likeliest = [TokenRecord(1, token.token_id + i, -0.5 - i, int(Flag.TOP)) for i in range(2)]
        script.append([*likeliest, token])
    return script


@ANSWERS
async def test_log_probabilities_of_a_chat_come_token_by_token(answered: Any) -> None:
    node = node_that(PlainReader, scored("naïve 🦊"))

    answer = await answered(node, **ASK, logprobs=True, top_logprobs=2)

    tokens = answer.choices[0].logprobs.content
    assert len(tokens) == len(says("naïve 🦊")) - 1
    assert bytes(byte for token in tokens for byte in token.bytes).decode() == "naïve 🦊"
    assert {token.logprob for token in tokens} == {-0.5}
    assert all([top.logprob for top in token.top_logprobs] == [-0.5, -1.5] for token in tokens)
    assert node.asked[0][2].top_logprobs == 2


async def test_in_a_stream_log_probabilities_go_with_their_text() -> None:
    node = node_that(PlainReader, scored("a quick brown fox"))

    async with sdk(node) as client:
        stream = await client.chat.completions.create(**ASK, logprobs=True, stream=True)
        chunks = [chunk.choices[0] async for chunk in stream]

    for chunk in chunks:
        if chunk.delta.content:
            tokens = [token.token for token in chunk.logprobs.content]
            assert "".join(tokens) == chunk.delta.content
        else:
            assert chunk.logprobs is None


@pytest.mark.parametrize("stream", [True, False])
async def test_log_probabilities_of_a_completion_are_in_its_old_shape(stream: bool) -> None:
    node = node_that(PlainReader, scored("a 🦊"))
    body = {"model": "m", "prompt": "x", "logprobs": 2, "stream": stream}
    parts: list[Any] = []

    async with posting(node, "/v1/completions", body) as response:
        text = await response.text()
        bodies = text.removesuffix("data: [DONE]\n\n").split("data: ") if stream else ["", text]
        parts = [msgspec.json.decode(part)["choices"][0]["logprobs"] for part in bodies[1:]]

    told = {
        name: [value for part in parts if part for value in part[name]]
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")
    }
    count = len(says("a 🦊")) - 1
    assert (told["tokens"][0], told["text_offset"][:2]) == ("a", [0, 1])
    assert told["tokens"][-1].startswith("bytes:\\x")
    assert told["token_logprobs"] == [-0.5] * count
    assert [list(top.values()) for top in told["top_logprobs"]] == [[-0.5, -1.5]] * count


async def test_the_chosen_token_is_always_among_the_likeliest_of_a_completion() -> None:
    node = node_that(PlainReader, [[says("a")[0][0]._replace(logprob=-3.0)], *says("a")[1:]])

    async with sdk(node) as client:
        answer = await client.completions.create(model="m", prompt="x", logprobs=0)

    assert answer.choices[0].logprobs is not None
    assert answer.choices[0].logprobs.top_logprobs == [{"a": -3.0}]


async def test_no_infinity_is_ever_in_the_json() -> None:
    nothing = float("-inf")
    token = says("a")[0][0]
    likeliest = [token._replace(flags=int(Flag.TOP), logprob=nothing)]
    node = node_that(PlainReader, [[*likeliest, token._replace(logprob=nothing)], *says("a")[1:]])

    body = {**ASK, "logprobs": True, "top_logprobs": 1}
    async with posting(node, "/v1/chat/completions", body) as response:
        [entry] = msgspec.json.decode(await response.read())["choices"][0]["logprobs"]["content"]

    assert (entry["logprob"], entry["top_logprobs"]) == (None, [])


async def test_nobody_is_told_log_probabilities_that_he_did_not_ask_for() -> None:
    answer = await whole(node_that(PlainReader, scored("Yes.")), **ASK)

    assert answer.choices[0].logprobs is None


async def test_a_token_that_was_named_as_an_end_is_why_it_stopped() -> None:
    end = tiny_text().text_prompt("x")[0]
    script: list[Step] = [*says("Yes", None), [TokenRecord(1, end, 0.0, Flag.TOKEN | Flag.STOP)]]

    async with posting(
        node_that(PlainReader, script),
        "/v1/chat/completions",
        {**ASK, "stop_token_ids": [end]},
    ) as response:
        [choice] = msgspec.json.decode(await response.read())["choices"]

    assert (choice["message"]["content"], choice["stop_reason"]) == ("Yes", end)
