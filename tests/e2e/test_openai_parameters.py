"""Choices, log probabilities, penalties, biases and tools: the SDK, the stack, the real model."""

import math
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletion

from stack import MODEL, Stack

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
LOOK_UP = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Look a word up.",
        "parameters": {"type": "object", "properties": {"word": {"type": "string"}}},
    },
}


@pytest.fixture
def client(stack: Stack) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{stack.url}/v1", api_key="none", max_retries=0) as opened:
        yield opened


def ask(client: openai.OpenAI, **more: Any) -> ChatCompletion:
    options: dict[str, Any] = {"model": MODEL, "messages": QUESTION, "max_tokens": 24, **more}
    answer: ChatCompletion = client.chat.completions.create(**options)
    return answer


def texts(answer: ChatCompletion) -> list[str | None]:
    return [choice.message.content for choice in answer.choices]


def tokens_of(stack: Stack, text: str) -> list[int]:
    """Return the token ids of *text* as the model would go on with it."""
    status, body = stack.post("/tokenize", {"model": MODEL, "prompt": text}, stack.neuron_url)
    assert status == 200, body
    return list(body["tokens"])


def test_three_choices_are_those_of_three_seeds(client: openai.OpenAI) -> None:
    together = ask(client, n=3, seed=11, temperature=1.0)
    alone = [texts(ask(client, seed=11 + at, temperature=1.0))[0] for at in range(3)]

    assert texts(together) == alone
    assert len(set(alone)) == 3
    assert together.usage is not None
    assert together.usage.prompt_tokens == ask(client).usage.prompt_tokens  # type: ignore[union-attr] # it has one


def test_choices_stream_side_by_side(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"n": 3, "seed": 11, "temperature": 1.0}
    chunks: Any = ask(client, **options, stream=True)
    streamed = ["", "", ""]

    for chunk in chunks:
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""

    assert streamed == texts(ask(client, **options))


def test_greedy_choices_are_equal(client: openai.OpenAI) -> None:
    assert len(set(texts(ask(client, n=2, temperature=0)))) == 1


def test_the_greedy_token_is_the_likeliest_and_probabilities_are_some(
    client: openai.OpenAI,
) -> None:
    choice = ask(client, temperature=0, logprobs=True, top_logprobs=5).choices[0]

    assert choice.logprobs is not None
    assert choice.logprobs.content
    for token in choice.logprobs.content:
        tops = [top.logprob for top in token.top_logprobs]
        assert len(tops) == 5
        assert token.logprob == tops[0] == max(tops)
        assert tops == sorted(tops, reverse=True)
        assert sum(map(math.exp, tops)) <= 1 + 1e-6
    assert "".join(token.token for token in choice.logprobs.content) == choice.message.content


def test_log_probabilities_do_not_depend_on_how_tokens_are_chosen(client: openai.OpenAI) -> None:
    def first(**more: Any) -> list[float]:
        choice = ask(client, logprobs=True, top_logprobs=3, max_tokens=1, **more).choices[0]
        assert choice.logprobs is not None
        assert choice.logprobs.content
        return [top.logprob for top in choice.logprobs.content[0].top_logprobs]

    plain = first(temperature=0)

    assert first(temperature=1.7, seed=3, top_p=0.5, presence_penalty=2.0) == plain


def test_a_completion_tells_log_probabilities_in_its_old_shape(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model=MODEL, prompt="The capital of France is", max_tokens=4, temperature=0, logprobs=2
    )

    told = answer.choices[0].logprobs
    assert told is not None
    assert "".join(told.tokens or []) == answer.choices[0].text
    assert told.text_offset == [0, *_ends(told.tokens or [])][:-1]
    assert told.token_logprobs is not None
    for token, logprob, tops in zip(
        told.tokens or [], told.token_logprobs, told.top_logprobs or [], strict=True
    ):
        assert tops[token] == logprob == max(tops.values())


def _ends(tokens: list[str]) -> Iterator[int]:
    at = 0
    for token in tokens:
        at += len(token)
        yield at


def test_a_bias_forces_a_token_and_bans_one(stack: Stack, client: openai.OpenAI) -> None:
    [forced] = tokens_of(stack, " banana")
    plain = client.completions.create(
        model=MODEL, prompt="The capital of France is", max_tokens=1, temperature=0
    )
    [likeliest] = tokens_of(stack, plain.choices[0].text)

    def completed(bias: dict[str, int]) -> str:
        return (
            client.completions.create(
                model=MODEL,
                prompt="The capital of France is",
                max_tokens=3,
                temperature=0,
                logit_bias=bias,
            )
            .choices[0]
            .text
        )

    assert completed({str(forced): 100}) == " banana banana banana"
    assert not completed({str(likeliest): -100}).startswith(plain.choices[0].text)


