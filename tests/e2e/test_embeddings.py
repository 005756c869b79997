"""Embeddings of a model that declares them: the SDK, the whole stack, transformers beside it."""

import json
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import openai
import pytest
import torch

from stack import Stack, until
from tiny_models import saved_llama
from tiny_text import trained

TEXTS = ["The quick brown fox", "日本語の文章です。", "def add(left: int): return left"]


@pytest.fixture(scope="module", params=["lasttoken", "mean"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tiny model with random weights, its directory, and how it pools."""
    directory = tmp_path_factory.mktemp("model")
    tokenizer = trained("smollm")
    vocab_size = tokenizer.get_vocab_size()
    weights = saved_llama(directory, vocab_size=vocab_size)
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "1_Pooling").mkdir()
    way = "lasttoken" if request.param == "lasttoken" else "mean_tokens"
    declared = {f"pooling_mode_{way}": True}
    (directory / "1_Pooling" / "config.json").write_text(json.dumps(declared))
    return weights, tokenizer, directory, request.param


@pytest.fixture(scope="module")
def client(stack: Stack, model: Any) -> Iterator[openai.OpenAI]:
    model_id = f"file:{model[2]}"
    load = {"model_id": model_id, "wait": True, "max_context_tokens": 64}
    status, body = stack.post("/models/load", load, stack.neuron_url)
    assert status == 200, body
    until(lambda: stack.get(f"/v1/models/{model_id}"), "the gateway to see the model")
    with openai.OpenAI(base_url=f"{stack.url}/v1", api_key="none", max_retries=0) as opened:
        yield opened
    stack.post("/models/unload", {"model_id": model_id}, stack.neuron_url)


def reference(model: Any, text: str) -> list[float]:
    """Return the vector that transformers and the definition give."""
    weights, tokenizer, _, way = model
    with torch.inference_mode():
        ids = torch.tensor([tokenizer.encode(text).ids])
        states = weights.model(ids).last_hidden_state[0].double()
    vector = states[-1] if way == "lasttoken" else states.mean(dim=0)
    return list((vector / vector.norm()).tolist())


def test_vectors_equal_the_reference_and_come_in_order(client: openai.OpenAI, model: Any) -> None:
    answer = client.embeddings.create(model=f"file:{model[2]}", input=TEXTS)

    for entry, text in zip(answer.data, TEXTS, strict=True):
        np.testing.assert_allclose(entry.embedding, reference(model, text), atol=1e-5)
    assert answer.usage.prompt_tokens == sum(len(model[1].encode(text).ids) for text in TEXTS)


def test_token_ids_give_the_vector_of_their_text(client: openai.OpenAI, model: Any) -> None:
    ids = [model[1].encode(text).ids for text in TEXTS]

    by_ids = client.embeddings.create(model=f"file:{model[2]}", input=ids)
    by_text = client.embeddings.create(model=f"file:{model[2]}", input=TEXTS)

    assert [e.embedding for e in by_ids.data] == [e.embedding for e in by_text.data]


def test_a_cut_vector_is_the_beginning_made_long_again(client: openai.OpenAI, model: Any) -> None:
    answer = client.embeddings.create(model=f"file:{model[2]}", input=TEXTS[0], dimensions=8)

    begin = reference(model, TEXTS[0])[:8]
    np.testing.assert_allclose(
        answer.data[0].embedding, [x / math.hypot(*begin) for x in begin], atol=1e-5
    )


def test_a_text_over_the_context_is_named(client: openai.OpenAI, model: Any) -> None:
    with pytest.raises(openai.BadRequestError, match="64 tokens") as refusal:
        client.embeddings.create(model=f"file:{model[2]}", input=["a", "word " * 200])

    assert (refusal.value.code, refusal.value.param) == ("context_length_exceeded", "input[1]")


def test_it_says_that_it_can(stack: Stack, client: openai.OpenAI, model: Any) -> None:
    models = stack.get("/models", stack.neuron_url)

    able = {entry["id"]: entry["capabilities"] for entry in models}
    assert "embeddings" in able[f"file:{model[2]}"]
