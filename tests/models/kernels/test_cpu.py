"""The C kernels against plain torch, operation by operation, and their promise about bits."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from cortex.models.batch import Batch, KVCache
from cortex.models.kernels import compiler, cpu, ops, reference
from cortex.models.quantization import DENSE, Part, row_bytes


@pytest.fixture
def kernels() -> cpu.CpuKernels:
    found = cpu.kernels()
    assert found is not None, "the tests need a C compiler"
    return found


def random_part(kind: str, rows: int, columns: int) -> Part:
    data = torch.randint(0, 256, (rows, row_bytes(kind, columns)), dtype=torch.uint8)
    size = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}.get(kind)
    if size is None:
        dtype = DENSE[kind]
        return Part(kind, torch.randn(rows, columns).to(dtype).view(torch.uint8))
    blocks = data.view(rows, -1, size)
    fields = 2 if kind == "Q4_1" else 1
    scales = (torch.randn(rows, blocks.size(1), fields) / 16).to(torch.float16)
    blocks[:, :, : 2 * fields] = scales.view(torch.uint8)
    return Part(kind, data)


def sequences(
    lengths: list[tuple[int, int]], heads: int, size: int
) -> tuple[Tensor, Tensor, Tensor, Batch]:
    """Queries, keys, values and batch of sequences given as (cached before, new tokens)."""
    block_tokens, used = 4, 0
    tables, positions = list[list[int]](), list[int]()
    for before, new in lengths:
        count = -(-(before + new) // block_tokens)
        tables.append(list(range(used, used + count))[::-1])
        used += count
        positions += range(before, before + new)
    width = max(len(table) for table in tables)
    cache = KVCache([], [], block_tokens)
    empty = torch.empty(0)
    starts = [0, *torch.tensor([new for _, new in lengths]).cumsum(0).tolist()]
    batch = Batch(
        empty,
        torch.tensor(positions),
        empty,
        torch.tensor(starts, dtype=torch.int32),
        torch.tensor([before + new for before, new in lengths], dtype=torch.int32),
        torch.tensor([t + [0] * (width - len(t)) for t in tables], dtype=torch.int32),
        empty,
        cache,
    )
    keys, values = (torch.randn(used, block_tokens, heads // 2, size) for _ in range(2))
    return torch.randn(len(positions), heads, size), keys, values, batch


@pytest.mark.parametrize("kind", cpu.KINDS)
@pytest.mark.parametrize("rows", [0, 1, 2, 3, 4, 5, 9, 33])
@pytest.mark.parametrize(("outputs", "columns"), [(64, 96), (37, 32), (1, 128)])
def test_linear_agrees(
    kernels: cpu.CpuKernels, kind: str, rows: int, outputs: int, columns: int
) -> None:
    part, x = random_part(kind, outputs, columns), torch.randn(rows, columns)

    y = kernels.linear(x, [part])

    torch.testing.assert_close(y, reference.linear(x, [part]), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("columns", [1, 15, 17, 40])
@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
def test_linear_agrees_on_inputs_that_fill_no_vector(
    kernels: cpu.CpuKernels, kind: str, columns: int
) -> None:
    part, x = random_part(kind, 19, columns), torch.randn(6, columns)

    y = kernels.linear(x, [part])

    torch.testing.assert_close(y, reference.linear(x, [part]), rtol=1e-5, atol=1e-4)


def test_parts_of_several_types_lie_side_by_side(kernels: cpu.CpuKernels) -> None:
    parts = [random_part(kind, rows, 64) for kind, rows in (("Q4_1", 21), ("F16", 3), ("Q8_0", 8))]
    x = torch.randn(5, 64)

    y = kernels.linear(x, parts)

    torch.testing.assert_close(y, reference.linear(x, parts), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", cpu.KINDS)
def test_a_row_times_a_matrix_does_not_depend_on_its_neighbours(
    kernels: cpu.CpuKernels, kind: str
) -> None:
    part, x = random_part(kind, 50, 64), torch.randn(21, 64)
    alone = torch.cat([kernels.linear(row[None], [part]) for row in x])

    for rows in range(1, 22):
        assert torch.equal(kernels.linear(x[:rows], [part]), alone[:rows])


def test_an_output_does_not_depend_on_the_others(kernels: cpu.CpuKernels) -> None:
    part, x = random_part("Q4_0", 37, 64), torch.randn(3, 64)

    alone = [kernels.linear(x, [Part("Q4_0", row[None].clone())]) for row in part.data]

    assert torch.equal(kernels.linear(x, [part]), torch.cat(alone, dim=1))


@pytest.mark.parametrize("kind", cpu.KINDS)
def test_rows_agree(kernels: cpu.CpuKernels, kind: str) -> None:
    part, ids = random_part(kind, 9, 64), torch.tensor([8, 0, 3, 3])

    assert torch.equal(kernels.rows(part, ids), reference.rows(part, ids))


@pytest.mark.parametrize("row", [-1, 9, 1 << 62])
def test_a_row_that_is_not_there_is_an_error(kernels: cpu.CpuKernels, row: int) -> None:
    with pytest.raises(IndexError, match="from 0 to 8"):
        kernels.rows(random_part("F16", 9, 64), torch.tensor([0, row]))


@pytest.mark.parametrize("rows", [1, 40])
def test_add_agrees(kernels: cpu.CpuKernels, rows: int) -> None:
    x, y = torch.randn(rows, 33), torch.randn(rows, 33)

    assert torch.equal(kernels.add(x, y), x + y)


@pytest.mark.parametrize("size", [1, 16, 40, 64])
def test_rms_norm_agrees(kernels: cpu.CpuKernels, size: int) -> None:
    x, weight = torch.randn(20, size) * 9, torch.randn(size)

    y = kernels.rms_norm(x, weight, 1e-5)

    torch.testing.assert_close(y, reference.rms_norm(x, weight, 1e-5))


@pytest.mark.parametrize("size", [1, 16, 51, 96])
def test_silu_multiply_agrees(kernels: cpu.CpuKernels, size: int) -> None:
    x = torch.randn(7, 2 * size) * 20

    torch.testing.assert_close(kernels.silu_multiply(x), reference.silu_multiply(x))


def test_silu_of_extreme_numbers_agrees(kernels: cpu.CpuKernels) -> None:
    gates = torch.tensor([0.0, -0.0, 1e-30, 87.0, -87.5, -103.0, 1e30, -1e30, torch.nan])
    x = torch.cat([gates, torch.ones_like(gates)])[None]

    torch.testing.assert_close(
        kernels.silu_multiply(x), reference.silu_multiply(x), atol=1e-35, rtol=1e-5, equal_nan=True
    )


def test_rotation_and_rotate_agree(kernels: cpu.CpuKernels) -> None:
    positions = torch.tensor([0, 1, 77, 8191, 131071])
    frequencies = 1.0 / 10000.0 ** (torch.arange(0, 10, 2) / 10)
    x = torch.randn(5, 6, 10)[:, 1:4]  # heads of one token together, tokens strided

    turned = kernels.rotate(x, *kernels.rotation(positions, frequencies))

    expected = reference.rotate(x, *reference.rotation(positions, frequencies))
    torch.testing.assert_close(turned, expected)


@pytest.mark.parametrize("size", [2, 16, 40, 64, 128, 256])
@pytest.mark.parametrize("heads", [2, 6])
def test_attention_agrees(kernels: cpu.CpuKernels, heads: int, size: int) -> None:
    q, keys, values, batch = sequences([(0, 9), (300, 1), (127, 3), (0, 1)], heads, size)

    out = kernels.attention(q, keys, values, batch, size**-0.5)

    expected = reference.attention(q, keys, values, batch, size**-0.5)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def test_attention_to_one_overwhelming_position_is_its_value(kernels: cpu.CpuKernels) -> None:
    q, keys, values, batch = sequences([(200, 1)], 2, 16)
    keys.zero_()
    keys[0, 0] = q[0, 0] * 1e4  # the last block, so the maximum comes after a span of others

    out = kernels.attention(q[:, :1].expand(-1, 2, -1), keys, values, batch, 1.0)

    torch.testing.assert_close(out[0, 0], values[0, 0, 0])


def test_a_nan_stays_in_its_own_sequence(kernels: cpu.CpuKernels) -> None:
    q, keys, values, batch = sequences([(4, 2), (8, 2)], 2, 16)
    keys[0, 0] = torch.nan

    out = kernels.attention(q, keys, values, batch, 1.0)

    assert out[1].isnan().all()
    assert out[2:].isfinite().all()


def test_store_writes_slots_and_nothing_else(kernels: cpu.CpuKernels) -> None:
    k, v = torch.randn(3, 6, 8)[:, 1:3], torch.randn(3, 2, 8)
    slots = torch.tensor([5, 0, 11])
    ours = [torch.zeros(3, 4, 2, 8) for _ in range(2)]
    theirs = [torch.zeros(3, 4, 2, 8) for _ in range(2)]

    kernels.store(k, v, ours[0], ours[1], slots)

    reference.store(k, v, theirs[0], theirs[1], slots)
    assert torch.equal(torch.stack(ours), torch.stack(theirs))


def test_heads_too_large_for_the_kernel_go_to_torch() -> None:
    q, keys, values, batch = sequences([(0, 3)], 2, cpu.MAX_HEAD + 2)

    out = ops.attention(q, keys, values, batch, 0.1)

    assert torch.equal(out, reference.attention(q, keys, values, batch, 0.1))


@pytest.mark.parametrize(
    "x", [torch.zeros(1, dtype=torch.bfloat16), torch.zeros(1, device="meta")], ids=str
)
def test_other_widths_and_devices_go_to_torch(x: Tensor) -> None:
    assert cpu.kernels_for(x) is None


def test_block_tables_may_be_a_view_of_larger_ones(kernels: cpu.CpuKernels) -> None:
    q, keys, values, batch = sequences([(40, 3), (0, 20)], heads=4, size=16)
    wide = torch.cat([batch.block_tables, torch.full_like(batch.block_tables, 2**30)], dim=1)
    view = wide[:, : batch.block_tables.size(1)]

    out = kernels.attention(q, keys, values, replace(batch, block_tables=view), 0.25)

    assert torch.equal(out, kernels.attention(q, keys, values, batch, 0.25))


def test_a_norm_of_another_width_goes_to_torch() -> None:
    x, weight = torch.randn(3, 64), torch.randn(64)

    y = ops.rms_norm(x, weight.half(), 1e-5)

    torch.testing.assert_close(y, reference.rms_norm(x, weight.half(), 1e-5))


def test_plain_torch_unpacks_a_large_matrix_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    part, x = random_part("Q4_1", 50, 64), torch.randn(3, 64)
    whole, unpack, unpacked = reference.linear(x, [part]), reference.dequantize, list[int]()

    def counting(kind: str, data: Tensor) -> Tensor:
        unpacked.append(len(data))
        return unpack(kind, data)

    monkeypatch.setattr(reference, "dequantize", counting)
    monkeypatch.setattr(reference, "UNPACKED_AT_ONCE", 7 * 64)

    torch.testing.assert_close(reference.linear(x, [part]), whole)
    assert unpacked == [7] * 7 + [1]


def test_no_memory_is_an_error(kernels: cpu.CpuKernels, monkeypatch: pytest.MonkeyPatch) -> None:
    class Exhausted:
        def cortex_linear(self, *_: object) -> int:
            return -1

    monkeypatch.setattr(kernels, "c", Exhausted())

    with pytest.raises(MemoryError):
        kernels.linear(torch.ones(1, 32), [random_part("Q4_0", 1, 32)])


def test_without_kernels_one_warning_says_what_is_lost(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise compiler.KernelsUnavailable("no C compiler is installed")

    monkeypatch.setattr(cpu, "load_library", fail)

    with caplog.at_level(logging.WARNING):
        assert cpu.kernels.__wrapped__() is None

    (record,) = caplog.records
    assert "many times slower" in record.message
    assert "no C compiler is installed" in record.message
