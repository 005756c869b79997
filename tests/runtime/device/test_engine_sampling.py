"""What a sequence asks of sampling it gets, the same in any company, chunking and memory."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import plain_sampling
from cortex.ipc.messages import ReasoningBudget, SamplingParams
from cortex.ipc.ring import Flag
from cortex.runtime.device.reasoning_block import ReasoningBlock
from cortex.runtime.device.row import Row
from cortex.runtime.device.token_counts import TokenCounts
from engine_fakes import UNHEALTHY_TOKEN, VOCABULARY, answer, next_token
from engine_run import Run, is_same

FEATURES: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "min_p": {"min_p": 0.2},
    "filters": {"min_p": 0.01, "top_k": 40, "top_p": 0.9},
    "repetition": {"temperature": 0.0, "repetition_penalty": 1.7},
    "presence": {"temperature": 0.0, "presence_penalty": 1.5},
    "frequency": {"frequency_penalty": 0.6, "temperature": 0.4},
    "bias": {"logit_bias": {3: 4.0, 50: -100.0}},
    "logprobs": {"temperature": 0.0, "top_logprobs": 5},
    "budget": {"reasoning_budget": ReasoningBudget(7, (), (11, 12, 13))},
    "everything": {
        "temperature": 0.8,
        "min_p": 0.02,
        "top_p": 0.95,
        "repetition_penalty": 1.2,
        "presence_penalty": 0.4,
        "frequency_penalty": 0.2,
        "logit_bias": {5: 2.0},
        "top_logprobs": 2,
        "reasoning_budget": ReasoningBudget(9, (5,), (11, 12)),
    },
}


def sampling(feature: str, max_tokens: int = 40, seed: int = 1) -> SamplingParams:
    return SamplingParams(
        **{"temperature": 1.0, "max_tokens": max_tokens, "seed": seed, **FEATURES[feature]}
    )


def model_logits(tokens: list[int]) -> list[float]:
    """Return what the fake model says after *tokens*."""
    ids = torch.arange(VOCABULARY)
    return (-((ids - next_token(tokens)) % VOCABULARY).float() * 0.1).tolist()


def plainly(prompt: list[int], asked: SamplingParams) -> list[int]:
    """Return the answer by the definitions, token after token."""
    known = list(prompt)
    while len(known) < len(prompt) + asked.max_tokens and known[-1] != UNHEALTHY_TOKEN:
        forced = None
        if asked.reasoning_budget is not None:
            block = ReasoningBlock(asked.reasoning_budget)
            for token in known[len(prompt) :]:
                block.add(token)
            forced = block.forced
        row = Row(asked, len(known), TokenCounts.of(known, len(prompt)), forced)
        chosen = plain_sampling.chosen(model_logits(known), row)
        assert chosen is not None, "no row has a mask"
        known.append(chosen)
    return known[len(prompt) :]


@pytest.mark.parametrize("feature", FEATURES)
def test_an_answer_is_what_the_definitions_say(feature: str) -> None:
    run = Run()
    run.start(1, [4, 9, 2], sampling(feature))

    run.until_idle()

    assert run.tokens[1] == plainly([4, 9, 2], sampling(feature))


prompts = st.lists(st.integers(0, 95), min_size=1, max_size=60)


@given(
    st.lists(st.tuples(prompts, st.sampled_from(sorted(FEATURES))), min_size=1, max_size=6),
    st.integers(1, 20),
    st.integers(7, 20),
    st.integers(1, 8),
)
@settings(max_examples=30, deadline=None)
def test_chunks_company_and_preemption_change_no_token_and_no_logprob(
    asked: list[tuple[list[int], str]], budget: int, blocks: int, seats: int
) -> None:
    crowded, alone = Run(blocks=blocks, seats=seats, budget=budget), Run(seats=1)
    for number, (prompt, feature) in enumerate(asked):
        for run in (crowded, alone):
            run.start(number, prompt, sampling(feature, seed=number))

    crowded.until_idle()
    alone.until_idle()

    assert crowded.tokens == alone.tokens
    assert all(is_same(crowded.logprobs[n], alone.logprobs[n]) for n in alone.logprobs)
    assert crowded.tops == alone.tops
    assert crowded.codes == alone.codes
    assert crowded.has_all_blocks


@pytest.mark.parametrize("feature", FEATURES)
def test_a_sequence_that_was_preempted_says_the_same(feature: str) -> None:
    roomy, crowded = Run(), Run(blocks=9, seats=3, budget=5)
    for run in (roomy, crowded):
        for number in (1, 2, 3):
            run.start(number, [number, 7, 3], sampling(feature, max_tokens=90, seed=number))

    roomy.until_idle()
    crowded.until_idle()

    assert crowded.tokens == roomy.tokens
    assert crowded.tops == roomy.tops


def test_memory_that_runs_out_does_preempt_in_these_tests() -> None:
    run = Run(blocks=9, seats=3, budget=5)
    for number in (1, 2, 3):
        run.start(number, [number, 7, 3], sampling("repetition", max_tokens=90))

    run.until_idle()

    assert run.model.module.steps > 92


def test_logprobs_come_only_to_whom_asked_and_are_the_models_own() -> None:
    run = Run()
    for number, count in ((1, 2), (2, 0), (3, None)):
        asked = SamplingParams(0.0, 3, 0, logit_bias={20: 100.0}, top_logprobs=count)
        run.start(number, [1, 2], asked)

    run.until_idle()

    for at in range(3):
        expected = plain_sampling.logprobs(model_logits([1, 2] + [20] * at))
        likeliest = sorted(range(VOCABULARY), key=lambda token: -expected[token])[:2]
        assert run.logprobs[1][at] == pytest.approx(expected[20], abs=1e-6)
        assert [token for token, _ in run.tops[1][at]] == likeliest
        assert [value for _, value in run.tops[1][at]] == pytest.approx(
            [expected[token] for token in likeliest], abs=1e-6
        )
    assert run.logprobs[2] == run.logprobs[1]
    assert run.tops[2] == [[], [], []]
    assert all(math.isnan(logprob) for logprob in run.logprobs[3])
    assert run.tops[3] == [[], [], []]


def test_a_reasoning_block_is_ended_by_tokens_like_any_others() -> None:
    run = Run()
    budget = ReasoningBudget(3, (), (11, 12, 13))
    run.start(1, [1, 2], SamplingParams(0.0, 8, 0, top_logprobs=1, reasoning_budget=budget))

    run.until_idle()

    thought = answer([1, 2], 3)
    ended = [*thought, 11, 12, 13]
    assert run.tokens[1] == [*ended, *answer([1, 2, *ended], 2)]
    put_in = plain_sampling.logprobs(model_logits([1, 2, *thought]))[11]
    assert run.logprobs[1][3] == pytest.approx(put_in, abs=1e-6)
    assert run.finishes[1] == Flag.LENGTH


def test_the_last_token_may_be_one_that_is_put_in() -> None:
    run = Run()
    budget = ReasoningBudget(3, (), (11, 12, 13))
    run.start(1, [1, 2], SamplingParams(0.0, 5, 0, reasoning_budget=budget))

    run.until_idle()

    assert (run.tokens[1][3:], run.finishes[1]) == ([11, 12], Flag.LENGTH)


def test_a_block_whose_end_is_a_stop_token_ends_the_sequence() -> None:
    run = Run()
    budget = ReasoningBudget(2, (), (11,))
    run.start(1, [1, 2], SamplingParams(0.0, 9, 0, stop_token_ids=(11,), reasoning_budget=budget))

    run.until_idle()

    assert (run.tokens[1][2:], run.finishes[1]) == ([11], Flag.STOP)


def test_a_block_that_ends_by_itself_in_time_is_left_alone() -> None:
    said = answer([1, 2], 12)
    run = Run()
    budget = ReasoningBudget(5, (said[0],), (said[4], said[5]))
    run.start(1, [1, 2], SamplingParams(0.0, 12, 0, reasoning_budget=budget))

    run.until_idle()

    assert run.tokens[1] == said
