"""A recorded step against the model it was recorded from: the same bits, for any batch."""

from __future__ import annotations

import gc
import logging
import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from cortex.models.batch import Batch, KVCache
from cortex.models.kernels import cpu, ops
from cortex.models.kernels.op import OPERATIONS
from cortex.models.kernels.program import Program
from cortex.models.layers import RMSNorm
from cortex.models.loaded_model import LoadedModel
from cortex.models.quantization import Matrix
from tiny_models import Player, loaded, random_llama, random_model, some_tokens, write_gguf


@pytest.fixture
def kernels() -> cpu.CpuKernels:
    found = cpu.kernels()
    assert found is not None, "the tests need a C compiler"
    return found


@pytest.fixture(params=["auto", "float32", "float16"])
def model(tmp_path: Path, request: pytest.FixtureRequest) -> LoadedModel:
    write_gguf(tmp_path / "tiny.gguf", random_llama(), "Q4_1")
    return loaded(tmp_path / "tiny.gguf", dtype=request.param)


def players(model: LoadedModel) -> tuple[Player, Player]:
    """One that computes operation by operation, one that runs a recording."""
    plain, recorded = Player(model), Player(model)
    recorded.compute = model.recorded(recorded.cache)
    assert isinstance(recorded.compute, Program)
    return plain, recorded


def test_a_recording_gives_the_bits_of_the_model(model: LoadedModel) -> None:
    plain, recorded = players(model)
    steps = [
        {"a": some_tokens(5)},
        {"a": [1], "b": some_tokens(40, 1)},
        {"a": [2], "b": [3], "c": some_tokens(3, 2)},
        {"c": [9]},
        {name: [4] for name in "abcdefg"},
        {"a": some_tokens(33, 4), "g": [7]},
    ]

    for step in steps:
        expected, found = plain.step(**step), recorded.step(**step)
        for name in step:
            assert torch.equal(expected[name], found[name])


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "qwen3_moe"])
def test_every_architecture_can_be_recorded(
    tmp_path: Path, architecture: str, caplog: pytest.LogCaptureFixture
) -> None:
    write_gguf(tmp_path / "tiny.gguf", random_model(architecture), "Q8_0")
    plain, recorded = players(loaded(tmp_path / "tiny.gguf", dtype="auto"))

    expected, found = plain.step(a=some_tokens(20)), recorded.step(a=some_tokens(20))

    assert torch.equal(expected["a"], found["a"])
    assert not caplog.records


def test_buffers_are_used_again_and_not_for_each_layer(kernels: cpu.CpuKernels) -> None:
    def bytes_of(layers: int) -> int:
        deep = nn.Sequential(*[RMSNorm(64, 1e-6) for _ in range(layers)])
        for norm in deep:
            norm.weight = torch.ones(64)

        def compute(batch: Batch) -> Tensor:
            x, _ = ops.rotation(batch.positions, torch.ones(64))
            return ops.take(deep(x), batch.sampled)

        program = Program(compute, KVCache([], [], 16), kernels)
        program(one_token())
        return program.buffer_bytes

    assert bytes_of(20) == bytes_of(3)


def test_a_whole_model_takes_no_more_buffers_the_more_layers_it_has(tmp_path: Path) -> None:
    def bytes_of(layers: int) -> int:
        path = tmp_path / f"{layers}.gguf"
        write_gguf(path, random_llama(num_hidden_layers=layers), "Q4_1")
        _, recorded = players(loaded(path, dtype="auto"))
        recorded.step(a=some_tokens(5))
        assert isinstance(recorded.compute, Program)
        return recorded.compute.buffer_bytes

    assert bytes_of(9) == bytes_of(3)


def one_token() -> Batch:
    one = torch.tensor([0])
    return Batch(
        token_ids=one,
        positions=one,
        slots=one,
        query_starts=torch.tensor([0, 1], dtype=torch.int32),
        context_tokens=torch.tensor([1], dtype=torch.int32),
        block_tables=torch.tensor([[0]], dtype=torch.int32),
        sampled=one,
        cache=KVCache([], [], 16),
    )


def test_a_model_that_computes_by_other_means_runs_unrecorded_with_one_warning(
    kernels: cpu.CpuKernels, caplog: pytest.LogCaptureFixture
) -> None:
    frequencies = torch.ones(3)

    def compute(batch: Batch) -> Tensor:
        cosines, _ = ops.rotation(batch.positions, frequencies)
        return torch.cos(cosines)

    program = Program(compute, KVCache([], [], 16), kernels)

    with caplog.at_level(logging.WARNING):
        logits = [program(one_token()) for _ in range(2)]

    assert all(torch.equal(row, torch.ones(1, 3).cos()) for row in logits)
    (record,) = caplog.records
    assert "aten.cos" in record.getMessage()


def test_a_token_that_is_not_in_the_vocabulary_is_an_error(model: LoadedModel) -> None:
    _, recorded = players(model)

    with pytest.raises(IndexError, match="out of range"):
        recorded.step(a=[10_000_000])


class WithoutMemory:
    """A library whose *operation* gets none."""

    def __init__(self, operation: str) -> None:
        self._code = OPERATIONS.index(operation)

    def cortex_run(self, *_: object) -> int:
        return 1 + self._code


def test_a_step_that_gets_no_memory_says_so(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, recorded = players(model)
    recorded.step(a=[1, 2])
    program = recorded.compute
    assert isinstance(program, Program)
    monkeypatch.setattr(program._recording, "_library", WithoutMemory("attention"))

    with pytest.raises(MemoryError, match="attention"):
        recorded.step(a=[3])


def test_a_program_that_goes_takes_weights_cache_and_buffers_along_at_once(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", random_llama(), "Q4_1")
    model = loaded(tmp_path / "tiny.gguf", dtype="auto")
    player = Player(model)
    program = model.recorded(player.cache)
    player.compute = program
    player.step(a=some_tokens(5))
    assert isinstance(program, Program)
    assert program._recording is not None
    parts = [m.parts[0].data for m in model.module.modules() if isinstance(m, Matrix)]
    held = [weakref.ref(t) for t in (*parts, *player.cache.keys, *program._recording._slabs)]
    gc.collect()
    gc.disable()  # nothing may be left for it to find
    try:
        del model, player, program, parts
        assert [one() for one in held] == [None] * len(held)
    finally:
        gc.enable()


def test_recording_changes_nothing_for_other_models(model: LoadedModel) -> None:
    _, recorded = players(model)
    recorded.step(a=[1, 2])

    assert cpu.RECORDING.get() is None
    assert torch.equal(ops.add(torch.ones(1, 2), torch.ones(1, 2)), torch.full((1, 2), 2.0))


def test_a_profile_tells_the_seconds_of_each_operation(model: LoadedModel) -> None:
    _, recorded = players(model)
    program = recorded.compute
    assert isinstance(program, Program)

    before = program.profile()
    recorded.step(a=some_tokens(20))
    after = program.profile()

    assert set(before) == set(after) == set(OPERATIONS)
    assert not any(before.values())
    assert after["attention"] > 0
    assert after["take"] > 0
