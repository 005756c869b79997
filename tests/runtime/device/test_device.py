"""A device process obeys every command, between two steps, and answers each."""

import gc
import os
import weakref
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cortex.ipc.errors import ProtocolError
from cortex.ipc.heartbeat import Activity
from cortex.ipc.messages import (
    Bye,
    CacheCleared,
    Cancel,
    CheckCollective,
    ClearPrefixCache,
    Embedded,
    Failed,
    Footprint,
    Generate,
    GroupLeft,
    JoinGroup,
    LeaveGroup,
    LoadModel,
    MemoryReport,
    ModelLoaded,
    ModelUnloaded,
    Ping,
    Pong,
    QueryMemory,
    SamplingParams,
    Shutdown,
    UnloadModel,
)
from cortex.ipc.plan_ring import PlanRing
from cortex.ipc.post import Letters, Post
from cortex.ipc.ring import Flag
from cortex.ipc.taps import Tap
from cortex.runtime.device.device import EXIT_DEVICE_LOST, EXIT_INTERNAL_ERROR, EXIT_OK
from cortex.runtime.device.refusal import PeerLost
from engine_fakes import (
    DeviceBench,
    FakeLoad,
    FakeModel,
    answer,
    code_of,
    greedy,
    loaded,
    vector,
)


@pytest.fixture
def load() -> FakeLoad:
    return FakeLoad(m=FakeModel(), other=FakeModel())


@pytest.fixture
def bench(load: FakeLoad) -> Iterator[DeviceBench]:
    bench = DeviceBench(load)
    yield bench
    bench.close()


@pytest.fixture
def serving(bench: DeviceBench) -> DeviceBench:
    """A bench with the model ``m`` loaded."""
    loaded(bench.load("m"))
    return bench


def loads(bench: DeviceBench) -> list[str]:
    return [e.model for e in bench.channel.events if isinstance(e, ModelLoaded)]


def last_failure(bench: DeviceBench) -> Failed:
    failed = bench.channel.events[-1]
    assert isinstance(failed, Failed)
    return failed


def test_a_ping_is_answered(bench: DeviceBench) -> None:
    assert bench.ask(Ping(7)) == Pong(7)


def test_a_loaded_model_answers(serving: DeviceBench) -> None:
    serving.generate(1, [1, 2, 3], greedy(8))

    serving.run_until_ended(1)

    assert serving.tokens(1) == answer([1, 2, 3], 8)
    assert serving.finish(1) == Flag.LENGTH


def test_two_models_on_one_device_take_turns(serving: DeviceBench) -> None:
    loaded(serving.load("other"))
    serving.generate(1, [1], greedy(5), model="m")
    serving.generate(2, [2], greedy(5), model="other")

    serving.run_until(lambda: len(serving.tokens(1)) == 2 or len(serving.tokens(2)) == 2)

    assert {len(serving.tokens(1)), len(serving.tokens(2))} == {1, 2}
    serving.run_until_ended(1, 2)
    assert serving.tokens(1) == answer([1], 5)
    assert serving.tokens(2) == answer([2], 5)


def test_a_load_runs_beside_the_steps_of_other_models(load: FakeLoad, serving: DeviceBench) -> None:
    load.started.clear()
    load.may_finish.clear()
    serving.send(LoadModel(900, "other", "/other"))
    serving.generate(1, [1], greedy(20))
    serving.turn()
    assert load.started.wait(20.0)

    serving.run_until_ended(1)

    assert serving.tokens(1) == answer([1], 20)
    assert not any(
        isinstance(e, ModelLoaded) and e.model == "other" for e in serving.channel.events
    )
    load.may_finish.set()
    serving.run_until(lambda: isinstance(serving.channel.events[-1], ModelLoaded))


def test_cancelling_ends_a_sequence_within_a_step_also_in_its_prompt(load: FakeLoad) -> None:
    bench = DeviceBench(load, token_budget=16)
    bench.load("m")
    bench.generate(1, [1] * 500)
    bench.turn()
    bench.send(Cancel(900, 1))

    bench.turn()

    assert bench.finish(1) == Flag.CANCELLED
    assert bench.tokens(1) == []
    bench.close()


