"""Loads go on in a thread of their own and end as an engine or as words."""

import select
from collections.abc import Iterator

import pytest
import torch

from cortex.ipc.engine_options import EngineOptions
from cortex.ipc.messages import Failed, Generate, LoadModel, LoadProgress, ModelLoaded
from cortex.models.checkpoints.errors import CheckpointError
from cortex.models.kernels.cuda_attention import Unavailable
from cortex.runtime.device import loader as loader_module
from cortex.runtime.device.cuda import side_stream
from cortex.runtime.device.loader import Loaded, Loader, LoadFailed, Outcome
from cortex.runtime.device.memory import DeviceMemory
from cortex.runtime.device.refusal import DeviceLost
from engine_fakes import FakeLoad, FakeModel, greedy

CPU = torch.device("cpu")


class Clock:
    """Stands still until told."""

    def __init__(self, *ticks: float) -> None:
        self.ticks = list(ticks)

    def __call__(self) -> float:
        return self.ticks.pop(0) if len(self.ticks) > 1 else self.ticks[0]


@pytest.fixture
def load() -> FakeLoad:
    return FakeLoad(m=FakeModel(), other=FakeModel())


@pytest.fixture
def memory() -> DeviceMemory:
    return DeviceMemory(2**24)


@pytest.fixture
def loader(load: FakeLoad, memory: DeviceMemory) -> Iterator[Loader]:
    loader = Loader(load, CPU, memory, token_budget=512, clock=Clock(0.0))
    yield loader
    loader.close()


def outcomes(loader: Loader) -> list[Outcome]:
    """Return what happens until a load has ended."""
    happened: list[Outcome] = []
    while not happened or isinstance(happened[-1], LoadProgress):
        assert select.select([loader.fd], [], [], 20.0)[0], "the loader says nothing"
        happened += loader.take()
    return happened


def outcome(loader: Loader, command: LoadModel) -> Outcome:
    loader.start(command)
    return outcomes(loader)[-1]


def failure(loader: Loader, command: LoadModel) -> Failed:
    failed = outcome(loader, command)
    assert isinstance(failed, LoadFailed), failed
    assert failed.event.command_id == command.command_id
    return failed.event


def test_a_load_ends_with_an_engine_and_its_numbers(loader: Loader, memory: DeviceMemory) -> None:
    loaded = outcome(loader, LoadModel(3, "m", "/m", max_context_tokens=320, max_sequences=2))

    assert isinstance(loaded, Loaded)
    footprint = loaded.event.footprint
    assert loaded.event == ModelLoaded(3, "m", footprint, 320, 2, 640, 0.0)
    assert (footprint.weights_bytes, footprint.kv_bytes) == (1000, 640 * 8)
    assert footprint.workspace_bytes > 0
    assert memory.held == {"m": footprint}
    assert not loaded.engine.has_work


def test_the_weights_are_read_as_the_command_says(load: FakeLoad, loader: Loader) -> None:
    outcome(loader, LoadModel(1, "m", "/m", dtype="bfloat16"))

    assert load.asked == [("cpu", "bfloat16")]


def test_nothing_has_happened_before_it_has(loader: Loader) -> None:
    assert loader.take() == []


def test_progress_comes_at_most_ten_times_a_second(load: FakeLoad, memory: DeviceMemory) -> None:
    load.progress = [(0, 60), (10, 60), (20, 60), (30, 60), (60, 60)]
    loader = Loader(
        load, CPU, memory, token_budget=512, clock=Clock(0.0, 0.0, 0.05, 0.1, 0.15, 0.25)
    )
    loader.start(LoadModel(1, "m", "/m"))

    told = [o for o in outcomes(loader) if isinstance(o, LoadProgress)]

    assert told == [LoadProgress(1, "m", done, 60) for done in (0, 20, 60)]
    loader.close()


def test_engines_compute_as_the_options_say(load: FakeLoad, memory: DeviceMemory) -> None:
    loader = Loader(load, CPU, memory, token_budget=512, options=EngineOptions(prefix_cache=False))

    loaded = outcome(loader, LoadModel(1, "m", "/m"))

    assert isinstance(loaded, Loaded)
    for number in range(2):
        loaded.engine.start(Generate(number, number, "m", [1] * 40, greedy(1)))
        loaded.engine.step()
    assert loaded.engine.pool.cached == 0
    loader.close()


