"""The compiled choice of tokens against plain torch: the same bits, whatever is asked of what."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from cortex.ipc.messages import SamplingParams
from cortex.models.kernels.cpu import CpuKernels
from cortex.models.kernels.sampling import STUCK, UNHEALTHY, Asks
from cortex.runtime.device.philox import uniform
from cortex.runtime.device.row import Row
from cortex.runtime.device.sampler import Choice, choose_by_kernels, choose_by_torch
from cortex.runtime.device.shares import shares
from cortex.runtime.device.token_counts import TokenCounts

SIZES = 1, 2, 31, 33, 64, 65, 127, 500, 3000


def normal(rows: int, size: int) -> Tensor:
    return torch.randn(rows, size) * 3


def with_ties(rows: int, size: int) -> Tensor:
    return (torch.randn(rows, size) * 4).round() / 4


def peaked(rows: int, size: int) -> Tensor:
    return torch.randn(rows, size) * 3 + 30 * torch.rand(rows, size) ** 40


def all_equal(rows: int, size: int) -> Tensor:
    return torch.full((rows, size), -7.25)


def hardly_different(rows: int, size: int) -> Tensor:
    return 100 + torch.randint(0, 50, (rows, size)) * torch.finfo(torch.float32).eps * 64


def of_all_sizes(rows: int, size: int) -> Tensor:
    return torch.randn(rows, size) * 10.0 ** torch.randint(-40, 38, (rows, size))


def not_finite(rows: int, size: int) -> Tensor:
    logits = torch.randn(rows, size)
    bad = torch.tensor([math.nan, math.inf, -math.inf])
    for row in range(0, rows, 2):
        logits[row, torch.randint(0, size, ())] = bad[row // 2 % 3]
    return logits


LOGITS = normal, with_ties, peaked, all_equal, hardly_different, of_all_sizes, not_finite


def mask_of(size: int, allowed: int) -> Tensor:
    """Return the bits of so many random tokens; those behind the last token are set or not."""
    bits = torch.zeros(-(-size // 32) * 32, dtype=torch.bool)
    bits[torch.randperm(size)[:allowed]] = True
    bits[size:] = torch.rand(len(bits) - size) < 0.5
    return (bits.view(-1, 32).long() << torch.arange(32)).sum(-1).to(torch.int32)


def asked(number: int, size: int) -> Row:
    """A row that asks for something else with each *number*."""

    def one_of(*values: Any) -> Any:
        return values[int(torch.randint(0, len(values), ()))]

    def some_ids(most: int) -> list[int]:
        return torch.randint(0, size, (one_of(0, 1, most),)).tolist()

    sampling = SamplingParams(
        temperature=one_of(0.0, 1e-320, 0.1, 0.7, 1.0, 3.0, 1e6, 1e300),
        max_tokens=1,
        seed=one_of(0, -1, 2**63 - 1, number),
        top_p=one_of(1.0, 1.0, 0.95, 0.5, 1e-9, 1 - 1e-16),
        top_k=one_of(0, 0, 1, 2, 40, size - 1 if size > 1 else 0, size, size + 1),
        min_p=one_of(0.0, 0.0, 1e-20, 0.1, 1.0),
        repetition_penalty=one_of(1.0, 1.0, 1.3, 0.5),
        frequency_penalty=one_of(0.0, 0.0, 0.7, -1e30),
        presence_penalty=one_of(0.0, 0.0, -0.5, 1e30),
        logit_bias=dict.fromkeys(some_ids(9), one_of(-100.0, 0.5, 1e30)),
        top_logprobs=one_of(None, None, 0, 5, 20),
    )
    return Row(
        sampling,
        position=one_of(0, number, 2**40),
        counts=TokenCounts.of(some_ids(60), one_of(0, 20)),
        forced=one_of(None, None, None, size - 1),
        allowed=one_of(None, None, mask_of(size, 0), mask_of(size, 1), mask_of(size, size // 2)),
    )


def same(one: Choice, other: Choice) -> bool:
    """Whether tokens, and the scores of rows that have one, are the same bits."""
    if not torch.equal(one.tokens, other.tokens) or one.scored != other.scored:
        return False
    return repr(one.read(one.tensors)) == repr(other.read(other.tensors))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("make", LOGITS, ids=lambda make: make.__name__)
def test_it_chooses_and_scores_as_torch_does(
    kernels: CpuKernels,
    other_kernels: dict[str, CpuKernels],
    make: Callable[[int, int], Tensor],
    size: int,
) -> None:
    torch.manual_seed(size)
    logits, rows = make(96, size), [asked(number, size) for number in range(96)]

    expected = choose_by_torch(logits, rows)

    assert same(choose_by_kernels(kernels, logits, rows), expected)
    for name, other in other_kernels.items():
        assert same(choose_by_kernels(other, logits, rows), expected), name


def test_these_rows_have_all_outcomes(kernels: CpuKernels) -> None:
    torch.manual_seed(0)
    rows = [asked(number, 100) for number in range(300)]

    tokens = choose_by_kernels(kernels, not_finite(300, 100), rows).tokens

    assert {UNHEALTHY, STUCK} < set(tokens.tolist())
    assert len(set(tokens.tolist())) > 40


def test_the_exponential_is_torchs_to_the_last_bit(
    kernels: CpuKernels, other_kernels: dict[str, CpuKernels]
) -> None:
    """Tokens whose share is exactly min_p are kept; where min_p is the next number they are not."""
    torch.manual_seed(1)
    seed = next(seed for seed in range(1000) if uniform(seed, 0) > 0.95)
    logits = torch.cat([torch.zeros(400, 1), -5 * torch.rand(400, 1).expand(-1, 2000)], dim=1)
    share = shares(logits)[:, 1]
    above = torch.nextafter(share, torch.tensor(2.0, dtype=torch.float64))

    for found in (kernels, *other_kernels.values()):
        for bounds, is_kept in ((share, True), (above, False)):
            rows = [Row(SamplingParams(1.0, 1, seed, min_p=p), 0) for p in bounds.tolist()]
            tokens = choose_by_kernels(found, logits, rows).tokens
            assert ((tokens > 0) == is_kept).all()


def test_the_exponential_is_one() -> None:
    x = torch.linspace(0, -31.9, 10_000, dtype=torch.float64)[None]

    assert ((shares(x) - x.exp()).abs() <= 2.0**-50 * x.exp()).all()
    assert shares(x)[0, 0] == 1.0


def test_the_number_of_threads_changes_nothing(kernels: CpuKernels) -> None:
    torch.manual_seed(2)
    logits, rows = normal(50, 700), [asked(number, 700) for number in range(50)]
    with torch_threads(1):
        alone = choose_by_kernels(kernels, logits, rows)

    with torch_threads(3):
        assert same(choose_by_kernels(kernels, logits, rows), alone)


def test_logits_may_be_a_view(kernels: CpuKernels) -> None:
    torch.manual_seed(3)
    logits, rows = normal(6, 200), [asked(number, 100) for number in range(6)]

    found = choose_by_kernels(kernels, logits[:, 50:150], rows)

    assert same(found, choose_by_kernels(kernels, logits[:, 50:150].clone(), rows))


def test_no_rows_give_no_tokens(kernels: CpuKernels) -> None:
    tokens, scores = Asks(0).choose(kernels, torch.zeros(0, 7))

    assert (tokens.tolist(), scores) == ([], None)


def test_a_mask_without_a_bit_for_every_token_is_not_read(kernels: CpuKernels) -> None:
    asks = Asks(1)
    asks.add(allowed=torch.zeros(1, dtype=torch.int32))

    with pytest.raises(AssertionError, match="every token"):
        asks.choose(kernels, torch.zeros(1, 33))


def test_no_memory_is_an_error(kernels: CpuKernels, monkeypatch: pytest.MonkeyPatch) -> None:
    asks = Asks(1)
    asks.add(temperature=1.0)
    monkeypatch.setattr(kernels, "library", SimpleNamespace(cortex_choose=lambda *_: -1))

    with pytest.raises(MemoryError):
        asks.choose(kernels, torch.zeros(1, 7))


@contextlib.contextmanager
def torch_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
