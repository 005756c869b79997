"""Real device processes that share a model, over gloo: the tokens are those of one device alone."""

from __future__ import annotations

import asyncio
import json
import math
import os
import signal
from array import array
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from cortex.ipc.messages import (
    Cancel,
    ClearPrefixCache,
    Embedded,
    Failed,
    Generate,
    GroupLeft,
    LeaveGroup,
    LoadModel,
    MemoryReport,
    ModelUnloaded,
    Ping,
    QueryMemory,
    ReasoningBudget,
    SamplingParams,
    UnloadModel,
)
from cortex.ipc.ring import Flag, TokenRecord
from cortex.runtime.device.device import EXIT_DEVICE_LOST
from forked import forking
from rank_processes import Ranks, are_unloaded, join, loaded, ranks_of
from tiny_checkpoint import write_checkpoint

SIZES: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
BLOCKS = 11
"""The first two requests alone need twelve before they end."""
LIMITS: dict[str, Any] = {
    "max_sequences": 4,
    "max_context_tokens": 160,
    "kv_cache_bytes": BLOCKS * 16 * 64,
}
"""Of each of several ranks, which has one of the two key-value heads."""
LIMITS_ALONE = {**LIMITS, "kv_cache_bytes": 2 * LIMITS["kv_cache_bytes"]}
pytestmark = pytest.mark.asyncio(loop_scope="module")

REQUESTS: dict[int, tuple[list[int], SamplingParams]] = {
    1: ([5, 6, 7], SamplingParams(0.0, 84, 0)),
    9: ([7, 6, 5], SamplingParams(0.0, 84, 0)),
    2: ([8] * 40, SamplingParams(0.9, 12, 7, top_p=0.9, top_k=50, min_p=0.01)),
    3: (
        [9, 4] * 10,
        SamplingParams(
            1.1, 20, 3, repetition_penalty=1.2, frequency_penalty=0.3, presence_penalty=0.1
        ),
    ),
    4: ([11, 12], SamplingParams(0.0, 9, 0, logit_bias={7: 4.0}, top_logprobs=3)),
    5: (list(range(20, 50)), SamplingParams(0.0, 2, 0, prompt_logprobs=1)),
    6: ([3, 1], SamplingParams(1.3, 30, 5, stop_token_ids=(1,), grammar="start: /[a-z]{1,6}/")),
    7: ([2, 2], SamplingParams(0.8, 16, 9, reasoning_budget=ReasoningBudget(3, (), (70, 71)))),
    8: (list(range(100, 240)), SamplingParams(0.5, 14, 2)),  # longer than a step
}


