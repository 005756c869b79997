"""Every operation in plain torch, on any device and dtype: what the fused kernels are held to.

Serves where no kernel does: on GPUs, in 16-bit floats, and on a CPU without a C compiler. Unlike
the C kernels it unpacks much of a matrix for every product, and torch may sum a row in another
order when the number of rows changes; so a sequence's logits are equal only to rounding in another
batch or chunking. Shapes as in ``models.batch``; M rows, N outputs, K inputs of a projection.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from cortex.models.batch import Batch
from cortex.models.quantization import DENSE, Part

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
"""Widths that activations may have."""

UNPACKED_AT_ONCE = 1 << 24
"""Weights unpacked for one product: in float32 64 MiB, where a large model's head would be GiBs."""


def dequantize(kind: str, data: Tensor) -> Tensor:
    """Unpack uint8 [M, bytes of a row] to float32 [M, K]."""
    if kind in DENSE:
        return data.view(DENSE[kind]).float()
    return UNPACK[kind](data).flatten(1)


def rows(part: Part, ids: Tensor) -> Tensor:
    """Unpack rows *ids* [T] to float32 [T, K]; raises IndexError."""
    return dequantize(part.kind, part.data.index_select(0, ids))


def _q4_0(data: Tensor) -> Tensor:
    blocks = data.reshape(data.size(0), -1, 18)
    return (_nibbles(blocks[..., 2:]) - 8.0) * _half(blocks, 0)


def _q4_1(data: Tensor) -> Tensor:
    blocks = data.reshape(data.size(0), -1, 20)
    return _nibbles(blocks[..., 4:]) * _half(blocks, 0) + _half(blocks, 2)


def _q5_0(data: Tensor) -> Tensor:
    blocks = data.reshape(data.size(0), -1, 22)
    return (_nibbles(blocks[..., 6:]) + _fifth_bits(blocks, 2) - 16.0) * _half(blocks, 0)


def _q5_1(data: Tensor) -> Tensor:
    blocks = data.reshape(data.size(0), -1, 24)
    quants = _nibbles(blocks[..., 8:]) + _fifth_bits(blocks, 4)
    return quants * _half(blocks, 0) + _half(blocks, 2)


def _q8_0(data: Tensor) -> Tensor:
    blocks = data.reshape(data.size(0), -1, 34)
    return blocks[..., 2:].contiguous().view(torch.int8).float() * _half(blocks, 0)


def _nibbles(quants: Tensor) -> Tensor:
    """[M, blocks, 16] bytes to [M, blocks, 32] float32 from 0 to 15."""
    return torch.cat((quants & 15, quants >> 4), dim=-1).float()


def _fifth_bits(blocks: Tensor, offset: int) -> Tensor:
    """Return 16 where an element's bit is set in the 4 bytes at *offset*, float32 [.., .., 32]."""
    places = torch.arange(8, dtype=torch.uint8, device=blocks.device)
    bits = blocks[..., offset : offset + 4, None] >> places & 1  # [M, blocks, 4, 8]
    return bits.flatten(-2).float() * 16.0


def _half(blocks: Tensor, offset: int) -> Tensor:
    """Return the float16 at a byte offset of every block, as float32 [M, blocks, 1]."""
    return blocks[..., offset : offset + 2].contiguous().view(torch.float16).float()


UNPACK: dict[str, Callable[[Tensor], Tensor]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
}


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
        yield dequantize(part.kind, data).to(dtype)


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


def rotation(positions: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines, float32 [T, D / 2] each."""
    angles = positions[:, None].float() * frequencies
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """[T, heads, D] -> [T, heads, D], halves convention; the arithmetic is float32."""
    cosines, sines = cosines[:, None], sines[:, None]  # [T, 1, D / 2]
    first, second = x.float().chunk(2, dim=-1)
    rotated = (first * cosines - second * sines, second * cosines + first * sines)
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
