"""The C kernels against plain torch, operation by operation, and their promise about bits."""

from __future__ import annotations

import contextlib
import logging
import resource
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cortex.models.batch import Batch, KVCache
from cortex.models.kernels import compiler, cpu, ops, reference
from cortex.models.quantization import DENSE, Part
from random_blocks import PACKED, columns_of, random_part


def sequences(
    lengths: list[tuple[int, int]],
    heads: int,
    size: int,
    dtype: torch.dtype = torch.float32,
    kv_heads: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Batch]:
    """Queries, keys, values and batch of sequences given as (cached before, new tokens)."""
    block_tokens, used = cpu.BLOCK_TOKENS, 0
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
    keys, values = cpu.new_cache_layer(used, kv_heads or heads // 2, size, dtype)
    keys.copy_(torch.randn(keys.shape))
    values.copy_(torch.randn(values.shape))
    return torch.randn(len(positions), heads, size), keys, values, batch


@pytest.mark.parametrize("kind", cpu.KINDS)
@pytest.mark.parametrize("rows", [0, 1, 2, 3, 4, 5, 9, 33])
@pytest.mark.parametrize(("outputs", "blocks"), [(64, 3), (37, 1), (1, 4)])
def test_linear_agrees(
    kernels: cpu.CpuKernels, kind: str, rows: int, outputs: int, blocks: int
) -> None:
    columns = columns_of(kind, blocks)
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
    columns = columns_of(kind, 2)
    part, x = random_part(kind, 50, columns), torch.randn(21, columns)
    alone = torch.cat([kernels.linear(row[None], [part]) for row in x])

    for rows in range(1, 22):
        assert torch.equal(kernels.linear(x[:rows], [part]), alone[:rows])


def test_an_output_does_not_depend_on_the_others(kernels: cpu.CpuKernels) -> None:
    part, x = random_part("Q4_0", 37, 64), torch.randn(3, 64)

    alone = [kernels.linear(x, [Part("Q4_0", row[None].clone())]) for row in part.data]

    assert torch.equal(kernels.linear(x, [part]), torch.cat(alone, dim=1))


@pytest.mark.parametrize("kind", cpu.KINDS)
def test_rows_agree(kernels: cpu.CpuKernels, kind: str) -> None:
    part, ids = random_part(kind, 9, columns_of(kind, 2)), torch.tensor([8, 0, 3, 3])

    assert torch.equal(kernels.rows(part, ids), reference.rows(part, ids))


@pytest.mark.parametrize("row", [-1, 9, 1 << 62])
def test_a_row_that_is_not_there_is_an_error(kernels: cpu.CpuKernels, row: int) -> None:
    with pytest.raises(IndexError, match="from 0 to 8"):
        kernels.rows(random_part("F16", 9, 64), torch.tensor([0, row]))


@pytest.mark.parametrize("rows", [1, 40])
def test_add_agrees(kernels: cpu.CpuKernels, rows: int) -> None:
    x, y = torch.randn(rows, 33), torch.randn(rows, 33)

    assert torch.equal(kernels.add(x, y), x + y)


@pytest.mark.parametrize("rows", [1, 40])
def test_add_bias_agrees(kernels: cpu.CpuKernels, rows: int) -> None:
    y, bias = torch.randn(rows, 33), torch.randn(33)

    assert torch.equal(kernels.add_bias(y.clone(), bias), reference.add_bias(y, bias))


def test_a_bias_is_added_in_float32_and_rounded_once() -> None:
    y, bias = torch.randn(3, 8).bfloat16(), torch.randn(8)

    assert torch.equal(ops.add_bias(y, bias), (y.float() + bias).bfloat16())


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("size", [1, 16, 40])
def test_rms_norm_of_strided_heads_agrees(kernels: cpu.CpuKernels, heads: int, size: int) -> None:
    x = torch.randn(20, 5, size)[:, 1 : 1 + heads]  # as queries lie among keys and values
    weight = torch.randn(size)

    y = kernels.rms_norm(x, weight, 1e-5)

    torch.testing.assert_close(y, reference.rms_norm(x, weight, 1e-5))
    flat = kernels.rms_norm(x.flatten(0, 1), weight, 1e-5)
    assert torch.equal(y.flatten(0, 1), flat)


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


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("size", [2, 16, 40, 64, 128, 256])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 1), (6, 3), (4, 4), (9, 3), (8, 1), (34, 2)])
def test_attention_agrees(
    kernels: cpu.CpuKernels, heads: int, kv_heads: int, size: int, dtype: torch.dtype
) -> None:
    lengths = [(0, 9), (300, 1), (127, 3), (0, 1), (511, 1), (250, 40)]
    q, keys, values, batch = sequences(lengths, heads, size, dtype, kv_heads)

    out = kernels.attention(q, keys, values, batch, size**-0.5)

    expected = reference.attention(q, keys, values, batch, size**-0.5)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_attention_of_a_token_does_not_depend_on_its_company(
    kernels: cpu.CpuKernels, dtype: torch.dtype
) -> None:
    lengths = [(700, 3), (1023, 1), (0, 30), (15, 17)]
    q, keys, values, batch = sequences(lengths, 6, 48, dtype, 2)
    together = kernels.attention(q, keys, values, batch, 0.2)

    for index, (before, new) in enumerate(lengths):
        start = int(batch.query_starts[index])
        for offset in range(new):
            one = replace(
                batch,
                positions=torch.tensor([before + offset]),
                query_starts=torch.tensor([0, 1], dtype=torch.int32),
                block_tables=batch.block_tables[index : index + 1].clone(),
            )
            alone = kernels.attention(
                q[start + offset : start + offset + 1], keys, values, one, 0.2
            )
            assert torch.equal(alone[0], together[start + offset])


