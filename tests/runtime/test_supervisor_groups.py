"""Models that several devices share: where they go, how they come and go, what a lost rank does."""

import asyncio
import fcntl
import os
import shutil
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from cortex.ipc.errors import (
    Conflict,
    LoadedDifferently,
    NodeFailed,
    Recovering,
    Unloadable,
)
from cortex.ipc.messages import (
    PEER_LOST,
    Generate,
    JoinGroup,
    LoadModel,
    LoadProgress,
    Shutdown,
    UnloadModel,
)
from cortex.ipc.node_api import LoadRequest, Refusal, Servable
from cortex.runtime.device_state import Cause
from cortex.runtime.model_state import State
from cortex.runtime.served_model import ServedModel
from supervisor_bench import GREEDY, A, B, Neuron, error_of
from supervisor_fakes import FOOTPRINT, MIB, FakeDeviceProcess, eventually, loaded

C = "file:/models/c.gguf"
PAIR = [0, 1]


@pytest.fixture
async def neuron() -> AsyncIterator[Neuron]:
    neuron = Neuron(devices=4)
    async with neuron.supervisor:
        for device in neuron.supervisor.devices:
            await device.become_ready()
        yield neuron


async def shares(neuron: Neuron, model_id: str = A, devices: list[int] = PAIR) -> ServedModel:
    """Load a model onto *devices* together."""
    await neuron.supervisor.load(LoadRequest(model_id, devices=devices))
    return await neuron.supervisor.loaded(model_id)


def ops(life: FakeDeviceProcess) -> list[str]:
    """Return what a device was told, in order."""
    return [str(command.__struct_config__.tag) for command in life.received]


async def are_told(neuron: Neuron, op: str) -> None:
    """Return once both devices of the pair have got *op*."""
    await eventually(lambda: all(op in ops(neuron.lives.now(index)) for index in PAIR), op)


def _has_more_lives(neuron: Neuron, index: int, count: int) -> bool:
    return len(neuron.lives.lives[index]) > count


async def comes_back(neuron: Neuron, lose: Callable[[], None], model_id: str = A) -> None:
    """Lose a rank of the pair; return when both devices live again, and the model is loaded."""
    before = [len(neuron.lives.lives[index]) for index in PAIR]
    lose()
    for index, count in zip(PAIR, before, strict=True):
        await eventually(partial(_has_more_lives, neuron, index, count), f"a life of {index}")
    await neuron.reaches(model_id, State.LOADED)


async def test_every_rank_is_told_to_join_to_add_up_and_to_load(neuron: Neuron) -> None:
    model = await shares(neuron)

    first, second = neuron.lives.now(0), neuron.lives.now(1)
    assert ops(first) == ops(second) == ["join_group", "check_collective", "load_model"]
    joins = [life.last(JoinGroup) for life in (first, second)]
    assert [(join.rank, join.ranks) for join in joins] == [(0, 2), (1, 2)]
    loads = [life.last(LoadModel) for life in (first, second)]
    assert {join.group for join in joins} == {load.group for load in loads} == {joins[0].group}
    assert model.status == "loaded"
    assert neuron.lives.now(2).received == []


async def test_each_rank_gets_its_end_of_the_plan_ring_before_it_is_told_to_join(
    neuron: Neuron,
) -> None:
    await shares(neuron, devices=[1, 2, 3])

    sent = [neuron.lives.now(index).post.sent for index in (1, 2, 3)]
    assert [list(letters.values()) for letters in sent] == [[5], [3], [3]]
    assert all(
        life.last(JoinGroup).group in life.post.sent for life in map(neuron.lives.now, [1, 2, 3])
    )


async def test_a_group_is_joined_once_for_all_its_models(neuron: Neuron) -> None:
    await shares(neuron, A)
    await shares(neuron, B)

    assert ops(neuron.lives.now(1)).count("join_group") == 1
    assert ops(neuron.lives.now(1)).count("load_model") == 2


async def test_where_ranks_meet_is_locked_against_who_cleans_up_old_files(neuron: Neuron) -> None:
    await shares(neuron)

    meetings = os.open(_meetings(neuron, 0), os.O_RDONLY)
    with pytest.raises(BlockingIOError):
        fcntl.flock(meetings, fcntl.LOCK_SH | fcntl.LOCK_NB)
    os.close(meetings)


async def test_where_ranks_met_may_be_deleted_before_others_meet(neuron: Neuron) -> None:
    await shares(neuron)
    shutil.rmtree(_meetings(neuron, 0))

    model = await shares(neuron, B, devices=[2, 3])

    assert model.status == "loaded"
    assert _meetings(neuron, 2).is_dir()


