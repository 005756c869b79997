"""The kernels as the device computes them: the cases that the interpreter has, and graphs."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import triton_cases
from cortex.models.execution import Execution
from cortex.models.kernels import cuda, cuda_attention, reference
from cortex.models.kernels.cuda_attention import Shape, Unavailable, trial_step
from triton_cases import Lengths, TinyModel, difference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
PLACES = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
TOLERANCES = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
RAGGED: tuple[Lengths, ...] = (
    [(0, 5), (37, 1), (20, 16), (0, 300)],
    [(299, 1), (0, 1), (130, 1), (16_000, 1)],
    [(4000, 130)],
    [(700, 4)] * 9,
)


@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("lengths", RAGGED)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "size"),
    [(32, 8, 128), (9, 3, 64), (7, 1, 80), (6, 6, 96), (16, 2, 256), (40, 1, 64)],
)
def test_attention_agrees(
    heads: int,
    kv_heads: int,
    size: int,
    *,
    dtype: torch.dtype,
    lengths: Lengths,
    batch_invariant: bool,
) -> None:
    shape = Shape(heads, kv_heads, size, 16, dtype)

    found = triton_cases.attention_difference(shape, lengths, batch_invariant=batch_invariant)

    assert found < TOLERANCES[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [64, 128, 256])
def test_a_token_has_the_same_bits_alone_and_in_company(dtype: torch.dtype, size: int) -> None:
    lengths = [(0, 90), (37, 2), (2045, 9), (300, 1)]

    assert triton_cases.is_same_attention_alone(Shape(8, 2, size, 16, dtype), lengths)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_other_kernels_agree(dtype: torch.dtype) -> None:
    cases = triton_cases
    differences = [
        *(cases.rms_norm_difference(rows, dtype, "cuda") for rows in ((1, 5120), (300, 40, 128))),
        *cases.add_rms_norm_differences(70, 4096, dtype, "cuda"),
        cases.silu_multiply_difference(70, 25_600, dtype, "cuda"),
        cases.add_bias_difference(70, 5000, dtype, "cuda"),
        *cases.rotate_and_store_differences(32, 8, 128, dtype, "cuda"),
        *cases.rotate_and_store_differences(7, 1, 80, dtype, "cuda"),
    ]

    assert max(differences) < 16 * PLACES[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 33, 200])
def test_a_batch_invariant_product_agrees(rows: int, dtype: torch.dtype) -> None:
    found = triton_cases.linear_difference(rows, 1000, 4096, dtype, "cuda")

    assert found < 512 * PLACES[dtype]  # outputs are below 512


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("outputs", [100, 9000, 20_000])
def test_a_row_of_a_batch_invariant_product_has_the_same_bits_alone(
    outputs: int, dtype: torch.dtype
) -> None:
    assert triton_cases.is_same_linear_alone(130, outputs, 512, dtype, "cuda")


@pytest.mark.parametrize("name", ["auto", "flash_attn", "torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_serves_here_agrees_or_says_why_it_does_not(
    name: str, dtype: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    shape = Shape(32, 8, 128, 16, dtype)
    with caplog.at_level(logging.INFO):
        try:
            choice = cuda_attention.choose(
                shape,
                Execution(attention=name),
                cuda_attention.CANDIDATES,
                cuda_attention.try_out,
            )
        except Unavailable as exc:
            assert name != "auto"
            pytest.skip(str(exc))

    for lengths in RAGGED:
        q, keys, values, batch = trial_step(shape, lengths)
        found = choice(q, keys, values, batch, 0.1)
        expected = reference.attention(q.float(), keys.float(), values.float(), batch, 0.1)
        assert difference(found, expected) < TOLERANCES[dtype]


def captured(compute: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """Warm *compute* up and write it down; what it waits for or asks spoils that."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call] # torch's
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        compute()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin()
        found = compute()
        graph.capture_end()
    return graph, found


@pytest.mark.parametrize("is_batch_invariant", [False, True])
def test_a_captured_step_serves_other_lengths(is_batch_invariant: bool) -> None:
    execution = Execution(is_batch_invariant=is_batch_invariant)
    eager, graphed = TinyModel(execution, "cuda"), TinyModel(execution, "cuda")
    for model in (eager, graphed):
        model.step(s0_0=range(40), s4_0=range(7))
    batch = graphed.batch({"s0_40": [1], "s4_7": [2]})
    cuda.kernels()

    with torch.inference_mode():
        graph, logits = captured(lambda: graphed.module(batch))
        for at in range(40, 46):
            there = graphed.batch({f"s0_{at}": [at], f"s4_{at - 33}": [at]})
            for name in ("token_ids", "positions", "slots", "context_tokens"):
                getattr(batch, name).copy_(getattr(there, name))
            graph.replay()
            expected = eager.step(**{f"s0_{at}": [at], f"s4_{at - 33}": [at]})
            assert difference(logits, torch.cat(list(expected.values()))) < 1e-4


def test_a_model_computes_on_a_gpu_what_it_computes_by_plain_torch() -> None:
    plain = TinyModel(Execution(attention="reference"), "cpu")
    ours = TinyModel(Execution(), "cuda")

    for step in ({"s0_0": range(20), "s4_0": range(7)}, {"s0_20": [3], "s4_7": range(9)}):
        expected, found = plain.step(**step), ours.step(**step)
        for name in step:
            assert difference(found[name].cpu(), expected[name]) < 1e-3
