"""Recurrent states have their part of a cache: a slot for each seat, and some for snapshots."""

from __future__ import annotations

import json
import select
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cortex.ipc.messages import LoadModel
from cortex.models.batch import Batch
from cortex.runtime.device.loader import Loaded, Loader, Outcome
from cortex.runtime.device.memory import DeviceMemory, Limits, Needs, settle
from cortex.runtime.device.model_runner import ModelRunner
from cortex.runtime.device.refusal import Refused
from cortex.runtime.device.sequence_states import RecurrentStates
from cortex.runtime.device.step_plan import PlannedSequence, StepPlan
from cortex.runtime.device.workspace import measure_workspace
from engine_fakes import FakeLoad, RecurrentModule, greedy, recurrent_model

CPU = torch.device("cpu")
STATE_BYTES = 10_000
TOKEN_BYTES = 100
PLENTY = 2**40


class NoSteps:
    """Steps that take no memory."""

    fixed_bytes = 0
    bytes_per_context_token = 0


NEEDS = Needs(8192, TOKEN_BYTES, 16, NoSteps(), state_bytes=STATE_BYTES)


def load(**limits: int) -> LoadModel:
    return LoadModel(1, "m", "/m", **limits)  # type: ignore[arg-type] # limits are ints


def taken(limits: Limits) -> int:
    return limits.blocks * 16 * TOKEN_BYTES + limits.state_slots * STATE_BYTES


def test_where_there_is_room_all_seats_have_a_state_and_there_are_16_snapshots() -> None:
    limits = settle(load(), NEEDS, PLENTY)

    assert (limits.max_sequences, limits.state_slots) == (32, 48)
    assert limits.blocks * 16 == 8192 + 31 * 512


def test_seats_that_nobody_asked_for_have_states_in_a_quarter_of_the_memory() -> None:
    limits = settle(load(), NEEDS, 400_000)

    assert (limits.max_sequences, limits.state_slots) == (8, 10)
    assert limits.max_context_tokens == 3000 // 16 * 16
    assert taken(limits) <= 400_000


def test_at_least_there_are_one_seat_and_two_snapshots() -> None:
    least_bytes = 256 * TOKEN_BYTES + 3 * STATE_BYTES
    limits = settle(load(), NEEDS, least_bytes)

    assert (limits.max_sequences, limits.state_slots) == (1, 3)
    assert limits.max_context_tokens == 256
    with pytest.raises(
        Refused, match=r"states of 0\.0 MiB \(sequences: 1, snapshots: 2\) and a wor"
    ):
        settle(load(), NEEDS, least_bytes - 1)


def test_a_refusal_counts_the_states_with_the_cache() -> None:
    with pytest.raises(Refused) as refused:
        settle(load(max_sequences=4), NEEDS, 50_000)

    assert refused.value.numbers["kv_bytes"] == 256 * TOKEN_BYTES + 6 * STATE_BYTES


def test_a_context_that_was_asked_for_goes_before_seats_that_were_not() -> None:
    limits = settle(load(max_context_tokens=3600), NEEDS, 400_000)

    assert limits.max_context_tokens == 3600
    assert (limits.max_sequences, limits.state_slots) == (2, 4)


def test_seats_that_were_asked_for_are_there_with_two_snapshots_or_refused() -> None:
    limits = settle(load(max_sequences=20), NEEDS, 400_000)

    assert (limits.max_sequences, limits.state_slots) == (20, 22)
    assert taken(limits) <= 400_000
    with pytest.raises(Refused, match="sequences: 40, snapshots: 2"):
        settle(load(max_sequences=40), NEEDS, 400_000)


def test_fewer_seats_than_there_is_room_for_leave_it_to_snapshots() -> None:
    limits = settle(load(max_sequences=2), NEEDS, 400_000)

    assert (limits.max_sequences, limits.state_slots) == (2, 10)


def test_a_cache_of_so_many_bytes_is_just_that_with_the_states() -> None:
    limits = settle(load(kv_cache_bytes=200_000), NEEDS, PLENTY)

    assert (limits.max_sequences, limits.state_slots) == (3, 5)
    assert limits.blocks == 150_000 // 1600


def test_a_cache_too_small_for_a_context_beside_the_states_is_refused_with_the_numbers() -> None:
    with pytest.raises(
        Refused, match=r"holds 240 tokens; 256 .* 25600, recurrent states"
    ) as refused:
        settle(load(kv_cache_bytes=54_000), NEEDS, PLENTY)

    assert refused.value.numbers["kv_bytes"] == 256 * TOKEN_BYTES + 3 * STATE_BYTES


