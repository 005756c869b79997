"""The unmodified SDKs of both dialects, the gateway, a neuron and the real model."""

import anthropic
import openai
import pytest

from stack import MODEL, Stack

QUESTION = "What is the capital of France?"


@pytest.fixture
def chat(stack: Stack) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{stack.url}/v1", api_key="none", max_retries=0)


@pytest.fixture
def claude(stack: Stack) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=stack.url, api_key="none", max_retries=0)


def ask(chat: openai.OpenAI, **more: object) -> openai.types.chat.ChatCompletion:
    return chat.chat.completions.create(  # type: ignore[call-overload, no-any-return]  # **more
        model=MODEL, messages=[{"role": "user", "content": QUESTION}], **more
    )


def test_a_chat_completion_answers(chat: openai.OpenAI) -> None:
    answer = ask(chat)

    assert "Paris" in (answer.choices[0].message.content or "")
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_a_chat_completion_streams_the_same_answer(chat: openai.OpenAI) -> None:
    whole = ask(chat).choices[0].message.content
    stream = chat.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": QUESTION}],
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)

    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens > 1


def test_a_text_completion_continues_its_prompt(chat: openai.OpenAI) -> None:
    answer = chat.completions.create(
        model=MODEL, prompt="The capital of France is", max_tokens=4, temperature=0
    )

    assert "Paris" in answer.choices[0].text
    assert answer.choices[0].finish_reason == "length"


def test_a_text_completion_streams(chat: openai.OpenAI) -> None:
    stream = chat.completions.create(
        model=MODEL, prompt="The capital of France is", max_tokens=4, temperature=0, stream=True
    )

    assert "Paris" in "".join(chunk.choices[0].text for chunk in stream if chunk.choices)


def test_a_stop_string_ends_the_answer_before_it(chat: openai.OpenAI) -> None:
    answer = ask(chat, stop=["Paris"])

    assert answer.choices[0].message.content is not None
    assert "Paris" not in answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "stop"


def test_max_tokens_ends_the_answer_with_length(chat: openai.OpenAI) -> None:
    answer = ask(chat, max_completion_tokens=2)

    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 2


def test_the_same_seed_gives_the_same_text(chat: openai.OpenAI) -> None:
    one, two, other = (
        ask(chat, temperature=1.0, top_p=0.95, seed=seed, max_tokens=24) for seed in (7, 7, 8)
    )

    assert one.choices[0].message.content == two.choices[0].message.content
    assert one.choices[0].message.content != other.choices[0].message.content


def test_a_model_nobody_has_is_a_404_with_its_code(chat: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as refusal:
        chat.chat.completions.create(model="gpt-2", messages=[{"role": "user", "content": "hi"}])

    assert refusal.value.code == "model_not_found"


def test_a_parameter_that_is_not_honoured_is_refused_in_words(chat: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refusal:
        ask(chat, extra_body={"min_tokens": 3})

    assert refusal.value.code == "unsupported_parameter"
    assert refusal.value.param == "min_tokens"


def test_a_prompt_over_the_context_is_refused_with_its_code(chat: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refusal:
        chat.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "word " * 9000}]
        )

    assert refusal.value.code == "context_length_exceeded"


def test_the_catalogue_lists_the_loaded_model(chat: openai.OpenAI) -> None:
    entries = {entry.id: entry for entry in chat.models.list()}

    assert (entries[MODEL].model_extra or {})["loaded"] is True


def prompt_tokens(usage: anthropic.types.Usage) -> int:
    """Return the length of the prompt: Anthropic counts what was read from a cache apart."""
    return usage.input_tokens + (usage.cache_read_input_tokens or 0)


def test_a_message_answers(claude: anthropic.Anthropic) -> None:
    answer = claude.messages.create(
        model=MODEL, max_tokens=64, messages=[{"role": "user", "content": QUESTION}]
    )

    assert answer.content[0].type == "text"
    assert "Paris" in answer.content[0].text
    assert answer.stop_reason == "end_turn"
    assert prompt_tokens(answer.usage) > 10


def test_a_message_streams_the_same_answer(claude: anthropic.Anthropic) -> None:
    whole = claude.messages.create(
        model=MODEL, max_tokens=64, messages=[{"role": "user", "content": QUESTION}]
    )
    with claude.messages.stream(
        model=MODEL, max_tokens=64, messages=[{"role": "user", "content": QUESTION}]
    ) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()

    assert whole.content[0].type == "text"
    assert text == whole.content[0].text
    assert final.stop_reason == "end_turn"
    assert final.usage.output_tokens == whole.usage.output_tokens


