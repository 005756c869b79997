"""The SDKs with strict validation against real processes: the same in every dialect and way.

What needs wit is asked of a script in the model's place; the embedded model is asked the rest.
"""

from collections.abc import Iterator
from typing import Any, Literal

import anthropic
import openai
import pytest
from anthropic.types import Message, ThinkingBlock
from pydantic import BaseModel

from stack import MODEL, Stack
from strict_sdks import VERSIONS, WAYS, Question, Said, Tool, Way, messages_request

WEATHER = Tool("get_weather", ("city",))
TIME = Tool("get_time")
BOTH = (WEATHER, TIME)
GREETING = "Hello there, friend!"
THOUGHT = "They want to be greeted."
IN_PARIS = ("get_weather", {"city": "Paris"})
NOW: tuple[str, dict[str, Any]] = ("get_time", {})
RESULT = "The tool said: 18 degrees"
CAPITAL = Question("What is the capital of France?", system="You are terse.")
USER: list[Any] = [{"role": "user", "content": "Hi"}]

QUESTIONS: dict[str, tuple[Question, str, str, list[tuple[str, Any]]]] = {
    "a greeting": (Question("Hi", system="Be kind."), GREETING, "", []),
    "reasoning": (Question("Let me think. Hi"), GREETING, THOUGHT, []),
    "a call": (Question("How warm is it?", BOTH), "", "", [IN_PARIS]),
    "a forced call": (Question("How warm is it?", BOTH, "required", False), "", "", [IN_PARIS]),
    "a named call": (Question("How warm is it?", BOTH, "get_time"), "", "", [NOW]),
    "no call": (Question("How warm is it?", BOTH, "none"), GREETING, "", []),
    "parallel calls": (Question("Call each of your tools.", BOTH), "", "", [IN_PARIS, NOW]),
    "one call at a time": (
        Question("Call each of your tools.", BOTH, is_parallel=False),
        "",
        "",
        [IN_PARIS],
    ),
}
"""Each with the text, the reasoning and the calls of its answer."""


class Mood(BaseModel):
    """What an answer is to be."""

    mood: Literal["good", "bad"]


@pytest.fixture(scope="module")
def gpt(scripted_url: str) -> Iterator[openai.OpenAI]:
    with Way("chat", streams=False, is_async=False).client(scripted_url) as client:
        yield client


@pytest.fixture(scope="module", params=VERSIONS)
def claude(request: pytest.FixtureRequest, scripted_url: str) -> Iterator[anthropic.Anthropic]:
    way = Way("messages", streams=False, is_async=False, version=request.param)
    with way.client(scripted_url) as client:
        yield client


@pytest.fixture(scope="module")
def first_said(scripted_url: str) -> dict[str, Said]:
    """What the first way was answered, by the name of the question."""
    return {name: WAYS[0].ask(scripted_url, MODEL, asked[0]) for name, asked in QUESTIONS.items()}


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("name", QUESTIONS)
def test_every_way_to_ask_gets_the_same_answer_at_the_same_cost(
    scripted_url: str, first_said: dict[str, Said], name: str, way: Way
) -> None:
    question, text, reasoning, calls = QUESTIONS[name]

    said = way.ask(scripted_url, MODEL, question)

    assert (said.text, said.reasoning, said.calls) == (text, reasoning, calls)
    assert said == first_said[name]


@pytest.fixture(scope="module")
def embedded_said(stack: Stack) -> Said:
    """What the embedded model said to the capital, asked in the first way."""
    return WAYS[0].ask(stack.url, MODEL, CAPITAL)


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_the_embedded_model_says_the_same_in_every_way(
    stack: Stack, embedded_said: Said, way: Way
) -> None:
    said = way.ask(stack.url, MODEL, CAPITAL)

    assert "Paris" in said.text
    assert said == embedded_said


def test_a_loop_of_chat(gpt: openai.OpenAI) -> None:
    turns: list[Any] = [{"role": "user", "content": "Call each of your tools."}]
    tools: list[Any] = [{"type": "function", "function": tool.function} for tool in BOTH]
    called = gpt.chat.completions.create(model=MODEL, messages=turns, tools=tools)
    message = called.choices[0].message
    turns.append(message.model_dump(exclude_none=True))
    turns += [
        {"role": "tool", "tool_call_id": call.id, "content": "18 degrees"}
        for call in message.tool_calls or []
    ]

    answer = gpt.chat.completions.create(model=MODEL, messages=turns, tools=tools)

    assert (called.choices[0].finish_reason, len(turns)) == ("tool_calls", 4)
    assert answer.choices[0].message.content == RESULT


def test_a_loop_of_responses_goes_on_from_the_last(gpt: openai.OpenAI) -> None:
    tools: list[Any] = [{"type": "function", **tool.function} for tool in BOTH]
    called = gpt.responses.create(model=MODEL, input="Call each of your tools.", tools=tools)
    results: list[Any] = [
        {"type": "function_call_output", "call_id": call.call_id, "output": "18 degrees"}
        for call in called.output
        if call.type == "function_call"
    ]

    answer = gpt.responses.create(
        model=MODEL, input=results, tools=tools, previous_response_id=called.id
    )

    assert len(results) == 2
    assert answer.output_text == RESULT
    assert answer.previous_response_id == called.id


