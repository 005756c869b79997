"""Every operation in plain torch, on any device and dtype: what the fused kernels are held to.

Serves where no kernel does: on GPUs, in 16-bit floats, and on a CPU without a C compiler. Unlike
the C kernels it unpacks much of a matrix for every product, and torch may sum a row in another
order when the number of rows changes; so a sequence's logits are equal only to rounding in another
batch or chunking. Shapes as in ``models.batch``; M rows, N outputs, K inputs of a projection.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from cortex.models.batch import Batch
from cortex.models.kernels import planes
from cortex.models.kernels.blocks import UNPACK
from cortex.models.quantization import DENSE, STORED, ExpertMatrix, Part

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
"""Widths that activations may have."""

UNPACKED_AT_ONCE = 1 << 24
"""Weights unpacked for one product: in float32 64 MiB, where a large model's head would be GiBs."""


def dequantize(kind: str, data: Tensor, *, is_planar: bool = False) -> Tensor:
    """Unpack uint8 [M, bytes of a row] to float32 [M, K]; *is_planar* as in ``planes``."""
    if kind in DENSE:
        return data.view(DENSE[kind]).float()
    if is_planar:
        data = planes.stored(kind, data)
    blocks = data.reshape(data.size(0), -1, STORED[kind].block_bytes)
    return UNPACK[kind](blocks).flatten(1)


def rows(part: Part, ids: Tensor) -> Tensor:
    """Unpack rows *ids* [T] to float32 [T, K]; raises IndexError."""
    return dequantize(part.kind, part.data.index_select(0, ids), is_planar=part.is_planar)


def rows_of_share(part: Part, ids: Tensor, first: int, of: int) -> Tensor:
    """Unpack rows *ids* [T] of a matrix of *of* rows, of which *part* holds those from *first* on.

    [T, K] float32, zeros for the others; on a CPU IndexError for what is no row of the matrix.
    """
    is_beyond = not ids.is_cuda and bool(((ids < 0) | (ids >= of)).any())  # else it would wait
    if is_beyond:
        raise IndexError(f"row ids must be from 0 to {of - 1}")
    here = (ids >= first) & (ids < first + part.rows)
    return rows(part, torch.where(here, ids - first, 0)) * here[:, None]


def take(x: Tensor, ids: Tensor) -> Tensor:
    """Rows *ids* [R] of x [T, K] -> [R, K]."""
    return x[ids]


def add(x: Tensor, y: Tensor) -> Tensor:
    """[M, K] + [M, K] -> [M, K]."""
    return x + y


def linear(x: Tensor, parts: Sequence[Part]) -> Tensor:
    """X [M, K] times the transpose of the stacked parts [N, K] -> [M, N]."""
    products = [F.linear(x, w) for part in parts for w in weights(part, x.size(-1), x.dtype)]
    return products[0] if len(products) == 1 else torch.cat(products, dim=-1)


