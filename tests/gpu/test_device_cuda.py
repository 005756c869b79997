"""The same device, on a GPU: what it says, what it gives back, and how it ends when CUDA fails."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from cortex.ipc.messages import MemoryReport, QueryMemory, SamplingParams, UnloadModel
from cortex.runtime.device.device import EXIT_DEVICE_LOST
from cortex.runtime.device.row import Row
from cortex.runtime.device.sampler import sample
from cortex.runtime.device.token_counts import TokenCounts
from engine_fakes import DeviceBench, FakeLoad, FakeModel, answer, greedy, loaded

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]
GPU = "cuda:0"
GIB = 2**30


@pytest.fixture
def bench() -> Iterator[DeviceBench]:
    """A device of 2 GiB with the model ``m`` to load, in steps of few tokens."""
    load = FakeLoad(m=FakeModel(device=torch.device(GPU)))
    bench = DeviceBench(load, device=GPU, memory_bytes=2 * GIB, token_budget=9)
    yield bench
    bench.close()


def various() -> tuple[Tensor, list[Row]]:
    """Return logits and rows that ask for everything there is."""
    generator = torch.Generator().manual_seed(7)
    logits = torch.randn(20, 5000, generator=generator).mul_(3)
    rows = [
        Row(
            SamplingParams(
                0.1 * (n % 12),
                1,
                n,
                top_p=(0.5, 0.9, 1.0)[n % 3],
                top_k=n % 4 * 20,
                min_p=n % 2 * 0.01,
                repetition_penalty=(1.0, 1.2)[n // 10],
                frequency_penalty=n % 5 * 0.25,
                logit_bias={n: 3.0} if n % 7 == 0 else {},
                top_logprobs=(None, 0, 20)[n % 3],
            ),
            n,
            TokenCounts.of(list(range(n)) * 3, n),
            forced=77 if n == 19 else None,
        )
        for n in range(20)
    ]
    return logits, rows


def tokens(logits: Tensor, rows: list[Row]) -> list[int | None]:
    return [chosen.token_id for chosen in sample(logits, rows)]


def test_sequences_together_say_what_each_says_alone(bench: DeviceBench) -> None:
    loaded(bench.load("m", kv_cache_bytes=12 * 16 * 8 * 2, max_context_tokens=2048))
    prompts = {number: [number, 5, 6] * (number + 1) for number in range(8)}
    for number, prompt in prompts.items():
        bench.generate(number, prompt, greedy(60))

    bench.run_until_ended(*prompts)

    said = {number: bench.tokens(number) for number in prompts}
    assert said == {number: answer(prompt, 60) for number, prompt in prompts.items()}


def test_a_gpu_draws_the_tokens_that_a_cpu_draws() -> None:
    logits, rows = various()

    on_gpu = tokens(logits.to(GPU), rows)

    assert on_gpu == tokens(logits, rows)
    assert on_gpu == [tokens(logits[n : n + 1].to(GPU), rows[n : n + 1])[0] for n in range(20)]


def test_a_gpu_gives_the_log_probabilities_that_a_cpu_gives() -> None:
    logits, rows = various()

    for there, here in zip(sample(logits.to(GPU), rows), sample(logits, rows), strict=True):
        assert there.logprob == pytest.approx(here.logprob, abs=1e-6, nan_ok=True)
        assert [token for token, _ in there.top] == [token for token, _ in here.top]


def test_equal_logits_give_the_lowest_id_on_a_gpu() -> None:
    rows = [Row(SamplingParams(0.0, 1, 0), 0)] * 4

    assert tokens(torch.zeros(4, 150_000, device=GPU), rows) == [0, 0, 0, 0]


def test_an_unloaded_cache_is_free_again_for_everybody(bench: DeviceBench) -> None:
    torch.cuda.synchronize(GPU)
    before = torch.cuda.mem_get_info(GPU)[0]
    loaded(bench.load("m", kv_cache_bytes=GIB))
    assert torch.cuda.mem_get_info(GPU)[0] < before - GIB // 2

    bench.ask(UnloadModel(900, "m"))

    assert torch.cuda.mem_get_info(GPU)[0] > before - GIB // 16


def test_the_free_memory_is_never_more_than_what_the_gpu_says(bench: DeviceBench) -> None:
    bench.memory.total_bytes = 2**60

    report = bench.ask(QueryMemory(900))

    assert isinstance(report, MemoryReport)
    assert report.free_bytes <= torch.cuda.get_device_properties(GPU).total_memory


def test_a_cuda_error_in_a_step_is_fatal(bench: DeviceBench) -> None:
    loaded(bench.load("m"))
    bench.generate(1, [1])
    model = bench.loader._load_model.models["/m"]  # type: ignore[attr-defined] # the fake's
    model.module.errors = [torch.AcceleratorError("CUDA error: unspecified launch failure")]

    assert bench.device.serve() == EXIT_DEVICE_LOST
