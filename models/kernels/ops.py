"""The operations architectures are written in; each takes the fastest way that serves its inputs.

    where   what                                                    see
    a CPU   the C kernels, in float32, where it could compile them  cpu.py
    a GPU   torch's libraries and our Triton kernels                cuda.py
    else    plain torch                                             reference.py

The functions of ``reference`` say what each of these returns. Some operations do two things because
a GPU is much faster at both together; a CPU does them one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from cortex.models.batch import Batch
from cortex.models.kernels import cpu, cuda, reference
from cortex.models.quantization import Matrix, Part


def linear(x: Tensor, parts: Sequence[Part], *, is_batch_invariant: bool = False) -> Tensor:
    """X [M, K] times the transpose of the stacked parts [N, K] -> [M, N].

    On a GPU a row's bits depend on the other rows unless it *is_batch_invariant*.
    """
    if on_gpu := cuda.kernels_for(x):
        return on_gpu.linear(x, parts, is_batch_invariant=is_batch_invariant)
    fast = cpu.kernels_for(x)
    return fast.linear(x, parts) if fast else reference.linear(x, parts)


def rows(matrix: Matrix, ids: Tensor) -> Tensor:
    """Look up rows *ids* [T] of a matrix -> float32 [T, K]; an id that is no row is IndexError."""
    (part,) = matrix.parts
    fast = cpu.kernels_for(part.data)
    return fast.rows(part, ids) if fast else reference.rows(part, ids)


def take(x: Tensor, ids: Tensor) -> Tensor:
    """Rows *ids* [R] of x [T, K] -> [R, K]."""
    fast = cpu.kernels_for(x)
    return fast.take(x, ids) if fast else reference.take(x, ids)


def add(x: Tensor, y: Tensor) -> Tensor:
    """[M, K] + [M, K] -> [M, K]; torch's own sum would wake a second set of threads on a CPU."""
    fast = cpu.kernels_for(x, y)
    return fast.add(x, y) if fast else reference.add(x, y)


def add_bias(y: Tensor, bias: Tensor) -> Tensor:
    """[M, N] + [N] -> [M, N], which may be *y* itself; the sum is float32, rounded to y's width."""
    fast = cuda.kernels_for(y) or cpu.kernels_for(y, bias)
    return fast.add_bias(y, bias) if fast else reference.add_bias(y, bias)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """[..., K] -> [..., K] of two or three dimensions: x / rms(x) * weight, row by row."""
    fast = cuda.kernels_for(x) or cpu.kernels_for(x, weight)
    return fast.rms_norm(x, weight, eps) if fast else reference.rms_norm(x, weight, eps)


def add_rms_norm(x: Tensor, y: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """[M, K] and [M, K] -> their sum, and that sum normalised as by ``rms_norm``."""
    if on_gpu := cuda.kernels_for(x):
        return on_gpu.add_rms_norm(x, y, weight, eps)
    total = add(x, y)
    return total, rms_norm(total, weight, eps)


def silu_multiply(gate_up: Tensor) -> Tensor:
    """[M, 2 K] -> [M, K]: silu of the first half times the second."""
    fast = cuda.kernels_for(gate_up) or cpu.kernels_for(gate_up)
    return fast.silu_multiply(gate_up) if fast else reference.silu_multiply(gate_up)


def rotation(positions: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines of positions [T] times frequencies [D / 2], float32 [T, D / 2] each."""
    fast = cpu.kernels_for(frequencies)
    compute = fast.rotation if fast else reference.rotation
    return compute(positions, frequencies)


def rotate(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """[T, heads, D] -> [T, heads, D], halves convention."""
    fast = cpu.kernels_for(x)
    return fast.rotate(x, cosines, sines) if fast else reference.rotate(x, cosines, sines)


def store(k: Tensor, v: Tensor, keys: Tensor, values: Tensor, slots: Tensor) -> None:
    """Write k and v [T, K, D] to their slots of one layer's cache."""
    fast = cpu.kernels_for(k) if cpu.can_attend(keys) else None
    write = fast.store if fast else reference.store
    write(k, v, keys, values, slots)


def rotate_and_store(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cosines: Tensor,
    sines: Tensor,
    *,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
) -> Tensor:
    """Turn q [T, N, D] -> [T, N, D]; write k, turned, and v [T, K, D] to their slots."""
    if on_gpu := cuda.kernels_for(q):
        return on_gpu.rotate_and_store(
            q, k, v, cosines, sines, keys=keys, values=values, slots=slots
        )
    rotated = rotate(q, cosines, sines)
    store(rotate(k, cosines, sines), v, keys, values, slots)
    return rotated


def attention(q: Tensor, keys: Tensor, values: Tensor, batch: Batch, scale: float) -> Tensor:
    """Q [T, N, D] against one layer's cache, causally -> [T, N, D]."""
    if on_gpu := cuda.kernels_for(q):
        return on_gpu.attention(q, keys, values, batch, scale)
    fast = cpu.kernels_for(q) if cpu.can_attend(keys) else None
    attend = fast.attention if fast else reference.attention
    return attend(q, keys, values, batch, scale)