def weights(part: Part, columns: int, dtype: torch.dtype) -> Iterator[Tensor]:
    """Yield the rows of *part* as they multiply with *dtype*, unpacked as they are asked for."""
    if DENSE.get(part.kind) == dtype:
        yield part.data.view(dtype)
        return
    for data in torch.split(part.data, max(1, UNPACKED_AT_ONCE // columns)):
        yield dequantize(part.kind, data, is_planar=part.is_planar).to(dtype)


def add_bias(y: Tensor, bias: Tensor) -> Tensor:
    """[M, N] + float32 [N] -> [M, N] in the dtype of *y*."""
    return (y + bias).to(y.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """[..., K] -> [..., K]; computed in float32, returned in the dtype of *x*."""
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return (weight * (wide * scale)).to(x.dtype)


def add_rms_norm(x: Tensor, y: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """[M, K] and [M, K] -> their sum, and that normalised."""
    total = x + y
    return total, rms_norm(total, weight, eps)


def silu_multiply(gate_up: Tensor) -> Tensor:
    """[M, 2 K] -> [M, K]: silu of the first half times the second."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def route(logits: Tensor, top_k: int, *, is_normalised: bool) -> tuple[Tensor, Tensor]:
    """Router logits [T, E] -> ids [T, k] int64 and weights [T, k] float32, by falling weight."""
    ordered = logits.float().softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
    weights, ids = ordered.values[:, :top_k], ordered.indices[:, :top_k].contiguous()
    return ids, weights / weights.sum(dim=-1, keepdim=True) if is_normalised else weights


def experts(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    *,
    gate: ExpertMatrix,
    up: ExpertMatrix,
    down: ExpertMatrix,
) -> Tensor:
    """X [T, H] through the SwiGLUs *ids* [T, k], summed with *weights* [T, k] -> [T, H].

    Sorted by expert; how many tokens each has is read from the device.
    """
    top_k = ids.size(1)
    order = ids.flatten().argsort(stable=True)  # [T * k]
    counts = ids.flatten().bincount(minlength=gate.experts).tolist()
    outputs = torch.empty((order.size(0), x.size(1)), device=x.device, dtype=torch.float32)
    for expert, places in enumerate(torch.split(order, counts)):
        if places.size(0):
            rows_in = x[places // top_k]
            both = [linear(rows_in, [matrix.expert(expert)]) for matrix in (gate, up)]
            inner = silu_multiply(torch.cat(both, dim=-1))
            outputs[places] = linear(inner, [down.expert(expert)]).float()
    return (outputs.view(-1, top_k, x.size(1)) * weights[..., None]).sum(dim=1).to(x.dtype)


def add_gated(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """[M, K] + sigmoid(gate [M, 1]) * [M, K] -> [M, K]; the arithmetic is float32."""
    return (x.float() + gate.float().sigmoid() * y.float()).to(x.dtype)


def rotation(
    positions: Tensor, frequencies: Tensor, magnitude: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Cosines and sines, *magnitude* times as large, float32 [T, D / 2] each."""
    angles = positions[:, None].float() * frequencies
    return angles.cos() * magnitude, angles.sin() * magnitude


def rotate(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """[T, heads, D] -> [T, heads, D], halves convention; the arithmetic is float32.

    What is behind the first two halves that have cosines stays as it is.
    """
    cosines, sines = cosines[:, None], sines[:, None]  # [T, 1, D / 2]
    half = cosines.size(-1)
    first, second, rest = torch.split(x.float(), [half, half, x.size(-1) - 2 * half], dim=-1)
    rotated = (first * cosines - second * sines, second * cosines + first * sines, rest)
    return torch.cat(rotated, dim=-1).to(x.dtype)


def store(k: Tensor, v: Tensor, keys: Tensor, values: Tensor, slots: Tensor) -> None:
    """Write k and v [T, K, D] to their slots of one layer's cache."""
    blocks, positions = slots // keys.size(1), slots % keys.size(1)
    keys[blocks, positions] = k.to(keys.dtype)
    values[blocks, positions] = v.to(values.dtype)


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
    """Q [T, N, D] turned; k, turned, and v [T, K, D] written to their slots."""
    store(rotate(k, cosines, sines), v, keys, values, slots)
    return rotate(q, cosines, sines)


def attention(q: Tensor, keys: Tensor, values: Tensor, batch: Batch, scale: float) -> Tensor:
    """Q [T, N, D] against one layer's cache -> [T, N, D], one sequence after the other.

    Lengths are read from the device, so on a GPU every call waits for it, and none can be captured:
    RuntimeError, before anything spoils the capture, of which torch 2.11 would not let go any more
    (pytorch/pytorch#180395).
    """
    if q.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("attention by plain torch asks the device for lengths")
    out = torch.empty_like(q)
    starts, contexts = batch.query_starts.tolist(), batch.context_tokens.tolist()
    for index, context in enumerate(contexts):
        tokens = slice(starts[index], starts[index + 1])
        blocks = batch.block_tables[index, : -(-context // batch.cache.block_tokens)]
        out[tokens] = _attend(
            q[tokens],
            keys[blocks].flatten(0, 1)[:context].to(q.dtype),
            values[blocks].flatten(0, 1)[:context].to(q.dtype),
            scale,
        )
    return out


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """The last q.size(0) positions of one sequence, [T, N, D], against all of it, [C, K, D]."""
    tokens, context = q.size(0), k.size(0)
    column = torch.arange(context, device=q.device)
    visible = column <= torch.arange(context - tokens, context, device=q.device)[:, None]  # [T, C]
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))  # [1, heads, tokens, D]
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=visible, scale=scale, enable_gqa=q.size(1) != k.size(1)
    )
    return out[0].transpose(0, 1)