async def test_of_a_group_that_is_gone_the_files_go_and_their_directory_stays(
    neuron: Neuron,
) -> None:
    await shares(neuron)
    meeting = _meeting(neuron, 0)
    (meeting / "store").touch()
    await neuron.supervisor.unload(A)

    await shares(neuron, B, devices=[1, 2])

    assert meeting.is_dir()
    assert not (meeting / "store").exists()


def _meetings(neuron: Neuron, index: int) -> Path:
    return _meeting(neuron, index).parent


def _meeting(neuron: Neuron, index: int) -> Path:
    return Path(neuron.lives.now(index).last(JoinGroup).meeting)


async def test_requests_go_to_the_rank_0_alone(neuron: Neuron) -> None:
    await shares(neuron, devices=[3, 2])

    async with neuron.supervisor.generate(A, [1], GREEDY) as generation:
        tokens = [record.token_id async for batch in generation for record in batch]

    assert tokens == neuron.lives.tokens
    assert ops(neuron.lives.now(2))[-1] == "generate"
    assert "generate" not in ops(neuron.lives.now(3))


async def test_what_each_rank_holds_is_booked_on_its_device(neuron: Neuron) -> None:
    model = await shares(neuron)

    assert model.footprints == (FOOTPRINT, FOOTPRINT)
    books = [neuron.supervisor.free_bytes(index) // MIB for index in range(3)]
    assert books == [924, 924, 1024]


async def test_a_model_is_judged_by_the_room_of_the_fullest_of_its_devices(neuron: Neuron) -> None:
    await neuron.loads(B, device=1)
    await shares(neuron)

    assert neuron.files.read_with[A] == 924 * MIB


async def test_a_load_on_its_way_is_booked_on_each_of_its_devices(neuron: Neuron) -> None:
    neuron.files.may_fetch.clear()
    neuron.files.estimate_bytes = 100 * MIB
    await neuron.supervisor.load(LoadRequest(A, devices=PAIR))

    books = [neuron.supervisor.free_bytes(index) // MIB for index in range(3)]

    assert books == [924, 924, 1024]


async def test_as_many_devices_as_are_asked_for_are_chosen_where_most_is_free(
    neuron: Neuron,
) -> None:
    await neuron.loads(B, device=1)

    await neuron.supervisor.load(LoadRequest(A, tensor_parallel=2))
    model = await neuron.supervisor.loaded(A)

    assert [device.spec.index for device in model.devices] == [0, 2]


async def test_a_second_model_takes_devices_that_are_in_no_other_group(neuron: Neuron) -> None:
    await shares(neuron, A, [0, 2])

    await neuron.supervisor.load(LoadRequest(B, tensor_parallel=2))
    model = await neuron.supervisor.loaded(B)

    assert [device.spec.index for device in model.devices] == [1, 3]


async def test_where_there_is_no_other_device_a_model_joins_the_group_that_is_there(
    neuron: Neuron,
) -> None:
    await shares(neuron, A, [0, 1, 2])

    await neuron.supervisor.load(LoadRequest(B, tensor_parallel=3))
    model = await neuron.supervisor.loaded(B)

    assert [device.spec.index for device in model.devices] == [0, 1, 2]


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"devices": [1, 2]}, "groups_overlap"),
        ({"tensor_parallel": 3}, "groups_overlap"),
        ({"devices": [1, 1]}, "devices_mismatch"),
        ({"devices": [1, 2], "tensor_parallel": 3}, "devices_mismatch"),
        ({"tensor_parallel": 5}, "too_few_devices"),
    ],
)
async def test_devices_that_cannot_share_a_model_are_refused(
    neuron: Neuron, fields: dict[str, Any], kind: str
) -> None:
    await shares(neuron, A)

    with pytest.raises(Unloadable) as refused:
        await neuron.supervisor.load(LoadRequest(B, **fields))

    assert refused.value.kind == kind


async def test_a_model_of_one_device_may_be_where_a_group_is(neuron: Neuron) -> None:
    await shares(neuron, A)

    model = await neuron.loads(B, device=1)

    assert (model.status, neuron.lives.now(1).last(LoadModel).group) == ("loaded", None)


async def test_another_group_is_possible_once_no_model_uses_the_first(neuron: Neuron) -> None:
    await shares(neuron, A, [0, 1])
    await neuron.supervisor.unload(A)

    await shares(neuron, B, [1, 2])

    assert ops(neuron.lives.now(0))[-1] == "leave_group"
    told = ops(neuron.lives.now(1))
    assert told.index("leave_group") < len(told) - 1 - told[::-1].index("join_group")


