"""Steps on a GPU: graphs, launches ahead, and what does not depend on company. One run: minutes."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from random_models import SHAPES, random_model
from torch import Tensor

from cortex.ipc.messages import SamplingParams
from cortex.models.execution import DEFAULT, Execution
from cortex.models.kernels.graphs import DecodeGraphs, buckets
from cortex.models.loaded_model import LoadedModel
from cortex.models.quantization import Matrix, Part
from cortex.models.weights import load_model
from cortex.runtime.device.async_runner import AsyncRunner
from cortex.runtime.device.cuda import open_device, reclaim, side_stream, wait_for_stream
from cortex.runtime.device.engine import Engine
from cortex.runtime.device.memory import Limits
from cortex.runtime.device.model_runner import BLOCK_TOKENS, ModelRunner
from cortex.runtime.device.row import Row
from cortex.runtime.device.sequence import UNKNOWN
from cortex.runtime.device.step_plan import PlannedSequence, StepPlan
from cortex.runtime.device.workspace import measure_workspace
from engine_fakes import DeviceBench, greedy, loaded
from engine_run import Run
from tiny_models import saved_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]
GPU = torch.device("cuda:0")
BLOCKS = 256
MOST = 6
SHAPE = {
    **SHAPES["tiny"],
    "hidden_size": 256,
    "intermediate_size": 512,
    "head_dim": 64,
    "vocab_size": 1000,
}
GREEDY = SamplingParams(temperature=0.0, max_tokens=1, seed=0)
INVARIANT = Execution(is_batch_invariant=True)


def made(
    dtype: torch.dtype = torch.bfloat16, execution: Execution = DEFAULT, seed: int = 0
) -> LoadedModel:
    torch.manual_seed(seed)
    return random_model(SHAPE, GPU, dtype, execution)


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return made()


@pytest.fixture(scope="module")
def invariant() -> LoadedModel:
    return made(execution=INVARIANT)


def prompt(sequence: int) -> list[int]:
    return [(7 * sequence + 3 * at) % 1000 for at in range(20 + 13 * sequence)]


def planned(sequence: int, tokens: list[int], first: int) -> PlannedSequence:
    """Return what a sequence, whose 32 blocks are its own, brings to a step."""
    table = list(range(32 * sequence, 32 * sequence + 32))
    return PlannedSequence(sequence, tokens, first, table, is_last=True, sampling=GREEDY)


def logits(runner: ModelRunner, sequences: list[int], steps: int) -> list[Tensor]:
    """Return the logits [S, V] of the prompts, and of so many decode steps after them."""
    found = [runner.forward(StepPlan([planned(s, prompt(s), 0) for s in sequences])).clone()]
    for step in range(steps):
        plan = StepPlan([planned(s, [5 + step], len(prompt(s)) + step) for s in sequences])
        found.append(runner.forward(plan).clone())
    return found


def graphs_of(runner: ModelRunner) -> DecodeGraphs:
    assert isinstance(runner._module, DecodeGraphs)
    return runner._module


def runner_of(model: LoadedModel, *, is_recorded: bool = True) -> ModelRunner:
    cache = model.new_cache(BLOCKS, BLOCK_TOKENS)
    return ModelRunner(model, cache, GPU, max_sequences=MOST, is_recorded=is_recorded)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_every_bucket_is_captured(dtype: torch.dtype) -> None:
    runner = runner_of(made(dtype))

    assert graphs_of(runner).sizes == buckets(MOST)


def test_a_step_that_cannot_be_captured_spoils_nothing() -> None:
    plain = made(execution=Execution(attention="reference"))
    runner = runner_of(plain)
    assert graphs_of(runner).sizes == []
    reclaim(GPU)
    before = torch.cuda.mem_get_info(GPU)[0]

    memory = torch.empty(1 << 28, dtype=torch.uint8, device=GPU)
    del memory
    reclaim(GPU)

    assert torch.cuda.mem_get_info(GPU)[0] == before
    assert graphs_of(runner_of(made())).sizes == buckets(MOST)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 6])
def test_graphs_compute_what_the_model_does(model: LoadedModel, count: int) -> None:
    graphs, plain = runner_of(model), runner_of(model, is_recorded=False)

    pairs = zip(
        logits(graphs, list(range(count)), 20), logits(plain, list(range(count)), 20), strict=True
    )

    is_exact = count in buckets(MOST)  # else a product has other rows, and other roundings
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, atol=0 if is_exact else 0.1, rtol=0)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 5e-3), (torch.float16, 0.05), (torch.bfloat16, 0.3)],
    ids=str,
)
def test_a_gpu_computes_what_a_cpu_does(dtype: torch.dtype, tolerance: float) -> None:
    there = made(dtype)
    here = random_model(SHAPE, torch.device("cpu"), torch.float32)
    here.module.load_state_dict(there.module.state_dict())
    for mine, its in zip(here.module.modules(), there.module.modules(), strict=True):
        if isinstance(mine, Matrix) and isinstance(its, Matrix):
            (part,) = its.parts
            weights = part.data.view(dtype).float().cpu()
            mine.fill([Part("F32", weights.view(torch.uint8))])
    on_cpu = ModelRunner(here, here.new_cache(BLOCKS, BLOCK_TOKENS), torch.device("cpu"))

    for ours, theirs in zip(
        logits(runner_of(there), [0, 1, 2], 5), logits(on_cpu, [0, 1, 2], 5), strict=True
    ):
        assert (ours.cpu() - theirs).abs().max() < tolerance


def test_with_batch_invariant_no_bit_depends_on_company(invariant: LoadedModel) -> None:
    together = logits(runner_of(invariant), list(range(6)), 12)

    for sequence in range(6):
        alone = logits(runner_of(invariant), [sequence], 12)
        for ours, theirs in zip(together, alone, strict=True):
            assert torch.equal(ours[sequence], theirs[0])


def test_with_batch_invariant_no_bit_depends_on_chunks(invariant: LoadedModel) -> None:
    whole = logits(runner_of(invariant), [3], 0)[0]
    runner, tokens = runner_of(invariant), prompt(3)

    chunks = [
        runner.forward(StepPlan([planned(3, tokens[first : first + 7], first)])).clone()
        for first in range(0, len(tokens), 7)
    ]

    assert torch.equal(chunks[-1], whole)


def engine(model: LoadedModel, runner_type: type[ModelRunner]) -> Engine:
    cache = model.new_cache(BLOCKS, BLOCK_TOKENS)
    runner = runner_type(model, cache, GPU, max_sequences=MOST)
    limits = Limits(512, MOST, BLOCKS, 0)
    return Engine("m", runner, limits, token_budget=64, device_type="cuda")


def everything(number: int) -> SamplingParams:
    """Return one of several ways to choose, all of them legal."""
    return SamplingParams(
        temperature=(0.0, 0.7, 1.3)[number % 3],
        max_tokens=10 + 7 * number,
        seed=number,
        top_p=(1.0, 0.9)[number % 2],
        top_k=(0, 40)[number // 2 % 2],
        min_p=(0.0, 0.02)[number // 3 % 2],
        repetition_penalty=(1.0, 1.0, 1.0, 1.2)[number % 4],
        logit_bias={5: 2.0} if number % 5 == 4 else {},
        top_logprobs=3 if number % 5 == 2 else None,
        stop_token_ids=(11, 12),
    )


def test_launching_ahead_says_what_waiting_says(invariant: LoadedModel) -> None:
    said = []
    for runner_type in (ModelRunner, AsyncRunner):
        run = Run()
        run.engine = engine(invariant, runner_type)
        for number in range(12):
            run.start(number, prompt(number % 6), everything(number))
        run.until_idle()
        assert run.has_all_blocks
        said.append((run.tokens, run.finishes, run.tops))

    assert said[0] == said[1]


@pytest.fixture
def no_waiting() -> Iterator[None]:
    """Whatever waits for the device, of what torch knows to wait, is an error."""
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("default")
    yield
    torch.cuda.set_sync_debug_mode(mode)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_a_decode_step_waits_for_nothing(model: LoadedModel, no_waiting: None) -> None:
    cache = model.new_cache(BLOCKS, BLOCK_TOKENS)
    runner = AsyncRunner(model, cache, GPU, max_sequences=MOST)
    ways = [everything(number) for number in (0, 1, 2, 5, 7, 11)]
    plan = StepPlan([planned(s, prompt(s), 0) for s in range(6)])

    def rows() -> list[Row]:
        return [Row(way, p.end_position) for way, p in zip(ways, plan.sampled, strict=True)]

    runner.launch(plan, rows()).result()
    before = None
    for step in range(4):  # the first of them may still compile something
        token = UNKNOWN if before else 5
        plan = StepPlan([planned(s, [token], len(prompt(s)) + step) for s in range(6)])
        if step == 2:
            torch.cuda.set_sync_debug_mode("error")
        before = runner.launch(plan, rows())
    torch.cuda.set_sync_debug_mode("default")

    assert before is not None
    assert all(chosen.token_id is not None for chosen in before.result())


def test_a_capture_does_not_disturb_the_steps_of_another_model(model: LoadedModel) -> None:
    expected = logits(runner_of(model), [0, 1], 10)
    runner, other, sizes = runner_of(model), made(seed=1), list[int]()

    def load() -> None:
        open_device(GPU)
        with side_stream(GPU):
            for _ in range(5):
                sizes[:] = graphs_of(runner_of(other)).sizes
            wait_for_stream(GPU)

    loader = threading.Thread(target=load)
    loader.start()
    steps = 0
    while loader.is_alive() or not steps:
        for ours, theirs in zip(logits(runner, [0, 1], 10), expected, strict=True):
            assert torch.equal(ours, theirs)
        torch.zeros(1 << 20, device=GPU)  # memory comes and goes meanwhile
        steps += 1
    loader.join()

    assert sizes == buckets(MOST)


def test_graphs_keep_about_as_much_as_was_foretold(model: LoadedModel) -> None:
    foretold = measure_workspace(model, GPU, 64, 0, graph_rows=buckets(MOST)).graph_bytes

    kept = graphs_of(runner_of(model)).buffer_bytes

    assert 0 < kept <= foretold + (64 << 20)


def test_weights_that_went_through_pinned_memory_are_those_of_the_file(tmp_path: Path) -> None:
    saved_model(tmp_path, "qwen3", head_dim=16, vocab_size=20_000, hidden_size=512)
    here, there = (
        load_model(tmp_path, device=device, dtype="float32", on_progress=lambda *_: None)
        for device in (torch.device("cpu"), GPU)
    )
    torch.cuda.synchronize(GPU)

    for mine, its in zip(here.module.modules(), there.module.modules(), strict=True):
        for ours, theirs in zip(getattr(mine, "parts", ()), getattr(its, "parts", ()), strict=True):
            assert torch.equal(ours.data, theirs.data.cpu())
    for name, weight in here.module.named_buffers():
        assert torch.equal(weight, there.module.get_buffer(name).cpu())


def test_the_engine_serves_a_checkpoint_from_disk(tmp_path: Path) -> None:
    saved_model(tmp_path, "qwen3", head_dim=64)
    model = load_model(
        tmp_path, device=GPU, dtype="auto", on_progress=lambda *_: None, execution=INVARIANT
    )
    assert model.dtype == model.kv_dtype == torch.float32
    run = Run()
    run.engine = engine(model, AsyncRunner)
    for number in range(6):
        run.start(number, [number, 3, 5], SamplingParams(0.0, 30, 0))
    run.until_idle()
    together = dict(run.tokens)

    for number in range(6):
        run.start(100 + number, [number, 3, 5], SamplingParams(0.0, 30, 0))
        run.until_idle()

    assert [run.tokens[100 + number] for number in range(6)] == list(together.values())


def test_a_device_serves_it_within_what_it_books(tmp_path: Path) -> None:
    saved_model(tmp_path, "qwen3", head_dim=64)

    def load(
        path: Path,
        *,
        device: torch.device,
        dtype: str,
        on_progress: Callable[[int, int], None],
        **rest: object,
    ) -> LoadedModel:
        del rest
        return load_model(tmp_path, device=device, dtype="bfloat16", on_progress=on_progress)

    bench = DeviceBench(load, device=str(GPU), memory_bytes=4 << 30)
    footprint = loaded(bench.load("m", max_sequences=MOST)).footprint
    torch.cuda.reset_peak_memory_stats(GPU)
    before = torch.cuda.memory_allocated(GPU)
    for number in range(20):
        bench.generate(number, [number] * (1 + 9 * number), greedy(50))
    bench.run_until_ended(*range(20))

    assert all(len(bench.tokens(number)) == 50 for number in range(20))
    taken = torch.cuda.max_memory_allocated(GPU) - before
    assert 0 < taken <= footprint.workspace_bytes + (16 << 20)
    bench.close()


def test_what_is_imported_before_the_fork_starts_no_thread_and_no_context() -> None:
    program = """
from pathlib import Path
from cortex.runtime import fork_server
fork_server.import_device_main()
import torch
print(sum(1 for _ in Path("/proc/self/task").iterdir()), torch.cuda.is_initialized())
"""
    environment = {
        "OPENBLAS_NUM_THREADS": "1",
        "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
        "PATH": "/usr/bin:/bin",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }

    ended = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )

    assert ended.stdout.split() == ["1", "False"]