def test_a_cancelled_stream_gets_no_more_tokens(serving: DeviceBench) -> None:
    serving.generate(1, [1], greedy(500))
    serving.run_until(lambda: len(serving.tokens(1)) == 3)
    serving.send(Cancel(900, 1))

    serving.turn()

    assert len(serving.tokens(1)) == 3
    assert serving.finish(1) == Flag.CANCELLED


def test_cancelling_an_unknown_sequence_is_not_an_error(serving: DeviceBench) -> None:
    events = list(serving.channel.events)
    serving.send(Cancel(900, 77))

    serving.ask(Ping(901))

    assert serving.channel.events == [*events, Pong(901)]
    assert serving.records == []


def test_unloading_ends_the_sequences_as_cancelled_before_it_is_answered(
    serving: DeviceBench,
) -> None:
    serving.generate(1, [1], greedy(500))
    serving.run_until(lambda: len(serving.tokens(1)) == 1)

    assert serving.ask(UnloadModel(900, "m")) == ModelUnloaded(900, "m")

    assert serving.finish(1) == Flag.CANCELLED


def test_unloading_leaves_other_models_alone(serving: DeviceBench) -> None:
    loaded(serving.load("other"))
    serving.generate(1, [1], greedy(20), model="other")

    serving.ask(UnloadModel(900, "m"))
    serving.run_until_ended(1)

    assert serving.tokens(1) == answer([1], 20)


def test_unloading_lets_go_of_every_tensor(load: FakeLoad, bench: DeviceBench) -> None:
    gone = weakref.ref(load.models["/m"].module)
    caches = [o for o in gc.get_objects() if type(o).__name__ == "KVCache"]
    bench.load("m")
    bench.generate(1, [1])
    bench.run_until_ended(1)
    load.models.clear()

    bench.ask(UnloadModel(900, "m"))

    assert gone() is None
    assert len([o for o in gc.get_objects() if type(o).__name__ == "KVCache"]) == len(caches)
    assert bench.memory.held == {}


def test_a_model_can_be_loaded_again_after_it_was_unloaded(serving: DeviceBench) -> None:
    serving.ask(UnloadModel(900, "m"))

    assert isinstance(serving.load("m"), ModelLoaded)


def test_what_each_model_holds_is_reported(serving: DeviceBench) -> None:
    report = serving.ask(QueryMemory(900))

    assert isinstance(report, MemoryReport)
    assert isinstance(report.models["m"], Footprint)
    assert report.total_bytes == 2**24
    assert report.free_bytes == 2**24 - report.models["m"].total_bytes


def test_clearing_the_prefix_cache_of_a_model_says_how_many_blocks_it_had(
    serving: DeviceBench,
) -> None:
    serving.generate(1, [5] * 40, greedy(4))
    serving.run_until_ended(1)

    assert serving.ask(ClearPrefixCache(900, "m")) == CacheCleared(900, "m", 2)
    assert serving.ask(ClearPrefixCache(901, "m")) == CacheCleared(901, "m", 0)
    assert code_of(serving.ask(ClearPrefixCache(902, "other"))) == "model_not_loaded"


def test_loading_what_is_loaded_is_refused(serving: DeviceBench) -> None:
    assert code_of(serving.load("m")) == "already_loaded"


def test_loading_what_is_being_loaded_is_refused(load: FakeLoad, bench: DeviceBench) -> None:
    load.may_finish.clear()
    bench.send(LoadModel(900, "m", "/m"))

    assert code_of(bench.ask(LoadModel(901, "m", "/m"))) == "already_loading"

    load.may_finish.set()
    bench.run_until(lambda: isinstance(bench.channel.events[-1], ModelLoaded))


def test_unloading_what_is_being_loaded_is_refused(load: FakeLoad, bench: DeviceBench) -> None:
    load.may_finish.clear()
    bench.send(LoadModel(900, "m", "/m"))

    assert code_of(bench.ask(UnloadModel(901, "m"))) == "model_loading"

    load.may_finish.set()


def test_unloading_what_is_not_there_is_refused(bench: DeviceBench) -> None:
    assert code_of(bench.ask(UnloadModel(900, "m"))) == "model_not_loaded"


def test_a_load_with_a_senseless_limit_is_refused(bench: DeviceBench) -> None:
    assert code_of(bench.load("m", max_sequences=0)) == "invalid_limits"