def test_states_that_are_larger_than_all_of_the_cache_are_refused() -> None:
    with pytest.raises(Refused, match="holds 0 tokens"):
        settle(load(kv_cache_bytes=20_000), NEEDS, PLENTY)


def test_states_and_blocks_of_more_bytes_than_are_free_are_refused() -> None:
    with pytest.raises(Refused, match="do not fit") as refused:
        settle(load(kv_cache_bytes=200_000), NEEDS, 150_000)

    assert refused.value.numbers["kv_bytes"] > 150_000


def test_a_model_without_states_has_no_slots() -> None:
    assert settle(load(), replace(NEEDS, state_bytes=0), PLENTY).state_slots == 0


@pytest.fixture
def loader() -> Iterator[Loader]:
    models = FakeLoad(m=recurrent_model())
    loader = Loader(models, CPU, DeviceMemory(2**24), token_budget=512)
    yield loader
    loader.close()


def outcome(loader: Loader, command: LoadModel) -> Outcome:
    loader.start(command)
    assert select.select([loader.fd], [], [], 20.0)[0], "the loader says nothing"
    return loader.take()[-1]


def special_ids(loaded: Outcome) -> frozenset[int]:
    assert isinstance(loaded, Loaded), loaded
    states = loaded.engine._scheduler._states
    assert isinstance(states, RecurrentStates)
    return states._special_ids


def test_the_footprint_of_a_load_counts_the_states(loader: Loader) -> None:
    loaded = outcome(loader, load(max_context_tokens=320, max_sequences=2))

    assert isinstance(loaded, Loaded)
    assert loaded.engine.limits.state_slots == 18
    assert loaded.event.footprint.kv_bytes == 640 * 8 + 18 * 8


def test_special_tokens_are_read_from_the_checkpoint(tmp_path: Path) -> None:
    added = [{"id": 1, "content": "<|end|>", "special": True}, {"id": 2, "content": "<tool>"}]
    tokenizer = {"model": {"vocab": {"a": 0}}, "added_tokens": added}
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    models = FakeLoad()
    models.models[str(tmp_path)] = recurrent_model()
    loader = Loader(models, CPU, DeviceMemory(2**24), token_budget=512)
    loaded = outcome(loader, LoadModel(1, "m", str(tmp_path)))
    loader.close()

    assert special_ids(loaded) == {1}


def test_a_checkpoint_without_a_vocabulary_has_no_special_tokens(loader: Loader) -> None:
    loaded = outcome(loader, load())

    assert special_ids(loaded) == set()


class Chunked(RecurrentModule):
    """Takes 1000 bytes for each whole or begun chunk of 64 tokens, and 7 for each token."""

    def forward(self, batch: Batch) -> Tensor:
        tokens = len(batch.token_ids)
        assert batch.state_slots is not None
        assert batch.cache.states[0].delta[batch.state_slots].numel() == 1
        chunks = torch.zeros(-(-tokens // 64), 1000, dtype=torch.uint8)
        hidden = torch.zeros(tokens, 7, dtype=torch.uint8)
        return chunks[:1, :1].float() + hidden[:1, :1]


def test_a_step_of_a_model_that_computes_by_chunks_is_foretold_from_whole_ones() -> None:
    model = recurrent_model()
    model.module = Chunked()

    workspace = measure_workspace(model, CPU, token_budget=512, beside_bytes=0)

    true = 8 * 1000 + 512 * 7
    assert true <= workspace.at(128) < true + 100_000  # the batch's own tensors are in it


def test_slots_are_copied_all_at_once() -> None:
    model = recurrent_model()
    cache = model.new_cache(1, 16, 20)
    runner = ModelRunner(model, cache, CPU)
    state = cache.states[0]
    for tensor in (state.conv, state.delta):
        tensor.copy_(torch.arange(20.0).view(-1, *[1] * (tensor.dim() - 1)))

    step = PlannedSequence(0, [1], 0, [0], True, greedy(1), state_slot=19)
    others = [(4, target) for target in range(10, 19)]

    runner.forward(StepPlan([step], restores=[(0, 1), (1, 2), (2, 0), (3, 9), *others]))

    expected = [2.0, 0.0, 1.0, 3, 4, 5, 6, 7, 8, 3, *[4.0] * 9]
    assert state.conv.flatten()[:19].tolist() == state.delta.flatten()[:19].tolist() == expected
