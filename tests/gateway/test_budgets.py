"""What a key may still use: the arithmetic, and what a restart keeps."""

from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cortex.gateway.auth import NOBODY, Principal
from cortex.gateway.budgets import OUTPUT_TOKENS, PARTS, Account, Budgets, prompt_estimate
from cortex.gateway.catalogue import Limits, Profile, Target
from cortex.gateway.config import Budget, Neuron
from cortex.gateway.dialects.chat import PassedOn
from cortex.gateway.fleet import Fleet
from cortex.gateway.state import FILE, StateFile
from cortex.ipc.errors import ApiError, InsufficientQuota, RateLimitExceeded
from cortex.ipc.node_api import Health, Limit, ModelInfo, Servable

CHAT = "/v1/chat/completions"
HOUR = 3600
TARGET = Target("m", "m", None)
NOON = 1_000_000_000.0


class Clock:
    """Seconds since the epoch, as the test says."""

    def __init__(self) -> None:
        self.now = NOON

    def __call__(self) -> float:
        return self.now


def holder(tokens: int, per_seconds: int | None = None) -> Principal:
    return Principal("k", budget=Budget(tokens, per_seconds))


def call(path: str = CHAT, **fields: Any) -> PassedOn:
    """Return a call with a body of 400 bytes."""
    raw = msgspec.json.encode({"model": "m", "user": "", **fields})
    return PassedOn.of(path, raw.replace(b'"user":""', b'"user":"%s"' % (b"x" * (400 - len(raw)))))


def fleet(limit: Limit | None = None) -> Fleet:
    fleet = Fleet([Neuron("a", "http://a:1")])
    info = ModelInfo("m", "torch", "loaded", [], Servable(ok=True), limit=limit)
    fleet.put(fleet.node("a").answered(Health(1.0), [info], {}, 0.0))
    return fleet


def taken(budgets: Budgets, principal: Principal, target: Target = TARGET, **fields: Any) -> int:
    """Return how many tokens are kept for a request."""
    before = told(budgets, principal)["reserved_tokens"]
    budgets.reserve(principal, call(**fields), target)
    return told(budgets, principal)["reserved_tokens"] - before


def told(budgets: Budgets, principal: Principal) -> dict[str, int]:
    assert principal.budget
    return budgets.told("k", principal.budget)


def refusal(account: Account, principal: Principal, tokens: int, now: float = NOON) -> ApiError:
    error = account.refusal(principal, tokens, now)
    assert error is not None
    return error


def test_a_prompt_has_about_a_token_for_four_bytes() -> None:
    assert [prompt_estimate(n) for n in (0, 1, 4, 5, 4000)] == [0, 1, 1, 2, 1000]


@pytest.mark.parametrize(
    ("fields", "limit", "profile", "output"),
    [
        ({}, None, None, OUTPUT_TOKENS),
        ({"max_tokens": 50}, Limit(output=9), None, 50),
        ({"max_tokens": 50, "n": 3}, None, None, 150),
        ({"max_tokens": 0}, None, None, 0),
        ({}, Limit(context=8192, output=512), None, 512),
        ({}, Limit(context=8192), None, OUTPUT_TOKENS),
        ({}, Limit(output=131_072), None, OUTPUT_TOKENS),
        ({"max_tokens": 9_000}, Limit(output=131_072), None, 9_000),
        ({}, Limit(output=512), Limits(output=256), 256),
        ({}, Limit(output=512), Limits(context=99), 512),
        ({"path": "/v1/embeddings"}, Limit(output=512), None, 0),
    ],
    ids=str,
)
async def test_what_is_kept_is_the_prompt_and_all_that_the_answer_may_have(
    fields: dict[str, Any], limit: Limit | None, profile: Limits | None, output: int
) -> None:
    target = Target("m", "m", Profile("m", limit=profile) if profile else None)

    async with StateFile(None) as state:
        kept = taken(Budgets(state, fleet(limit)), holder(10_000), target, **fields)

    assert kept == 100 + output