def test_a_failed_load_can_be_tried_again(load: FakeLoad, bench: DeviceBench) -> None:
    load.errors["/m"] = KeyError("x")
    assert code_of(bench.load("m")) == "load_failed"
    load.errors.clear()

    assert isinstance(bench.load("m"), ModelLoaded)


def test_a_sequence_of_a_model_that_is_not_there_fails(bench: DeviceBench) -> None:
    bench.generate(1, [1])

    bench.run_until_ended(1)

    assert bench.failures() == {1: "model_not_loaded"}


def test_a_refused_prompt_fails_alone(serving: DeviceBench) -> None:
    serving.generate(1, [])
    serving.generate(2, [2])

    serving.run_until_ended(1, 2)

    assert serving.failures() == {1: "empty_prompt"}
    assert serving.tokens(2) == answer([2], 8)


def test_an_id_in_use_is_refused_without_ending_its_sequence(serving: DeviceBench) -> None:
    serving.generate(1, [1], greedy(20))
    serving.turn()

    refused = serving.ask(Generate(900, 1, "m", [2], greedy(1)))
    serving.run_until_ended(1)

    assert code_of(refused) == "duplicate_sequence"
    assert serving.failures() == {}
    assert serving.tokens(1) == answer([1], 20)


def test_records_of_a_step_are_published_before_its_failures_are_sent(
    load: FakeLoad, serving: DeviceBench
) -> None:
    serving.generate(1, [1], greedy(20))
    serving.run_until(lambda: len(serving.tokens(1)) == 3)
    load.models["/m"].module.errors = [ValueError("x")]

    serving.run_until_ended(1)

    assert serving.failures() == {1: "step_failed"}
    assert serving.tokens(1) == answer([1], 3)


def test_a_frame_that_is_no_command_is_answered_and_touches_nothing(serving: DeviceBench) -> None:
    serving.generate(1, [1])
    serving.send(ProtocolError("not a command: object missing `op`"))

    serving.run_until_ended(1)

    assert serving.tokens(1) == answer([1], 8)
    assert last_failure(serving) == Failed("protocol_error", "not a command: object missing `op`")


def test_a_shutdown_ends_sequences_says_bye_and_exits_with_zero(serving: DeviceBench) -> None:
    serving.generate(1, [1], greedy(500))
    serving.run_until(lambda: len(serving.tokens(1)) == 1)
    serving.send(Shutdown(900))

    assert serving.device.serve() == EXIT_OK

    serving.records += serving.consumer.take()
    assert serving.finish(1) == Flag.CANCELLED
    assert serving.channel.events[-1] == Bye(900)


def test_a_shutdown_does_not_wait_for_a_load(load: FakeLoad, bench: DeviceBench) -> None:
    load.may_finish.clear()
    bench.send(LoadModel(900, "m", "/m"))
    bench.send(Shutdown(901))

    assert bench.device.serve() == EXIT_OK
    load.may_finish.set()


def test_a_full_ring_loses_nothing(load: FakeLoad) -> None:
    bench = DeviceBench(load, ring_capacity=2)
    loaded(bench.load("m"))
    for number in range(7):
        bench.generate(number, [number], greedy(4))
    receive = bench.channel.receive_waiting

    def drain_then_receive() -> Any:  # called between two waits for room
        bench.records += bench.consumer.take()
        return receive()

    bench.channel.receive_waiting = drain_then_receive  # type: ignore[method-assign] # a spy

    bench.run_until_ended(*range(7))

    for number in range(7):
        assert bench.tokens(number) == answer([number], 4)
    assert Activity.BLOCKED in bench.beats
    bench.close()


def test_a_full_ring_between_a_token_and_its_likeliest_loses_and_mixes_nothing(
    load: FakeLoad,
) -> None:
    bench = DeviceBench(load, ring_capacity=3)
    loaded(bench.load("m"))
    for number in range(1, 4):
        bench.generate(number, [number], SamplingParams(0.0, 4, 0, top_logprobs=20))
    receive = bench.channel.receive_waiting

    def drain_then_receive() -> Any:  # called between two waits for room
        bench.records += bench.consumer.take()
        return receive()

    bench.channel.receive_waiting = drain_then_receive  # type: ignore[method-assign] # a spy

    bench.run_until_ended(1, 2, 3)

    for number in range(1, 4):
        of_it = [record for record in bench.records if record.sequence_id == number]
        assert of_it.pop(0).flags == Flag.PROMPT
        assert [record.spare for record in of_it] == [*range(1, 21), 0] * 4
        assert [bool(record.flags & Flag.TOP) for record in of_it] == ([True] * 20 + [False]) * 4
        assert bench.tokens(number) == answer([number], 4)
        assert of_it[0].logprob == of_it[20].logprob, "greedy takes the likeliest"
    bench.close()


