"""Streams never stall, prompts join in chunks, the last to come goes back first, all end."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from cortex.ipc.ring import Flag
from cortex.runtime.device.block_pool import BlockPool
from cortex.runtime.device.scheduler import Scheduler
from cortex.runtime.device.sequence import Sequence
from cortex.runtime.device.step_plan import StepPlan
from engine_fakes import greedy


def scheduler(
    *, blocks: int = 64, block_tokens: int = 16, seats: int = 8, budget: int = 32
) -> Scheduler:
    return Scheduler(
        BlockPool(blocks, block_tokens),
        max_sequences=seats,
        max_context_tokens=10_000,
        token_budget=budget,
    )


def sequence(number: int, prompt_tokens: int, max_tokens: int = 50) -> Sequence:
    return Sequence(number, [1] * prompt_tokens, greedy(max_tokens))


def step(scheduler: Scheduler) -> dict[int, int]:
    """Schedule a step, pretend to run it, and return the tokens that each sequence brought."""
    plan = scheduler.schedule()
    finish(scheduler, plan)
    return {planned.sequence_id: len(planned.token_ids) for planned in plan.sequences}


def finish(scheduler: Scheduler, plan: StepPlan) -> list[int]:
    """Pretend that *plan* was run; return the sequences that ended."""
    scheduler.advance(plan)
    flags = {p.sequence_id: scheduler.append(p.sequence_id, 2) for p in plan.sampled}
    return [number for number, flag in flags.items() if flag & Flag.FINISH]


def test_a_long_prompt_comes_in_chunks_of_the_budget() -> None:
    s = scheduler(budget=32)
    s.add(sequence(1, 70))

    assert [step(s) for _ in range(4)] == [{1: 32}, {1: 32}, {1: 6}, {1: 1}]


def test_a_running_stream_gets_its_token_beside_the_chunks_of_a_prompt() -> None:
    s = scheduler(budget=32)
    s.add(sequence(1, 4))
    step(s)
    s.add(sequence(2, 70))

    assert [step(s) for _ in range(3)] == [{1: 1, 2: 31}, {1: 1, 2: 31}, {1: 1, 2: 8}]


def test_only_the_last_chunk_of_a_prompt_is_sampled() -> None:
    s = scheduler(budget=32)
    s.add(sequence(1, 40))
    first = s.schedule()
    finish(s, first)
    second = s.schedule()

    assert [p.samples for p in (*first.sequences, *second.sequences)] == [False, True]


def test_a_budget_smaller_than_the_seats_still_lets_every_stream_go_on() -> None:
    s = scheduler(seats=4, budget=1)
    for number in range(4):
        s.add(sequence(number, 1))
    while s.waiting:
        step(s)

    assert step(s) == {0: 1, 1: 1, 2: 1, 3: 1}


def test_seats_are_given_in_order_of_arrival() -> None:
    s = scheduler(seats=2)
    for number in (5, 3, 4):
        s.add(sequence(number, 4))

    assert list(step(s)) == [5, 3]


def test_a_short_prompt_does_not_overtake_a_long_one_that_waits_for_memory() -> None:
    s = scheduler(blocks=10)
    s.add(sequence(1, 60))
    s.add(sequence(2, 150))
    s.add(sequence(3, 1))

    assert list(step(s)) == [1]


def test_joining_takes_a_little_more_than_the_prompt_not_max_tokens() -> None:
    s = scheduler(blocks=64, block_tokens=16)
    s.add(sequence(1, 16, max_tokens=32_000))

    step(s)

    assert s.pool.total - s.pool.free == (16 + 64) // 16


def test_the_latest_arrival_goes_back_when_blocks_run_out() -> None:
    s = scheduler(blocks=10, block_tokens=16)  # each joins with 5 blocks
    s.add(sequence(1, 16, max_tokens=140))
    s.add(sequence(2, 16, max_tokens=140))
    while len(s.running) == 2 or not s.running:
        step(s)

    assert [r.id for r in s.running] == [1]
    assert [(w.id, w.computed, w.blocks) for w in s.waiting] == [(2, 0, [])]
    assert len(s.waiting[0].tokens) > 16, "what was generated is kept"


def test_a_preempted_sequence_waits_in_front_of_those_that_came_later() -> None:
    s = scheduler(blocks=10, block_tokens=16, seats=2)
    for number in (1, 2, 3):
        s.add(sequence(number, 16, max_tokens=140))
    while len(s.running) == 2 or not s.running:
        step(s)

    assert [w.id for w in s.waiting] == [2, 3]


def test_a_sequence_ends_at_the_limit_of_the_context() -> None:
    s = Scheduler(BlockPool(64, 16), max_sequences=1, max_context_tokens=10, token_budget=32)
    s.add(sequence(1, 8))

    step(s)

    assert finish(s, s.schedule()) == [1]


def test_a_sequence_alone_ends_where_the_whole_cache_is_full() -> None:
    s = scheduler(blocks=2, block_tokens=16)
    s.add(sequence(1, 20, max_tokens=1000))
    steps = 0
    while len(s):
        step(s)
        steps += 1

    assert steps == 12
    assert s.pool.free == 2


def test_ending_an_unknown_sequence_is_not_an_error() -> None:
    assert scheduler().end(7) is None


class SchedulerMachine(RuleBasedStateMachine):
    """Any interleaving of arrivals, steps and cancellations.

    Room for two sequences as they join, so that their further growth sends some of them back.
    """

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = scheduler(blocks=36, block_tokens=4, seats=3, budget=23)
        self.arrivals = 0
        self.open: set[int] = set()

    @rule(prompt_tokens=st.integers(1, 143), max_tokens=st.integers(1, 143))
    def arrive(self, prompt_tokens: int, max_tokens: int) -> None:
        self.scheduler.add(sequence(self.arrivals, prompt_tokens, max_tokens))
        self.open.add(self.arrivals)
        self.arrivals += 1

    @precondition(lambda self: self.open)
    @rule()
    def step(self) -> None:
        decoding = {s.id for s in self.scheduler.running if s.remaining == 1}
        plan = self.scheduler.schedule()
        running = {s.id for s in self.scheduler.running}
        planned = {p.sequence_id for p in plan.sequences}
        assert planned, "a step is never empty while there is a sequence"
        assert plan.tokens <= self.scheduler.token_budget
        assert decoding & running <= planned, "a stream that was not preempted goes on"
        for p in plan.sequences:
            assert len(p.block_table) * self.scheduler.pool.block_tokens >= p.end_position
        self.open -= set(finish(self.scheduler, plan))

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.open)))
        assert self.scheduler.end(number)
        self.open.discard(number)

    @invariant()
    def every_block_is_free_or_of_those_that_run(self) -> None:
        owned = {b for s in self.scheduler.running for b in s.blocks}
        assert self.scheduler.pool.free + len(owned) == self.scheduler.pool.total
        assert not any(s.blocks for s in self.scheduler.waiting)

    @invariant()
    def a_block_is_shared_only_as_the_same_part_of_the_same_head(self) -> None:
        parts: dict[int, tuple[int, ...]] = {}
        for s in self.scheduler.running:
            assert len(set(s.blocks)) == len(s.blocks)
            for at, block in enumerate(s.blocks):
                head = tuple(s.tokens[: (at + 1) * self.scheduler.pool.block_tokens])
                assert parts.setdefault(block, head) == head

    @invariant()
    def whoever_runs_came_before_whoever_waits(self) -> None:
        assert self.scheduler.sequence_ids == sorted(self.open)
        assert len(self.scheduler.running) <= self.scheduler.max_sequences

    def teardown(self) -> None:
        for _ in range(200 * self.arrivals):
            if not self.open:
                break
            self.step()
        assert not self.open, "every sequence ends"
        assert self.scheduler.pool.free == self.scheduler.pool.total


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