def test_both_dialects_give_the_same_text(chat: openai.OpenAI, claude: anthropic.Anthropic) -> None:
    answer = claude.messages.create(
        model=MODEL,
        max_tokens=64,
        system="You are terse.",
        messages=[{"role": "user", "content": QUESTION}],
    )
    same = chat.chat.completions.create(
        model=MODEL,
        max_tokens=64,
        messages=[
            {"role": "system", "content": "You are terse."},
            {"role": "user", "content": QUESTION},
        ],
    )

    assert answer.content[0].type == "text"
    assert answer.content[0].text == same.choices[0].message.content


def test_a_response_is_the_answer_of_chat(chat: openai.OpenAI) -> None:
    response = chat.responses.create(model=MODEL, input=QUESTION)
    same = ask(chat)

    assert response.output_text == same.choices[0].message.content
    assert response.status == "completed"
    assert response.usage is not None
    assert same.usage is not None
    assert response.usage.total_tokens == same.usage.total_tokens


def test_a_response_streams_the_same_answer(chat: openai.OpenAI) -> None:
    whole = chat.responses.create(model=MODEL, input=QUESTION)
    with chat.responses.stream(model=MODEL, input=QUESTION) as stream:
        text = "".join(e.delta for e in stream if e.type == "response.output_text.delta")
        final = stream.get_final_response()

    assert text == final.output_text == whole.output_text
    assert final.usage is not None
    assert whole.usage is not None
    assert final.usage.output_tokens == whole.usage.output_tokens


def test_a_response_goes_on_from_another(chat: openai.OpenAI) -> None:
    first = chat.responses.create(model=MODEL, input=QUESTION)
    second = chat.responses.create(model=MODEL, input="Why?", previous_response_id=first.id)
    same = chat.responses.create(
        model=MODEL,
        input=[
            {"role": "user", "content": QUESTION},
            {"role": "assistant", "content": first.output_text},
            {"role": "user", "content": "Why?"},
        ],
    )

    assert second.output_text == same.output_text


def test_the_tokens_of_a_response_are_counted_exactly(chat: openai.OpenAI) -> None:
    first = chat.responses.create(model=MODEL, input=QUESTION, max_output_tokens=4)
    tool: openai.types.responses.FunctionToolParam = {
        "type": "function",
        "name": "look_up",
        "description": "Look a city up.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        "strict": False,
    }
    counted = chat.responses.input_tokens.count(
        model=MODEL,
        input="Why?",
        instructions="You are terse.",
        previous_response_id=first.id,
        tools=[tool],
    )
    answer = chat.responses.create(
        model=MODEL,
        input="Why?",
        instructions="You are terse.",
        previous_response_id=first.id,
        tools=[tool],
        max_output_tokens=1,
    )

    assert answer.usage is not None
    assert counted.input_tokens == answer.usage.input_tokens


def test_a_response_that_the_limit_cut_is_incomplete(chat: openai.OpenAI) -> None:
    response = chat.responses.create(model=MODEL, input=QUESTION, max_output_tokens=2)

    assert response.status == "incomplete"
    assert response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"


def test_log_probabilities_of_a_response_are_those_of_its_text(chat: openai.OpenAI) -> None:
    response = chat.responses.create(
        model=MODEL, input=QUESTION, top_logprobs=2, include=["message.output_text.logprobs"]
    )

    (item,) = response.output
    assert item.type == "message"
    assert item.content[0].type == "output_text"
    told = item.content[0].logprobs or []
    assert "".join(token.token for token in told).startswith(response.output_text)
    assert len(told[0].top_logprobs) == 2


def test_counting_tokens_is_exact(claude: anthropic.Anthropic) -> None:
    counted = claude.messages.count_tokens(
        model=MODEL, messages=[{"role": "user", "content": QUESTION}]
    )
    answer = claude.messages.create(
        model=MODEL, max_tokens=1, messages=[{"role": "user", "content": QUESTION}]
    )

    assert counted.input_tokens == prompt_tokens(answer.usage)
    assert answer.stop_reason == "max_tokens"


def test_a_prompt_too_long_is_said_as_anthropic_clients_expect(
    claude: anthropic.Anthropic,
) -> None:
    with pytest.raises(anthropic.BadRequestError, match=r"prompt is too long: \d+ tokens > \d+"):
        claude.messages.create(
            model=MODEL, max_tokens=5, messages=[{"role": "user", "content": "word " * 9000}]
        )


def test_a_model_nobody_has_is_not_found_in_the_other_dialect(
    claude: anthropic.Anthropic,
) -> None:
    with pytest.raises(anthropic.NotFoundError, match="gpt-2"):
        claude.messages.create(
            model="gpt-2", max_tokens=5, messages=[{"role": "user", "content": "hi"}]
        )
