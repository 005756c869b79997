"""Many sequences in one engine say what each says alone, and each of them ends."""

from itertools import takewhile

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cortex.ipc.engine_options import EngineOptions
from cortex.ipc.messages import ReasoningBudget, SamplingParams
from cortex.ipc.ring import Flag, TokenRecord
from cortex.models.batch import CacheShape
from cortex.runtime.device.model_runner import kv_bytes_per_token
from cortex.runtime.device.refusal import DeviceLost, Refused
from engine_fakes import UNHEALTHY_TOKEN, VOCABULARY, FakeModel, answer, greedy
from engine_run import Run


def refusal(run: Run, prompt: list[int], sampling: SamplingParams | None = None) -> str:
    with pytest.raises(Refused) as refused:
        run.start(1, prompt, sampling)
    assert not run.engine.has_work
    return refused.value.code


prompts = st.lists(st.lists(st.integers(0, 95), min_size=1, max_size=90), min_size=1, max_size=8)


@given(prompts, st.integers(1, 20), st.integers(7, 30), st.integers(1, 8))
@settings(max_examples=40, deadline=None)
def test_sequences_together_say_token_for_token_what_each_says_alone(
    prompts: list[list[int]], budget: int, blocks: int, seats: int
) -> None:
    run = Run(blocks=blocks, seats=seats, budget=budget)
    for number, prompt in enumerate(prompts):
        run.start(number, prompt, greedy(20))

    run.until_idle()

    limit = blocks * 16
    expected = [answer(prompt, min(20, limit - len(prompt))) for prompt in prompts]
    assert list(run.tokens.values()) == expected
    assert run.engine.pool.free == blocks


def test_memory_that_runs_out_changes_no_token() -> None:
    run = Run(blocks=12, seats=4, budget=9, options=EngineOptions(speculation=False))
    for number in range(4):
        run.start(number, [number, 7, 3], greedy(100))

    run.until_idle()

    assert run.tokens == {number: answer([number, 7, 3], 100) for number in range(4)}
    assert run.engine._scheduler.preemptions, "somebody was computed again"


def test_a_seeded_sequence_says_the_same_in_any_company_and_after_preemption() -> None:
    sampling = SamplingParams(temperature=1.0, max_tokens=60, seed=42, top_p=0.9, top_k=40)
    alone, crowded = Run(), Run(blocks=8, seats=4, budget=5)
    alone.start(1, [5, 6], sampling)
    for number in (0, 2, 3):
        crowded.start(number, [number], greedy(60))
    crowded.start(1, [5, 6], sampling)

    alone.until_idle()
    crowded.until_idle()

    assert crowded.tokens[1] == alone.tokens[1]
    assert alone.tokens[1] != answer([5, 6], 60), "it was sampled, not greedy"


def test_another_seed_says_something_else() -> None:
    run = Run()
    for seed in (1, 2):
        run.start(seed, [5, 6], SamplingParams(temperature=1.0, max_tokens=30, seed=seed))

    run.until_idle()

    assert run.tokens[1] != run.tokens[2]


def test_a_sequence_ends_with_max_tokens() -> None:
    run = Run()
    run.start(1, [1, 2, 3], greedy(5))

    run.until_idle()

    assert (run.tokens[1], run.finishes[1]) == (answer([1, 2, 3], 5), Flag.LENGTH)


def test_a_sequence_ends_with_any_of_its_stop_tokens_which_it_carries() -> None:
    said = answer([1, 2, 3], 8)
    run = Run()
    run.start(1, [1, 2, 3], greedy(50, stop_token_ids=(said[4], said[6])))

    run.until_idle()

    assert (run.tokens[1], run.finishes[1]) == (said[:5], Flag.STOP)


def test_a_stop_token_as_the_first_token_ends_at_once() -> None:
    run = Run()
    run.start(1, [1, 2, 3], greedy(50, stop_token_ids=tuple(answer([1, 2, 3], 1))))

    run.until_idle()

    assert (len(run.tokens[1]), run.finishes[1]) == (1, Flag.STOP)


