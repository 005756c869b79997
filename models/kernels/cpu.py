"""The operations of cpu_ops.c, called through ctypes, which lets other Python threads run.

Each method returns what its namesake in ``reference`` returns. They use as many threads as torch
is set to, from a pool of their own (thread_pool.c says why).
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Sequence
from ctypes import c_float, c_int, c_int64, c_void_p
from functools import cache

import torch
from torch import Tensor

from cortex.models.batch import Batch
from cortex.models.kernels.compiler import KernelsUnavailable, load_library
from cortex.models.quantization import STORED, Part

KINDS = {"F32": 0, "F16": 1, "BF16": 2, "Q4_0": 3, "Q4_1": 4, "Q8_0": 5}  # enum in cpu_ops.c
MAX_HEAD = 256  # as in cpu_ops.c

SIGNATURES = {
    "cortex_rows": (c_int, c_void_p, c_int64, c_void_p, c_void_p, c_int, c_int64, c_int),
    "cortex_add": (c_void_p, c_void_p, c_void_p, c_int, c_int, c_int),
    "cortex_linear": (
        *(c_int, c_void_p, c_int64, c_void_p, c_void_p, c_int64),
        *(c_int, c_int, c_int, c_int),
    ),
    "cortex_rms_norm": (c_void_p, c_void_p, c_void_p, c_int, c_int, c_float, c_int),
    "cortex_silu_multiply": (c_void_p, c_void_p, c_int, c_int, c_int),
    "cortex_rotation": (c_void_p, c_void_p, c_void_p, c_void_p, c_int, c_int),
    "cortex_rotate": (c_void_p, c_int64, c_void_p, c_void_p, c_void_p, c_int, c_int, c_int),
    "cortex_store": (
        *(c_void_p, c_void_p, c_int64, c_int64, c_void_p),
        *(c_void_p, c_void_p, c_int, c_int),
    ),
    "cortex_attention": (
        *(c_void_p, c_void_p, c_void_p, c_void_p, c_int, c_void_p, c_int, c_void_p, c_void_p),
        *(c_int, c_int, c_int, c_int, c_float, c_int),
    ),
}

MAY_FAIL = ("cortex_rows", "cortex_linear")

log = logging.getLogger(__name__)


class CpuKernels:
    """The compiled operations; each returns what its namesake in ``reference`` returns.

    All tensors are on the CPU, activations float32. Results of one row are bitwise the same
    whatever other rows there are and whatever the number of threads.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        for name, types in SIGNATURES.items():
            function = getattr(library, name)
            function.argtypes = types
            function.restype = c_int if name in MAY_FAIL else None
        self.c = library

    def rows(self, part: Part, ids: Tensor) -> Tensor:
        """Unpack rows *ids* [T] to float32 [T, K]; raises IndexError."""
        stored = STORED[part.kind]
        columns = part.data.size(1) // stored.block_bytes * stored.block_elements
        ids = ids.contiguous()
        y = torch.empty(ids.size(0), columns)
        failed = self.c.cortex_rows(
            KINDS[part.kind],
            part.data.data_ptr(),
            part.data.size(1),
            ids.data_ptr(),
            y.data_ptr(),
            ids.size(0),
            part.rows,
            columns,
        )
        if failed:
            raise IndexError(f"row ids must be from 0 to {part.rows - 1}")
        return y

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        """[M, K] + [M, K] -> [M, K]."""
        x, y = x.contiguous(), y.contiguous()
        out = torch.empty_like(x)
        self.c.cortex_add(
            x.data_ptr(), y.data_ptr(), out.data_ptr(), *x.shape, torch.get_num_threads()
        )
        return out

    def linear(self, x: Tensor, parts: Sequence[Part]) -> Tensor:
        """X [M, K] times the transpose of the stacked parts [N, K] -> [M, N]."""
        x = x.contiguous()
        y = torch.empty(x.size(0), sum(part.rows for part in parts))
        to = y.data_ptr()
        for part in parts:
            failed = self.c.cortex_linear(
                KINDS[part.kind],
                part.data.data_ptr(),
                part.data.size(1),
                x.data_ptr(),
                to,
                y.size(1),
                x.size(0),
                part.rows,
                x.size(1),
                torch.get_num_threads(),
            )
            if failed:
                raise MemoryError("no memory to unpack weights into")
            to += part.rows * y.element_size()
        return y

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """[M, K] -> [M, K]."""
        x = x.contiguous()
        y = torch.empty_like(x)
        self.c.cortex_rms_norm(
            x.data_ptr(),
            weight.data_ptr(),
            y.data_ptr(),
            x.size(0),
            x.size(1),
            eps,
            torch.get_num_threads(),
        )
        return y

    def silu_multiply(self, gate_up: Tensor) -> Tensor:
        """[M, 2 K] -> [M, K]."""
        gate_up = gate_up.contiguous()
        y = torch.empty(gate_up.size(0), gate_up.size(1) // 2)
        self.c.cortex_silu_multiply(
            gate_up.data_ptr(), y.data_ptr(), y.size(0), y.size(1), torch.get_num_threads()
        )
        return y

    def rotation(self, positions: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines, float32 [T, D / 2] each."""
        positions = positions.contiguous()
        cosines = torch.empty(positions.size(0), frequencies.size(0))
        sines = torch.empty_like(cosines)
        self.c.cortex_rotation(
            positions.data_ptr(),
            frequencies.data_ptr(),
            cosines.data_ptr(),
            sines.data_ptr(),
            positions.size(0),
            frequencies.size(0),
        )
        return cosines, sines

    def rotate(self, x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        """[T, heads, D] -> [T, heads, D]."""
        x = _heads_together(x)
        y = torch.empty(x.shape)
        self.c.cortex_rotate(
            x.data_ptr(),
            x.stride(0),
            cosines.data_ptr(),
            sines.data_ptr(),
            y.data_ptr(),
            *x.shape,
        )
        return y

    def store(self, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, slots: Tensor) -> None:
        """Write k and v [T, K, D] to their slots of one layer's cache."""
        k, v = _heads_together(k), _heads_together(v)
        self.c.cortex_store(
            k.data_ptr(),
            v.data_ptr(),
            k.stride(0),
            v.stride(0),
            slots.data_ptr(),
            keys.data_ptr(),
            values.data_ptr(),
            k.size(0),
            k.size(1) * k.size(2),
        )

    def attention(
        self, q: Tensor, keys: Tensor, values: Tensor, batch: Batch, scale: float
    ) -> Tensor:
        """Q [T, N, D] against one layer's cache -> [T, N, D]."""
        q, tables = q.contiguous(), batch.block_tables.contiguous()
        out = torch.empty_like(q)
        self.c.cortex_attention(
            q.data_ptr(),
            keys.data_ptr(),
            values.data_ptr(),
            tables.data_ptr(),
            tables.size(1),
            batch.query_starts.data_ptr(),
            batch.query_starts.size(0) - 1,
            batch.positions.data_ptr(),
            out.data_ptr(),
            q.size(1),
            keys.size(2),
            q.size(2),
            batch.cache.block_tokens,
            scale,
            torch.get_num_threads(),
        )
        return out


def _heads_together(x: Tensor) -> Tensor:
    """[T, heads, D] with only the tokens strided, as the kernels read it."""
    return x if x.stride()[1:] == (x.size(2), 1) else x.contiguous()


def kernels_for(*tensors: Tensor) -> CpuKernels | None:
    """Return the kernels if they serve tensors of this device and width, here."""
    for x in tensors:
        if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.uint8):
            return None
    return kernels()


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
