"""Token for token what transformers generates from the same file, dequantised, in float32."""

from pathlib import Path

import pytest
import torch
import transformers

from cortex.ipc.messages import Generate, SamplingParams
from cortex.ipc.openai import ChatMessage
from cortex.ipc.ring import Flag
from cortex.models.weights import load_model
from cortex.runtime.conversation import Conversation
from cortex.runtime.device.engine import Engine
from cortex.runtime.device.memory import Limits
from cortex.runtime.device.model_runner import BLOCK_TOKENS, ModelRunner
from cortex.runtime.device.scheduler import TOKEN_BUDGETS
from cortex.runtime.text import TextSide
from stack import MODEL, Stack
from tiny_models import llama_from_gguf

PROMPTS = [
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "List three prime numbers.",
    "Who wrote Romeo and Juliet?",
    "Explain what a compiler does.",
    "Name a fruit.",
    "Tell me a joke.",
    "What is 2+2?",
    "Translate 'good morning' to French.",
    "How do airplanes fly?",
]
TOKENS = 32
EOS = 2


@pytest.fixture(scope="module")
def reference(embedded_model: Path) -> transformers.LlamaForCausalLM:
    """Transformers' model with the file's weights, dequantised by the gguf library."""
    model: transformers.LlamaForCausalLM = llama_from_gguf(embedded_model)
    return model


@pytest.fixture(scope="module")
def engine(embedded_model: Path) -> Engine:
    """The engine of a device process, on the same file."""
    device = torch.device("cpu")
    model = load_model(
        embedded_model, device=device, dtype="auto", on_progress=lambda _done, _total: None
    )
    limits = Limits(max_context_tokens=512, max_sequences=8, blocks=64, workspace_bytes=0)
    runner = ModelRunner(model, model.new_cache(limits.blocks, BLOCK_TOKENS), device)
    return Engine(MODEL, runner, limits, token_budget=TOKEN_BUDGETS["cpu"])


@pytest.fixture(scope="module")
def text(embedded_model: Path) -> TextSide:
    return TextSide.from_checkpoint(embedded_model)


def greedy_by_reference(reference: transformers.LlamaForCausalLM, prompt: list[int]) -> list[int]:
    tokens: list[int] = []
    step, cache = torch.tensor([prompt]), None
    with torch.inference_mode():
        while len(tokens) < TOKENS and tokens[-1:] != [EOS]:
            output = reference(step, past_key_values=cache, use_cache=True)
            cache, step = output.past_key_values, output.logits[:, -1:].argmax(-1)
            tokens.append(int(step))
    return tokens


def greedy_by_engine(engine: Engine, prompt: list[int], sequence_id: int) -> list[int]:
    sampling = SamplingParams(temperature=0.0, max_tokens=TOKENS, seed=0, stop_token_ids=(EOS,))
    engine.start(Generate(1, sequence_id, MODEL, prompt, sampling))
    tokens, flags = [], 0
    while not flags & Flag.FINISH:
        for record in engine.step().records:
            if record.flags & Flag.PROMPT:
                continue
            tokens.append(record.token_id)
            flags = record.flags
    return tokens


@pytest.mark.parametrize("question", PROMPTS)
def test_the_first_greedy_tokens_equal_the_reference(
    engine: Engine, reference: transformers.LlamaForCausalLM, text: TextSide, question: str
) -> None:
    prompt = text.chat_prompt(Conversation([ChatMessage(role="user", content=question)])).token_ids

    tokens = greedy_by_engine(engine, prompt, PROMPTS.index(question) + 1)

    assert len(tokens) > 5
    assert tokens == greedy_by_reference(reference, prompt)


@pytest.mark.parametrize("question", PROMPTS[:5])
def test_the_node_answers_with_the_text_of_those_tokens(
    stack: Stack, engine: Engine, text: TextSide, question: str
) -> None:
    prompt = text.chat_prompt(Conversation([ChatMessage(role="user", content=question)])).token_ids
    tokens = greedy_by_engine(engine, prompt, PROMPTS.index(question) + 100)

    _, answer = stack.post(
        "/v1/chat/completions",
        {
            "model": MODEL,
            "messages": [{"role": "user", "content": question}],
            "max_tokens": TOKENS,
            "temperature": 0,
        },
    )

    detokenizer = text.detokenizer()
    expected = detokenizer.add(tokens) + detokenizer.flush()
    assert answer["choices"][0]["message"]["content"] == expected
    assert answer["usage"]["completion_tokens"] == len(tokens)