@pytest.fixture(scope="module", autouse=True)
def fork_server() -> Iterator[None]:
    with forking("cortex.runtime.preload"):
        yield


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model"), **SIZES)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def alone(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Ranks]:
    """One device with the model, ``m``."""
    async with ranks_of(1, tmp_path_factory.mktemp("alone")) as ranks:
        loaded(await ranks.load(checkpoint, **LIMITS_ALONE))
        yield ranks


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def group(
    checkpoint: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> AsyncIterator[Ranks]:
    """Two devices with the model, ``m``, or as many as a test asks for."""
    async with ranks_of(getattr(request, "param", 2), tmp_path_factory.mktemp("group")) as ranks:
        loaded(await ranks.load(checkpoint, **LIMITS))
        yield ranks


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def expected(alone: Ranks) -> dict[int, list[TokenRecord]]:
    return await alone.generate(REQUESTS)


def are_alike(some: list[TokenRecord], others: list[TokenRecord]) -> bool:
    """Whether two answers are the same, but for the last bits of their log probabilities."""
    return len(some) == len(others) and all(
        (one.token_id, one.flags, one.spare) == (other.token_id, other.flags, other.spare)
        and (
            math.isclose(one.logprob, other.logprob, abs_tol=1e-3)
            or (math.isnan(one.logprob) and math.isnan(other.logprob))
        )
        for one, other in zip(some, others, strict=True)
    )


@pytest.mark.parametrize("group", [2, 4], indirect=True)
async def test_all_ranks_give_the_tokens_of_one_device(
    group: Ranks, expected: dict[int, list[TokenRecord]]
) -> None:
    found = await group.generate(REQUESTS)

    await group.leader.ask(Ping)
    assert group.leader.preemptions, "there were to be too few blocks"
    for number, records in expected.items():
        assert are_alike(found[number], records), (number, found[number], records)


async def test_alone_in_the_batch_each_gives_the_same(
    group: Ranks, expected: dict[int, list[TokenRecord]]
) -> None:
    for number in (3, 8):
        await group.leader.ask(lambda command_id: ClearPrefixCache(command_id, "m"))
        found = await group.generate({number: REQUESTS[number]})

        assert are_alike(found[number], expected[number])


async def test_a_head_that_was_computed_is_found_again_on_all_ranks(
    alone: Ranks, group: Ranks
) -> None:
    head = list(range(300, 350))
    requests = {n: ([*head, n], SamplingParams(0.0, 6, 0)) for n in (21, 22)}

    answers = []
    for ranks in (alone, group):
        await ranks.leader.ask(lambda command_id: ClearPrefixCache(command_id, "m"))
        found: dict[int, list[TokenRecord]] = {}
        for number, request in requests.items():
            found |= await ranks.generate({number: request})
        answers.append(found)

    assert [r.token_id for r in answers[1][22] if r.flags & Flag.PROMPT] == [48]
    assert all(are_alike(answers[0][number], answers[1][number]) for number in requests)


async def test_embeddings_are_those_of_one_device(alone: Ranks, group: Ranks) -> None:
    prompt = list(range(40, 180))

    vectors = [await ranks.embed(prompt[:150]) for ranks in (alone, group)]

    assert all(isinstance(event, Embedded) for event in vectors)
    one, other = (array("f", v.vector).tolist() for v in vectors if isinstance(v, Embedded))
    assert other == pytest.approx(one, abs=1e-4)


async def test_a_cancelled_sequence_leaves_the_others_alone(
    group: Ranks, expected: dict[int, list[TokenRecord]]
) -> None:
    leader = group.leader
    await leader.tell(Generate(31, 31, "m", [1, 2], SamplingParams(0.0, 150, 0)))
    while not leader.tokens(31):
        leader.take()
        await asyncio.sleep(0.002)
    await leader.tell(Cancel(32, 31))

    found = await group.generate({4: REQUESTS[4]})

    await leader.until_ended(31)
    assert leader.records.pop(31)[-1].flags == Flag.CANCELLED
    assert are_alike(found[4], expected[4])


async def test_two_models_of_one_group_take_turns(
    group: Ranks, expected: dict[int, list[TokenRecord]], checkpoint: Path
) -> None:
    loaded(await group.load(checkpoint, "other", **LIMITS))
    others = {number + 40: request for number, request in REQUESTS.items() if number in {2, 3}}

    both = await asyncio.gather(
        group.generate({n: REQUESTS[n] for n in (2, 3)}), group.generate(others, "other")
    )

    for number in (2, 3):
        assert are_alike(both[0][number], expected[number])
        assert are_alike(both[1][number + 40], expected[number])
    assert are_unloaded(await group.unload("other"))


async def test_a_model_goes_from_all_ranks_and_comes_back(
    group: Ranks, expected: dict[int, list[TokenRecord]], checkpoint: Path
) -> None:
    await group.leader.tell(Generate(51, 51, "m", [1, 2], SamplingParams(0.0, 150, 0)))

    assert are_unloaded(await group.unload())

    reports = await group.ask_all(lambda _, command_id: QueryMemory(command_id))
    assert [r.models for r in reports if isinstance(r, MemoryReport)] == [{}] * len(group.ranks)
    await group.leader.until_ended(51)
    assert group.leader.records.pop(51)[-1].flags == Flag.CANCELLED
    loaded(await group.load(checkpoint, **LIMITS))
    found = await group.generate({3: REQUESTS[3]})
    assert are_alike(found[3], expected[3])


async def test_a_load_that_one_rank_refuses_is_refused_on_all_with_its_numbers(
    group: Ranks, checkpoint: Path, tmp_path: Path
) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "vocab_size": 641}))
    for name in ("model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).symlink_to(checkpoint / name)

    broken = await group.load(tmp_path, "broken")
    too_large = await group.load(checkpoint, "large", kv_cache_bytes=2**40)

    assert {event.code for event in broken if isinstance(event, Failed)} == {"bad_checkpoint"}
    refused = [event for event in too_large if isinstance(event, Failed)]
    assert [event.code for event in refused] == ["insufficient_memory"] * len(group.ranks)
    assert all(event.numbers["kv_bytes"] > 2**39 for event in refused)
    found = await group.generate({2: REQUESTS[2]})
    assert found[2][-1].flags & Flag.FINISH


@pytest.mark.parametrize("kind", ["refused", "agreed"])
async def test_the_rank_with_the_least_memory_decides_for_all(
    checkpoint: Path, tmp_path: Path, kind: str
) -> None:
    small = {"refused": 10_000, "agreed": 2**20}[kind]

    async with ranks_of(2, tmp_path, last_memory_bytes=small) as group:
        answers = await group.load(checkpoint)

    if kind == "agreed":
        first, last = loaded(answers)
        assert first.kv_cache_tokens == last.kv_cache_tokens < 32 * 512
        assert first.footprint.kv_bytes == last.footprint.kv_bytes
        assert first.max_context_tokens == last.max_context_tokens
    else:
        first_said, last_said = answers
        assert isinstance(first_said, Failed)
        assert isinstance(last_said, Failed)
        assert first_said.code == last_said.code == "insufficient_memory"
        assert first_said.numbers == last_said.numbers
        assert last_said.numbers["memory_bytes"] == small
        assert first_said.detail == f"on rank 1: {last_said.detail}"


async def test_a_rank_that_chooses_another_token_ends_with_words(
    checkpoint: Path, tmp_path: Path
) -> None:
    async with ranks_of(2, tmp_path, diverges_after=5) as group:
        loaded(await group.load(checkpoint))
        await group.leader.tell(Generate(1, 1, "m", [1], SamplingParams(0.0, 100, 0)))

        lost = await group.ranks[1].next_event(lambda event: isinstance(event, Failed))

        assert isinstance(lost, Failed)
        assert lost.fatal
        assert lost.code == "ranks_diverged"
        assert await group.ranks[1].exit_code() == EXIT_DEVICE_LOST


@pytest.mark.parametrize("victim", [0, 2])
async def test_a_rank_that_is_killed_in_a_step_takes_the_others_along_at_once(
    checkpoint: Path, tmp_path: Path, victim: int
) -> None:
    async with ranks_of(4 if victim else 2, tmp_path) as group:
        loaded(await group.load(checkpoint))
        await group.leader.tell(Generate(1, 1, "m", [1], SamplingParams(0.0, 200, 0)))
        while not group.leader.tokens(1):
            group.leader.take()
            await asyncio.sleep(0.001)
        killed = group.ranks[victim].process
        assert killed is not None
        assert killed.pid is not None

        os.kill(killed.pid, signal.SIGKILL)

        for rank in group.ranks:
            if rank is not group.ranks[victim]:
                lost = await rank.next_event(lambda event: isinstance(event, Failed))
                assert isinstance(lost, Failed)
                assert (lost.code, lost.fatal) == ("peer_lost", True)
                assert await rank.exit_code() == EXIT_DEVICE_LOST


async def test_a_load_that_one_rank_does_not_even_begin_is_refused_on_all(
    group: Ranks, checkpoint: Path
) -> None:
    last = group.ranks[-1]
    alone = await last.ask(
        lambda number: LoadModel(number, "solo", str(checkpoint), max_context_tokens=64)
    )

    answers = await group.load(checkpoint, "solo", **LIMITS)

    loaded([alone])
    failed = [event for event in answers if isinstance(event, Failed)]
    assert [event.code for event in failed] == ["already_loaded"] * len(group.ranks)
    assert failed[0].detail == f"on rank {len(group.ranks) - 1}: {failed[-1].detail}"
    assert isinstance(await last.ask(lambda number: UnloadModel(number, "solo")), ModelUnloaded)
    loaded(await group.load(checkpoint, "solo", **LIMITS))
    assert are_unloaded(await group.unload("solo"))


async def test_a_group_is_left_once_its_models_are_gone_and_another_can_be_joined(
    checkpoint: Path, tmp_path: Path
) -> None:
    (tmp_path / "next").mkdir()
    async with ranks_of(2, tmp_path) as group:
        loaded(await group.load(checkpoint, **LIMITS))

        refused = await group.ask_all(lambda _, number: LeaveGroup(number, "g"))
        await group.unload()
        left = await group.ask_all(lambda _, number: LeaveGroup(number, "g"))
        await join(group, tmp_path / "next", "h")
        group.group = "h"
        loaded(await group.load(checkpoint, **LIMITS))
        found = await group.generate({3: REQUESTS[3]})

    assert {event.code for event in refused if isinstance(event, Failed)} == {"group_failed"}
    assert all(isinstance(event, GroupLeft) for event in left)
    assert found[3][-1].flags & Flag.FINISH
