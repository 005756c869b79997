"""A token depends on its own row, its seed and its position, and on nothing else."""

import math
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import plain_sampling
from cortex.ipc.messages import SamplingParams
from cortex.runtime.device import sampler
from cortex.runtime.device.row import Row
from cortex.runtime.device.sampler import choose, choose_by_torch, sample, sampling_bytes
from cortex.runtime.device.token_counts import TokenCounts
from cortex.runtime.device.workspace import living_bytes

DRAWS = 4000


def row(
    position: int = 0,
    *,
    known: list[int] | None = None,
    prompt_tokens: int = 0,
    forced: int | None = None,
    allowed: list[int] | None = None,
    **options: Any,
) -> Row:
    """A row of temperature 1 unless the options, those of SamplingParams, say otherwise."""
    sampling = SamplingParams(**{"temperature": 1.0, "max_tokens": 16, "seed": 0, **options})
    counts = TokenCounts.of(known or [], prompt_tokens)
    return Row(sampling, position, counts, forced, None if allowed is None else mask(allowed))


def mask(allowed: list[int]) -> Tensor:
    """Return the bits of these tokens, none above 319."""
    bits = torch.zeros(320, dtype=torch.bool)
    bits[allowed] = True
    return (bits.view(-1, 32).long() << torch.arange(32)).sum(-1).to(torch.int32)


def tokens(logits: Tensor, rows: list[Row]) -> list[int | None]:
    return [chosen.token_id for chosen in sample(logits, rows)]


def frequencies(probabilities: list[float], **options: Any) -> dict[int, float]:
    """Draw many times from a distribution; return how often each token came."""
    logits = torch.tensor(probabilities).log()
    chosen: Counter[int | None] = Counter()
    for at in range(0, DRAWS, 500):
        rows = [row(at + n, **options) for n in range(500)]
        chosen.update(tokens(logits.expand(500, -1), rows))
    return {token: count / DRAWS for token, count in chosen.items() if token is not None}


def test_temperature_zero_takes_the_largest() -> None:
    assert tokens(torch.tensor([[0.0, 3.0, 1.0]]), [row(temperature=0.0)]) == [1]


def test_temperature_zero_takes_the_lowest_id_of_equals() -> None:
    assert tokens(torch.tensor([[0.0, 3.0, 3.0, 3.0]]), [row(temperature=0.0)]) == [1]


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

    assert len(set(tokens(logits, [row(n) for n in range(64)]))) > 50
    assert len(set(tokens(logits, [row(seed=n) for n in range(64)]))) > 50


def test_a_vanishing_temperature_is_greedy() -> None:
    assert tokens(torch.tensor([[1.0, 2.0, 1.5]]), [row(temperature=1e-320)]) == [1]


def test_no_rows_give_no_tokens() -> None:
    assert tokens(torch.zeros(0, 5), []) == []


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_that_is_not_finite_has_no_token_and_spoils_no_other(
    bad: float, temperature: float
) -> None:
    logits = torch.tensor([[0.0, 9.0], [bad, 0.0], [9.0, 0.0]])

    assert tokens(logits, [row(temperature=temperature)] * 3) == [1, None, 0]


def test_min_p_keeps_what_is_at_least_that_share_of_the_likeliest() -> None:
    seen = frequencies([0.5, 0.26, 0.24], min_p=0.5)

    assert seen == pytest.approx({0: 50 / 76, 1: 26 / 76}, abs=0.03)


def test_min_p_keeps_a_token_that_is_exactly_that_share() -> None:
    assert set(frequencies([0.4, 0.4, 0.2], min_p=1.0)) == {0, 1}


def test_the_temperature_comes_before_min_p() -> None:
    assert set(frequencies([0.6, 0.4], temperature=0.2, min_p=0.5)) == {0}


def test_top_p_is_taken_of_what_min_p_left() -> None:
    # 0.45 / 0.75 alone reaches 0.55; of the whole distribution it would take 0.45 + 0.3.
    assert set(frequencies([0.45, 0.3, 0.25], min_p=0.6, top_p=0.55)) == {0}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_token_that_is_put_in_is_taken_whatever_the_logits_say(temperature: float) -> None:
    forced = row(temperature=temperature, forced=2, logit_bias={2: -100.0}, top_k=1)

    assert tokens(torch.tensor([[9.0, 0.0, -9.0]] * 2), [forced, row(top_k=1)]) == [2, 0]


def test_a_row_that_is_not_finite_has_no_token_even_where_one_would_be_put_in() -> None:
    assert tokens(torch.tensor([[math.nan, 0.0]]), [row(forced=1)]) == [None]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_only_tokens_that_are_allowed_are_chosen(temperature: float) -> None:
    logits = torch.tensor([[9.0, 5.0, 1.0, 0.0]]).expand(50, -1)
    options: dict[str, Any] = {"temperature": temperature, "logit_bias": {0: 100.0}}

    found = set(tokens(logits, [row(n, allowed=[2, 3], **options) for n in range(50)]))

    assert found == ({2} if temperature == 0 else {2, 3})


def test_top_k_and_top_p_are_taken_of_what_is_allowed() -> None:
    seen = frequencies([0.5, 0.3, 0.15, 0.05], allowed=[1, 2, 3], top_k=2, top_p=0.9)

    assert seen == pytest.approx({1: 2 / 3, 2: 1 / 3}, abs=0.03)


def test_a_token_that_is_put_in_need_not_be_allowed() -> None:
    assert tokens(torch.tensor([[9.0, 0.0]]), [row(forced=1, allowed=[0])]) == [1]