def test_an_embedding_is_answered_with_its_vector(serving: DeviceBench) -> None:
    command_id = serving.embed([4, 9, 2])
    serving.generate(900, [1], greedy(8))
    serving.run_until_ended(900)

    (embedded,) = serving.answers(command_id)

    assert isinstance(embedded, Embedded)
    assert array("f", embedded.vector).tolist() == pytest.approx(vector([4, 9, 2], "mean"))
    assert serving.tokens(900) == answer([1], 8)


def test_a_refused_embedding_fails_by_its_command(serving: DeviceBench) -> None:
    empty, elsewhere = serving.embed([]), serving.embed([1], model="x")

    serving.ask(Ping(900))

    assert [code_of(*serving.answers(number)) for number in (empty, elsewhere)] == [
        "empty_prompt",
        "model_not_loaded",
    ]
    assert serving.failures() == {}


def test_a_cancelled_embedding_ends_within_a_step_and_is_answered_once(load: FakeLoad) -> None:
    bench = DeviceBench(load, token_budget=16)
    loaded(bench.load("m"))
    command_id = bench.embed([1] * 500)
    bench.turn()
    bench.send(Cancel(900, command_id))
    bench.send(Cancel(901, command_id))

    bench.turn()

    assert code_of(*bench.answers(command_id)) == "cancelled"
    assert bench.records == []
    steps = load.models["/m"].module.steps
    bench.ask(Ping(902))
    assert load.models["/m"].module.steps == steps
    bench.close()


@pytest.mark.parametrize("command", [UnloadModel(900, "m"), Shutdown(900)])
def test_an_embedding_is_answered_before_its_model_or_device_goes(
    load: FakeLoad, command: UnloadModel | Shutdown
) -> None:
    bench = DeviceBench(load, token_budget=16)
    loaded(bench.load("m"))
    command_id = bench.embed([1] * 500)
    bench.turn()

    last = bench.ask(command)

    assert code_of(*bench.answers(command_id)) == "cancelled"
    assert bench.channel.events[-1] == last
    bench.close()


def test_a_shutdown_gets_through_to_a_device_whose_ring_is_full(load: FakeLoad) -> None:
    bench = DeviceBench(load, ring_capacity=1)
    loaded(bench.load("m"))
    for number in range(3):
        bench.generate(number, [number], greedy(500))
    receive = bench.channel.receive_waiting
    calls = 0

    def stop_later() -> Any:
        nonlocal calls
        calls += 1
        if calls == 10:
            bench.send(Shutdown(900))
        return receive()

    bench.channel.receive_waiting = stop_later  # type: ignore[method-assign] # a late command

    assert bench.device.serve() == EXIT_OK
    assert bench.channel.events[-1] == Bye(900)
    bench.close()


def test_a_device_fault_in_a_step_is_fatal(load: FakeLoad, serving: DeviceBench) -> None:
    load.models["/m"].module.errors = [torch.AcceleratorError("CUDA error: unspecified failure")]
    serving.generate(1, [1])

    assert serving.device.serve() == EXIT_DEVICE_LOST

    failed = last_failure(serving)
    assert (failed.code, failed.fatal) == ("device_lost", True)
    assert "CUDA error: unspecified failure" in failed.detail


def test_a_device_fault_in_a_load_is_fatal(load: FakeLoad, bench: DeviceBench) -> None:
    load.errors["/m"] = torch.AcceleratorError("CUDA error: unspecified failure")
    bench.send(LoadModel(900, "m", "/m"))

    assert bench.device.serve() == EXIT_DEVICE_LOST


def test_a_device_that_is_not_there_is_fatal(load: FakeLoad) -> None:
    bench = DeviceBench(load, device="cuda:99")

    assert bench.device.serve() == EXIT_DEVICE_LOST
    assert last_failure(bench).fatal
    bench.close()