async def test_what_was_kept_is_given_back_and_what_it_cost_is_spent() -> None:
    async with StateFile(None) as state:
        budgets, principal = Budgets(state, fleet()), holder(10_000)
        reservation = budgets.reserve(principal, call(), TARGET)
        during = told(budgets, principal), budgets.in_flight("k")
        reservation.settle(30)

        assert during == ({"tokens": 10_000, "spent_tokens": 0, "reserved_tokens": 4196}, 1)
        assert told(budgets, principal)["spent_tokens"] == 30
        assert told(budgets, principal)["reserved_tokens"] == budgets.in_flight("k") == 0


async def test_requests_side_by_side_cannot_exceed_a_budget_together() -> None:
    async with StateFile(None) as state:
        budgets, principal = Budgets(state, fleet()), holder(500)
        running = [budgets.reserve(principal, call(max_tokens=0), TARGET) for _ in range(5)]

        with pytest.raises(InsufficientQuota):
            budgets.reserve(principal, call(max_tokens=0), TARGET)
        running.pop().settle(0)
        budgets.reserve(principal, call(max_tokens=0), TARGET)


async def test_an_answer_of_which_nobody_said_how_long_it_gets_is_kept_what_is_left() -> None:
    async with StateFile(None) as state:
        budgets, principal = Budgets(state, fleet()), holder(1000)

        first = taken(budgets, principal, max_tokens=500)
        second = taken(budgets, principal)
        with pytest.raises(InsufficientQuota):
            budgets.reserve(principal, call(), TARGET)

    assert (first, second) == (600, 400)


async def test_a_prompt_that_leaves_nothing_for_an_answer_is_refused() -> None:
    async with StateFile(None) as state:
        budgets = Budgets(state, fleet())

        with pytest.raises(InsufficientQuota, match="may take 101 tokens"):
            budgets.reserve(holder(100), call(), TARGET)
        budgets.reserve(holder(101), call(), TARGET)


async def test_a_key_without_limits_and_whoever_has_none_are_never_refused() -> None:
    async with StateFile(None) as state:
        budgets = Budgets(state, fleet())
        for principal in (NOBODY, Principal("k")):
            for _ in range(1000):
                budgets.reserve(principal, call(), TARGET)
            budgets.reserve(principal, call(), TARGET).settle(10**9)

        assert await state.do(lambda c: c.execute("SELECT * FROM spent").fetchall()) == []


def test_a_spent_balance_says_so_and_not_when_to_come_back() -> None:
    account = Account()
    account.spend(Budget(100), 90, NOON)

    error = refusal(account, holder(100), 11, NOON + 10**9)

    assert isinstance(error, InsufficientQuota)
    assert error.retry_after_seconds is None
    assert "may take 11 tokens" in str(error)
    assert "of the 100" in str(error)
    assert "90 are spent" in str(error)
    assert account.refusal(holder(100), 10, NOON) is None


def test_a_window_gives_back_what_was_spent_when_it_has_passed() -> None:
    account, principal = Account(), holder(100, HOUR)
    account.spend(Budget(100, HOUR), 90, NOON)

    error = refusal(account, principal, 11)

    assert isinstance(error, RateLimitExceeded)
    wait = error.retry_after_seconds
    assert wait is not None
    assert HOUR <= wait <= HOUR + HOUR // PARTS
    assert account.refusal(principal, 11, NOON + wait - 1) is not None
    assert account.refusal(principal, 11, NOON + wait) is None


def test_one_waits_only_until_enough_has_come_back() -> None:
    account, budget = Account(), Budget(100, 60)
    for second in range(10):
        account.spend(budget, 10, NOON + second)

    waits = [refusal(account, holder(100, 60), n, NOON + 9).retry_after_seconds for n in (10, 35)]

    assert waits == [52, 55]


def test_one_waits_a_second_for_what_only_runs() -> None:
    account = Account(reserved=95)

    assert refusal(account, holder(100, HOUR), 11).retry_after_seconds == 1


