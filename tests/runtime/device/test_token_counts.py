"""Counts that grow with a sequence are those of all its tokens."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from cortex.ipc.messages import SamplingParams
from cortex.runtime.device.sequence import Sequence
from cortex.runtime.device.token_counts import TokenCounts

tokens = st.lists(st.integers(0, 9), max_size=40)


@given(tokens, tokens)
def test_they_are_those_of_prompt_and_answer(prompt: list[int], answer: list[int]) -> None:
    counts = TokenCounts(prompt)
    for token in answer:
        counts.add(token)

    counted = dict(zip(counts.ids, counts.counts, strict=True))
    assert len(counts.ids) == len(set(counts.ids))
    assert counted == dict.fromkeys(prompt, 0) | Counter(answer)
    assert TokenCounts.of(prompt + answer, len(prompt)).counts == counts.counts


def test_a_sequence_has_them_only_where_penalties_look_at_them() -> None:
    penalised = SamplingParams(0.0, 9, 0, presence_penalty=0.5)
    one, other = Sequence(1, [5, 6], penalised), Sequence(2, [5, 6], SamplingParams(0.0, 9, 0))

    one.append(6, 100)

    assert one.counts is not None
    assert (list(one.counts.ids), list(one.counts.counts)) == ([5, 6], [0, 1])
    assert other.counts is None