def test_a_sequence_ends_at_the_end_of_the_context() -> None:
    run = Run(context=20)
    run.start(1, [1] * 15, greedy(50))

    run.until_idle()

    assert (len(run.tokens[1]), run.finishes[1]) == (5, Flag.LENGTH)


def test_a_prompt_that_fills_the_context_is_refused() -> None:
    run = Run(context=20)

    assert refusal(run, [1] * 20) == "context_length_exceeded"


def test_a_prompt_that_fits_the_context_and_never_the_memory_is_refused() -> None:
    run = Run(blocks=4, context=2048)

    assert refusal(run, [1] * 64) == "prompt_too_long_for_memory"


def test_an_empty_prompt_is_refused() -> None:
    assert refusal(Run(), []) == "empty_prompt"


@pytest.mark.parametrize("token", [-1, 97])
def test_a_token_that_the_vocabulary_does_not_have_is_refused(token: int) -> None:
    assert refusal(Run(), [1, token]) == "token_out_of_range"


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(-0.1, 8, 0),
        SamplingParams(float("nan"), 8, 0),
        SamplingParams(float("inf"), 8, 0),
        SamplingParams(1.0, -1, 0),
        SamplingParams(1.0, 8, 0, top_p=0.0),
        SamplingParams(1.0, 8, 0, top_p=1.1),
        SamplingParams(1.0, 8, 0, top_k=-1),
        SamplingParams(1.0, 8, 0, min_p=-0.1),
        SamplingParams(1.0, 8, 0, min_p=1.1),
        SamplingParams(1.0, 8, 0, repetition_penalty=0.0),
        SamplingParams(1.0, 8, 0, repetition_penalty=float("nan")),
        SamplingParams(1.0, 8, 0, presence_penalty=float("inf")),
        SamplingParams(1.0, 8, 0, frequency_penalty=float("nan")),
        SamplingParams(1.0, 8, 0, logit_bias={5: float("-inf")}),
        SamplingParams(1.0, 8, 0, logit_bias={5: float("nan")}),
        SamplingParams(1.0, 8, 0, logit_bias={5: 1e300}),
        SamplingParams(1.0, 8, 0, top_logprobs=-1),
        SamplingParams(1.0, 8, 0, top_logprobs=21),
        SamplingParams(1.0, 8, 0, prompt_logprobs=-1),
        SamplingParams(1.0, 8, 0, prompt_logprobs=21),
        SamplingParams(1.0, 8, 0, reasoning_budget=ReasoningBudget(-1, (), (1,))),
        SamplingParams(1.0, 8, 0, reasoning_budget=ReasoningBudget(1, (1,), ())),
    ],
)
def test_sampling_out_of_range_is_refused(sampling: SamplingParams) -> None:
    assert refusal(Run(), [1], sampling) == "invalid_sampling"


@pytest.mark.parametrize("token", [-1, VOCABULARY])
def test_a_parameter_that_names_a_token_that_the_vocabulary_does_not_have_is_refused(
    token: int,
) -> None:
    biased = SamplingParams(0.0, 8, 0, logit_bias={token: 1.0})
    limited = SamplingParams(0.0, 8, 0, reasoning_budget=ReasoningBudget(1, (), (token,)))

    assert refusal(Run(), [1], biased) == "token_out_of_range"
    assert refusal(Run(), [1], limited) == "token_out_of_range"


@pytest.mark.parametrize("bias", [-1e30, -100.0, 100.0, 1e30])
def test_a_large_bias_forbids_or_commands_a_token_and_harms_nobody(bias: float) -> None:
    run = Run()
    said = answer([1, 2], 1)[0]
    run.start(1, [1, 2], SamplingParams(0.0, 1, 0, logit_bias={said: bias, 7: bias}))
    run.start(2, [1, 2], greedy(1))

    run.until_idle()

    assert (run.tokens[1][0] in {said, 7}) == (bias > 0)
    assert run.tokens[2] == [said]


def test_cancelling_in_the_middle_of_a_prompt_frees_its_blocks_before_the_next_step() -> None:
    run = Run(budget=8)
    run.start(1, [1] * 100)
    run.step()

    records = run.engine.cancel(1)

    assert [(r.sequence_id, r.flags) for r in records if isinstance(r, TokenRecord)] == [
        (1, Flag.CANCELLED)
    ]
    assert run.tokens[1] == []
    assert not run.engine.has_work
    assert run.engine.pool.free == run.engine.pool.total


