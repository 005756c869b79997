"""A token depends on its own row, its seed and its position, and on nothing else."""

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cortex.ipc.messages import SamplingParams
from cortex.runtime.device.philox import uniform
from cortex.runtime.device.sampler import Row, sample, sampling_bytes
from cortex.runtime.device.workspace import living_bytes

DRAWS = 4000


def row(
    position: int = 0,
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
) -> Row:
    return Row(SamplingParams(temperature, 16, seed, top_p, top_k), position)


def frequencies(probabilities: list[float], **options: float) -> dict[int, float]:
    """Draw many times from a distribution; return how often each token came."""
    logits = torch.tensor(probabilities).log()
    chosen: Counter[int | None] = Counter()
    for at in range(0, DRAWS, 500):
        rows = [row(at + n, **options) for n in range(500)]  # type: ignore[arg-type] # top_k is an int
        chosen.update(sample(logits.expand(500, -1), rows))
    return {token: count / DRAWS for token, count in chosen.items() if token is not None}


def test_temperature_zero_takes_the_largest() -> None:
    assert sample(torch.tensor([[0.0, 3.0, 1.0]]), [row(temperature=0.0)]) == [1]


def test_temperature_zero_takes_the_lowest_id_of_equals() -> None:
    assert sample(torch.tensor([[0.0, 3.0, 3.0, 3.0]]), [row(temperature=0.0)]) == [1]


def test_tokens_come_as_often_as_they_are_probable() -> None:
    seen = frequencies([0.5, 0.3, 0.2])

    assert seen == pytest.approx({0: 0.5, 1: 0.3, 2: 0.2}, abs=0.03)


def test_a_higher_temperature_flattens() -> None:
    seen = frequencies([0.8, 0.2], temperature=2.0)

    assert seen[0] == pytest.approx(2 / 3, abs=0.03)


def test_top_k_keeps_the_k_largest() -> None:
    seen = frequencies([0.2, 0.5, 0.3], top_k=2)

    assert seen == pytest.approx({1: 0.625, 2: 0.375}, abs=0.03)


def test_top_k_keeps_the_lower_ids_of_equals() -> None:
    assert set(frequencies([0.25, 0.25, 0.25, 0.25], top_k=2)) == {0, 1}


def test_top_p_keeps_the_token_that_crosses_the_mark() -> None:
    seen = frequencies([0.5, 0.3, 0.15, 0.05], top_p=0.6)

    assert seen == pytest.approx({0: 0.625, 1: 0.375}, abs=0.03)


def test_a_tiny_top_p_keeps_the_likeliest() -> None:
    assert set(frequencies([0.2, 0.5, 0.3], top_p=1e-9)) == {1}


def test_top_p_is_taken_of_what_top_k_left() -> None:
    # 0.4 / 0.7 alone reaches 0.55; of the whole distribution it would take 0.4 + 0.3.
    assert set(frequencies([0.4, 0.3, 0.2, 0.1], top_k=2, top_p=0.55)) == {0}


def test_the_temperature_comes_before_top_p() -> None:
    assert set(frequencies([0.6, 0.4], temperature=0.2, top_p=0.7)) == {0}


def test_another_position_or_seed_may_choose_another_token() -> None:
    logits = torch.zeros(64, 1000)

    assert len(set(sample(logits, [row(n) for n in range(64)]))) > 50
    assert len(set(sample(logits, [row(seed=n) for n in range(64)]))) > 50


def test_a_vanishing_temperature_is_greedy() -> None:
    assert sample(torch.tensor([[1.0, 2.0, 1.5]]), [row(temperature=1e-320)]) == [1]


def test_no_rows_give_no_tokens() -> None:
    assert sample(torch.zeros(0, 5), []) == []


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_that_is_not_finite_has_no_token_and_spoils_no_other(
    bad: float, temperature: float
) -> None:
    logits = torch.tensor([[0.0, 9.0], [bad, 0.0], [9.0, 0.0]])

    assert sample(logits, [row(temperature=temperature)] * 3) == [1, None, 0]


rows = st.builds(
    row,
    st.integers(0, 10_000),
    temperature=st.sampled_from([0.0, 0.3, 1.0, 1.7]),
    top_p=st.sampled_from([0.1, 0.9, 1.0]),
    top_k=st.sampled_from([0, 1, 5, 40]),
    seed=st.integers(-(2**63), 2**63),
)


@given(st.lists(rows, min_size=1, max_size=20), st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_a_row_gets_the_same_token_alone_as_in_any_company(many: list[Row], noise: int) -> None:
    logits = torch.randn(len(many), 300, generator=torch.Generator().manual_seed(noise))

    alone = [sample(logits[n : n + 1], [many[n]])[0] for n in range(len(many))]

    assert sample(logits, many) == alone


def plainly(logits: list[float], row: Row) -> int:
    """Choose as the sampler says it does, one step after the other."""
    sampling, ids = row.sampling, sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    largest = logits[ids[0]]
    weights = [int(math.exp((x - largest) / sampling.temperature) * 2**40) for x in logits]
    ids = ids[: sampling.top_k or None]
    mark, before, kept = sampling.top_p * sum(weights[i] for i in ids), 0, list[int]()
    for i in ids:
        if before < mark:
            kept.append(i)
        before += weights[i]
    left = uniform(sampling.seed, row.position) * sum(weights[i] for i in kept)
    for i in sorted(kept):
        left -= weights[i]
        if left < 0:
            return i
    return max(kept)


@pytest.mark.parametrize("spread", [0.1, 1.0, 5.0])  # the nucleus has thousands, many, few tokens
@pytest.mark.parametrize("top_p", [1e-9, 0.3, 0.95, 1.0])
@pytest.mark.parametrize("top_k", [0, 1, 40, 1024, 1025, 2000, 2999, 3000, 10_000])
def test_it_chooses_what_the_definition_says(spread: float, top_p: float, top_k: int) -> None:
    generator = torch.Generator().manual_seed(top_k)
    logits = (torch.randn(4, 3000, generator=generator) * 16).round() / 16 * spread  # with ties
    rows = [
        row(n, temperature=temperature, top_p=top_p, top_k=top_k, seed=7)
        for n, temperature in enumerate([1e-5, 0.7, 1.0, 2.0])
    ]

    chosen = sample(logits, rows)

    assert chosen == [plainly(x, r) for x, r in zip(logits.tolist(), rows, strict=True)]


@pytest.mark.parametrize("count", [1, 3, 20])
def test_it_stays_within_the_memory_that_it_says(count: int) -> None:
    logits = torch.randn(count, 5000)
    many = [row(n, top_p=0.9, top_k=50) for n in range(count)]

    peak = max(living_bytes(lambda: sample(logits, many)))

    assert peak + 4 * logits.numel() <= sampling_bytes(count, 5000)
