"""The operations on a GPU, as far as they can be told without one: who computes what."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import triton_cases
from cortex.models.execution import Execution
from cortex.models.kernels import cuda, ops, reference
from cortex.models.kernels.cuda import CudaKernels
from cortex.models.kernels.cuda_attention import Shape, trial_step
from cortex.models.kernels.planes import planar
from cortex.models.quantization import Part
from interpreted import Interpreted
from quantized_cases import random_experts, random_part

GIVEN_BACK = "CORTEX_REFERENCE_OPERATIONS"
OPERATIONS = {
    "rms_norm": ("rms_norm", "add_rms_norm"),
    "silu_multiply": ("silu_multiply",),
    "rotate_and_store": ("rotate_and_store",),
    "add_bias": ("add_bias",),
}


class NamingOperations:
    """Stands for ``triton_ops``: its functions answer with their name."""

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: name


def answer(kernels: CudaKernels, operation: str) -> Any:
    x = torch.ones(1, 2, 4)
    arguments = {
        "rms_norm": (x, x[0, 0], 1e-5),
        "add_rms_norm": (x[0], x[0], x[0, 0], 1e-5),
        "silu_multiply": (x[0],),
        "rotate_and_store": (x, x, x, x[:, 0, :2], x[:, 0, :2]),
        "add_bias": (x[0], x[0, 0]),
    }[operation]
    cache = {name: torch.zeros(1, 16, 2, 4) for name in ("keys", "values")}
    named = {**cache, "slots": torch.tensor([0])} if operation == "rotate_and_store" else {}
    return getattr(kernels, operation)(*arguments, **named)


@pytest.mark.parametrize("given_back", OPERATIONS)
def test_an_operation_that_is_given_back_is_the_references(given_back: str) -> None:
    kernels = CudaKernels(NamingOperations(), frozenset({given_back}))

    for switch, operations in OPERATIONS.items():
        for operation in operations:
            is_plain = answer(kernels, operation) != operation
            assert is_plain == (switch == given_back)


@pytest.mark.parametrize("operation", [name for names in OPERATIONS.values() for name in names])
def test_without_triton_every_operation_is_the_references(operation: str) -> None:
    found = answer(CudaKernels(None), operation)

    expected = answer(CudaKernels(reference), operation)
    pairs = zip(found, expected, strict=True) if isinstance(found, tuple) else [(found, expected)]
    assert all(torch.equal(a, b) for a, b in pairs)


def test_the_environment_names_what_is_given_back() -> None:
    assert cuda._given_back({}) == frozenset()
    assert cuda._given_back({GIVEN_BACK: ""}) == frozenset()
    assert cuda._given_back({GIVEN_BACK: "rms_norm,add_bias"}) == {"rms_norm", "add_bias"}
    with pytest.raises(
        ValueError, match=r"softmax is none of add_bias, .*experts, .*quantized_linear, .*route, "
    ):
        cuda._given_back({GIVEN_BACK: "softmax"})


def test_a_triton_that_computes_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    right = SimpleNamespace(add_bias=lambda y, bias: y + bias)
    monkeypatch.setattr(importlib, "import_module", lambda _: right)

    assert cuda._working_triton_ops(torch.device("cpu")) is right


@pytest.mark.parametrize(
    ("add_bias", "reason"),
    [
        (lambda y, _: y, "a sum was wrong"),
        (lambda *_: 1 // 0, "ZeroDivisionError: "),
    ],
)
def test_a_triton_that_does_not_is_left_with_one_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, add_bias: Any, reason: str
) -> None:
    wrong = SimpleNamespace(add_bias=add_bias)
    monkeypatch.setattr(importlib, "import_module", lambda _: wrong)

    assert cuda._working_triton_ops(torch.device("cpu")) is None

    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert reason in record.getMessage()


def test_a_product_is_torchs_unless_it_must_not_know_the_batch() -> None:
    weights = torch.randn(6, 8)
    x, part = torch.randn(3, 8), Part("F32", weights.view(torch.uint8))

    assert torch.equal(CudaKernels(None).linear(x, [part]), x @ weights.T)


def test_a_batch_invariant_product_has_parts_of_several_types(interpreted: Interpreted) -> None:
    assert interpreted(triton_cases.mixed_product_difference) < 1e-4


@pytest.mark.parametrize(
    "kernels", [CudaKernels(None), CudaKernels(object(), cuda.TRITON_OPERATIONS)]
)
def test_packed_weights_that_no_kernel_serves_are_the_references(kernels: CudaKernels) -> None:
    stored, packed = random_experts(("Q4_0",) * 3, experts=3, hidden=32, inner=64)
    (plain,), (packed_gate,) = stored["gate"].parts, packed["gate"].parts
    x, logits, ids = torch.randn(4, 32), torch.randn(4, 3), torch.tensor([5, 0])

    found, weights = kernels.route(logits, 2, is_normalised=True)

    assert torch.equal(found, reference.route(logits, 2, is_normalised=True)[0])
    assert torch.equal(kernels.linear(x, [packed_gate]), reference.linear(x, [plain]))
    assert torch.equal(kernels.rows(packed_gate, ids), reference.rows(plain, ids))
    share = kernels.rows_of_share(packed_gate, ids, 3, 300)
    assert torch.equal(share, reference.rows_of_share(plain, ids, 3, 300))
    expected = reference.experts(x, found, weights, **stored)
    assert torch.equal(kernels.experts(x, found, weights, **packed), expected)


def test_experts_whose_gate_and_up_are_of_two_types_are_the_references() -> None:
    stored, packed = random_experts(("Q4_0", "Q8_0", "Q4_0"), experts=3, hidden=32, inner=64)
    x = torch.randn(4, 32)
    ids, weights = reference.route(torch.randn(4, 3), 2, is_normalised=True)

    found = CudaKernels(object()).experts(x, ids, weights, **packed)

    assert torch.equal(found, reference.experts(x, ids, weights, **stored))


def test_products_are_prepared_once_for_each_shape_and_every_number_of_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []

    class Kernels(CudaKernels):
        def linear(self, x: Tensor, parts: Sequence[Part], **_: bool) -> Tensor:
            asked.append((parts[0].kind, parts[0].rows, *x.shape))
            return x

    monkeypatch.setattr(cuda, "kernels", lambda: Kernels(object()))
    monkeypatch.setattr(cuda, "PREPARED_ROWS", 6)
    large, small = (planar(random_part("Q4_0", rows, 32)) for rows in (9, 5))
    dense = random_part("F32", 9, 32)

    cuda.prepare_products([large, dense, small, large], torch.float32, is_batch_invariant=False)

    rows = (1, 2, 17, 65, 256)
    assert asked == [("Q4_0", n, m, 32) for n in (6, 5) for m in rows]


def test_experts_are_prepared_once_for_each_type_and_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    from cortex.models.kernels import triton_experts

    prepared = []
    monkeypatch.setattr(triton_experts, "prepare", lambda **layer: prepared.append(layer["gate"]))
    monkeypatch.setattr(cuda, "kernels", lambda: CudaKernels(object()))
    layers = [
        random_experts(kinds, experts=2, hidden=32, inner=inner)[1]
        for kinds, inner in (
            (("Q4_0",) * 3, 64),
            (("Q4_0",) * 3, 64),
            (("Q4_0",) * 3, 32),
            (("Q4_0", "Q8_0", "Q4_0"), 64),  # the reference's
        )
    ]

    cuda.prepare_experts(layers, torch.float32, is_batch_invariant=False)

    assert prepared == [layers[1]["gate"], layers[2]["gate"]]


def test_experts_that_are_given_back_are_not_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "kernels", lambda: CudaKernels(object(), frozenset({"experts"})))

    cuda.prepare_experts([{}], torch.float32, is_batch_invariant=False)


@pytest.mark.parametrize(
    ("has_states", "given_back", "is_batch_invariant", "times"),
    [
        (True, (), False, 1),
        (False, (), False, 0),
        (True, ("gated_delta_rule",), False, 0),
        (True, (), True, 0),
    ],
)
def test_chunks_by_fla_are_tried_before_the_first_prompt(
    monkeypatch: pytest.MonkeyPatch,
    *,
    has_states: bool,
    given_back: Sequence[str],
    is_batch_invariant: bool,
    times: int,
) -> None:
    tried = []
    monkeypatch.setattr(cuda, "kernels", lambda: CudaKernels(object(), frozenset(given_back)))
    monkeypatch.setattr(cuda, "attention_for", lambda *_: None)
    monkeypatch.setattr(cuda, "fla_rule", lambda: tried.append(1))

    cuda.prepare(
        Shape(4, 2, 64, 16, torch.float32, "cpu"),
        Execution(is_batch_invariant=is_batch_invariant),
        has_states=has_states,
    )

    assert len(tried) == times


@pytest.mark.parametrize("is_batch_invariant", [False, True])
def test_a_model_computes_with_the_kernels_what_it_computes_by_plain_torch(
    interpreted: Interpreted, is_batch_invariant: bool
) -> None:
    found = interpreted(triton_cases.model_difference, is_batch_invariant=is_batch_invariant)

    assert found < 1e-4


def test_a_batch_invariant_model_gives_a_sequence_the_same_bits_in_any_company_and_chunking(
    interpreted: Interpreted,
) -> None:
    assert interpreted(triton_cases.is_same_model_alone_and_in_chunks)


def test_attention_is_what_the_batchs_execution_chooses() -> None:
    shape = Shape(4, 2, 64, 16, torch.float32, "cpu")
    q, keys, values, batch = trial_step(shape, [(3, 5)])
    batch = replace(batch, cache=replace(batch.cache, execution=Execution("reference")))

    found = CudaKernels(None).attention(q, keys, values, batch, 0.1)

    assert torch.equal(found, reference.attention(q, keys, values, batch, 0.1))


def test_a_cpus_tensors_are_none_of_a_gpus_business() -> None:
    assert cuda.kernels_for(torch.ones(1)) is None


def test_a_sum_and_its_norm_are_those_of_the_two_operations_on_a_cpu() -> None:
    x, y, weight = torch.randn(3, 64), torch.randn(3, 64), torch.randn(64)

    total, normed = ops.add_rms_norm(x, y, weight, 1e-5)

    assert torch.equal(total, ops.add(x, y))
    assert torch.equal(normed, ops.rms_norm(total, weight, 1e-5))
