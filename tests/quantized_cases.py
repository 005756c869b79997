"""What the kernels of quantised weights and of experts make of random ones, told in numbers.

Called in the process of ``interpreted``, or on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from random_models import SCALES, random_rows
from torch import Tensor

from cortex.models.kernels import cuda, reference
from cortex.models.kernels.planes import planar
from cortex.models.parallel import Cut
from cortex.models.quantization import DENSE, STORED, ExpertMatrix, Part

KINDS = tuple(kind for kind in STORED if kind not in DENSE)


def random_part(kind: str, rows: int, columns: int, device: str = "cpu") -> Part:
    """Return weights as stored, with scales that differ from block to block."""
    if kind in DENSE:
        weights = torch.randn(rows, columns).to(DENSE[kind]) * columns**-0.5
        return Part(kind, weights.to(device).view(torch.uint8))
    data = random_rows(kind, rows, columns, torch.device("cpu"))
    blocks = data.view(rows, -1, STORED[kind].block_bytes)
    louder = 0.5 + torch.rand(*blocks.shape[:2], 1)
    numbers = [(at, torch.float16) for at, _ in SCALES.get(kind, ())] or [(0, torch.float32)]
    for at, dtype in numbers:
        field = blocks[..., at : at + dtype.itemsize]
        scaled = field.contiguous().view(dtype).float() * louder
        field.copy_(scaled.to(dtype).view(torch.uint8))
    return Part(kind, data.to(device))


def weights_of(part: Part) -> Tensor:
    """Return them by the reference, float64."""
    return reference.dequantize(part.kind, part.data).double()


def product_difference(
    kind: str,
    *,
    rows: int,
    outputs: int,
    columns: int,
    dtype: torch.dtype = torch.float32,
    is_batch_invariant: bool = False,
    device: str = "cpu",
) -> float:
    """Against float64's, written beside something that must stay; outputs are about 1."""
    from cortex.models.kernels import triton_quantized

    part = random_part(kind, outputs, columns, device)
    x = torch.randn(rows, columns).to(device, dtype)
    y = torch.full((rows, outputs + 3), 7.0, device=device, dtype=dtype)
    triton_quantized.linear_into(
        y[:, :outputs], x, planar(part), is_batch_invariant=is_batch_invariant
    )
    assert torch.equal(y[:, outputs:], torch.full_like(y[:, outputs:], 7.0))
    return float((y[:, :outputs].double() - x.double() @ weights_of(part).T).abs().max())


def rows_difference(kind: str, columns: int, device: str = "cpu") -> float:
    """Look up rows of the second half of a matrix, and some that are none of it."""
    from cortex.models.kernels import triton_quantized

    part = random_part(kind, 6, columns, device)
    ids = torch.tensor([9, 4, 6, 12, 11], device=device)
    found = triton_quantized.rows(planar(part), ids, 6)
    expected = weights_of(part)[torch.tensor([3, 0, 0, 0, 5])]
    is_there = torch.tensor([1, 0, 1, 0, 1], device=device)[:, None]
    return float((found.double() - expected * is_there).abs().max())