def test_weights_beyond_what_is_free_are_refused_before_they_are_read(
    load: FakeLoad, loader: Loader
) -> None:
    load.progress = [(0, 2**30)]

    failed = failure(loader, LoadModel(1, "m", "/m"))

    assert failed.code == "insufficient_memory"
    assert failed.detail == "the weights take 1024.0 MiB, the device has 16.0 MiB free"
    assert failed.numbers == {"weights_bytes": 2**30, "memory_bytes": 2**24}


def test_a_model_without_room_for_a_context_is_refused_and_holds_nothing(
    loader: Loader, memory: DeviceMemory
) -> None:
    memory.total_bytes = 5000

    failed = failure(loader, LoadModel(1, "m", "/m"))

    assert failed.code == "insufficient_memory"
    assert (failed.numbers["weights_bytes"], failed.numbers["memory_bytes"]) == (1000, 5000)
    assert failed.numbers["kv_bytes"] > 0
    assert memory.held == {}


@pytest.mark.parametrize(
    ("error", "code", "detail"),
    [
        (CheckpointError("/m: no tensors"), "bad_checkpoint", "/m: no tensors"),
        (OSError(5, "Input/output error"), "load_failed", "Input/output error"),
        (KeyError("secret"), "load_failed", "loading m failed: KeyError"),
        (Unavailable("no flash-attn here"), "attention_unavailable", "no flash-attn here"),
        (torch.OutOfMemoryError("of 9 GB"), "insufficient_memory", "of 9 GB"),
    ],
)
def test_a_load_that_fails_says_why(
    load: FakeLoad, loader: Loader, error: Exception, code: str, detail: str
) -> None:
    load.errors["/m"] = error

    failed = failure(loader, LoadModel(1, "m", "/m"))

    assert failed.code == code
    assert failed.detail.endswith(detail)


def test_a_load_that_fails_at_its_very_end_holds_nothing(
    loader: Loader, memory: DeviceMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_arguments: object, **_options: object) -> None:
        raise ValueError("no engine")

    monkeypatch.setattr(loader_module, "Engine", broken)

    failed = outcome(loader, LoadModel(1, "m", "/m"))

    assert isinstance(failed, LoadFailed)
    assert memory.held == {}


def test_a_load_that_fails_does_not_stand_in_the_way_of_the_next(
    load: FakeLoad, loader: Loader
) -> None:
    load.errors["/m"] = KeyError("x")
    failure(loader, LoadModel(1, "m", "/m"))

    assert isinstance(outcome(loader, LoadModel(2, "other", "/other")), Loaded)


def test_a_fault_of_the_device_while_loading_is_not_the_models(
    load: FakeLoad, loader: Loader
) -> None:
    load.errors["/m"] = torch.AcceleratorError("CUDA error: uncorrectable ECC error")

    lost = outcome(loader, LoadModel(1, "m", "/m"))

    assert isinstance(lost, DeviceLost)
    assert "while loading m" in str(lost)


def test_a_device_that_cannot_clean_up_after_a_load_is_lost(
    load: FakeLoad, loader: Loader, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: torch.device) -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr("cortex.runtime.device.loader.reclaim", fail)
    load.errors["/m"] = KeyError("x")

    assert isinstance(outcome(loader, LoadModel(1, "m", "/m")), DeviceLost)


def test_a_device_that_is_not_there_is_lost(load: FakeLoad, memory: DeviceMemory) -> None:
    loader = Loader(load, torch.device("cuda:99"), memory, token_budget=512)

    assert isinstance(outcome(loader, LoadModel(1, "m", "/m")), DeviceLost)
    loader.close()


def test_all_loads_of_a_device_share_a_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[object] = []
    monkeypatch.setattr(torch.cuda, "Stream", lambda _: object())
    monkeypatch.setattr(torch.cuda, "stream", used.append)

    for _ in range(2):
        side_stream(torch.device("cuda:98"))

    assert used[0] is used[1]


def test_the_second_of_two_loads_sees_what_the_first_holds(
    loader: Loader, memory: DeviceMemory
) -> None:
    first = outcome(loader, LoadModel(1, "m", "/m"))
    assert isinstance(first, Loaded)
    memory.total_bytes = first.event.footprint.total_bytes + 4000

    assert failure(loader, LoadModel(2, "other", "/other")).code == "insufficient_memory"