def test_where_nothing_is_allowed_the_row_is_stuck_and_not_unhealthy() -> None:
    logits = torch.tensor([[9.0, 0.0], [math.nan, 0.0], [9.0, 0.0]])
    rows = [row(allowed=[], top_logprobs=1), row(allowed=[]), row(allowed=[1])]

    stuck, unhealthy, well = sample(logits, rows)

    assert (stuck.token_id, stuck.is_stuck) == (None, True)
    assert (unhealthy.token_id, unhealthy.is_stuck) == (None, False)
    assert (well.token_id, well.is_stuck) == (1, False)


def test_a_mask_may_end_within_a_word_and_what_is_behind_the_vocabulary_is_no_token() -> None:
    everything = Row(SamplingParams(1.0, 1, 0), 0, allowed=torch.full((2,), -1, dtype=torch.int32))

    for way in WAYS.values():
        assert way(torch.zeros(1, 33), [everything]).tokens.tolist() == tokens(
            torch.zeros(1, 33), [row()]
        )


ids = st.integers(0, 19)
penalties = st.sampled_from([0.0, 0.0, 0.5, 2.0, -1.5])
rows = st.builds(
    row,
    st.integers(0, 10_000),
    known=st.lists(ids, max_size=30),
    prompt_tokens=st.integers(0, 30),
    forced=st.sampled_from([None, None, None, 3]),
    temperature=st.sampled_from([0.0, 0.3, 1.0, 1.7]),
    top_p=st.sampled_from([0.1, 0.9, 1.0]),
    top_k=st.sampled_from([0, 1, 5, 40]),
    min_p=st.sampled_from([0.0, 0.0, 0.05, 0.4]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.3, 0.7]),
    presence_penalty=penalties,
    frequency_penalty=penalties,
    logit_bias=st.dictionaries(ids, st.sampled_from([-100.0, -1.0, 2.5, 100.0]), max_size=4),
    top_logprobs=st.sampled_from([None, None, 0, 3, 20]),
    allowed=st.sampled_from([None, None, None, [], [3], list(range(0, 40, 3))]),
    seed=st.integers(-(2**63), 2**63),
)
several = st.lists(rows, min_size=1, max_size=20)
WAYS = {"kernels": choose, "torch": choose_by_torch}


def noise(rows: int, vocabulary: int, seed: int) -> Tensor:
    """Return logits with many equals among them."""
    logits = torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * 2
    return (logits * 8).round() / 8


@pytest.mark.parametrize("way", WAYS)
@given(several, st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_whatever_rows_ask_for_they_get_what_the_definition_says(
    way: str, many: list[Row], seed: int
) -> None:
    logits = noise(len(many), 40, seed)

    choice = WAYS[way](logits, many)

    expected = [plain_sampling.chosen(*pair) for pair in zip(logits.tolist(), many, strict=True)]
    assert [chosen.token_id for chosen in choice.read(choice.tensors)] == expected


@given(several, st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_a_row_gets_the_same_token_and_logprobs_alone_as_in_any_company(
    many: list[Row], seed: int
) -> None:
    logits = noise(len(many), 300, seed)
    logits[seed % len(many), 0] = [math.nan, 1.0][seed % 2]

    alone = [sample(logits[n : n + 1], [many[n]])[0] for n in range(len(many))]

    assert repr(sample(logits, many)) == repr(alone)  # a NaN is no other NaN's equal


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

    expected = [plain_sampling.chosen(x, r) for x, r in zip(logits.tolist(), rows, strict=True)]

    for choose_in_this_way in WAYS.values():
        assert choose_in_this_way(logits, rows).tokens.tolist() == expected


@pytest.mark.parametrize("count", [1, 3, 20])
@pytest.mark.parametrize(
    "options",
    [
        {"top_p": 0.9, "top_k": 50},
        {"top_p": 0.9, "min_p": 0.1, "presence_penalty": 1.0, "known": list(range(5000)) * 3},
        {"temperature": 0.0, "top_logprobs": 20},
        {"top_p": 0.9, "repetition_penalty": 1.1, "known": list(range(5000)), "top_logprobs": 20},
    ],
)
def test_it_stays_within_the_memory_that_it_says(count: int, options: dict[str, Any]) -> None:
    logits = torch.randn(count, 5000)
    many = [row(n, **options) for n in range(count)]

    peak = max(living_bytes(lambda: choose_by_torch(logits, many)))

    assert peak + 4 * logits.numel() <= sampling_bytes(count, 5000)


EVERYTHING = [
    row(temperature=0.0),
    row(temperature=0.7, top_p=0.9),
    row(top_k=40, min_p=0.1),
    row(allowed=[1, 2], temperature=0.0),
    row(allowed=[]),
    row(known=[1, 2, 2], prompt_tokens=1, frequency_penalty=0.5, repetition_penalty=1.2),
    row(logit_bias={3: 1.0}, top_p=0.5),
    row(forced=5),
    row(temperature=0.0, top_logprobs=20),
    row(top_p=0.9, top_logprobs=0),
]


def test_nothing_of_the_choice_waits_for_the_device() -> None:
    """A tensor of the meta device has no values: whoever looks at one fails."""
    choice = choose_by_torch(torch.zeros(10, 320, device="meta"), EVERYTHING)

    assert {tensor.device.type for tensor in choice.tensors} == {"meta"}
    assert choice.tokens.shape == (10,)
    with pytest.raises(RuntimeError, match="meta"):
        choice.read(choice.tensors)


def test_where_there_is_no_compiler_torch_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(10, 320, generator=torch.Generator().manual_seed(5))
    compiled = sample(logits, EVERYTHING)
    monkeypatch.setattr(sampler, "kernels_for", lambda *_: None)

    assert repr(sample(logits, EVERYTHING)) == repr(compiled)
