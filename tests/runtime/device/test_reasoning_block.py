"""A reasoning block that does not end in time is ended, and no other is touched."""

from hypothesis import given, settings
from hypothesis import strategies as st

from cortex.ipc.messages import ReasoningBudget
from cortex.runtime.device.reasoning_block import ReasoningBlock

START, END = (7, 8), (3, 4, 5)


def forced_after(tokens: list[int], budget: ReasoningBudget) -> int | None:
    block = ReasoningBlock(budget)
    for token in tokens:
        block.add(token)
    return block.forced


def said(model: list[int], budget: ReasoningBudget) -> list[int]:
    """Return an answer of a model that says *model*, but for what is put in before it."""
    block = ReasoningBlock(budget)
    answer: list[int] = []
    wanted = list(model)
    while wanted or block.forced is not None:
        forced = block.forced
        token = wanted.pop(0) if forced is None or wanted[:1] == [forced] else forced
        answer.append(token)
        block.add(token)
    return answer


def test_a_block_gets_its_end_after_so_many_tokens() -> None:
    assert said([7, 8, 1, 2, 1, 2], ReasoningBudget(3, START, END)) == [7, 8, 1, 2, 1, 3, 4, 5, 2]


def test_a_block_that_the_prompt_opened_counts_from_the_first_token() -> None:
    assert said([1, 2, 1, 2], ReasoningBudget(2, (), END)) == [1, 2, 3, 4, 5, 1, 2]


def test_a_budget_of_nothing_ends_a_block_as_it_starts() -> None:
    assert said([7, 8, 1], ReasoningBudget(0, START, END)) == [7, 8, 3, 4, 5, 1]


def test_a_budget_of_nothing_ends_a_block_of_the_prompt_before_its_first_token() -> None:
    assert said([1], ReasoningBudget(0, (), END)) == [3, 4, 5, 1]


def test_a_block_that_never_starts_is_none() -> None:
    model = [7, 1, 8, 1, 7, 7, 1]

    assert said(model, ReasoningBudget(0, START, END)) == model


def test_a_block_that_ends_by_itself_is_left_alone() -> None:
    model = [7, 8, 1, 3, 4, 5, 1, 1, 1, 1, 1]

    assert said(model, ReasoningBudget(4, START, END)) == model


def test_the_last_token_of_an_end_may_be_the_last_of_the_budget() -> None:
    model = [7, 8, 1, 3, 4, 5, 1]

    assert said(model, ReasoningBudget(3, START, END)) == model


def test_of_an_end_that_the_model_has_begun_only_the_rest_is_put_in() -> None:
    assert said([7, 8, 1, 3, 4, 1], ReasoningBudget(3, START, END)) == [7, 8, 1, 3, 4, 5, 1]


def test_a_beginning_of_an_end_that_came_to_nothing_does_not_count() -> None:
    assert said([7, 8, 3, 4, 1, 1], ReasoningBudget(3, START, END)) == [7, 8, 3, 4, 1, 3, 4, 5, 1]


def test_an_end_that_repeats_itself_is_completed_by_what_is_missing() -> None:
    assert said([1, 3, 3, 3], ReasoningBudget(3, (), (3, 3, 4))) == [1, 3, 3, 4, 3]


def test_a_second_block_has_a_budget_of_its_own() -> None:
    model = [7, 8, 1, 3, 4, 5, 7, 8, 1, 1, 1]

    assert said(model, ReasoningBudget(2, START, END)) == [*model[:10], *END, 1]


def test_a_block_of_the_prompt_comes_once() -> None:
    model = [1, 3, 4, 5, 1, 1, 1, 1, 1]

    assert said(model, ReasoningBudget(3, (), END)) == model


def plainly_forced(tokens: list[int], budget: ReasoningBudget) -> int | None:
    """Return what has to come next, by looking for the marks in the whole answer."""
    start, end = list(budget.start_token_ids), list(budget.end_token_ids)
    at = 0
    while True:
        if start:
            begins = [n for n in range(at, len(tokens)) if tokens[n : n + len(start)] == start]
            if not begins:
                return None
            at = begins[0] + len(start)
        ends = [n for n in range(at, len(tokens)) if tokens[n : n + len(end)] == end]
        if not ends:
            break
        at = ends[0] + len(end)
        if not start:
            return None
    if len(tokens) - at < budget.max_tokens:
        return None
    inside = tokens[at:]
    there = max(n for n in range(len(end)) if inside[len(inside) - n :] == end[:n])
    return end[there]


few = st.integers(0, 2)
marks = st.lists(few, min_size=1, max_size=4).map(tuple)


@given(
    st.lists(few, max_size=25),
    st.builds(ReasoningBudget, st.integers(0, 6), st.just(()) | marks, marks),
)
@settings(max_examples=500, deadline=None)
def test_what_is_put_in_follows_from_the_tokens_of_the_answer_alone(
    tokens: list[int], budget: ReasoningBudget
) -> None:
    assert forced_after(tokens, budget) == plainly_forced(tokens, budget)


@given(
    st.lists(few, max_size=40),
    st.builds(ReasoningBudget, st.integers(0, 6), st.just(()), marks),
)
@settings(max_examples=200, deadline=None)
def test_no_block_is_longer_than_its_budget_and_its_end(
    model: list[int], budget: ReasoningBudget
) -> None:
    answer = said(model, budget)

    most = budget.max_tokens + len(budget.end_token_ids)
    if len(answer) >= most:
        end = list(budget.end_token_ids)
        assert any(answer[n : n + len(end)] == end for n in range(budget.max_tokens + 1))
