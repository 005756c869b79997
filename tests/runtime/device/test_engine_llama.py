"""What a sequence of a real architecture says does not depend on company, chunks or memory."""

from array import array
from dataclasses import dataclass, field

import pytest
import torch

from cortex.ipc.messages import Embed, Embedded, Generate, ReasoningBudget, SamplingParams
from cortex.models.checkpoints.pooling import Pooling
from cortex.models.loaded_model import LoadedModel
from cortex.runtime.device.engine import Engine
from cortex.runtime.device.memory import Limits
from cortex.runtime.device.model_runner import BLOCK_TOKENS, ModelRunner
from tiny_models import loaded, saved_llama, some_tokens

SAMPLINGS = [
    SamplingParams(temperature=0.0, max_tokens=80, seed=0),
    SamplingParams(temperature=1.0, max_tokens=80, seed=1),
    SamplingParams(temperature=0.7, max_tokens=80, seed=2, top_p=0.9, top_k=20),
    SamplingParams(temperature=1.0, max_tokens=80, seed=3, min_p=0.1, top_logprobs=3),
    SamplingParams(
        temperature=0.8,
        max_tokens=80,
        seed=4,
        repetition_penalty=1.3,
        presence_penalty=0.5,
        frequency_penalty=0.3,
        logit_bias={5: 2.0},
        top_logprobs=0,
    ),
    SamplingParams(
        temperature=0.0,
        max_tokens=80,
        seed=5,
        repetition_penalty=1.1,
        reasoning_budget=ReasoningBudget(20, (), (7, 8, 9)),
    ),
]
PROMPTS = [some_tokens(5 + 9 * n, seed=n) for n in range(len(SAMPLINGS))]
POOLINGS: list[Pooling] = ["last", "mean"]
EMBEDDED = [some_tokens(70 + 20 * n, seed=100 + n) for n in range(len(POOLINGS))]


@dataclass
class Said:
    """Records of the generations, in words because of their NaNs, and vectors of the embeddings."""

    records: dict[int, list[str]] = field(default_factory=dict)
    vectors: dict[int, bytes] = field(default_factory=dict)
    steps: int = 0


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    path = tmp_path_factory.mktemp("llama")
    saved_llama(path)
    return loaded(path)


def engine(llama: LoadedModel, *, blocks: int, seats: int, budget: int) -> Engine:
    runner = ModelRunner(llama, llama.new_cache(blocks, BLOCK_TOKENS), torch.device("cpu"))
    return Engine("m", runner, Limits(512, seats, blocks, 0), token_budget=budget)


def run(engine: Engine) -> Said:
    """Run what was started to its end."""
    said = Said()
    while engine.has_work:
        said.steps += 1
        report = engine.step()
        for record in report.records:
            said.records.setdefault(record.sequence_id, []).append(repr(record))
        for event in report.events:
            assert isinstance(event, Embedded)
            said.vectors[event.command_id] = event.vector
    assert engine.pool.free == engine.pool.total
    return said


def generate(engine: Engine, number: int) -> None:
    engine.start(Generate(0, number, "m", PROMPTS[number], SAMPLINGS[number]))


def embed(engine: Engine, number: int) -> None:
    engine.start(Embed(100 + number, "m", EMBEDDED[number], POOLINGS[number]))


def together(engine: Engine) -> Said:
    """Run everything at once."""
    for number in range(len(POOLINGS)):
        embed(engine, number)
    for number in range(len(PROMPTS)):
        generate(engine, number)
    return run(engine)


@pytest.fixture(scope="module")
def alone(llama: LoadedModel) -> Said:
    """What each says by itself, with room for everything."""
    said = Said()
    starts = [(generate, n) for n in range(len(PROMPTS))] + [(embed, n) for n in range(2)]
    for start, number in starts:
        by_itself = engine(llama, blocks=32, seats=1, budget=512)
        start(by_itself, number)
        one = run(by_itself)
        said.records |= one.records
        said.vectors |= one.vectors
    return said


@pytest.mark.parametrize("budget", [1, 7, 128])
def test_chunks_and_company_change_no_token_logprob_or_vector(
    llama: LoadedModel, alone: Said, budget: int
) -> None:
    said = together(engine(llama, blocks=64, seats=8, budget=budget))

    assert said.records == alone.records
    assert said.vectors == alone.vectors


def test_memory_that_runs_out_changes_no_token_logprob_or_vector(
    llama: LoadedModel, alone: Said
) -> None:
    crowded = engine(llama, blocks=12, seats=8, budget=40)
    roomy = engine(llama, blocks=64, seats=8, budget=40)

    said = together(crowded)

    assert said.records == alone.records
    assert said.vectors == alone.vectors
    assert said.steps > together(roomy).steps, "some had to wait or were computed again"


@pytest.mark.parametrize("number", range(len(POOLINGS)))
def test_a_vector_is_that_of_the_hidden_states(
    llama: LoadedModel, alone: Said, number: int
) -> None:
    reference = engine(llama, blocks=64, seats=1, budget=512)
    embed(reference, number)
    hidden = reference._runner.hidden(reference._scheduler.schedule())

    pooled = hidden[-1] if POOLINGS[number] == "last" else hidden.mean(dim=0)

    vector = torch.tensor(array("f", alone.vectors[100 + number]))
    torch.testing.assert_close(vector, pooled / pooled.norm(), rtol=1e-5, atol=1e-6)