def test_attention_of_few_to_a_long_context_keeps_little_memory(kernels: cpu.CpuKernels) -> None:
    """Its spans are shared among threads, and merged before there are too many of them."""
    many = 15  # one less, and two threads would take a task each
    _, keys, values, batch = sequences([(100_000, 1)], 1, 16, torch.float16, 1)
    batch = replace(
        batch,
        positions=batch.positions.repeat(many),
        query_starts=torch.arange(many + 1, dtype=torch.int32),
        block_tables=batch.block_tables.repeat(many, 1),
    )
    queries = torch.randn(many, 1, 16)
    grown, outs = list[int](), list[Tensor]()

    def attend() -> None:  # in a thread of its own, which has met no such matrix before
        before = resident_bytes()
        outs.append(kernels.attention(queries, keys, values, batch, 0.25))
        grown.append(resident_bytes() - before)

    thread = threading.Thread(target=attend)
    with torch_threads(2):
        thread.start()
        thread.join()
    with torch_threads(1):  # then a task is a sequence
        alone = kernels.attention(queries, keys, values, batch, 0.25)

    assert torch.equal(outs[0], alone)
    assert grown[0] < 16 * 2**20


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


@contextlib.contextmanager
def torch_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def test_attention_without_memory_is_an_error(
    kernels: cpu.CpuKernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, keys, values, batch = sequences([(4, 2)], 2, 16)
    monkeypatch.setattr(kernels, "do", lambda *_, **__: -1)

    with pytest.raises(MemoryError):
        kernels.attention(q, keys, values, batch, 1.0)


def test_attention_to_one_overwhelming_position_is_its_value(kernels: cpu.CpuKernels) -> None:
    q, keys, values, batch = sequences([(200, 1)], 2, 16)
    keys.zero_()
    keys[0, 8] = q[0, 0] * 1e4  # the last position, so the maximum comes after others

    out = kernels.attention(q[:, :1].expand(-1, 2, -1), keys, values, batch, 1.0)

    torch.testing.assert_close(out[0, 0], values[0, 8, 0])


def test_a_nan_stays_in_its_own_sequence(kernels: cpu.CpuKernels) -> None:
    q, keys, values, batch = sequences([(4, 2), (8, 2)], 2, 16)
    keys[0, 0] = torch.nan

    out = kernels.attention(q, keys, values, batch, 1.0)

    assert out[1].isnan().all()
    assert out[2:].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_store_writes_slots_and_nothing_else(kernels: cpu.CpuKernels, dtype: torch.dtype) -> None:
    k, v = torch.randn(3, 6, 8)[:, 1:3], torch.randn(3, 2, 8)
    slots = torch.tensor([5, 0, 31])
    ours, theirs = (cpu.new_cache_layer(3, 2, 8, dtype) for _ in range(2))
    for cache in (*ours, *theirs):
        cache.zero_()

    kernels.store(k, v, *ours, slots)

    reference.store(k, v, *theirs, slots)
    assert torch.equal(torch.stack(ours), torch.stack(theirs))


def test_what_is_too_large_for_float16_is_stored_as_its_largest_number(
    kernels: cpu.CpuKernels,
) -> None:
    k = torch.tensor([[[1e6, -1e30, 65519.0, 1e-9, torch.nan, torch.inf, -0.0, 6e-8]]])
    keys, values = cpu.new_cache_layer(1, 1, 8, torch.float16)

    kernels.store(k, k, keys, values, torch.tensor([3]))

    stored = torch.tensor([65504.0, -65504.0, 65504.0, 0.0, torch.nan, 65504.0, -0.0, 6e-8]).half()
    for cache in (keys, values):
        torch.testing.assert_close(cache[0, 3, 0], stored, rtol=0, atol=0, equal_nan=True)


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

    def counting(kind: str, data: Tensor, *, is_planar: bool) -> Tensor:
        unpacked.append(len(data))
        return unpack(kind, data, is_planar=is_planar)

    monkeypatch.setattr(reference, "dequantize", counting)
    monkeypatch.setattr(reference, "UNPACKED_AT_ONCE", 7 * 64)

    torch.testing.assert_close(reference.linear(x, [part]), whole)
    assert unpacked == [7] * 7 + [1]


@pytest.mark.parametrize("is_tiled", [False, True])
def test_no_memory_is_an_error(
    kernels: cpu.CpuKernels, monkeypatch: pytest.MonkeyPatch, is_tiled: bool
) -> None:
    part = random_part("Q4_0", 1, 32)
    part = kernels.tile(part) if is_tiled else part
    monkeypatch.setattr(kernels, "do", lambda *_: -1)

    with pytest.raises(MemoryError):
        kernels.linear(torch.ones(1, 32), [part])


@pytest.mark.parametrize("kind", PACKED)
@pytest.mark.parametrize("rows", [0, 1, 2, 3, 4, 5, 9, 33])
@pytest.mark.parametrize(("outputs", "blocks"), [(64, 3), (37, 1), (1, 4)])
def test_a_product_with_tiles_agrees(
    kernels: cpu.CpuKernels, kind: str, rows: int, outputs: int, blocks: int
) -> None:
    columns = columns_of(kind, blocks)
    part, x = random_part(kind, outputs, columns), torch.randn(rows, columns)

    y = kernels.linear(x, [kernels.tile(part)])

    exact = x.double() @ reference.dequantize(kind, part.data).double().T
    size = x.double().abs() @ reference.dequantize(kind, part.data).double().abs().T
    assert ((y - exact).abs() <= 5e-5 * size + 1e-12).all()


@pytest.mark.parametrize("kind", PACKED)
def test_a_row_times_tiles_does_not_depend_on_the_other_rows(
    kernels: cpu.CpuKernels, kind: str
) -> None:
    columns = columns_of(kind, 3)
    part, x = kernels.tile(random_part(kind, 50, columns)), torch.randn(21, columns)
    alone = torch.cat([kernels.linear(row[None], [part]) for row in x])

    for rows in (2, 3, 4, 5, 8, 9, 21):
        assert torch.equal(kernels.linear(x[:rows], [part]), alone[:rows])


@pytest.mark.parametrize("kind", PACKED)
def test_rows_of_tiles_are_those_of_the_file(kernels: cpu.CpuKernels, kind: str) -> None:
    part, ids = random_part(kind, 37, columns_of(kind, 3)), torch.tensor([0, 36, 15, 16, 36])

    assert torch.equal(kernels.rows(kernels.tile(part), ids), reference.rows(part, ids))
    with pytest.raises(IndexError):
        kernels.rows(kernels.tile(part), torch.tensor([37]))


@pytest.mark.parametrize("kind", PACKED)
def test_tiles_take_no_more_memory_than_whole_tiles_of_rows(
    kernels: cpu.CpuKernels, kind: str
) -> None:
    part = random_part(kind, 33, columns_of(kind, 2))

    tiled = kernels.tile(part)

    assert tiled.data.numel() == part.data.numel() // 33 * 48
    assert (tiled.rows, tiled.columns) == (33, columns_of(kind, 2))


@pytest.mark.parametrize("kind", PACKED)
def test_a_product_with_tiles_does_not_depend_on_the_threads(
    kernels: cpu.CpuKernels, kind: str
) -> None:
    columns = columns_of(kind, 1)
    part, x = kernels.tile(random_part(kind, 200, columns)), torch.randn(11, columns)
    with torch_threads(1):
        alone = kernels.linear(x, [part])

    for threads in (2, 5):
        with torch_threads(threads):
            assert torch.equal(kernels.linear(x, [part]), alone)


def test_tiled_parts_of_several_types_lie_side_by_side(kernels: cpu.CpuKernels) -> None:
    x = torch.randn(5, 512)
    parts = [random_part(kind, 5 + index, 512) for index, kind in enumerate(PACKED)]
    tiled = [kernels.tile(part) for part in parts]

    y = kernels.linear(x, tiled)

    alone = [kernels.linear(x, [part]) for part in tiled]
    assert torch.equal(y, torch.cat(alone, dim=1))
    torch.testing.assert_close(y, reference.linear(x, parts), rtol=1e-3, atol=1e-3)


def test_a_float8_that_is_no_number_makes_its_output_none(kernels: cpu.CpuKernels) -> None:
    part, x = random_part("FP8", 20, 256), torch.randn(3, 256)
    part.data[7, 132 + 4 + 50] = 0xFF

    for form in (part, kernels.tile(part)):
        y = kernels.linear(x, [form])
        assert y[:, 7].isnan().all()
        assert y[:, [n for n in range(20) if n != 7]].isfinite().all()
        row = kernels.rows(form, torch.tensor([7]))[0]
        assert row[128 + 50].isnan()
        assert row[:128].isfinite().all()


@pytest.mark.parametrize("kind", PACKED)
def test_blocks_of_zeros_give_zero(kernels: cpu.CpuKernels, kind: str) -> None:
    part = random_part(kind, 20, columns_of(kind, 2))
    part.data.zero_()

    for form in (part, kernels.tile(part)):
        assert (kernels.linear(torch.randn(3, part.columns), [form]) == 0).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_so_and_in_its_row(kernels: cpu.CpuKernels, value: float) -> None:
    part, x = kernels.tile(random_part("Q4_1", 40, 64)), torch.randn(9, 64)
    calm = kernels.linear(x, [part])
    x[4, 40] = value

    y = kernels.linear(x, [part])

    assert not y[4].isfinite().any()
    others = [0, 1, 2, 3, 5, 6, 7, 8]
    assert torch.equal(y[others], calm[others])


def test_activations_of_any_size_keep_sixteen_bits(kernels: cpu.CpuKernels) -> None:
    part = random_part("Q8_0", 16, 32)
    for size in (1e-20, 1.0, 1e20):
        x = torch.randn(1, 32) * size
        weights = reference.dequantize("Q8_0", part.data).double().T
        y = kernels.linear(x, [kernels.tile(part)])
        assert ((y - x.double() @ weights).abs() <= 5e-5 * (x.double().abs() @ weights.abs())).all()


def test_take_agrees(kernels: cpu.CpuKernels) -> None:
    x, ids = torch.randn(7, 24), torch.tensor([6, 0, 3])

    assert torch.equal(kernels.take(x, ids), x[ids])


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


@pytest.mark.parametrize("kind", PACKED)
def test_older_cpus_compute_the_same(
    kernels: cpu.CpuKernels, other_kernels: dict[str, cpu.CpuKernels], kind: str
) -> None:
    columns = columns_of(kind, 3)
    part, x = random_part(kind, 50, columns), torch.randn(9, columns)
    expected = kernels.linear(x, [kernels.tile(part)])

    for name, other in other_kernels.items():
        assert torch.equal(other.tile(part).data, kernels.tile(part).data)
        found = other.linear(x, [other.tile(part)])
        # without fused multiply-adds each block of a sum is rounded twice
        tolerance = 0.0 if name == "avx2" else 1e-5
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", cpu.KINDS)
def test_older_cpus_read_and_multiply_with_every_format(
    other_kernels: dict[str, cpu.CpuKernels], kind: str
) -> None:
    columns = columns_of(kind, 3)
    part, x = random_part(kind, 37, columns), torch.randn(9, columns)
    ids = torch.tensor([36, 0, 15, 16])
    exact = x.double() @ reference.rows(part, torch.arange(37)).double().T
    size = x.double().abs() @ reference.rows(part, torch.arange(37)).double().abs().T

    for other in other_kernels.values():
        forms = [part] if kind in DENSE else [part, other.tile(part)]
        for form in forms:
            assert torch.equal(other.rows(form, ids), reference.rows(part, ids))
            tolerance = 5e-5 if form.is_tiled else 1e-6
            assert ((other.linear(x, [form]) - exact).abs() <= tolerance * size).all()


def test_older_cpus_do_the_small_operations(
    kernels: cpu.CpuKernels, other_kernels: dict[str, cpu.CpuKernels]
) -> None:
    x, weight, positions = torch.randn(20, 40), torch.randn(40), torch.arange(20) * 400
    frequencies = 1.0 / 10000.0 ** (torch.arange(0, 10, 2) / 10)

    def everything(of: cpu.CpuKernels) -> list[Tensor]:
        turned = of.rotate(x.view(20, 4, 10), *of.rotation(positions, frequencies))
        normed = of.rms_norm(x, weight, 1e-5)
        return [of.add(x, normed), of.silu_multiply(x * 9), of.add_bias(x + 0, weight), turned]

    for other in other_kernels.values():
        for found, expected in zip(everything(other), everything(kernels), strict=True):
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_older_cpus_attend_the_same(
    kernels: cpu.CpuKernels, other_kernels: dict[str, cpu.CpuKernels], dtype: torch.dtype
) -> None:
    q, keys, values, batch = sequences([(300, 3), (0, 20)], 6, 40, dtype, 2)
    expected = kernels.attention(q, keys, values, batch, 0.2)
    k = torch.randn(1, 2, 40) * torch.tensor(10.0) ** torch.arange(-20, 20)

    for other in other_kernels.values():
        found = other.attention(q, keys, values, batch, 0.2)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        ours, theirs = (cpu.new_cache_layer(1, 2, 40, dtype) for _ in range(2))
        for cache in (*ours, *theirs):
            cache.zero_()
        kernels.store(k, k, *ours, torch.tensor([5]))
        other.store(k, k, *theirs, torch.tensor([5]))
        assert torch.equal(torch.stack(ours), torch.stack(theirs))
