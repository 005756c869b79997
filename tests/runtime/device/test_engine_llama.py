"""What a sequence of a real architecture says does not depend on company, chunks or memory."""

import pytest
import torch

from cortex.ipc.messages import Generate, SamplingParams
from cortex.models.weights import LoadedModel
from cortex.runtime.device.engine import Engine
from cortex.runtime.device.memory import Limits
from cortex.runtime.device.model_runner import BLOCK_TOKENS, ModelRunner
from tiny_models import loaded, saved_llama, some_tokens

PROMPTS = [some_tokens(5 + 9 * n, seed=n) for n in range(6)]
SAMPLINGS = [
    SamplingParams(temperature=0.0, max_tokens=80, seed=0),
    SamplingParams(temperature=1.0, max_tokens=80, seed=1),
    SamplingParams(temperature=0.7, max_tokens=80, seed=2, top_p=0.9, top_k=20),
]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    path = tmp_path_factory.mktemp("llama")
    saved_llama(path)
    return loaded(path)


def engine(llama: LoadedModel, *, blocks: int, seats: int, budget: int) -> Engine:
    runner = ModelRunner(llama, llama.new_cache(blocks, BLOCK_TOKENS), torch.device("cpu"))
    return Engine("m", runner, Limits(512, seats, blocks, 0), token_budget=budget)


def said(engine: Engine, numbers: range) -> tuple[dict[int, list[int]], int]:
    """Run the sequences of these numbers to their end; return their tokens, and the steps."""
    tokens = {number: list[int]() for number in numbers}
    for number in numbers:
        engine.start(Generate(0, number, "m", PROMPTS[number], SAMPLINGS[number % 3]))
    steps = 0
    while engine.has_work:
        steps += 1
        for record in engine.step().records:
            tokens[record.sequence_id].append(record.token_id)
    assert engine.pool.free == engine.pool.total
    return tokens, steps


@pytest.fixture(scope="module")
def alone(llama: LoadedModel) -> dict[int, list[int]]:
    """What each sequence says by itself, with room for everything."""
    engines = {n: engine(llama, blocks=32, seats=1, budget=512) for n in range(len(PROMPTS))}
    return {n: said(engine, range(n, n + 1))[0][n] for n, engine in engines.items()}


@pytest.mark.parametrize("budget", [1, 7, 128])
def test_chunks_and_company_change_no_token(
    llama: LoadedModel, alone: dict[int, list[int]], budget: int
) -> None:
    together, _ = said(engine(llama, blocks=64, seats=6, budget=budget), range(len(PROMPTS)))

    assert together == alone


def test_memory_that_runs_out_changes_no_token(
    llama: LoadedModel, alone: dict[int, list[int]]
) -> None:
    crowded = engine(llama, blocks=12, seats=6, budget=40)
    roomy = engine(llama, blocks=64, seats=6, budget=40)

    together, steps = said(crowded, range(len(PROMPTS)))

    assert together == alone
    assert steps > said(roomy, range(len(PROMPTS)))[1], "some had to wait or were computed again"