def test_a_bug_in_the_loop_is_fatal_and_does_not_leak_its_text(
    serving: DeviceBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise KeyError("secret")

    monkeypatch.setattr(serving.loader, "take", fail)

    assert serving.device.serve() == EXIT_INTERNAL_ERROR

    assert last_failure(serving) == Failed(
        "internal_error", "a bug in the device process: KeyError", fatal=True
    )


class Seen(Tap):
    """A tap that somebody listens to."""

    def __init__(self) -> None:
        super().__init__(None, "cpu:0")
        self.messages: list[tuple[str, Any]] = []

    def wants(self, _topic: str) -> bool:
        return True

    def publish(self, topic: str, message: Any) -> None:
        self.messages.append((topic, message))


def test_a_step_is_seen_by_whoever_taps(load: FakeLoad) -> None:
    tap = Seen()
    bench = DeviceBench(load, tap=tap)
    loaded(bench.load("m"))
    bench.generate(1, [1, 2, 3], greedy(2))

    bench.run_until_ended(1)

    seen = [(topic, message["model"], message["tokens"]) for topic, message in tap.messages]
    assert seen == [("step", "m", 3), ("step", "m", 1)]
    assert all(message["seconds"] > 0 for _, message in tap.messages)
    bench.close()


def test_a_bench_leaves_no_descriptor_behind(load: FakeLoad) -> None:
    before = set(Path("/proc/self/fd").iterdir())
    bench = DeviceBench(load)
    loaded(bench.load("m"))
    bench.send(Shutdown(900))
    bench.device.serve()

    bench.close()
    del bench
    gc.collect()

    assert set(Path("/proc/self/fd").iterdir()) <= before


def test_memory_of_a_large_cache_returns_to_the_host(load: FakeLoad) -> None:
    bench = DeviceBench(load, memory_bytes=2**30)
    loaded(bench.load("m", kv_cache_bytes=2**28))
    holding = _resident_bytes()

    bench.ask(UnloadModel(900, "m"))

    assert _resident_bytes() < holding - 2**27
    bench.close()


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_it_beats_before_all_that_could_hang_and_rests_with_nothing_to_do(
    bench: DeviceBench,
) -> None:
    bench.load("m")
    bench.generate(1, [1, 2], greedy(3))
    bench.beats.clear()
    bench.run_until_ended(1)
    bench.send(Ping(99))
    bench.turn()

    assert set(bench.beats) == {Activity.STEPPING, Activity.IDLE}
    assert bench.beats.count(Activity.STEPPING) >= 3
    assert bench.beats[-1] is Activity.IDLE


def test_a_load_beats_for_itself(bench: DeviceBench, load: FakeLoad) -> None:
    load.progress = [(1, 3), (2, 3), (3, 3)]
    bench.load("m")
    bench.run_until(lambda: bench.loader_beats[-1:] == [Activity.IDLE])

    assert bench.loader_beats[:-1].count(Activity.LOADING) >= 4


@pytest.mark.parametrize(
    "command",
    [
        JoinGroup(900, "g", rank=0, ranks=2, meeting="/"),
        CheckCollective(900, "g"),
        LoadModel(900, "m", "/m", group="g"),
    ],
)
def test_a_group_that_was_not_joined_is_refused(
    bench: DeviceBench, command: JoinGroup | CheckCollective | LoadModel
) -> None:
    assert code_of(bench.ask(command)) == "group_failed"


def test_a_group_that_nobody_joined_can_be_left(bench: DeviceBench) -> None:
    assert bench.ask(LeaveGroup(900, "g")) == GroupLeft(900, "g")


def test_a_meeting_that_is_not_there_is_refused(load: FakeLoad, tmp_path: Path) -> None:
    post, ring = Post(), PlanRing(1)
    letters = Letters(post.letters)
    bench = DeviceBench(load, letters=letters)
    post.send("g", ring.descriptors(1))

    refused = bench.ask(JoinGroup(900, "g", rank=1, ranks=2, meeting=str(tmp_path / "gone")))

    assert code_of(refused) == "group_failed"
    for end in (bench, letters, post, ring):
        end.close()


def test_the_loss_of_a_peer_is_said_by_its_name(load: FakeLoad, serving: DeviceBench) -> None:
    serving.generate(1, [1])
    load.models["/m"].module.errors = [PeerLost("rank 1 is gone")]

    assert serving.device.serve() == EXIT_DEVICE_LOST

    assert last_failure(serving) == Failed("peer_lost", "rank 1 is gone", fatal=True)
