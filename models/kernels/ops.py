"""The operations architectures are written in; each takes the fastest way that serves its inputs.

On a CPU in float32 that is the C kernels (``cpu``), where this machine could compile them;
otherwise plain torch (``reference``), whose functions say what each of these returns.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from cortex.models.batch import Batch
from cortex.models.kernels import cpu, reference
from cortex.models.quantization import Matrix, Part


def linear(x: Tensor, parts: Sequence[Part]) -> Tensor:
    """X [M, K] times the transpose of the stacked parts [N, K] -> [M, N]."""
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
    return fast.take(x, ids) if fast else x[ids]


def add(x: Tensor, y: Tensor) -> Tensor:
    """[M, K] + [M, K] -> [M, K]; torch's own sum would wake a second set of threads on a CPU."""
    fast = cpu.kernels_for(x, y)
    return fast.add(x, y) if fast else x + y


def add_bias(y: Tensor, bias: Tensor) -> Tensor:
    """[M, N] + [N] -> [M, N], which may be *y* itself; the sum is float32, rounded to y's width."""
    fast = cpu.kernels_for(y, bias)
    return fast.add_bias(y, bias) if fast else reference.add_bias(y, bias)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """[..., K] -> [..., K] of two or three dimensions: x / rms(x) * weight, row by row."""
    fast = cpu.kernels_for(x, weight)
    return fast.rms_norm(x, weight, eps) if fast else reference.rms_norm(x, weight, eps)


def silu_multiply(gate_up: Tensor) -> Tensor:
    """[M, 2 K] -> [M, K]: silu of the first half times the second."""
    fast = cpu.kernels_for(gate_up)
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


def attention(q: Tensor, keys: Tensor, values: Tensor, batch: Batch, scale: float) -> Tensor:
    """Q [T, N, D] against one layer's cache, causally -> [T, N, D]."""
    fast = cpu.kernels_for(q) if cpu.can_attend(keys) else None
    attend = fast.attention if fast else reference.attention
    return attend(q, keys, values, batch, scale)
