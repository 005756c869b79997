"""A prompt may be all that is asked for: computed for those that begin the same, or scored."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cortex.ipc.engine_options import EngineOptions
from cortex.ipc.messages import Generate, SamplingParams
from cortex.ipc.ring import Flag
from cortex.runtime.device.engine import Engine
from cortex.runtime.device.memory import Limits
from cortex.runtime.device.model_runner import BLOCK_TOKENS, ModelRunner
from cortex.runtime.device.scheduler import SCORED_ROWS
from engine_fakes import UNHEALTHY_TOKEN, answer, greedy
from engine_run import Run
from tiny_models import loaded, reference_logits, saved_llama, some_tokens

HEAD = [7, 3, 5, 2] * 12  # three blocks


def scored(max_tokens: int = 4, likeliest: int = 0) -> SamplingParams:
    return SamplingParams(0.0, max_tokens, 0, prompt_logprobs=likeliest)


@pytest.mark.parametrize("runs_ahead", [False, True])
def test_of_no_tokens_the_prompt_is_computed_and_left_for_others(runs_ahead: bool) -> None:
    run = Run(runs_ahead=runs_ahead)
    run.start(1, [*HEAD, 1], greedy(0))
    run.until_idle()
    run.start(2, [*HEAD, 2], greedy(3))
    run.until_idle()

    assert (run.tokens[1], run.finishes[1]) == ([], Flag.LENGTH)
    assert run.tokens[2] == answer([*HEAD, 2], 3)
    assert run.cached == {1: 0, 2: len(HEAD)}
    assert run.has_all_blocks


def test_of_no_tokens_what_is_found_is_told() -> None:
    run = Run()
    for number in (1, 2):
        run.start(number, [*HEAD, 1], greedy(0))
        run.until_idle()

    assert run.cached == {1: 0, 2: len(HEAD)}


@pytest.mark.parametrize("prompt", [[1], [1, 2], [5] * 40])
def test_of_no_tokens_a_sequence_ends_without_a_prefix_cache_too(prompt: list[int]) -> None:
    run = Run(options=EngineOptions(prefix_cache=False))
    run.start(1, prompt, greedy(0))
    run.until_idle()

    assert (run.tokens[1], run.finishes[1]) == ([], Flag.LENGTH)


def test_of_no_tokens_a_prompt_whose_logits_are_not_finite_fails() -> None:
    run = Run()
    run.start(1, [1, UNHEALTHY_TOKEN], greedy(0))
    run.until_idle()

    assert run.codes == {1: "unhealthy_logits"}


@pytest.mark.parametrize("budget", [1, 7, 512])
@pytest.mark.parametrize("runs_ahead", [False, True])
def test_a_prompt_is_scored_whole_in_chunks_that_memory_is_set_aside_for(
    budget: int, runs_ahead: bool
) -> None:
    run = Run(budget=budget, runs_ahead=runs_ahead, options=EngineOptions(speculation=False))
    prompt = [token % 90 for token in some_tokens(3 * SCORED_ROWS, seed=1)]
    run.start(1, prompt, scored())
    rows = []
    while run.engine.has_work:
        before = len(run.scores[1])
        run.step()
        rows.append(len(run.scores[1]) - before)

    assert [token for token, _ in run.scores[1]] == prompt[1:]
    assert max(rows) <= SCORED_ROWS
    assert run.tokens[1] == answer(prompt, 4)


def test_the_likeliest_come_with_each_token_of_a_prompt() -> None:
    run = Run()
    run.start(1, [4, 9, 2], scored(likeliest=2))
    run.until_idle()

    firsts = [tops[0][0] for tops in run.score_tops[1]]
    assert firsts == [answer([4], 1)[0], answer([4, 9], 1)[0]]
    assert [len(tops) for tops in run.score_tops[1]] == [2, 2]
    assert run.tops[1] == [[]] * 4, "of the answer nobody asked for any"


def test_a_scored_prompt_takes_nothing_from_the_prefix_cache_and_leaves_itself_there() -> None:
    run = Run()
    run.start(1, [*HEAD, 1])
    run.until_idle()
    run.start(2, [*HEAD, 1], scored())
    run.until_idle()
    run.engine.clear_prefix_cache()
    run.start(3, [*HEAD, 1], scored(max_tokens=0))
    run.until_idle()
    run.start(4, [*HEAD, 1])
    run.until_idle()

    assert run.cached == {1: 0, 2: 0, 3: 0, 4: len(HEAD)}
    assert run.scores[2] == run.scores[3]


def test_a_prompt_that_cannot_be_scored_fails_alone() -> None:
    run = Run()
    run.start(1, [1, UNHEALTHY_TOKEN, 3], scored())
    run.start(2, [1, 2, 3], scored())
    run.until_idle()

    assert run.codes == {1: "unhealthy_logits"}
    assert run.tokens[2] == answer([1, 2, 3], 4)


prompts = st.lists(st.integers(0, 95), min_size=1, max_size=70)


@given(
    st.lists(st.tuples(prompts, st.integers(0, 30)), min_size=1, max_size=5),
    st.integers(1, 50),
    st.integers(8, 20),
    st.integers(1, 5),
    st.booleans(),
)
@settings(max_examples=30, deadline=None)
def test_chunks_company_and_preemption_change_no_score(
    asked: list[tuple[list[int], int]], budget: int, blocks: int, seats: int, runs_ahead: bool
) -> None:
    crowded = Run(blocks=blocks, seats=seats, budget=budget, runs_ahead=runs_ahead)
    alone = Run(seats=1)
    for number, (prompt, max_tokens) in enumerate(asked):
        for run in (crowded, alone):
            run.start(number, prompt, scored(max_tokens, likeliest=1))

    crowded.until_idle()
    alone.until_idle()

    assert crowded.scores == alone.scores
    assert crowded.score_tops == alone.score_tops
    assert crowded.tokens == alone.tokens
    assert crowded.has_all_blocks


def test_scores_are_those_of_the_reference(tmp_path: Path) -> None:
    reference = saved_llama(tmp_path)
    model = loaded(tmp_path)
    runner = ModelRunner(model, model.new_cache(16, BLOCK_TOKENS), torch.device("cpu"))
    engine = Engine("m", runner, Limits(512, 2, 16, 0), token_budget=24)
    prompt = some_tokens(100, seed=3)
    engine.start(Generate(0, 1, "m", prompt, scored(max_tokens=0)))

    records = []
    while engine.has_work:
        records += engine.step().records

    expected = reference_logits(reference, prompt).double().log_softmax(-1)
    scores = [record for record in records if record.flags == Flag.SCORE]
    assert [record.token_id for record in scores] == prompt[1:]
    for at, record in enumerate(scores):
        assert math.isclose(record.logprob, float(expected[at, prompt[at + 1]]), abs_tol=1e-4)
