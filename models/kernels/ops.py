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
from cortex.models.kernels import cpu, cuda, reference, reference_delta
from cortex.models.kernels.cpu_delta import MAX_KEY_DIM
from cortex.models.kernels.reference_delta import DeltaHeads
from cortex.models.parallel import Cut, Group
from cortex.models.quantization import ExpertMatrix, Matrix, Part


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
    fast = cuda.kernels_for_rows(part) or cpu.kernels_for(part.data)
    return fast.rows(part, ids) if fast else reference.rows(part, ids)


def rows_of_share(matrix: Matrix, ids: Tensor, cut: Cut) -> Tensor:
    """Look up those of rows *ids* [T] that a rank holds -> float32 [T, K], zeros for the others."""
    (part,) = matrix.parts
    ((first, _),) = cut.ranges
    fast = cuda.kernels_for_rows(part) or cpu.kernels_for(part.data)
    find = fast.rows_of_share if fast else reference.rows_of_share
    return find(part, ids, first, cut.of)


def all_reduce(x: Tensor, group: Group) -> Tensor:
    """Sum [M, N] over the ranks of *group* -> [M, N], which may be *x* itself."""
    if group.collectives is None:
        return x
    recorder = cpu.RECORDING.get()
    if recorder is not None:
        return recorder.all_reduce(x.contiguous(), group)
    return group.collectives.all_reduce(x.contiguous())


def all_gather(x: Tensor, group: Group) -> Tensor:
    """Put the columns [M, n] of all ranks of *group* side by side -> [M, n * ranks]."""
    if group.collectives is None:
        return x
    recorder = cpu.RECORDING.get()
    if recorder is not None:
        return recorder.all_gather(x.contiguous(), group)
    return group.collectives.all_gather(x.contiguous())


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


def route(logits: Tensor, top_k: int, *, is_normalised: bool) -> tuple[Tensor, Tensor]:
    """Router logits [T, E] -> the experts of each token [T, k] int64, their weights float32 [T, k].

    By falling weight, and of equal ones the first; they are the softmax over all experts, divided
    by the sum of the chosen where *is_normalised*.
    """
    fast = cuda.kernels_for(logits) or cpu.kernels_for(logits)
    choose = fast.route if fast else reference.route
    return choose(logits, top_k, is_normalised=is_normalised)


def experts(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    *,
    gate: ExpertMatrix,
    up: ExpertMatrix,
    down: ExpertMatrix,
    is_batch_invariant: bool = False,
) -> Tensor:
    """X [T, H] through the SwiGLUs *ids* [T, k], summed with *weights* [T, k] -> [T, H].

    On a GPU a row's bits depend on the other rows unless it *is_batch_invariant*.
    """
    if on_gpu := cuda.kernels_for(x):
        return on_gpu.experts(
            x, ids, weights, gate=gate, up=up, down=down, is_batch_invariant=is_batch_invariant
        )
    matrices = [part.data for matrix in (gate, up, down) for part in matrix.parts]
    fast = cpu.kernels_for(x, *matrices)
    compute = fast.experts if fast else reference.experts
    return compute(x, ids, weights, gate=gate, up=up, down=down)


def add_gated(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """[M, K] + sigmoid(gate [M, 1]) * [M, K] -> [M, K]."""
    fast = cpu.kernels_for(x, y, gate)
    return fast.add_gated(x, y, gate) if fast else reference.add_gated(x, y, gate)


def rotation(
    positions: Tensor, frequencies: Tensor, magnitude: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of positions [T] times frequencies [D / 2], float32 [T, D / 2] each.

    They are *magnitude* times as large.
    """
    fast = cpu.kernels_for(frequencies)
    compute = fast.rotation if fast else reference.rotation
    return compute(positions, frequencies, magnitude)


def rotate(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """[T, heads, D] -> [T, heads, D], halves convention; what has no cosine stays as it is."""
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


def causal_convolution(x: Tensor, weight: Tensor, kept: Tensor, batch: Batch) -> Tensor:
    """X [T, C] along each sequence, and silu of that -> [T, C]; *kept* are inputs of before."""
    fast = cuda.kernels_for(x) or cpu.kernels_for(x, weight, kept) or reference_delta
    return fast.causal_convolution(x, weight, kept, batch)


def gated_delta_rule(
    qkv: Tensor,
    ba: Tensor,
    rate: Tensor,
    bias: Tensor,
    *,
    states: Tensor,
    heads: DeltaHeads,
    batch: Batch,
) -> Tensor:
    """[q | k | v] [T, C] and [b | a] [T, 2 V] -> [T, V, value_dim]; states are read and written."""
    on_cpu = cpu.kernels_for(qkv, ba, states) if heads.key_dim <= MAX_KEY_DIM else None
    fast = cuda.kernels_for(qkv) or on_cpu or reference_delta
    return fast.gated_delta_rule(qkv, ba, rate, bias, states=states, heads=heads, batch=batch)


def gated_rms_norm(x: Tensor, z: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm of each head of x [T, V, D], times silu of z [T, V * D] -> [T, V * D]."""
    fast = cuda.kernels_for(x) or cpu.kernels_for(x, z, weight) or reference_delta
    return fast.gated_rms_norm(x, z, weight, eps)


def sigmoid_multiply(x: Tensor, gate: Tensor) -> Tensor:
    """[M, K] times sigmoid of a gate [M, K] -> [M, K]."""
    fast = cuda.kernels_for(x) or cpu.kernels_for(x, gate) or reference_delta
    return fast.sigmoid_multiply(x, gate)
