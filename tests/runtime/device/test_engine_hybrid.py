"""What a sequence of a real hybrid says does not depend on company, chunks, snapshots or memory."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch

from cortex.ipc.messages import Embed, Embedded, Generate, SamplingParams
from cortex.ipc.ring import Flag
from cortex.models.loaded_model import LoadedModel
from cortex.runtime.device.engine import Engine
from cortex.runtime.device.memory import Limits
from cortex.runtime.device.model_runner import BLOCK_TOKENS, ModelRunner
from tiny_hybrids import saved_hybrid
from tiny_models import loaded, some_tokens

SPECIAL = 99
HEAD = [*some_tokens(40, seed=50), SPECIAL, *some_tokens(4, seed=51)]
PROMPTS = [
    some_tokens(70, seed=1),
    [*HEAD, *some_tokens(9, seed=2)],
    [*HEAD, *some_tokens(30, seed=3)],
    [7] * 33,
    some_tokens(5, seed=4),
]
SAMPLINGS = [
    SamplingParams(0.0, 120, 0),
    SamplingParams(1.0, 40, 1, top_logprobs=2),
    SamplingParams(0.8, 40, 2, repetition_penalty=1.3),
    SamplingParams(0.0, 150, 3),
    SamplingParams(0.0, 8, 4, prompt_logprobs=1),
]
EMBEDDED = some_tokens(90, seed=9)


@dataclass
class Said:
    """Records of the generations, in words because of their NaNs, and the vector."""

    records: dict[int, list[str]] = field(default_factory=dict)
    vector: bytes = b""
    cached: dict[int, int] = field(default_factory=dict)


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    path = tmp_path_factory.mktemp("hybrid")
    saved_hybrid(path, "qwen3_5_text")
    return loaded(path)


def engine(hybrid: LoadedModel, *, blocks: int = 64, seats: int = 8, budget: int = 128) -> Engine:
    slots = seats + 3
    cache = hybrid.new_cache(blocks, BLOCK_TOKENS, slots)
    for state in cache.states:  # what was there before is nobody's
        state.conv.fill_(3.0)
        state.delta.fill_(3.0)
    return Engine(
        "m",
        ModelRunner(hybrid, cache, torch.device("cpu")),
        Limits(512, seats, blocks, 0, state_slots=slots),
        token_budget=budget,
        special_ids=frozenset({SPECIAL}),
    )


def run(engine: Engine) -> Said:
    said = Said()
    while engine.has_work:
        report = engine.step()
        for record in report.records:
            if record.flags & Flag.PROMPT:
                said.cached[record.sequence_id] = record.token_id
            else:
                said.records.setdefault(record.sequence_id, []).append(repr(record))
        for event in report.events:
            assert isinstance(event, Embedded)
            said.vector = event.vector
    return said


def generate(engine: Engine, *numbers: int) -> None:
    for number in numbers:
        engine.start(Generate(0, number, "m", PROMPTS[number], SAMPLINGS[number]))


def together(engine: Engine) -> Said:
    engine.start(Embed(100, "m", EMBEDDED, "mean"))
    generate(engine, *range(len(PROMPTS)))
    return run(engine)


@pytest.fixture(scope="module")
def alone(hybrid: LoadedModel) -> Said:
    """What each says by itself, with room for everything."""
    said = Said()
    for number in range(len(PROMPTS)):
        by_itself = engine(hybrid, seats=1, budget=512)
        generate(by_itself, number)
        said.records |= run(by_itself).records
    by_itself = engine(hybrid, seats=1, budget=512)
    by_itself.start(Embed(100, "m", EMBEDDED, "mean"))
    said.vector = run(by_itself).vector
    return said


@pytest.mark.parametrize("budget", [1, 7, 128])
def test_chunks_and_company_change_no_token_logprob_or_vector(
    hybrid: LoadedModel, alone: Said, budget: int
) -> None:
    said = together(engine(hybrid, budget=budget))

    assert said.records == alone.records
    assert said.vector == alone.vector


def test_memory_that_runs_out_changes_no_token_logprob_or_vector(
    hybrid: LoadedModel, alone: Said
) -> None:
    crowded = engine(hybrid, blocks=17, seats=4, budget=40)

    said = together(crowded)

    assert crowded.standing().preemptions
    assert said.records == alone.records
    assert said.vector == alone.vector


@pytest.mark.parametrize("budget", [24, 512])
def test_a_head_that_is_continued_from_a_snapshot_changes_nothing(
    hybrid: LoadedModel, alone: Said, budget: int
) -> None:
    warm = engine(hybrid, budget=budget)
    generate(warm, 1)
    first = run(warm)
    generate(warm, 1)
    again = run(warm)
    generate(warm, 2, 0)
    others = run(warm)

    assert first.cached[1] == 0
    assert again.cached[1] == 48
    assert others.cached == {2: 32, 0: 0}, "up to the special token, and not the next block"
    assert again.records[1] == alone.records[1]
    assert others.records == {number: alone.records[number] for number in (0, 2)}


def test_snapshots_that_are_cleared_or_reused_change_nothing(
    hybrid: LoadedModel, alone: Said
) -> None:
    small = engine(hybrid, seats=2)
    for numbers in [(1, 3), (0,), (2, 1), (3, 0)]:
        generate(small, *numbers)
        said = run(small)
        assert said.records == {number: alone.records[number] for number in numbers}
    small.clear_prefix_cache()
    generate(small, 1)
    said = run(small)

    assert said.cached == {1: 0}
    assert said.records[1] == alone.records[1]
