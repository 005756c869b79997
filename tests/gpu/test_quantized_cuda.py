"""Packed weights and experts as the device computes them: the cases that the interpreter has."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from random_models import SHAPES, random_model

import quantized_cases
from cortex.models.execution import Execution
from cortex.models.kernels import cuda, reference
from cortex.models.kernels.graphs import CudaCapture
from cortex.models.kernels.planes import planar
from quantized_cases import KINDS, random_experts, random_part

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]
GPU = torch.device("cuda:0")
TOLERANCES = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 0.1}
"""Outputs are about 1, and the largest of many thousands about 5."""


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_product_agrees_whatever_the_rows(kind: str, dtype: torch.dtype) -> None:
    found = {
        rows: quantized_cases.product_difference(
            kind, rows=rows, outputs=1000, columns=2048, dtype=dtype, device="cuda"
        )
        for rows in (1, 2, 16, 17, 64, 65, 200, 256, 600)
    }

    assert max(found.values()) < TOLERANCES[dtype], found


@pytest.mark.parametrize("columns", [256, 5120, 17_408])
@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("kind", ["Q4_0", "Q6_K", "FP8"])
def test_few_rows_agree_whatever_the_columns(kind: str, rows: int, columns: int) -> None:
    found = quantized_cases.product_difference(
        kind, rows=rows, outputs=300, columns=columns, dtype=torch.float16, device="cuda"
    )

    assert found < TOLERANCES[torch.float16]


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_looked_up_exactly(kind: str) -> None:
    assert quantized_cases.rows_difference(kind, 2048, "cuda") == 0


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("kind", ["Q4_0", "Q4_K", "Q6_K", "Q8_0", "FP8"])
def test_a_row_of_a_batch_invariant_product_has_the_same_bits_alone(
    kind: str, dtype: torch.dtype
) -> None:
    assert quantized_cases.is_same_product_alone(
        kind, rows=130, outputs=9000, columns=1024, dtype=dtype, device="cuda"
    )


@pytest.mark.parametrize("is_batch_invariant", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("kinds", [("dense",) * 3, ("Q4_K", "Q4_K", "Q6_K"), ("FP8",) * 3])
def test_tokens_go_through_their_experts(
    kinds: Sequence[str], dtype: torch.dtype, *, is_batch_invariant: bool
) -> None:
    dense = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}[dtype]
    found = {
        tokens: quantized_cases.experts_difference(
            [dense if kind == "dense" else kind for kind in kinds],
            tokens=tokens,
            dtype=dtype,
            experts=32,
            top_k=8,
            hidden=512,
            inner=768,
            is_batch_invariant=is_batch_invariant,
            device="cuda",
        )
        for tokens in (1, 8, 40, 512)
    }

    assert max(found.values()) < TOLERANCES[dtype], found


def test_a_token_has_the_same_bits_alone_and_in_company() -> None:
    assert quantized_cases.is_same_expert_alone(200, "cuda")


@pytest.mark.parametrize("experts", [8, 128, 512])
def test_the_likeliest_experts_are_chosen(experts: int) -> None:
    is_same, difference = quantized_cases.route_differences(
        300, experts, 8, is_normalised=True, device="cuda"
    )

    assert is_same
    assert difference < 1e-6


@pytest.mark.parametrize("tokens", [1, 8, 40])
def test_captured_experts_serve_other_tokens(tokens: int) -> None:
    _, packed = random_experts(("Q4_K",) * 3, experts=32, hidden=512, inner=256, device="cuda")
    kernels = cuda.kernels()
    x = torch.randn(tokens, 512, device=GPU)
    logits = torch.randn(tokens, 32, device=GPU)

    def compute() -> torch.Tensor:
        ids, weights = kernels.route(logits, 8, is_normalised=True)
        return kernels.experts(x, ids, weights, **packed)

    graph = CudaCapture(GPU)(compute)
    for _ in range(3):
        x.normal_()
        logits.normal_()
        graph.replay()
        assert torch.equal(graph.logits, compute())


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_K", "IQ4_NL", "FP8"])
def test_captured_products_and_rows_serve_other_inputs(kind: str) -> None:
    part = planar(random_part(kind, 512, 1024, "cuda"))
    kernels = cuda.kernels()
    x = torch.randn(3, 1024, device=GPU, dtype=torch.bfloat16)
    ids = torch.tensor([1, 2, 3], device=GPU)

    def compute() -> torch.Tensor:
        return kernels.rows(part, ids).bfloat16() @ kernels.linear(x, [part]).T.repeat(2, 1)

    graph = CudaCapture(GPU)(compute)
    x.normal_()
    ids.copy_(torch.tensor([500, 0, 9]))
    graph.replay()
    assert torch.equal(graph.logits, compute())


def test_what_is_given_back_is_the_references() -> None:
    part = random_part("Q5_K", 64, 512, "cuda")
    x = torch.randn(4, 512, device=GPU)
    kernels = cuda.CudaKernels(cuda.kernels()._triton_ops, frozenset({"quantized_linear"}))

    assert torch.equal(kernels.linear(x, [planar(part)]), reference.linear(x, [part]))


@pytest.mark.parametrize("shape", ["8b", "30b-a3b"])
@pytest.mark.parametrize("stored", ["Q4_K", "FP8", None])
def test_a_layer_of_a_large_model_runs(shape: str, stored: str | None) -> None:
    values = {**SHAPES[shape], "num_hidden_layers": 1, "vocab_size": 1024}
    model = random_model(values, GPU, torch.bfloat16, Execution(), stored)
    hidden = torch.randn(5, values["hidden_size"], device=GPU, dtype=torch.bfloat16)
    mlp: Callable[[torch.Tensor], torch.Tensor] = model.module.get_submodule("layers.0.mlp")

    with torch.inference_mode():
        found = mlp(hidden)

    assert found.shape == hidden.shape
    assert bool(found.isfinite().all())
