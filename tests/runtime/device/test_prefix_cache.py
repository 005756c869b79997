"""Two prompts with a common head share it, whoever came first; what is found is what is there."""

from __future__ import annotations

import pytest
from structlog.testing import capture_logs

from cortex.ipc.engine_options import EngineOptions
from engine_fakes import UNHEALTHY_TOKEN, answer, greedy
from engine_run import Run

HEAD = [7, 3, 5, 2] * 12  # three blocks


def said(run: Run, number: int, prompt: list[int], tokens: int = 8) -> list[int]:
    run.start(number, prompt, greedy(tokens))
    run.until_idle()
    return run.tokens[number]


def test_a_prompt_with_a_known_head_is_not_computed_again() -> None:
    run = Run()
    said(run, 1, [*HEAD, 1])

    assert said(run, 2, [*HEAD, 2]) == answer([*HEAD, 2], 8)
    assert run.cached == {1: 0, 2: len(HEAD)}


def test_two_that_run_at_once_share_the_blocks_of_their_head() -> None:
    run = Run()
    run.start(1, [*HEAD, 1], greedy(40))
    run.step()
    run.start(2, [*HEAD, 2], greedy(40))
    run.step()
    first, second = run.engine._scheduler.running

    assert first.blocks[:3] == second.blocks[:3]
    assert not set(first.blocks[3:]) & set(second.blocks[3:])


def test_the_answer_of_one_turn_is_part_of_the_next_prompt() -> None:
    run = Run()
    conversation = [*HEAD, *said(run, 1, HEAD, 20), 9]

    said(run, 2, conversation)

    assert run.cached[2] == 64, "48 of the prompt, and one whole block of the answer"


def test_the_last_token_of_a_prompt_is_always_computed() -> None:
    run = Run()
    said(run, 1, HEAD)

    assert said(run, 2, HEAD) == answer(HEAD, 8)
    assert run.cached[2] == len(HEAD) - 16


def test_a_head_that_differs_in_its_first_token_shares_nothing() -> None:
    run = Run()
    said(run, 1, HEAD)

    said(run, 2, [8, *HEAD[1:], 1])

    assert run.cached[2] == 0


def test_blocks_nobody_owns_are_free_and_known_until_they_are_needed() -> None:
    run = Run(blocks=8)
    said(run, 1, [*HEAD, 1])
    assert (run.engine.pool.free, run.engine.pool.cached) == (8, 3)

    other = [*range(50), *range(50)]  # seven blocks, with its answer
    assert said(run, 2, other) == answer(other, 8)

    assert said(run, 3, [*HEAD, 1]) == answer([*HEAD, 1], 8)
    assert run.cached[3] < len(HEAD)


def test_what_was_used_last_is_kept_longest() -> None:
    run = Run(blocks=12)
    other = [*range(48), 1]
    said(run, 1, [*HEAD, 1])
    said(run, 2, other)
    said(run, 3, [*HEAD, 1])  # used again
    said(run, 4, [9, 8] * 56)  # eight blocks: the six that are free, and two of what is known

    assert said(run, 5, [*HEAD, 1]) == answer([*HEAD, 1], 8)
    said(run, 6, other)

    assert run.cached[5] == len(HEAD)
    assert run.cached[6] < 48


def test_clearing_forgets_everything_and_disturbs_nobody() -> None:
    run = Run()
    said(run, 1, [*HEAD, 1])
    run.start(2, [*HEAD, 2], greedy(30))
    run.step()

    assert run.engine.clear_prefix_cache() == 3
    run.until_idle()

    assert run.tokens[2] == answer([*HEAD, 2], 30)
    assert said(run, 3, [*HEAD, 3]) == answer([*HEAD, 3], 8)
    assert run.engine.clear_prefix_cache() > 0


def test_nothing_is_found_of_what_an_unhealthy_sequence_computed() -> None:
    run = Run()
    run.start(1, [*HEAD, UNHEALTHY_TOKEN])
    run.until_idle()
    assert run.codes == {1: "unhealthy_logits"}

    said(run, 2, [*HEAD, 2])

    assert run.cached[2] == 0