def test_cancelling_what_has_ended_says_nothing() -> None:
    run = Run()
    run.start(1, [1], greedy(1))
    run.until_idle()

    assert run.engine.cancel(1) == []


def test_unhealthy_logits_end_their_sequence_and_no_other() -> None:
    run = Run()
    run.start(1, [1, UNHEALTHY_TOKEN])
    run.start(2, [1, 2])

    run.until_idle()

    assert [(f.sequence_id, f.code) for f in run.failures] == [(1, "unhealthy_logits")]
    assert run.tokens == {1: [], 2: answer([1, 2], 8)}
    assert run.has_all_blocks


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(1.0, 8, 0),
        SamplingParams(0.0, 8, 0, top_logprobs=3),
        SamplingParams(1.0, 8, 0, presence_penalty=1.0, top_logprobs=3),
        SamplingParams(0.0, 8, 0, reasoning_budget=ReasoningBudget(0, (), (3, 4))),
    ],
)
def test_unhealthy_logits_end_a_sequence_whatever_it_asked_for(sampling: SamplingParams) -> None:
    run = Run()
    run.start(1, [1, UNHEALTHY_TOKEN], sampling)
    run.start(2, [1, 2], SamplingParams(0.0, 8, 0, top_logprobs=3))

    run.until_idle()

    assert run.codes == {1: "unhealthy_logits"}
    assert run.tokens == {1: [], 2: answer([1, 2], 8)}
    assert run.has_all_blocks


def test_a_sequence_that_no_token_ends_goes_on_until_its_logits_are_not_finite() -> None:
    run = Run()
    run.start(1, [1, 2], SamplingParams(0.0, 500, 0, logit_bias={UNHEALTHY_TOKEN: 1.05}))

    run.until_idle()

    said = list(takewhile(lambda token: token < UNHEALTHY_TOKEN - 10, answer([1, 2], 100)))
    assert run.tokens[1] == [*said, UNHEALTHY_TOKEN]
    assert len(said) > 2
    assert run.codes == {1: "unhealthy_logits"}


def test_a_step_that_fails_ends_its_sequences_and_the_engine_goes_on() -> None:
    run = Run(seats=1)
    run.model.module.errors = [ValueError("shapes do not match")]
    run.start(1, [1])
    run.start(2, [2])  # waits for the seat: not in the step

    run.until_idle()

    assert [(f.sequence_id, f.code) for f in run.failures] == [(1, "step_failed")]
    assert run.tokens[2] == answer([2], 8)
    assert run.engine.pool.free == run.engine.pool.total


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        torch.AcceleratorError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
    ],
)
def test_a_step_out_of_memory_ends_only_the_youngest(error: Exception) -> None:
    run = Run()
    for number in (1, 2, 3):
        run.start(number, [number] * 5)
    run.step()
    run.model.module.errors = [error]

    run.until_idle()

    assert [(f.sequence_id, f.code) for f in run.failures] == [(3, "out_of_memory")]
    assert run.tokens[1] == answer([1] * 5, 8)
    assert run.tokens[2] == answer([2] * 5, 8)


@pytest.mark.parametrize(
    "error",
    [
        torch.AcceleratorError("CUDA error: device-side assert triggered"),
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED"),
        RuntimeError("CUDA driver error: unknown error"),
        RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
        RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
    ],
)
def test_a_fault_of_the_device_is_no_fault_of_a_sequence(error: Exception) -> None:
    run = Run()
    run.model.module.errors = [error]
    run.start(1, [1])

    with pytest.raises(DeviceLost, match="in a step of m"):
        run.step()


def test_the_cache_of_a_token_is_keys_and_values_of_all_layers() -> None:
    model = FakeModel(caches=CacheShape(30, 3, 64), kv_dtype=torch.bfloat16)

    assert kv_bytes_per_token(model) == 2 * 30 * 3 * 64 * 2