async def test_a_model_that_has_failed_holds_no_group(neuron: Neuron) -> None:
    neuron.lives.sums = {0: 9.0}
    assert isinstance(await error_of(shares(neuron, A, [0, 1])), Unloadable)

    model = await shares(neuron, B, [1, 2])

    assert model.status == "loaded"


async def test_the_same_load_on_several_devices_again_is_the_same_load(neuron: Neuron) -> None:
    one = await shares(neuron)

    assert await neuron.supervisor.load(LoadRequest(A, tensor_parallel=2)) is one
    assert await neuron.supervisor.load(LoadRequest(A, devices=[1, 0])) is one
    with pytest.raises(LoadedDifferently, match="other values of tensor_parallel"):
        await neuron.supervisor.load(LoadRequest(A))
    with pytest.raises(LoadedDifferently, match="other values of devices"):
        await neuron.supervisor.load(LoadRequest(A, devices=[2, 3]))


async def test_progress_is_that_of_all_ranks_together(neuron: Neuron) -> None:
    neuron.lives.silent_on = {LoadModel}
    model = await neuron.supervisor.load(LoadRequest(A, devices=PAIR))
    await are_told(neuron, "load_model")
    for index, done in enumerate([10, 30]):
        life = neuron.lives.now(index)
        life.says(LoadProgress(life.last(LoadModel).command_id, A, done, 100))

    assert model.progress is not None
    assert (model.progress.bytes_done, model.progress.bytes_total) == (40, 200)


async def test_where_one_rank_cannot_load_the_others_give_back_what_they_have(
    neuron: Neuron,
) -> None:
    neuron.lives.silent_on = {LoadModel}
    await neuron.supervisor.load(LoadRequest(A, devices=PAIR))
    await neuron.reaches(A, State.LOADING)
    await are_told(neuron, "load_model")
    first, second = neuron.lives.now(0), neuron.lives.now(1)
    second.refuses(second.last(LoadModel), "insufficient_memory", "no room", weights_bytes=5)
    first.says(loaded(first.last(LoadModel)))

    refused = await error_of(neuron.supervisor.loaded(A))

    assert isinstance(refused, Unloadable)
    assert (refused.kind, refused.extras["ranks"]) == ("insufficient_memory", 2)
    assert ops(first)[-1] == "unload_model"
    assert "unload_model" not in ops(second)
    assert neuron.supervisor.models[A].refusal == Refusal(
        "insufficient_memory", {"weights_bytes": 5, "ranks": 2}
    )


async def test_the_rank_that_says_why_is_believed_before_those_that_waited_for_it(
    neuron: Neuron,
) -> None:
    neuron.lives.silent_on = {LoadModel}
    await neuron.supervisor.load(LoadRequest(A, devices=PAIR))
    await are_told(neuron, "load_model")
    for index, code in ((0, PEER_LOST), (1, "corrupt_checkpoint")):
        life = neuron.lives.now(index)
        life.refuses(life.last(LoadModel), code, "it is so")

    refused = await error_of(neuron.supervisor.loaded(A))

    assert isinstance(refused, Unloadable)
    assert refused.kind == "corrupt_checkpoint"


async def test_ranks_that_do_not_add_up_get_no_model(neuron: Neuron) -> None:
    neuron.lives.sums = {1: 2.0}

    with pytest.raises(Unloadable, match=r"add up to \[3.0, 2.0\], not to 3.0") as refused:
        await shares(neuron)

    assert refused.value.kind == "collective_failed"
    assert [ops(neuron.lives.now(index))[-1] for index in PAIR] == ["leave_group"] * 2


async def test_a_group_that_could_not_be_joined_is_tried_anew(neuron: Neuron) -> None:
    neuron.lives.silent_on = {JoinGroup}
    await neuron.supervisor.load(LoadRequest(A, devices=PAIR))
    await are_told(neuron, "join_group")
    for index in PAIR:
        life = neuron.lives.now(index)
        life.refuses(life.last(JoinGroup), "no_nccl", "there is no libnccl")
    assert isinstance(await error_of(neuron.supervisor.loaded(A)), Unloadable)
    neuron.lives.silent_on = set()

    model = await shares(neuron)

    assert model.status == "loaded"
    assert ops(neuron.lives.now(0)).count("join_group") == 2


async def test_a_device_that_takes_no_post_is_a_failed_load(neuron: Neuron) -> None:
    neuron.lives.now(1).post.error = BrokenPipeError("nobody reads")

    with pytest.raises(NodeFailed, match="takes no post: nobody reads"):
        await shares(neuron)