def test_an_unhealthy_sequence_takes_its_head_along_whoever_computed_it() -> None:
    run = Run()
    said(run, 1, [*HEAD, 1])
    run.start(2, [*HEAD, UNHEALTHY_TOKEN])
    run.until_idle()

    said(run, 3, [*HEAD, 3])

    assert run.cached[3] == 0


def test_a_head_that_was_wrong_before_its_sequence_was_cancelled_is_not_found_for_ever() -> None:
    run = Run(budget=16)
    run.start(1, [UNHEALTHY_TOKEN, *HEAD])
    run.step()  # a chunk that no token is chosen from: nobody notices
    run.engine.cancel(1)
    run.model.module.poison = UNHEALTHY_TOKEN
    run.start(2, [UNHEALTHY_TOKEN, *HEAD])
    run.until_idle()
    assert run.codes == {2: "unhealthy_logits"}
    run.model.module.poison = None

    said(run, 3, [UNHEALTHY_TOKEN, *HEAD, 1])

    assert run.cached[3] == 0


def test_an_unhealthy_sequence_that_was_preempted_leaves_nothing() -> None:
    run = Run(blocks=10, seats=2)
    run.start(1, [1] * 16, greedy(140))
    run.start(2, [2] * 16, greedy(140))
    while not run.engine._scheduler.preemptions:
        run.step()
    [victim] = run.engine._scheduler.waiting
    while victim in run.engine._scheduler.waiting:
        run.step()
    run.model.module.poison = 2
    run.until_idle()
    assert run.codes == {2: "unhealthy_logits"}
    run.model.module.poison = None

    said(run, 3, [2] * 17)

    assert run.cached[3] == 0


def test_nothing_is_found_of_a_step_that_failed_when_it_landed() -> None:
    run = Run(runs_ahead=True)
    run.start(1, [*HEAD, 1])
    run.step()
    run.engine.cancel(1)  # its blocks are known, and not computed yet
    run.model.module.errors = [ValueError("a bug")]
    with capture_logs():
        run.until_idle()

    said(run, 2, [*HEAD, 2])

    assert run.cached[2] == 0


def test_nobody_goes_on_from_a_step_that_ran_out_of_memory_when_it_landed() -> None:
    run = Run(runs_ahead=True)
    for number in (1, 2):
        run.start(number, [number, 2, 3], greedy(8))
    run.step()
    run.model.module.errors = [MemoryError()]
    run.until_idle()

    assert run.codes == {1: "out_of_memory", 2: "out_of_memory"}
    assert run.has_all_blocks


def test_a_preempted_sequence_finds_its_own_blocks_again() -> None:
    run = Run(blocks=10, seats=2)
    for number in (1, 2):
        run.start(number, [number] * 16, greedy(140))
    run.until_idle()

    assert run.engine._scheduler.preemptions
    assert [run.tokens[n] for n in (1, 2)] == [answer([n] * 16, 140) for n in (1, 2)]
    assert run.cached == {1: 0, 2: 0}, "what counts is what was found at first"


@pytest.mark.parametrize("budget", [1, 5, 16, 512])
def test_hits_change_nothing_whatever_the_chunks(budget: int) -> None:
    run = Run(budget=budget, blocks=40)
    prompts = {n: [*HEAD[: 16 * (n % 4)], n, *HEAD[: n % 7], 1] for n in range(1, 12)}
    for number, prompt in prompts.items():
        run.start(number, prompt, greedy(20))
        run.step()
    run.until_idle()

    assert run.tokens == {n: answer(prompt, 20) for n, prompt in prompts.items()}


def test_without_the_prefix_cache_nothing_is_found() -> None:
    run = Run(options=EngineOptions(prefix_cache=False))
    said(run, 1, [*HEAD, 1])

    said(run, 2, [*HEAD, 2])

    assert run.cached == {1: 0, 2: 0}
    assert run.engine.clear_prefix_cache() == 0


def test_an_embedding_neither_finds_blocks_nor_leaves_any() -> None:
    run = Run()
    run.embed(1, HEAD)
    run.until_idle()
    said(run, 2, [*HEAD, 2])

    run.embed(3, [*HEAD, 2])
    run.until_idle()

    assert run.cached == {2: 0}
    assert set(run.vectors) == {1, 3}