def test_a_request_larger_than_the_whole_window_is_told_the_window() -> None:
    error = refusal(Account(), holder(100, HOUR), 101)

    assert isinstance(error, RateLimitExceeded)
    assert error.retry_after_seconds == HOUR
    assert "never has so many: a smaller max_tokens" in str(error)


def test_a_window_remembers_no_more_than_its_parts() -> None:
    account, budget = Account(), Budget(10**9, HOUR)

    for second in range(0, 3 * HOUR, 7):
        account.spend(budget, 1, NOON + second)

    assert len(account.spent) <= PARTS + 2


def test_one_request_too_many_at_the_same_time_is_told_to_come_back() -> None:
    account = Account(in_flight=2)

    error = refusal(account, Principal("k", max_in_flight=2), 0)

    assert isinstance(error, RateLimitExceeded)
    assert error.retry_after_seconds == 1
    assert "has 2 requests running, of 2" in str(error)
    assert account.refusal(Principal("k", max_in_flight=3), 0, NOON) is None


async def test_what_is_spent_is_kept_over_a_restart(tmp_path: Path) -> None:
    clock = Clock()
    for per_seconds in (None, HOUR):
        principal = holder(1000, per_seconds)
        async with StateFile(tmp_path / FILE) as state:
            budgets = Budgets(state, fleet(), clock)
            await budgets.read()
            for tokens in (100, 200):
                budgets.reserve(principal, call(max_tokens=9), TARGET).settle(tokens)

        async with StateFile(tmp_path / FILE) as state:
            budgets = Budgets(state, fleet(), clock)
            await budgets.read()

        assert told(budgets, principal)["spent_tokens"] == 300


async def test_what_has_come_back_leaves_the_file_and_a_balance_never_does() -> None:
    clock = Clock()
    async with StateFile(None) as state:
        budgets = Budgets(state, fleet(), clock)
        for per_seconds in (None, 60, 60, 60):
            clock.now += 100
            budgets.reserve(holder(1000, per_seconds), call(max_tokens=1), TARGET).settle(5)
        rows = await state.do(lambda c: c.execute("SELECT began, tokens FROM spent").fetchall())

    assert rows == [(0, 5), (int(clock.now), 5)]


async def test_a_budget_that_is_raised_counts_what_was_spent_before() -> None:
    async with StateFile(None) as state:
        budgets = Budgets(state, fleet())
        budgets.reserve(holder(100), call(max_tokens=0), TARGET).settle(100)

        with pytest.raises(InsufficientQuota):
            budgets.reserve(holder(100), call(max_tokens=0), TARGET)
        budgets.reserve(holder(200), call(max_tokens=0), TARGET).settle(100)

        assert told(budgets, holder(300))["spent_tokens"] == 200


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["reserve", "settle", "release", "wait"]),
        st.integers(0, 60),
        st.floats(0, 1),
    ),
    max_size=60,
)


@given(STEPS, st.sampled_from([None, 1, 7, 60, 90, HOUR]))
def test_no_order_of_requests_exceeds_a_budget(
    steps: list[tuple[str, int, float]], per_seconds: int | None
) -> None:
    principal, account, now = holder(100, per_seconds), Account(), NOON
    budget = Budget(100, per_seconds)
    running: list[int] = []
    spent: list[tuple[float, int]] = []

    for what, number, part in steps:
        if what == "reserve" and account.refusal(principal, number, now) is None:
            running.append(number)
            account.reserved += number
        elif what == "wait":
            now += part * 2 * (per_seconds or 1)
        elif what in ("settle", "release") and running:
            kept = running.pop(number % len(running))
            cost = int(kept * part) if what == "settle" else 0
            account.reserved -= kept
            account.spend(budget, cost, now)
            spent.append((now, cost))

        counts = sum(n for then, n in spent if per_seconds is None or now - then < per_seconds)
        assert counts <= account.spent_of(budget, now)
        assert counts + sum(running) <= 100
        assert account.reserved == sum(running)