def is_same_product_alone(
    kind: str,
    *,
    rows: int,
    outputs: int,
    columns: int,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> bool:
    """Whether every few rows have the bits that they have by themselves."""
    from cortex.models.kernels import triton_quantized

    part = planar(random_part(kind, outputs, columns, device))
    x = torch.randn(rows, columns).to(device, dtype)
    together, alone = torch.zeros(2, rows, outputs, device=device, dtype=dtype)
    triton_quantized.linear_into(together, x, part, is_batch_invariant=True)
    some = slice(0, rows, max(1, rows // 8))
    for row in range(rows)[some]:
        triton_quantized.linear_into(
            alone[row : row + 1], x[row : row + 1], part, is_batch_invariant=True
        )
    return torch.equal(together[some], alone[some])


def split_product_difference() -> float:
    """Share the columns of a few rows among programs."""
    from cortex.models.kernels import triton_packed, triton_quantized

    splits = triton_quantized._tiling(3, 20, triton_packed.Packed.of(_planar("Q4_0", 20, 2048)))
    assert splits.splits == 2
    return product_difference("Q4_0", rows=3, outputs=20, columns=2048, dtype=torch.float16)


def piecewise_product_difference() -> float:
    """Unpack a matrix in pieces, the last of them smaller."""
    from cortex.models.kernels import triton_quantized

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_quantized, "UNPACKED_ELEMENTS", 3 * 256)
        return product_difference("Q6_K", rows=2, outputs=7, columns=256)


def mixed_product_difference() -> float:
    """Multiply with a dense part and a packed one, stacked, as a GPU's kernels do."""
    parts = [random_part("F32", 7, 64), random_part("Q5_1", 9, 64)]
    x = torch.randn(3, 64)
    found = cuda.CudaKernels(object()).linear(x, [parts[0], planar(parts[1])])
    return float((found - reference.linear(x, parts)).abs().max())


def _planar(kind: str, rows: int, columns: int) -> Part:
    return planar(random_part(kind, rows, columns))


Matrices = Mapping[str, Any]


def random_experts(
    kinds: Sequence[str], *, experts: int, hidden: int, inner: int, device: str = "cpu"
) -> tuple[Matrices, Matrices]:
    """Return gate, up and down, of those types: as stored, and as a GPU has them."""
    sizes = {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
    stored, packed = dict[str, ExpertMatrix](), dict[str, ExpertMatrix]()
    for kind, (name, (rows, columns)) in zip(kinds, sizes.items(), strict=True):
        part = random_part(kind, experts * rows, columns, device)
        for to, what in ((stored, part), (packed, part if kind in DENSE else planar(part))):
            to[name] = ExpertMatrix(experts, Cut.whole(rows), Cut.whole(columns))
            to[name].fill([what])
    return stored, packed


def experts_difference(
    kinds: Sequence[str],
    *,
    tokens: int,
    dtype: torch.dtype = torch.float32,
    experts: int = 5,
    top_k: int = 3,
    hidden: int = 32,
    inner: int = 64,
    is_batch_invariant: bool = False,
    device: str = "cpu",
) -> float:
    """Against float32's; one expert is nobody's."""
    from cortex.models.kernels import triton_experts

    shape: dict[str, Any] = {"experts": experts, "hidden": hidden, "inner": inner}
    stored, packed = random_experts(kinds, **shape, device=device)
    x, ids, weights = _choices(tokens, experts, top_k, hidden, device)
    ids[ids == 1] = 0
    with larger_programs(device):
        found = triton_experts.experts(
            x.to(dtype), ids, weights, **packed, is_batch_invariant=is_batch_invariant
        )
    assert found.dtype == dtype
    expected = reference.experts(x.to(dtype).float(), ids, weights, **stored)
    return float((found.float() - expected).abs().max())


def is_same_expert_alone(tokens: int, device: str = "cpu") -> bool:
    """Whether every tenth token has the same bits in company, and alone in a step of its own."""
    from cortex.models.kernels import triton_experts

    _, packed = random_experts(("Q8_0",) * 3, experts=4, hidden=32, inner=32, device=device)
    x, ids, weights = _choices(tokens, 4, 2, 32, device)

    def compute(rows: slice) -> Tensor:
        with larger_programs(device):
            return triton_experts.experts(
                x[rows], ids[rows], weights[rows], **packed, is_batch_invariant=True
            )

    together, some = compute(slice(None)), range(0, tokens, 10)
    return all(torch.equal(compute(slice(t, t + 1))[0], together[t]) for t in some)


def route_differences(
    tokens: int, experts: int, top_k: int, *, is_normalised: bool, device: str = "cpu"
) -> tuple[bool, float]:
    """Whether the choice is the reference's, of equal experts the first; and of the weights."""
    from cortex.models.kernels import triton_experts

    logits = torch.randn(tokens, experts, device=device)
    logits[0] = 0.5
    ids, weights = triton_experts.route(logits, top_k, is_normalised=is_normalised)
    there, weights_there = reference.route(logits, top_k, is_normalised=is_normalised)
    return torch.equal(ids, there), float((weights - weights_there).abs().max())


def ids_of_what_is_no_number(experts: int) -> list[int]:
    """Return the least and the largest id that tokens get whose logits are no numbers."""
    from cortex.models.kernels import triton_experts

    logits = torch.randn(5, experts)
    logits[0], logits[1], logits[2, 1] = torch.nan, torch.inf, torch.nan
    logits[3, 0], logits[4] = torch.inf, -torch.inf
    ids, _ = triton_experts.route(logits, 4, is_normalised=True)
    return [int(ids.min()), int(ids.max())]


def prepared_launches(*, is_batch_invariant: bool) -> list[str]:
    """Return the kernels that preparing experts runs, of those that serving them runs."""
    from cortex.models.kernels import triton_experts

    _, packed = random_experts(("Q4_0",) * 3, experts=2, hidden=32, inner=32)
    launched = list[str]()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("_pairs_by_themselves", "_pairs_by_expert"):
            compute = getattr(triton_experts, name)

            def noted(*how: Any, name: str = name, compute: Any = compute) -> None:
                launched.append(f"{name} {how[-1] if isinstance(how[-1], int) else ''}".strip())
                compute(*how)

            patch.setattr(triton_experts, name, noted)
        triton_experts.prepare(**packed, dtype=torch.float32, is_batch_invariant=is_batch_invariant)
    return sorted(launched)


def of_nothing() -> list[tuple[int, ...]]:
    """Return the shapes of what the operations make of no rows."""
    from cortex.models.kernels import triton_experts, triton_quantized

    part, nothing = _planar("Q4_0", 5, 32), torch.empty(0, 32)
    y = torch.empty(0, 5)
    triton_quantized.linear_into(y, nothing, part)
    _, packed = random_experts(("F32",) * 3, experts=2, hidden=32, inner=32)
    ids, weights = triton_experts.route(nothing[:, :2], 2, is_normalised=True)
    made = (
        y,
        triton_quantized.rows(part, torch.empty(0, dtype=torch.int64)),
        ids,
        weights,
        triton_experts.experts(nothing, ids, weights, **packed),
    )
    return [tuple(x.shape) for x in made]


@contextmanager
def larger_programs(device: str) -> Iterator[None]:
    """Have the interpreter, which is slow for each program, run fewer of them."""
    from cortex.models.kernels import triton_experts

    with pytest.MonkeyPatch.context() as patch:
        if device == "cpu":
            patch.setattr(triton_experts, "VECTOR_OUTPUTS", 32)
        yield


def _choices(
    tokens: int, experts: int, top_k: int, hidden: int, device: str
) -> tuple[Tensor, Tensor, Tensor]:
    x, logits = torch.randn(tokens, hidden), torch.randn(tokens, experts)
    ids, weights = reference.route(logits, top_k, is_normalised=True)
    return x.to(device), ids.to(device), weights.to(device)
