"""What a kernel and its reference make of the same inputs, told in numbers.

Called in the process of ``interpreted``, or on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from cortex.models.batch import Batch, KVCache
from cortex.models.execution import Execution
from cortex.models.kernels import cuda, cuda_attention, reference
from cortex.models.kernels.cuda_attention import Shape, trial_step
from cortex.models.layers import RMSNorm
from cortex.models.linear import Projection
from cortex.models.quantization import Matrix, Part
from cortex.models.qwen3 import Qwen3, Qwen3Config
from cortex.models.rope import Rope

Lengths = Sequence[tuple[int, int]]
"""Per sequence the tokens cached before, and the new ones."""


def difference(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference; NaN where anything is."""
    return float((found.float() - expected.float()).abs().max())


def attention_difference(shape: Shape, lengths: Lengths, *, batch_invariant: bool) -> float:
    """Differ from float32's, with NaN wherever attention must not look."""
    from cortex.models.kernels import triton_attention

    q, keys, values, batch = trial_step(shape, lengths)
    for context, table in zip(batch.context_tokens.tolist(), batch.block_tables, strict=True):
        if context % shape.block_tokens:
            last = int(table[context // shape.block_tokens])
            keys[last, context % shape.block_tokens :] = torch.nan
            values[last, context % shape.block_tokens :] = torch.nan
    scale = shape.size**-0.5

    found = triton_attention.attention(
        q, keys, values, batch, scale, batch_invariant=batch_invariant
    )

    expected = reference.attention(q.float(), keys.float(), values.float(), batch, scale)
    assert found.dtype == q.dtype
    return difference(found, expected)


def is_same_attention_alone(shape: Shape, lengths: Lengths) -> bool:
    """Whether every token has the same bits in company, and alone in a step of its own."""
    from cortex.models.kernels import triton_attention

    q, keys, values, batch = trial_step(shape, lengths)

    def attend(q: Tensor, batch: Batch) -> Tensor:
        return triton_attention.attention(
            q, keys, values, batch, shape.size**-0.5, batch_invariant=True
        )

    together = attend(q, batch)
    tokens = [(s, before + at) for s, (before, new) in enumerate(lengths) for at in range(new)]
    return all(
        torch.equal(
            attend(q[row : row + 1], one_token(batch, sequence, position))[0], together[row]
        )
        for row, (sequence, position) in enumerate(tokens)
    )


def one_token(batch: Batch, sequence: int, position: int) -> Batch:
    """Return the step in which *sequence* brings the token at *position* alone."""
    blocks = position // batch.cache.block_tokens + 1
    device = batch.block_tables.device
    return replace(
        batch,
        query_starts=torch.tensor([0, 1], dtype=torch.int32, device=device),
        context_tokens=torch.tensor([position + 1], dtype=torch.int32, device=device),
        block_tables=batch.block_tables[sequence : sequence + 1, :blocks],
    )


def rms_norm_difference(shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu") -> float:
    """Normalise rows that lie apart, as those of a stacked projection do."""
    from cortex.models.kernels import triton_ops

    wide = torch.randn(*shape[:-2], shape[-2] + 1, shape[-1]).to(device, dtype)
    x = wide[..., : shape[-2], :]
    weight = torch.randn(shape[-1], device=device)
    return difference(triton_ops.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5))


def add_rms_norm_differences(
    rows: int, columns: int, dtype: torch.dtype, device: str = "cpu"
) -> tuple[float, float]:
    """Of the sum, and of what is normalised, which is held to the kernel's own sum."""
    from cortex.models.kernels import triton_ops

    x, y = torch.randn(2, rows, columns).to(device, dtype)
    weight = torch.randn(columns, device=device)
    total, normed = triton_ops.add_rms_norm(x, y, weight, 1e-5)
    return difference(total, x + y), difference(normed, reference.rms_norm(total, weight, 1e-5))


def silu_multiply_difference(
    rows: int, columns: int, dtype: torch.dtype, device: str = "cpu"
) -> float:
    """Against float32's."""
    from cortex.models.kernels import triton_ops

    gate_up = torch.randn(rows, 2 * columns).to(device, dtype)
    return difference(triton_ops.silu_multiply(gate_up), reference.silu_multiply(gate_up.float()))


def add_bias_difference(rows: int, columns: int, dtype: torch.dtype, device: str = "cpu") -> float:
    """Against float32's."""
    from cortex.models.kernels import triton_ops

    y, bias = torch.randn(rows, columns).to(device, dtype), torch.randn(columns, device=device)
    return difference(triton_ops.add_bias(y, bias), y.float() + bias)


def rotate_and_store_differences(
    heads: int,
    kv_heads: int,
    size: int,
    dtype: torch.dtype,
    device: str = "cpu",
    *,
    half: int | None = None,
) -> tuple[float, float, float]:
    """Of queries, keys and values; one token has no slot, and the cache is else left as it is."""
    from cortex.models.kernels import triton_ops

    slots = torch.tensor([3, 17, -1, 40, 0], device=device)
    rows = (len(slots), heads + 2 * kv_heads, size)
    q, k, v = torch.randn(rows).to(device, dtype).split([heads, kv_heads, kv_heads], 1)  # type: ignore[no-untyped-call] # torch's
    angles = torch.randn(len(slots), half or size // 2, device=device)
    cosines, sines = angles.cos(), angles.sin()
    keys, values, keys_there, values_there = torch.ones(4, 3, 16, kv_heads, size).to(device, dtype)

    rotated = triton_ops.rotate_and_store(
        q, k, v, cosines, sines, keys=keys, values=values, slots=slots
    )

    has_slot = slots >= 0
    turned = reference.rotate(k, cosines, sines)
    reference.store(turned[has_slot], v[has_slot], keys_there, values_there, slots[has_slot])
    return (
        difference(rotated, reference.rotate(q, cosines, sines)),
        difference(keys, keys_there),
        difference(values, values_there),
    )


def linear_difference(
    rows: int, outputs: int, inputs: int, dtype: torch.dtype, device: str = "cpu"
) -> float:
    """Against float32's, written beside something that must stay."""
    from cortex.models.kernels import triton_linear

    x, weight = (torch.randn(n, inputs).to(device, dtype) for n in (rows, outputs))
    y = torch.full((rows, outputs + 3), 7.0, device=device, dtype=dtype)
    triton_linear.linear_into(y[:, :outputs], x, weight)
    assert torch.equal(y[:, outputs:], torch.full_like(y[:, outputs:], 7.0))
    return difference(y[:, :outputs], x.float() @ weight.float().T)


def is_same_linear_alone(
    rows: int, outputs: int, inputs: int, dtype: torch.dtype, device: str = "cpu"
) -> bool:
    """Whether each row has the bits that it has by itself."""
    from cortex.models.kernels import triton_linear

    x, weight = (torch.randn(n, inputs).to(device, dtype) for n in (rows, outputs))
    together = torch.empty(rows, outputs, device=device, dtype=dtype)
    triton_linear.linear_into(together, x, weight)
    alone = torch.empty_like(together)
    for row in range(rows):
        triton_linear.linear_into(alone[row : row + 1], x[row : row + 1], weight)
    return torch.equal(together, alone)


def no_rows() -> list[tuple[int, ...]]:
    """Return the shapes of what the operations make of nothing."""
    from cortex.models.kernels import triton_attention, triton_linear, triton_ops

    weight, nothing = torch.ones(32), torch.empty(0, 32)
    shape = Shape(2, 1, 32, 16, torch.float32, "cpu")
    q, keys, values, batch = trial_step(shape, [(3, 1)])
    half = torch.empty(0, 16)
    y = torch.empty(0, 5)
    triton_linear.linear_into(y, nothing, torch.ones(5, 32))
    made = (
        triton_ops.rms_norm(nothing, weight, 1e-5),
        *triton_ops.add_rms_norm(nothing, nothing, weight, 1e-5),
        triton_ops.silu_multiply(nothing),
        triton_ops.add_bias(nothing, weight),
        triton_ops.rotate_and_store(
            *(q[:0], q[:0, :1], q[:0, :1], half, half),
            keys=keys,
            values=values,
            slots=torch.empty(0, dtype=torch.int64),
        ),
        triton_attention.attention(q[:0], keys, values, batch, 1.0),
        y,
    )
    return [tuple(x.shape) for x in made]


def mixed_product_difference() -> float:
    """Multiply with parts of two stored types, one of which has to be unpacked, side by side."""
    blocks = torch.randint(0, 256, (20, 2, 34), dtype=torch.uint8)
    blocks[..., :2] = torch.full((20, 2, 1), 0.01, dtype=torch.float16).view(torch.uint8)
    parts = [
        Part("F32", torch.randn(7, 64).view(torch.uint8)),
        Part("Q8_0", blocks.flatten(1)),
    ]
    x = torch.randn(3, 64)
    found = cuda.CudaKernels(None).linear(x, parts, is_batch_invariant=True)
    return difference(found, reference.linear(x, parts))


class TinyModel:
    """A Qwen3 with random weights that computes with the kernels of a GPU."""

    def __init__(self, execution: Execution, device: str = "cpu") -> None:
        torch.manual_seed(1)
        config = Qwen3Config(32, 48, 1, 4, 2, 16, 50, 1e-6, Rope(16, 10_000.0), 512, False)
        self.module = Qwen3(config, torch.float32).eval().to(device)
        for child in self.module.modules():
            if isinstance(child, Matrix):
                weights = torch.randn(child.rows, child.columns).to(device) / 4
                child.fill([Part("F32", weights.view(torch.uint8))])
            elif isinstance(child, RMSNorm):
                child.weight = torch.rand(child.size).to(device)
            if isinstance(child, Projection):
                child.is_batch_invariant = execution.is_batch_invariant
        keys, values = torch.zeros(2, 16, 16, 2, 16, device=device)
        self.cache = KVCache([keys], [values], 16, execution=execution)

    @torch.inference_mode()
    def step(self, **chunks: Sequence[int]) -> dict[str, Tensor]:
        """Compute tokens of sequences that are named for their first block and begin position."""
        logits: Tensor = self.module(self.batch(chunks))
        sizes = [len(tokens) for tokens in chunks.values()]
        return dict(zip(chunks, torch.split(logits, sizes), strict=True))

    def batch(self, chunks: Mapping[str, Sequence[int]]) -> Batch:
        """Return the batch; ``s4_20`` is the sequence in blocks from 4 on, beginning at 20."""
        device = self.cache.keys[0].device
        places = [[int(number) for number in name[1:].split("_")] for name in chunks]
        sizes = [len(tokens) for tokens in chunks.values()]
        positions = [
            begin + at for (_, begin), size in zip(places, sizes, strict=True) for at in range(size)
        ]
        firsts = [
            block for (block, _), size in zip(places, sizes, strict=True) for _ in range(size)
        ]

        def integers(values: object, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)

        return Batch(
            token_ids=integers([t for tokens in chunks.values() for t in tokens], torch.int64),
            positions=integers(positions, torch.int64),
            slots=integers(
                [16 * first + at for first, at in zip(firsts, positions, strict=True)], torch.int64
            ),
            query_starts=integers([sum(sizes[:at]) for at in range(len(sizes) + 1)]),
            context_tokens=integers(
                [begin + size for (_, begin), size in zip(places, sizes, strict=True)]
            ),
            block_tables=integers([[first, first + 1, first + 2] for first, _ in places]),
            sampled=torch.arange(len(positions), device=device),
            cache=self.cache,
        )


def model_difference(*, is_batch_invariant: bool) -> float:
    """Differ from the model by plain torch, in a prompt, a chunk of one and a single token."""
    plain = TinyModel(Execution(attention="reference"))
    ours = TinyModel(Execution(attention="triton", is_batch_invariant=is_batch_invariant))
    steps: list[dict[str, Sequence[int]]] = [
        {"s0_0": range(10), "s4_0": range(3)},
        {"s0_10": range(7), "s4_3": [9]},
        {"s0_17": [8], "s4_4": [1]},
    ]
    with _as_on_a_gpu(plain=True):
        expected = [plain.step(**step) for step in steps]
    with _as_on_a_gpu():
        found = [ours.step(**step) for step in steps]
    return max(
        difference(there[name], here[name])
        for here, there in zip(expected, found, strict=True)
        for name in here
    )


def is_same_model_alone_and_in_chunks() -> bool:
    """Whether a whole model gives the same bits for a prompt at once, and in pieces in company."""
    execution = Execution(attention="triton", is_batch_invariant=True)
    with _as_on_a_gpu():
        whole = TinyModel(execution).step(s0_0=range(18))["s0_0"]
        pieces = TinyModel(execution)
        parts = [
            pieces.step(s4_0=range(2), s0_0=range(9))["s0_0"],
            pieces.step(s0_9=range(9, 17), s4_2=[4])["s0_9"],
            pieces.step(s4_3=[5], s8_0=[1], s0_17=[17])["s0_17"],
        ]
    return torch.equal(whole, torch.cat(parts))


@contextmanager
def _as_on_a_gpu(*, plain: bool = False) -> Iterator[None]:
    """Have tensors of the CPU computed with as those of a GPU are; *plain*, by the reference."""
    from cortex.models.kernels import triton_ops

    kernels = cuda.CudaKernels(None if plain else triton_ops)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "kernels_for", lambda _: kernels)
        patch.setattr(cuda_attention, "try_out", lambda *_: None)
        yield