async def test_unloading_frees_the_rank_0_first(neuron: Neuron) -> None:
    await shares(neuron)
    neuron.lives.silent_on = {UnloadModel}
    gone = asyncio.ensure_future(neuron.supervisor.unload(A))
    first, second = neuron.lives.now(0), neuron.lives.now(1)
    await eventually(lambda: ops(first)[-1] == "unload_model", "the rank 0")
    assert ops(second)[-1] == "load_model"

    neuron.lives.silent_on = set()
    first.answers(first.last(UnloadModel))
    await gone

    assert ops(second)[-1] == "unload_model"
    assert [device.cycles for device in neuron.supervisor.devices] == [1, 1, 0, 0]
    assert neuron.supervisor.free_bytes(1) == 1024 * MIB


async def test_an_unload_during_the_load_waits_for_all_ranks(neuron: Neuron) -> None:
    neuron.lives.silent_on = {LoadModel, UnloadModel}
    await neuron.supervisor.load(LoadRequest(A, devices=PAIR))
    lives = [neuron.lives.now(index) for index in PAIR]
    await eventually(lambda: all("load_model" in ops(life) for life in lives), "LoadModel")
    gone = asyncio.ensure_future(neuron.supervisor.unload(A))
    await eventually(lambda: "unload_model" in ops(lives[0]), "UnloadModel")
    neuron.lives.silent_on = set()
    lives[0].refuses(lives[0].last(UnloadModel), "busy", "it is being loaded")
    for life in lives:
        life.says(loaded(life.last(LoadModel)))

    await gone

    assert [ops(life)[-1] for life in lives] == ["unload_model"] * 2
    assert A not in neuron.supervisor.models


@pytest.mark.parametrize("lost", PAIR)
async def test_a_lost_rank_takes_its_group_and_nothing_else(neuron: Neuron, lost: int) -> None:
    await shares(neuron, A)
    await neuron.loads(B, device=2)
    neuron.lives.silent_on = {Generate}
    shared = neuron.supervisor.generate(A, [1], GREEDY)
    alone = neuron.supervisor.generate(B, [1], GREEDY)
    before = [life[-1] for life in neuron.lives.lives.values()]

    await comes_back(neuron, before[lost].dies)

    with pytest.raises(NodeFailed):
        await anext(shared)
    now = [life[-1] for life in neuron.lives.lives.values()]
    are_new = [new is not old for new, old in zip(now, before, strict=True)]
    assert are_new == [True, True, False, False]
    assert neuron.supervisor.models[B].running == [alone]


async def test_a_group_that_was_lost_is_joined_anew_before_its_models_are_loaded_again(
    neuron: Neuron,
) -> None:
    await shares(neuron, A)
    await shares(neuron, B)
    first = neuron.lives.now(0).last(JoinGroup)

    await comes_back(neuron, neuron.lives.now(1).dies)
    await neuron.reaches(B, State.LOADED)

    told = ops(neuron.lives.now(0))
    assert told == ["join_group", "check_collective", "load_model", "load_model"]
    assert neuron.lives.now(0).last(JoinGroup).group != first.group


async def test_a_model_comes_back_only_when_all_its_devices_have(neuron: Neuron) -> None:
    model = await shares(neuron)
    gate = neuron.lives.may_start[1] = asyncio.Event()

    neuron.lives.now(1).dies()
    await eventually(lambda: len(neuron.lives.lives[1]) == 2, "the second life of 1")
    await neuron.supervisor.devices[0].become_ready()
    with pytest.raises(Recovering, match="its device cpu:1 restarts"):
        model.refuse_unless_loaded()
    gate.set()
    await neuron.reaches(A, State.LOADED)

    assert ops(neuron.lives.now(0)) == ["join_group", "check_collective", "load_model"]


async def test_a_healthy_card_is_not_given_up_for_its_neighbour(neuron: Neuron) -> None:
    model = await shares(neuron)
    healthy, broken = neuron.supervisor.devices[:2]
    for _ in range(3):
        await comes_back(neuron, neuron.lives.now(1).dies)
    neuron.lives.now(1).dies()
    await eventually(lambda: broken.is_poisoned, "the end of the device")
    await healthy.become_ready()

    assert (healthy.losses, broken.losses) == ({Cause.PEER: 4}, {Cause.DIED: 4})
    assert (healthy.is_ready, broken.is_poisoned) == (True, True)
    assert model.servable == Servable(ok=False, reason="device_poisoned", detail=broken.failure)
    assert isinstance(await error_of(neuron.supervisor.loaded(A)), NodeFailed)