def test_a_loop_of_messages(claude: anthropic.Anthropic) -> None:
    asked = messages_request(MODEL, Question("Call each of your tools.", BOTH))
    called = claude.messages.create(**asked)
    results = [
        {"type": "tool_result", "tool_use_id": block.id, "content": "18 degrees"}
        for block in called.content
        if block.type == "tool_use"
    ]
    asked["messages"] += [
        {"role": "assistant", "content": called.content},
        {"role": "user", "content": results},
    ]

    answer = claude.messages.create(**asked)

    assert (called.stop_reason, len(results)) == ("tool_use", 2)
    assert [block.text for block in answer.content if block.type == "text"] == [RESULT]


def test_every_dialect_parses_an_answer_of_a_schema(
    gpt: openai.OpenAI, claude: anthropic.Anthropic
) -> None:
    completion = gpt.chat.completions.parse(model=MODEL, messages=USER, response_format=Mood)
    response = gpt.responses.parse(model=MODEL, input="Hi", text_format=Mood)
    message = claude.messages.parse(model=MODEL, max_tokens=99, messages=USER, output_format=Mood)

    parsed = completion.choices[0].message.parsed
    assert isinstance(parsed, Mood)
    assert parsed == response.output_parsed == message.parsed_output


def test_both_sdks_list_the_same_models(gpt: openai.OpenAI, claude: anthropic.Anthropic) -> None:
    listed = [model.id for model in gpt.models.list()]

    assert MODEL in listed
    assert [model.id for model in claude.models.list()] == listed
    assert gpt.models.retrieve(MODEL).id == claude.models.retrieve(MODEL).id == MODEL


def test_a_text_completion_streams_what_it_says(stack: Stack) -> None:
    asked: Any = {"model": MODEL, "prompt": "The capital of France is", "max_tokens": 4}
    with Way("chat", streams=False, is_async=False).client(stack.url) as strict:
        whole = strict.completions.create(**asked, echo=True)
    # OpenAI's chunks have no finish_reason before the last; the SDK's type wants one in each.
    with openai.OpenAI(base_url=f"{stack.url}/v1", api_key="k") as client:
        streamed = list(client.completions.create(**asked, stream=True))

    assert whole.choices[0].text.startswith(asked["prompt"] + " Paris")
    assert whole.choices[0].text == asked["prompt"] + "".join(
        chunk.choices[0].text for chunk in streamed
    )


@pytest.mark.parametrize("name", QUESTIONS)
def test_tokens_are_counted_as_they_are_charged(
    claude: anthropic.Anthropic, first_said: dict[str, Said], name: str
) -> None:
    asked = messages_request(MODEL, QUESTIONS[name][0])
    del asked["max_tokens"]

    counted = claude.messages.count_tokens(**asked)

    assert counted.input_tokens == first_said[name].prompt_tokens


@pytest.mark.parametrize(
    ("fields", "reasoning"),
    [
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, [THOUGHT]),
        ({"thinking": {"type": "adaptive"}}, [THOUGHT]),
        (
            {"thinking": {"type": "enabled", "budget_tokens": 1024, "display": "omitted"}},
            [""],
        ),
        ({"thinking": {"type": "disabled"}}, []),
    ],
)
def test_thinking_is_shown_as_asked(
    claude: anthropic.Anthropic, fields: Any, reasoning: list[str]
) -> None:
    asked: Any = {**messages_request(MODEL, Question("Let me think. Hi")), "max_tokens": 2048}

    whole = claude.messages.create(**asked, **fields)
    with claude.messages.stream(**asked, **fields) as stream:
        streamed: Message = stream.get_final_message()

    for message in (whole, streamed):
        *thinking, last = message.content
        assert [b.thinking for b in thinking if isinstance(b, ThinkingBlock)] == reasoning
        assert (len(thinking), last.type) == (len(reasoning), "text")


def test_an_answer_that_was_begun_goes_on(claude: anthropic.Anthropic) -> None:
    begun: list[Any] = [*USER, {"role": "assistant", "content": "Hello there,"}]

    message = claude.messages.create(model=MODEL, max_tokens=99, messages=begun)

    assert [block.text for block in message.content if block.type == "text"] == [" friend!"]


def test_a_prompt_of_no_answer_is_cached(claude: anthropic.Anthropic) -> None:
    said = f"{claude.default_headers['anthropic-version']} Hi " * 40
    asked: Any = {"model": MODEL, "messages": [{"role": "user", "content": said}]}

    warmed = claude.messages.create(**asked, max_tokens=0)
    message = claude.messages.create(**asked, max_tokens=99)

    assert (warmed.content, warmed.stop_reason) == ([], "max_tokens")
    assert warmed.usage.output_tokens == 0
    assert (message.usage.cache_read_input_tokens or 0) > (
        warmed.usage.cache_read_input_tokens or 0
    )


def test_the_system_may_speak_in_the_middle(claude: anthropic.Anthropic) -> None:
    turns: list[Any] = [
        *USER,
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "And?"},
        {"role": "system", "content": "Let me think of something."},
    ]

    message = claude.messages.create(model=MODEL, max_tokens=99, messages=turns)

    assert [block.type for block in message.content] == ["thinking", "text"]


def test_a_stop_sequence_is_told(claude: anthropic.Anthropic) -> None:
    message = claude.messages.create(
        model=MODEL, max_tokens=99, messages=USER, stop_sequences=[", friend"]
    )

    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", ", friend")
    assert [block.text for block in message.content if block.type == "text"] == ["Hello there"]
