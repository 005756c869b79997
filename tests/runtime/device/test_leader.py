"""What a group's first rank computes and chooses, the others compute and choose after it."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
import torch

from cortex.ipc.messages import ReasoningBudget, SamplingParams
from cortex.ipc.plan_ring import PlanRingFull
from cortex.runtime.device.follower import Follower
from cortex.runtime.device.grammar import Grammars
from cortex.runtime.device.leader import Leader
from cortex.runtime.device.model_runner import ModelRunner, Runner
from cortex.runtime.device.plan_wire import (
    PlanListener,
    PlanTeller,
    ToldStep,
    decode_step,
    encode_masks,
    encode_step,
    with_masks,
)
from cortex.runtime.device.refusal import DeviceLost, PeerLost, RanksDiverged
from cortex.runtime.device.row import Row
from cortex.runtime.device.sequence import NO_ANSWER
from cortex.runtime.device.step_plan import PlannedSequence, StepPlan
from cortex.runtime.device.token_counts import TokenCounts
from cortex.runtime.device.vocabulary import Vocabulary
from engine_fakes import (
    UNHEALTHY_TOKEN,
    VOCABULARY,
    FakeModel,
    RecallingModule,
    greedy,
    recurrent_model,
)
from engine_run import LateRunner, Run

CPU = torch.device("cpu")
PENALISED = SamplingParams(
    0.8, 30, 5, repetition_penalty=1.3, frequency_penalty=0.4, presence_penalty=0.2
)

STRICT = msgspec.structs.replace(PENALISED, temperature=0.0, logit_bias={UNHEALTHY_TOKEN: -1e6})


class Pair:
    """A leading engine, and a follower with a model of its own that is told some steps late."""

    def __init__(self, *, lag: int = 0, **options: Any) -> None:
        self.messages: deque[bytes] = deque()
        self.told = 0
        self.lag = lag
        self.run = Run(wrapped=self._leading, **options)
        blocks, slots = self.run.cache.blocks, 0
        variety = options.get("variety", 96)
        self.model = FakeModel(RecallingModule(variety))
        if options.get("snapshots") is not None:
            slots = options.get("seats", 8) + options["snapshots"]
            self.model = recurrent_model(variety)
        self.cache = self.model.new_cache(blocks, 16, slots)
        runner = ModelRunner(self.model, self.cache, CPU)
        late: Runner = LateRunner(runner) if options.get("runs_ahead") else runner
        self.follower = Follower("m", late)

    def _leading(self, runner: Runner) -> Runner:
        return Leader("m", runner, self.messages.append)

    def step(self) -> None:
        self.run.engine.take_compiled()
        self.run.step()
        self.follow(self.lag)

    def follow(self, lag: int = 0) -> None:
        while len(self.messages) > lag:
            self.told += 1
            self.follower.step(decode_step(self.messages.popleft()), self.messages.popleft)

    def until_ended(self, *sequence_ids: int) -> None:
        for _ in range(5000):
            if all(n in self.run.finishes or n in self.run.codes for n in sequence_ids):
                break
            self.step()
        assert not self.run.failures, self.run.failures
        for _ in range(2):  # what is under way lands, and is told with one more step
            self.run.start(900, [1], greedy(2))
            while 900 not in self.run.finishes:
                self.step()
            del self.run.finishes[900]
            self.run.cached.pop(900)
        self.follow()

    def is_alike(self) -> bool:
        """Whether both caches hold the same bits."""
        mine = [*self.run.cache.keys, *self.run.cache.values]
        theirs = [*self.cache.keys, *self.cache.values]
        for one, other in zip(self.run.cache.states, self.cache.states, strict=True):
            mine += [one.conv, one.delta]
            theirs += [other.conv, other.delta]
        return all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


@pytest.fixture(params=[False, True], ids=["at once", "ahead"])
def runs_ahead(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.mark.parametrize("lag", [0, 3])
def test_a_follower_computes_and_chooses_what_the_first_rank_does(
    runs_ahead: bool, lag: int
) -> None:
    pair = Pair(runs_ahead=runs_ahead, lag=lag, blocks=20, seats=4, budget=32, variety=9)
    draw = random.Random(3)
    samplings = [
        greedy(110),
        SamplingParams(0.9, 110, 11, top_p=0.9, top_k=20),
        msgspec.structs.replace(PENALISED, max_tokens=90),
        SamplingParams(0.0, 20, 0, logit_bias={4: 3.0, 7: -2.0}, top_logprobs=3),
        SamplingParams(0.0, 8, 0, prompt_logprobs=2),
        SamplingParams(0.7, 25, 4, reasoning_budget=ReasoningBudget(4, (), (5, 6))),
    ]
    for number in range(7):
        prompt = [draw.randrange(9) for _ in range(draw.randrange(1, 16))]
        pair.run.start(number + 1, prompt, samplings[number % len(samplings)])
    pair.run.embed(300, [4] * 50)

    pair.until_ended(*range(1, 8))

    assert pair.run.engine.standing().preemptions > 0, "the blocks were to run out"
    assert pair.run.drafted or runs_ahead
    assert pair.run.vectors[300]
    assert pair.is_alike()


def test_a_follower_keeps_the_states_that_the_first_rank_keeps(runs_ahead: bool) -> None:
    pair = Pair(runs_ahead=runs_ahead, snapshots=4, seats=3, blocks=40, budget=24)
    for number in range(1, 6):
        pair.run.start(number, [7] * 48 + [number] * number, STRICT)

    pair.until_ended(*range(1, 6))

    assert any(pair.run.cached.values()), "states were to be restored"
    assert pair.is_alike()


@pytest.fixture
def grammars() -> Iterator[Grammars]:
    texts = [bytes([i]) for i in range(VOCABULARY)]
    made = Grammars(lambda: Vocabulary(texts, frozenset({2})), VOCABULARY)
    yield made
    made.close()


def test_a_follower_is_told_what_grammars_allow(runs_ahead: bool, grammars: Grammars) -> None:
    pair = Pair(runs_ahead=runs_ahead, grammars=grammars)
    digits = "start: /[0-9]{20}/"
    for number in (1, 2):
        sampling = SamplingParams(1.5, 30, number, stop_token_ids=(2,), grammar=digits)
        pair.run.start(number, [number, 9], sampling)
    pair.run.start(3, [3], greedy(12))

    pair.until_ended(1, 2, 3)

    assert all(48 <= token < 58 for token in pair.run.tokens[1][:20] + pair.run.tokens[2][:20])
    assert pair.is_alike()


def test_a_rank_that_chooses_another_token_is_found_out(runs_ahead: bool) -> None:
    pair = Pair(runs_ahead=runs_ahead)
    pair.run.start(1, [1, 2, 3], greedy(30))
    for _ in range(4):
        pair.step()
    pair.model.module.variety = 7

    with pytest.raises(RanksDiverged, match="ranks diverged in m"):
        pair.until_ended(1)


def test_a_step_without_tokens_is_not_told() -> None:
    pair = Pair()

    pair.run.engine._runner.launch(StepPlan([]), []).result()

    assert not pair.messages


@pytest.mark.parametrize("error", [ValueError("x"), MemoryError()])
def test_what_fails_after_it_was_told_is_the_end_of_the_first_rank(error: Exception) -> None:
    pair = Pair()
    pair.run.start(1, [1], greedy(4))
    pair.run.model.module.errors = [error]

    with pytest.raises(DeviceLost, match="that other ranks had begun"):
        pair.run.step()


def test_a_result_that_does_not_come_is_the_end_of_the_first_rank() -> None:
    pair = Pair(runs_ahead=True)
    pair.run.start(1, [1], greedy(4))
    pair.run.model.module.errors = [ValueError("x")]

    with pytest.raises(DeviceLost):
        pair.until_ended(1)


def test_an_embedding_that_fails_after_it_was_told_is_the_end_of_the_first_rank() -> None:
    pair = Pair()
    pair.run.embed(1, [1])
    pair.run.model.module.errors = [ValueError("x")]

    with pytest.raises(DeviceLost):
        pair.run.step()


def test_a_step_that_nobody_waits_for_is_not_compared(
    runs_ahead: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = Pair(runs_ahead=runs_ahead)
    pooler, failed = pair.run.engine._pooler, iter([MemoryError()])
    add = pooler.add

    def failing_once(*arguments: Any) -> Any:
        for error in failed:
            raise error
        return add(*arguments)

    monkeypatch.setattr(pooler, "add", failing_once)
    pair.run.start(1, [1, 2, 3], greedy(30))
    pair.run.embed(2, [4])

    pair.step()
    assert pair.run.codes == {2: "out_of_memory"}
    pair.run.failures.clear()
    pair.until_ended(1)

    assert pair.is_alike()


def test_what_fails_on_a_follower_is_its_end() -> None:
    pair = Pair()
    pair.run.start(1, [1], greedy(4))
    pair.model.module.errors = [ValueError("x")]

    with pytest.raises(DeviceLost, match="not on the first rank: ValueError"):
        pair.step()


def test_a_lost_peer_keeps_its_name() -> None:
    pair = Pair()
    pair.run.start(1, [1], greedy(4))
    pair.run.model.module.errors = [PeerLost("gone")]

    with pytest.raises(PeerLost, match=r"^gone$"):
        pair.run.step()


def test_a_rank_that_takes_no_steps_is_a_lost_peer() -> None:
    def full(_: bytes) -> None:
        raise PlanRingFull("rank 1 takes no plans from the ring")

    run = Run(wrapped=lambda runner: Leader("m", runner, full))
    run.start(1, [1], greedy(4))

    with pytest.raises(PeerLost, match="rank 1 takes no plans"):
        run.step()


def test_every_field_of_a_plan_is_told() -> None:
    planned = PlannedSequence(
        sequence_id=2**40,
        token_ids=[1, 2, -1],
        first_position=5,
        block_table=[3, 9],
        is_last=True,
        sampling=PENALISED,
        pooling="last",
        counts=TokenCounts([4, 4, 5]),
        forced=8,
        drafts=1,
        state_slot=6,
        scored=[1],
    )
    plan = StepPlan([planned], restores=[(1, 2)], snapshots=[(3, 4)])
    for struct in (planned, plan):
        for field in msgspec.structs.fields(struct):
            assert getattr(struct, field.name) != field.default, f"{field.name} is not tried"

    step = ToldStep("m", "launch", PlanTeller().tell(plan), plan.restores, plan.snapshots, True, [])
    (heard,) = (found := PlanListener().plan(decode_step(encode_step(step)))).sequences

    assert (found.restores, found.snapshots) == (plan.restores, plan.snapshots)
    assert heard.counts is not None
    assert heard.counts.ids.tolist() == [4, 5]
    assert msgspec.structs.replace(heard, counts=None) == msgspec.structs.replace(
        planned, counts=None
    )


def test_a_sequence_is_told_whole_once_and_then_only_what_is_new() -> None:
    teller = PlanTeller()
    counts = TokenCounts(range(50))
    first = PlannedSequence(1, [1], 640, list(range(41)), True, PENALISED, counts=counts)
    whole = teller.tell(StepPlan([first]))[0]
    counts.add(7)
    second = msgspec.structs.replace(first, block_table=list(range(42)), first_position=656)

    told = teller.tell(StepPlan([second]))[0]

    assert (whole.sampling, whole.kept_blocks, len(whole.blocks)) == (PENALISED, 0, 41 * 4)
    assert whole.prompt_ids is not None
    assert (told.sampling, told.prompt_ids) == (None, None)
    assert (told.kept_blocks, len(told.blocks), len(told.answer_ids)) == (41, 4, 4)


def test_a_sequence_that_missed_a_step_is_told_whole_again() -> None:
    teller = PlanTeller()
    first = PlannedSequence(1, [1], 16, [0, 1], True, PENALISED)
    other = PlannedSequence(2, [1], 16, [2, 3], True, PENALISED)
    teller.tell(StepPlan([first]))
    teller.tell(StepPlan([other]))

    told = teller.tell(StepPlan([first]))[0]

    assert told.sampling == PENALISED
    assert told.kept_blocks == 0


def test_a_block_table_that_was_taken_away_is_told_anew() -> None:
    teller, listener = PlanTeller(), PlanListener()
    tables = [[0, 1, 2], [5, 6], [5, 6, 7]]

    heard = []
    for table in tables:
        plan = StepPlan([PlannedSequence(1, [1], 16, table, True, PENALISED)])
        told = ToldStep("m", "launch", teller.tell(plan), [], [], False, [])
        heard.append(list(listener.plan(told).sequences[0].block_table))

    assert heard == tables


def test_masks_reach_the_rows_that_have_them() -> None:
    mask = torch.tensor([5, -1, 7, 0], dtype=torch.int32)
    rows = [Row(NO_ANSWER, 0), Row(NO_ANSWER, 1, allowed=mask), Row(NO_ANSWER, 2, allowed=mask + 1)]

    bare, some, others = with_masks(
        [row._replace(allowed=None) for row in rows], encode_masks(rows)
    )

    assert bare.allowed is None
    assert some.allowed is not None
    assert others.allowed is not None
    assert torch.equal(some.allowed, mask)
    assert torch.equal(others.allowed, mask + 1)
    (alone,) = with_masks(rows[:1], encode_masks(rows[:1]))
    assert alone.allowed is None
