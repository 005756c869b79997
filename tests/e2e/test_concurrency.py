"""Company does not change an answer, and nobody waits for a stranger."""

from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from stack import MODEL, Stack, until

PROMPTS = [
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "Count from one to ten.",
    "Explain gravity to a child in two sentences.",
    "Name three fruits that are yellow.",
    "def fibonacci(n):",
    "Translate 'good morning' into Spanish.",
    "Why is the sky blue? " * 20,
]


@pytest.fixture
def client(stack: Stack) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{stack.url}/v1", api_key="none", max_retries=0)


def text_of(client: openai.OpenAI, prompt: str, temperature: float) -> str:
    stream = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": prompt}],
        max_tokens=48,
        temperature=temperature,
        seed=11,
        stream=True,
    )
    return "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_eight_streams_at_once_give_the_texts_of_one_by_one(
    client: openai.OpenAI, temperature: float
) -> None:
    alone = [text_of(client, prompt, temperature) for prompt in PROMPTS]

    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        together = list(pool.map(lambda p: text_of(client, p, temperature), PROMPTS))

    assert together == alone
    assert len(set(alone)) == len(PROMPTS)


def test_a_client_that_leaves_frees_its_seat(stack: Stack) -> None:
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "Tell a very long story."}],
        "max_tokens": 4000,
        "ignore_eos": True,
        "stream": True,
    }
    lines = stack.stream("/v1/chat/completions", body)
    next(lines)
    until(lambda: in_flight(stack) == 1, "the request to run")

    lines.close()

    until(lambda: in_flight(stack) == 0, "the request to be cancelled")


def in_flight(stack: Stack) -> int:
    health = stack.get("/health", base=stack.neuron_url)
    return int(sum(model["in_flight"] for model in health["models"]))
