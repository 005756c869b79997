"""The operations of cpu_ops.c, called through ctypes, which lets other Python threads run.

Each method returns what its namesake in ``reference`` returns. They use as many threads as torch
is set to, from a pool of their own (thread_pool.c says why).
"""

from __future__ import annotations

import ctypes
import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextvars import ContextVar
from ctypes import c_int, c_int64, c_void_p
from functools import cache

import torch
from torch import Tensor

from cortex.models.batch import Batch
from cortex.models.kernels.compiler import KernelsUnavailable, load_library
from cortex.models.kernels.cpu_delta import DeltaOperations
from cortex.models.kernels.op import Op, Step
from cortex.models.parallel import Group
from cortex.models.quantization import DENSE_NAMES, STORED, ExpertMatrix, Part

KINDS = {
    kind: number
    for number, kind in enumerate(
        (
            *("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL"),
            *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS", "FP8"),
        )
    )
}
"""The enum in stored_blocks.c."""

MAX_HEAD = 256  # as in paged_attention.c
BLOCK_TOKENS = 16  # positions of a block of the cache, as there
TILE_OUTPUTS = 16  # as in quantized_tiles.c

log = logging.getLogger(__name__)


class CpuKernels(DeltaOperations):
    """The compiled operations; each returns what its namesake in ``reference`` returns.

    All tensors are on the CPU, activations float32. Results of one row are bitwise the same
    whatever other rows there are and whatever the number of threads.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        library.cortex_run.argtypes = (c_void_p, c_int, c_int, c_int, c_void_p, c_void_p)
        library.cortex_pack.argtypes = (*(c_int, c_void_p, c_int64, c_void_p, c_int, c_int, c_int),)
        library.cortex_pack.restype = None
        library.cortex_quantize.argtypes = (
            *(c_int, c_void_p, c_int, c_void_p, c_int64, c_int, c_int, c_int),
        )
        library.cortex_choose.argtypes = (
            *(c_void_p, c_void_p, c_int, c_int, c_void_p),
            *(c_void_p, c_void_p, c_void_p, c_void_p, c_int, c_int),
        )

    def rows(self, part: Part, ids: Tensor) -> Tensor:
        """Unpack rows *ids* [T] to float32 [T, K]; raises IndexError."""
        ids = ids.contiguous()
        y = self.new(ids, part.columns)
        where = (KINDS[part.kind], part.data.data_ptr())
        what = (ids.data_ptr(), y.data_ptr(), part.rows, part.columns)
        failed = (
            self.do("tiled_rows", y, *where, *what)
            if part.is_tiled
            else self.do("rows", y, *where, part.data.size(1), *what)
        )
        if failed:
            raise IndexError(f"row ids must be from 0 to {part.rows - 1}")
        return y

    def rows_of_share(self, part: Part, ids: Tensor, first: int, of: int) -> Tensor:
        """Unpack rows *ids* [T] of *of*, of which *part* holds those from *first* on.

        [T, K] float32, zeros for the others; raises IndexError.
        """
        ids = ids.contiguous()
        y = self.new(ids, part.columns)
        where = (KINDS[part.kind], part.data.data_ptr(), part.data.size(1))
        what = (ids.data_ptr(), y.data_ptr(), part.rows, part.columns)
        if self.do("rows_of_share", y, *where, *what, first, of, part.is_tiled):
            raise IndexError(f"row ids must be from 0 to {of - 1}")
        return y

    def take(self, x: Tensor, ids: Tensor) -> Tensor:
        """Copy rows *ids* [R] of x [T, K] -> [R, K]."""
        x, ids = x.contiguous(), ids.contiguous()
        y = self.new(ids, x.size(1))
        self.do("take", y, x.data_ptr(), ids.data_ptr(), y.data_ptr(), x.size(1))
        return y

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        """[M, K] + [M, K] -> [M, K]."""
        x, y = x.contiguous(), y.contiguous()
        out = self.new(x, x.size(1))
        self.do("add", out, x.data_ptr(), y.data_ptr(), out.data_ptr(), x.size(1))
        return out

    def linear(self, x: Tensor, parts: Sequence[Part]) -> Tensor:
        """X [M, K] times the transpose of the stacked parts [N, K] -> [M, N]."""
        x = x.contiguous()
        y = self.new(x, sum(part.rows for part in parts))
        to = y.data_ptr()
        for part in parts:
            where = (KINDS[part.kind], part.data.data_ptr())
            what = (x.data_ptr(), to, y.size(1), part.rows, x.size(1))
            failed = (
                self.do("tiled_linear", y, *where, *what)
                if part.is_tiled
                else self.do("linear", y, *where, part.data.size(1), *what)
            )
            if failed:
                raise MemoryError("no memory to unpack weights into")
            to += part.rows * y.element_size()
        return y

    def add_bias(self, y: Tensor, bias: Tensor) -> Tensor:
        """[M, N] + [N] -> [M, N], written to *y*, which is contiguous."""
        assert y.is_contiguous()
        self.do("add_bias", y, y.data_ptr(), bias.data_ptr(), y.size(1))
        return y

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """[M, K] -> [M, K], or [T, heads, K] -> [T, heads, K]."""
        tokens = _heads_together(x if x.dim() == 3 else x[:, None])
        y = self.new(x, *x.shape[1:])
        self.do(
            "rms_norm",
            y,
            *(tokens.data_ptr(), tokens.stride(0), weight.data_ptr(), y.data_ptr()),
            *(*tokens.shape[1:], float(eps)),
        )
        return y

    def silu_multiply(self, gate_up: Tensor) -> Tensor:
        """[M, 2 K] -> [M, K]."""
        gate_up = gate_up.contiguous()
        y = self.new(gate_up, gate_up.size(1) // 2)
        self.do("silu_multiply", y, gate_up.data_ptr(), y.data_ptr(), y.size(1))
        return y

    def route(self, logits: Tensor, top_k: int, *, is_normalised: bool) -> tuple[Tensor, Tensor]:
        """Router logits [T, E] -> ids [T, k] int64 and weights [T, k]."""
        logits = logits.contiguous()
        ids = self.new(logits, 2 * top_k).view(torch.int64)
        weights = self.new(logits, top_k)
        addresses = (t.data_ptr() for t in (logits, ids, weights))
        if self.do("route", weights, *addresses, logits.size(1), top_k, is_normalised):
            raise MemoryError("no memory to route tokens to experts")
        return ids, weights

    def experts(
        self,
        x: Tensor,
        ids: Tensor,
        weights: Tensor,
        *,
        gate: ExpertMatrix,
        up: ExpertMatrix,
        down: ExpertMatrix,
    ) -> Tensor:
        """X [T, H] through the SwiGLUs *ids* [T, k], summed with *weights* [T, k] -> [T, H]."""
        x, ids, weights = x.contiguous(), ids.contiguous(), weights.contiguous()
        top_k, hidden, inner = ids.size(1), x.size(1), down.columns
        work = self.new(x, top_k * (hidden + 3 * inner + 1) + 2 * gate.experts + 1)
        y = self.new(x, hidden)
        failed = self.do(
            "experts",
            y,
            *(t.data_ptr() for t in (x, ids, weights, work, y)),
            *(top_k, gate.experts, hidden, inner),
            *(value for matrix in (gate, up, down) for value in _stack(matrix)),
        )
        if failed:
            if bool(((ids < 0) | (ids >= gate.experts)).any()):
                raise IndexError(f"experts must be from 0 to {gate.experts - 1}")
            raise MemoryError("no memory for the rows of experts")
        return y

    def add_gated(self, x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
        """[M, K] + sigmoid(gate [M, 1]) * [M, K] -> [M, K]."""
        x, y, gate = x.contiguous(), y.contiguous(), gate.contiguous()
        out = self.new(x, x.size(1))
        addresses = (t.data_ptr() for t in (x, y, gate, out))
        self.do("add_gated", out, *addresses, x.size(1))
        return out

    def rotation(
        self, positions: Tensor, frequencies: Tensor, magnitude: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Cosines and sines, *magnitude* times as large, float32 [T, D / 2] each."""
        positions = positions.contiguous()
        half = frequencies.size(0)
        cosines, sines = self.new(positions, half), self.new(positions, half)
        addresses = (t.data_ptr() for t in (positions, frequencies, cosines, sines))
        self.do("rotation", cosines, *addresses, half, float(magnitude))
        return cosines, sines

    def rotate(self, x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        """[T, heads, D] -> [T, heads, D]."""
        x = _heads_together(x)
        y = self.new(x, x.size(1), x.size(2))
        addresses = (t.data_ptr() for t in (cosines, sines, y))
        sizes = (x.size(1), x.size(2), cosines.size(1))
        self.do("rotate", y, x.data_ptr(), x.stride(0), *addresses, *sizes)
        return y

    def store(self, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, slots: Tensor) -> None:
        """Write k and v [T, K, D] to their slots of one layer's cache."""
        assert can_attend(keys), "the cache lies as new_cache_layer makes it"
        k, v = _heads_together(k), _heads_together(v)
        self.do(
            "store",
            k,
            *(k.data_ptr(), v.data_ptr(), k.stride(0), v.stride(0)),
            *(slots.data_ptr(), keys.data_ptr(), values.data_ptr()),
            *(keys.dtype == torch.float16, k.size(1), k.size(2)),
        )

    def attention(
        self, q: Tensor, keys: Tensor, values: Tensor, batch: Batch, scale: float
    ) -> Tensor:
        """Q [T, N, D] against one layer's cache -> [T, N, D]."""
        assert can_attend(keys), "the cache lies as new_cache_layer makes it"
        q, tables = q.contiguous(), batch.block_tables.contiguous()
        out = self.new(q, q.size(1), q.size(2))
        failed = self.do(
            "attention",
            out,
            *(q.data_ptr(), keys.data_ptr(), values.data_ptr(), keys.dtype == torch.float16),
            *(tables.data_ptr(), tables.size(1), batch.query_starts.data_ptr()),
            *(batch.positions.data_ptr(), out.data_ptr()),
            *(q.size(1), keys.size(2), q.size(2), float(scale)),
            sequences=batch.query_starts.size(0) - 1,
        )
        if failed:
            raise MemoryError("no memory to share a long context among threads")
        return out

    def tile(self, part: Part) -> Part:
        """Return a quantised part as quantized_linear.c multiplies with it fastest."""
        data = torch.empty(
            -(-part.rows // TILE_OUTPUTS) * TILE_OUTPUTS, part.data.size(1), dtype=torch.uint8
        )
        self.tile_into(part.kind, part.data, data)
        return Part(part.kind, data, part.rows)

    def tile_into(self, kind: str, rows: Tensor, tiles: Tensor) -> None:
        """Put *rows* of *kind*, uint8 [rows, bytes], into *tiles*, padded to whole ones.

        On this thread alone: loading has several that do.
        """
        stored = STORED[kind]
        columns = rows.size(1) // stored.block_bytes * stored.block_elements
        assert rows.is_contiguous()
        assert tiles.is_contiguous()
        self.library.cortex_pack(
            *(KINDS[kind], rows.data_ptr(), rows.size(1), tiles.data_ptr()),
            *(rows.size(0), columns, 1),
        )

    def quantize(self, kind: str, weights: Tensor, packed: Tensor) -> None:
        """Quantise floats [M, K] of any width into *packed*, uint8 [M, bytes of a row]."""
        weights = weights.contiguous()
        failed = self.library.cortex_quantize(
            *(KINDS[DENSE_NAMES[weights.dtype]], weights.data_ptr(), KINDS[kind]),
            *(packed.data_ptr(), packed.size(1), *weights.shape, torch.get_num_threads()),
        )
        if failed:
            raise MemoryError("no memory to quantise rows in")

    def new(self, like: Tensor, *columns: int) -> Tensor:
        """Return an empty float32 tensor with as many rows as *like*."""
        return torch.empty(like.size(0), *columns)

    def do(self, name: str, rows_of: Tensor, *arguments: float, sequences: int = 0) -> int:
        """Run an operation on the rows of *rows_of*; return 0 unless it failed."""
        count = rows_of.size(0)
        step = Step(count, count, sequences, torch.get_num_threads())
        op = Op.of(name, arguments)
        where = (ctypes.addressof(op), 1, 0, 1)  # a list of one
        return int(self.library.cortex_run(*where, ctypes.addressof(step), None))


def new_cache_layer(
    blocks: int, kv_heads: int, head_dim: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return a layer's keys and values, [blocks, BLOCK_TOKENS, K, D] each, as attention wants them.

    In memory keys are [blocks, K, D, BLOCK_TOKENS], values [blocks, K, BLOCK_TOKENS, D].
    """
    keys = torch.empty(blocks, kv_heads, head_dim, BLOCK_TOKENS, dtype=dtype)
    values = torch.empty(blocks, kv_heads, BLOCK_TOKENS, head_dim, dtype=dtype)
    return keys.permute(0, 3, 1, 2), values.permute(0, 2, 1, 3)


def can_attend(keys: Tensor) -> bool:
    """Whether *keys* lie as ``new_cache_layer`` makes them, with heads that the kernel can hold."""
    _, tokens, _, size = keys.shape
    return (
        tokens == BLOCK_TOKENS
        and keys.stride()[1::2] == (1, BLOCK_TOKENS)
        and size <= MAX_HEAD
        and keys.device.type == "cpu"
    )


def _stack(matrix: ExpertMatrix) -> tuple[int, int, int, int]:
    """Return the matrices of all experts as experts.c draws them."""
    (part,) = matrix.parts
    assert not part.is_tiled or matrix.rows // matrix.experts % TILE_OUTPUTS == 0
    return KINDS[part.kind], part.is_tiled, part.data.data_ptr(), part.data.size(1)


def _heads_together(x: Tensor) -> Tensor:
    """[T, heads, D] with only the tokens strided, as the kernels read it."""
    return x if x.stride()[1:] == (x.size(2), 1) else x.contiguous()


class Recorder(CpuKernels, ABC):
    """What takes the operations of a model down instead of running them (``program``)."""

    @abstractmethod
    def all_reduce(self, x: Tensor, group: Group) -> Tensor:
        """Write down that [M, N] is summed over the ranks of *group*, in place; return it."""

    @abstractmethod
    def all_gather(self, x: Tensor, group: Group) -> Tensor:
        """Write down that [M, n] of all ranks is put side by side -> [M, n * ranks]."""


RECORDING: ContextVar[Recorder | None] = ContextVar("RECORDING", default=None)
"""Set while ``program`` records a model."""


def kernels_for(*tensors: Tensor) -> CpuKernels | None:
    """Return the kernels if they serve tensors of this device and width, here."""
    for x in tensors:
        if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.uint8):
            return None
    return RECORDING.get() or kernels()


@cache
def kernels() -> CpuKernels | None:
    """Compile or find the library, once per process; None, with one warning, where it cannot be."""
    try:
        return CpuKernels(load_library())
    except KernelsUnavailable as exc:
        log.warning(
            "CPU kernels are not available, plain torch serves: many times slower, and a "
            "sequence's logits are no longer bitwise independent of its batch (%s)",
            exc,
        )
        return None