async def test_a_rank_whose_collective_broke_is_not_at_fault(neuron: Neuron) -> None:
    await shares(neuron)
    life = neuron.lives.now(0)

    await comes_back(neuron, lambda: life.kill(Cause.PEER, "a collective broke"))

    losses = [device.losses for device in neuron.supervisor.devices]
    assert losses == [{Cause.PEER: 1}, {Cause.PEER: 1}, {}, {}]


async def test_a_hanging_rank_ends_its_group_too(neuron: Neuron) -> None:
    await shares(neuron)

    await comes_back(neuron, lambda: neuron.lives.now(0).kill(Cause.HUNG, "it hung"))

    losses = [device.losses for device in neuron.supervisor.devices]
    assert losses == [{Cause.HUNG: 1}, {Cause.PEER: 1}, {}, {}]


async def test_a_rank_that_dies_while_the_others_join_is_a_failed_load(neuron: Neuron) -> None:
    neuron.lives.silent_on = {JoinGroup}
    await neuron.supervisor.load(LoadRequest(A, devices=PAIR))
    await are_told(neuron, "join_group")

    neuron.lives.now(1).dies()

    with pytest.raises(NodeFailed, match="while model"):
        await neuron.supervisor.loaded(A)
    assert len(neuron.lives.lives[0]) == 2


async def test_a_rank_that_dies_while_the_model_loads_is_a_failed_load(neuron: Neuron) -> None:
    neuron.lives.silent_on = {LoadModel}
    await neuron.supervisor.load(LoadRequest(A, devices=PAIR))
    await eventually(lambda: "load_model" in ops(neuron.lives.now(1)), "LoadModel")

    neuron.lives.now(0).dies()

    with pytest.raises(NodeFailed, match="while model"):
        await neuron.supervisor.loaded(A)
    await neuron.supervisor.devices[1].become_ready()
    assert neuron.supervisor.devices[1].losses == {Cause.PEER: 1}


async def test_a_group_that_no_model_uses_is_only_forgotten(neuron: Neuron) -> None:
    await shares(neuron)
    await neuron.supervisor.unload(A)

    await neuron.dies(1)

    assert ops(neuron.lives.now(0))[-1] == "leave_group"
    assert neuron.supervisor.devices[0].losses == {}


async def test_restarting_one_rank_restarts_its_group(neuron: Neuron) -> None:
    await shares(neuron)

    await neuron.supervisor.restart_device(1)
    await neuron.reaches(A, State.LOADED)

    losses = [device.losses for device in neuron.supervisor.devices]
    assert losses == [{Cause.PEER: 1}, {Cause.ASKED: 1}, {}, {}]


async def test_a_rank_is_busy_while_the_rank_0_has_requests(neuron: Neuron) -> None:
    await shares(neuron)
    neuron.lives.silent_on = {Generate}
    neuron.supervisor.generate(A, [1], GREEDY)

    with pytest.raises(Conflict, match="device cpu:1 is busy: 1 requests run"):
        await neuron.supervisor.restart_device(1)


async def test_loads_on_crossing_devices_do_not_wait_for_each_other_in_a_circle(
    neuron: Neuron,
) -> None:
    neuron.files.may_fetch.clear()
    for model, devices in ((A, [1, 0]), (B, [2, 3]), (C, [1])):
        await neuron.supervisor.load(LoadRequest(model, devices=devices))
    neuron.files.may_fetch.set()

    for model in (A, B, C):
        assert (await neuron.supervisor.loaded(model)).status == "loaded"


async def test_at_the_stop_ranks_outlive_the_one_that_leads_them() -> None:
    neuron = Neuron()
    async with neuron.supervisor:
        await shares(neuron)
        lives = [neuron.lives.now(index) for index in PAIR]
        neuron.lives.silent_on = {Shutdown}
        stop = asyncio.ensure_future(neuron.supervisor._stop())
        await eventually(lambda: ops(lives[0])[-1] == "shutdown", "Shutdown")
        assert ops(lives[1])[-1] == "load_model"
        neuron.lives.silent_on = set()
        lives[0].answers(lives[0].last(Shutdown))
        await stop

    assert ops(lives[1])[-1] == "shutdown"
    assert neuron.supervisor.devices[1].losses == {}


async def test_in_situ_quantisation_is_told_to_every_rank(neuron: Neuron) -> None:
    await neuron.supervisor.load(LoadRequest(A, quant="q8_0", devices=PAIR))
    await neuron.supervisor.loaded(A)

    told = [neuron.lives.now(index).last(LoadModel) for index in PAIR]
    assert [(load.quant, load.quant_cache) for load in told] == [("q8_0", "/cache")] * 2
