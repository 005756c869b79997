"""An embedding is computed like any prompt, and is the same vector however that went."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cortex.ipc.messages import Failed
from cortex.models.checkpoints.pooling import Pooling
from cortex.runtime.device.embedding import Pooler
from cortex.runtime.device.refusal import Refused
from cortex.runtime.device.sequence import NO_ANSWER
from cortex.runtime.device.step_plan import PlannedSequence
from engine_fakes import UNHEALTHY_TOKEN, answer, greedy, vector
from engine_run import Run

BOTH: list[Pooling] = ["last", "mean"]


def refusal(run: Run, prompt: list[int]) -> str:
    with pytest.raises(Refused) as refused:
        run.embed(1, prompt)
    assert not run.engine.has_work
    return refused.value.code


def kept(run: Run) -> int:
    """Return how many sums of embeddings under way there are."""
    return len(run.engine._pooler)


@pytest.mark.parametrize("pooling", BOTH)
def test_the_vector_is_that_of_the_last_token_or_the_mean_of_length_one(pooling: Pooling) -> None:
    run = Run()
    run.embed(1, [4, 9, 2, 9], pooling)

    run.until_idle()

    assert run.vectors[1] == pytest.approx(vector([4, 9, 2, 9], pooling), rel=1e-6)
    assert math.hypot(*run.vectors[1]) == pytest.approx(1.0, abs=1e-6)
    assert run.has_all_blocks


@pytest.mark.parametrize("pooling", BOTH)
def test_a_prompt_of_one_token_has_a_vector(pooling: Pooling) -> None:
    run = Run()
    run.embed(1, [4], pooling)

    run.step()

    assert run.vectors[1] == pytest.approx(vector([4], pooling), rel=1e-6)


asked = st.tuples(
    st.lists(st.integers(0, 95), min_size=1, max_size=90),
    st.sampled_from(["last", "mean", "generate"]),
)


@given(
    st.lists(asked, min_size=1, max_size=8),
    st.integers(1, 20),
    st.integers(7, 30),
    st.integers(1, 8),
)
@settings(max_examples=40, deadline=None)
def test_chunks_company_and_preemption_change_no_bit_of_a_vector_and_no_token(
    many: list[tuple[list[int], Pooling]], budget: int, blocks: int, seats: int
) -> None:
    crowded, alone = Run(blocks=blocks, seats=seats, budget=budget), Run(seats=1)
    for number, (prompt, kind) in enumerate(many, 1):
        for run in (crowded, alone):
            if kind in BOTH:
                run.embed(number, prompt, kind)
            else:
                run.start(number, prompt, greedy(20))

    crowded.until_idle()
    alone.until_idle()

    assert crowded.vectors == alone.vectors
    assert crowded.tokens == alone.tokens
    assert crowded.has_all_blocks
    assert kept(crowded) == 0


def test_a_preempted_prompt_is_summed_from_its_beginning() -> None:
    run = Run(blocks=8, seats=2, budget=2)
    run.start(1, [1] * 10, greedy(110))
    while len(run.tokens[1]) < 60:
        run.step()
    run.embed(2, [2, 3] * 22)
    run.step()
    assert kept(run) == 1
    while not run.engine._scheduler.waiting:
        run.step()

    run.until_idle()

    assert run.vectors[2] == pytest.approx(vector([2, 3] * 22, "mean"), rel=1e-6)
    assert run.tokens[1] == answer([1] * 10, 110)


def test_a_step_that_is_tried_again_counts_no_token_twice() -> None:
    run = Run(budget=16)
    run.embed(1, list(range(40)))
    run.embed(2, list(range(40)))
    run.step()
    run.step()
    run.model.module.errors = [MemoryError()]

    run.until_idle()

    assert run.codes == {2: "out_of_memory"}
    assert run.vectors[1] == pytest.approx(vector(list(range(40)), "mean"), rel=1e-6)


def test_it_does_not_stall_streams() -> None:
    run = Run(budget=16)
    run.start(1, [1, 2], greedy(20))
    run.step()
    run.embed(2, [5] * 100)

    for _ in range(5):
        run.step()

    assert run.tokens[1] == answer([1, 2], 6)
    assert run.vectors == {}
    run.until_idle()
    assert run.tokens[1] == answer([1, 2], 20)
    assert run.vectors[2] == pytest.approx(vector([5] * 100, "mean"), rel=1e-6)


def test_it_pays_for_its_prompt_and_for_nothing_more() -> None:
    run = Run(blocks=4, seats=4)
    run.embed(1, [1] * 16)
    run.embed(2, [2] * 16)
    run.embed(3, [3] * 32)

    run.step()

    assert set(run.vectors) == {1, 2, 3}, "all of them joined the first step"


def test_a_prompt_may_fill_the_context_and_the_memory() -> None:
    run = Run(blocks=2, context=32)
    run.embed(1, [1] * 32)

    run.until_idle()

    assert run.vectors[1] == pytest.approx(vector([1] * 32, "mean"), rel=1e-6)


def test_a_prompt_beyond_the_context_is_refused() -> None:
    assert refusal(Run(context=20), [1] * 21) == "context_length_exceeded"


def test_a_prompt_beyond_the_memory_is_refused() -> None:
    assert refusal(Run(blocks=2), [1] * 33) == "prompt_too_long_for_memory"


def test_an_empty_prompt_is_refused() -> None:
    assert refusal(Run(), []) == "empty_prompt"


def test_a_token_that_the_vocabulary_does_not_have_is_refused() -> None:
    assert refusal(Run(), [1, 97]) == "token_out_of_range"


@pytest.mark.parametrize("pooling", BOTH)
def test_cancelling_in_the_middle_frees_everything_and_is_answered(pooling: Pooling) -> None:
    run = Run(budget=8)
    run.embed(1, [1] * 100, pooling)
    run.step()

    words = run.engine.cancel(1)

    assert words == [Failed("cancelled", "the embedding was cancelled", command_id=1)]
    assert not run.engine.has_work
    assert run.has_all_blocks
    assert kept(run) == 0


@pytest.mark.parametrize("pooling", BOTH)
def test_a_vector_that_is_not_finite_fails_alone(pooling: Pooling) -> None:
    run = Run()
    run.embed(1, [1, UNHEALTHY_TOKEN], pooling)
    run.embed(2, [1, 2], pooling)
    run.start(3, [1, 2])

    run.until_idle()

    assert run.codes == {1: "unhealthy_logits"}
    assert run.failures[0].command_id == 1
    assert run.vectors[2] == pytest.approx(vector([1, 2], pooling), rel=1e-6)
    assert run.tokens[3] == answer([1, 2], 8)
    assert run.has_all_blocks


def test_only_the_last_token_has_to_be_finite_where_it_is_all_that_counts() -> None:
    run = Run()
    run.embed(1, [UNHEALTHY_TOKEN, 2], "last")
    run.embed(2, [UNHEALTHY_TOKEN, 2], "mean")

    run.until_idle()

    assert set(run.vectors) == {1}
    assert run.codes == {2: "unhealthy_logits"}


def test_a_vector_without_a_length_fails() -> None:
    planned = PlannedSequence(1, [5], 0, [0], True, NO_ANSWER, "last")

    assert Pooler().add([planned], torch.zeros(1, 4)) == {1: None}


def test_a_step_that_fails_ends_its_embeddings_by_their_commands() -> None:
    run = Run()
    run.model.module.errors = [ValueError("shapes do not match")]
    run.embed(1, [1])

    run.until_idle()

    assert [(f.command_id, f.code) for f in run.failures] == [(1, "step_failed")]
    assert kept(run) == 0


def test_out_of_memory_ends_only_the_youngest() -> None:
    run = Run(budget=8)
    run.embed(1, [1] * 20)
    run.embed(2, [2] * 3)
    run.model.module.errors = [MemoryError()]

    run.until_idle()

    assert [(f.command_id, f.code) for f in run.failures] == [(1, "out_of_memory")]
    assert set(run.vectors) == {2}


@given(
    st.lists(
        st.lists(st.floats(-1e4, 1e4, width=32), min_size=3, max_size=3), min_size=1, max_size=30
    ),
    st.data(),
)
@settings(max_examples=80, deadline=None)
def test_the_mean_is_the_same_however_the_tokens_are_cut(
    states: list[list[float]], data: st.DataObject
) -> None:
    hidden = torch.tensor(states)
    cuts = data.draw(st.lists(st.integers(1, 5), min_size=len(states), max_size=len(states)))
    whole, pooler = Pooler(), Pooler()

    at, result = 0, None
    for size in cuts:
        chunk = hidden[at : at + size]
        if not len(chunk):
            break
        is_last = at + len(chunk) == len(hidden)
        planned = PlannedSequence(7, [0] * len(chunk), at, [0], is_last, NO_ANSWER, "mean")
        result = pooler.add([planned], chunk).get(7)
        at += len(chunk)

    planned = PlannedSequence(7, [0] * len(hidden), 0, [0], True, NO_ANSWER, "mean")
    assert result == whole.add([planned], hidden)[7]