@pytest.mark.parametrize(
    "penalty", [{"frequency_penalty": 1.5}, {"presence_penalty": 2.0}, {"repetition_penalty": 1.5}]
)
def test_a_penalty_makes_a_long_answer_repeat_itself_less(
    client: openai.OpenAI, penalty: dict[str, float]
) -> None:
    def different_tokens(**more: Any) -> int:
        answer = client.completions.create(
            model=MODEL,
            prompt="The sea is wide. The sea is wide. The sea",
            max_tokens=64,
            temperature=0,
            logprobs=0,
            extra_body={"ignore_eos": True, **more},
        )
        assert answer.choices[0].logprobs is not None
        return len(set(answer.choices[0].logprobs.tokens or []))

    assert different_tokens(**penalty) > different_tokens()


def test_a_token_of_ones_own_ends_the_answer(stack: Stack, client: openai.OpenAI) -> None:
    [end] = tokens_of(stack, " Paris")

    choice = ask(client, temperature=0, extra_body={"stop_token_ids": [end]}).choices[0]

    assert choice.finish_reason == "stop"
    assert "Paris" not in (choice.message.content or "")
    assert (choice.model_extra or {})["stop_reason"] == end


def test_min_p_of_one_is_greedy(client: openai.OpenAI) -> None:
    greedy = texts(ask(client, temperature=0))

    assert texts(ask(client, temperature=1.5, seed=5, extra_body={"min_p": 1.0})) == greedy


def test_the_embedded_model_takes_tools_as_text(stack: Stack, client: openai.OpenAI) -> None:
    [model] = stack.get("/models", stack.neuron_url)

    with_tools, without = ask(client, tools=[LOOK_UP]), ask(client)

    assert model["tool_call"]
    assert "tools" in model["capabilities"]
    assert with_tools.usage is not None
    assert without.usage is not None
    assert with_tools.usage.prompt_tokens > without.usage.prompt_tokens + 20
    assert with_tools.choices[0].finish_reason in {"stop", "length", "tool_calls"}


def test_a_model_that_makes_no_embeddings_says_so(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="no embeddings") as refusal:
        client.embeddings.create(model=MODEL, input="hello")

    assert refusal.value.code == "unsupported_parameter"


# what a prompt alone is good for


def post(stack: Stack, path: str, **body: Any) -> dict[str, Any]:
    status, answer = stack.post(path, {"model": MODEL, "temperature": 0, **body})
    assert status == 200, answer
    return dict(answer)


def test_of_no_tokens_the_prompt_is_left_for_the_next_request(
    stack: Stack, client: openai.OpenAI
) -> None:
    asked = [{"role": "user", "content": "Nobody else asks of the wombat. " * 12}]

    warmed = ask(client, messages=asked, max_tokens=0)
    streamed: Any = ask(
        client, messages=asked, max_tokens=0, stream=True, stream_options={"include_usage": True}
    )

    *_, last = streamed
    assert (warmed.choices[0].message.content, warmed.choices[0].finish_reason) == ("", "length")
    for usage in (warmed.usage, last.usage):
        assert usage is not None
        assert usage.completion_tokens == 0
    assert warmed.usage is not None
    assert last.usage.prompt_tokens_details.cached_tokens >= warmed.usage.prompt_tokens - 16


def test_an_answer_continues_what_the_assistant_began(stack: Stack) -> None:
    begun = [*QUESTION, {"role": "assistant", "content": "The capital of France is"}]
    continued = {"continue_final_message": True, "add_generation_prompt": False}

    answer = post(stack, "/v1/chat/completions", messages=begun, max_tokens=3, **continued)

    assert answer["choices"][0]["message"]["content"].startswith(" Paris")


def test_a_prompt_is_echoed_and_scored_as_it_would_be_said(stack: Stack) -> None:
    prompt = "The capital of France is"
    said = post(stack, "/v1/completions", prompt=prompt, max_tokens=2, logprobs=1)["choices"][0]
    whole = prompt + said["text"]

    scored = post(stack, "/v1/completions", prompt=whole, max_tokens=0, logprobs=1, echo=True)

    [choice] = scored["choices"]
    assert (choice["text"], scored["usage"]["completion_tokens"]) == (whole, 0)
    logprobs = choice["logprobs"]
    assert "".join(logprobs["tokens"]) == whole
    assert logprobs["token_logprobs"][0] is None
    assert all(p <= 0 for p in logprobs["token_logprobs"][1:])
    assert logprobs["token_logprobs"][-2:] == pytest.approx(
        said["logprobs"]["token_logprobs"], abs=1e-4
    )


def test_several_prompts_are_answered_as_each_alone(stack: Stack) -> None:
    prompts = ["The capital of France is", "One, two, three,"]

    together = post(stack, "/v1/completions", prompt=prompts, max_tokens=4)
    alone = [post(stack, "/v1/completions", prompt=one, max_tokens=4) for one in prompts]

    assert [choice["text"] for choice in together["choices"]] == [
        one["choices"][0]["text"] for one in alone
    ]
    assert together["usage"]["prompt_tokens"] == sum(o["usage"]["prompt_tokens"] for o in alone)


def test_a_load_is_estimated_by_what_it_was_measured_at(stack: Stack) -> None:
    status, estimate = stack.post("/models/estimate", {"model_id": MODEL}, stack.neuron_url)

    assert status == 200, estimate
    assert estimate["is_measured"]
    assert 90 < estimate["least_mb"] <= estimate["wanted_mb"]
