"""What the bytes of stored blocks mean, in plain torch, on any device.

Every function takes blocks uint8 [M, blocks, bytes of a block], as ``models.quantization`` draws
them, to elements float32, in order, [M, blocks, ...]. All of them multiply in the order in which
llama.cpp does, so that they agree with it to the last bit.

Codes of fewer than 8 bits share bytes: in a run of bytes the lowest bits are the first elements,
one from each byte, and the next higher ones follow after the last byte of the run:

    4 bits  run of 16 bytes   elements 0 to 15 low, 16 to 31 high      types of 32 elements, IQ4_XS
            run of 32         0 to 31 low, 32 to 63 high               Q4_K, Q5_K
            run of 64         0 to 63 low, 64 to 127 high              Q6_K
    2 bits  run of 32         0 to 31, 32 to 63, 64 to 95, 96 to 127   Q2_K, Q3_K, Q6_K's high bits
    1 bit   run of 32         eight times 32                           h of Q3_K, Q5_K
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cortex.models.quantization import CURVE


def _q4_0(blocks: Tensor) -> Tensor:
    return (_codes(blocks[..., 2:], 4, 16) - 8.0) * _half(blocks, 0)


def _q4_1(blocks: Tensor) -> Tensor:
    return _codes(blocks[..., 4:], 4, 16) * _half(blocks, 0) + _half(blocks, 2)


def _q5_0(blocks: Tensor) -> Tensor:
    quants = _codes(blocks[..., 6:], 4, 16) + _fifth_bits(blocks, 2)
    return (quants - 16.0) * _half(blocks, 0)


def _q5_1(blocks: Tensor) -> Tensor:
    quants = _codes(blocks[..., 8:], 4, 16) + _fifth_bits(blocks, 4)
    return quants * _half(blocks, 0) + _half(blocks, 2)


def _q8_0(blocks: Tensor) -> Tensor:
    return _signed(blocks[..., 2:]) * _half(blocks, 0)


def _iq4_nl(blocks: Tensor) -> Tensor:
    return _on_curve(_fields(blocks[..., 2:], 4, 16)) * _half(blocks, 0)


def _q2_k(blocks: Tensor) -> Tensor:
    scales = _half(blocks, 80) * (blocks[..., :16] & 15).float()
    minima = _half(blocks, 82) * (blocks[..., :16] >> 4).float()
    quants = _runs(_codes(blocks[..., 16:80], 2, 32), 16)
    return quants * scales[..., None] - minima[..., None]


def _q3_k(blocks: Tensor) -> Tensor:
    low = _fields(blocks[..., 96:104], 4, 8)
    high = _fields(blocks[..., 104:108], 2, 4)
    scales = _half(blocks, 108) * ((low | high << 4).float() - 32.0)  # [M, blocks, 16]
    quants = _fields(blocks[..., 32:96], 2, 32) | _fields(blocks[..., :32], 1, 32) << 2
    return _runs(quants.float() - 4.0, 16) * scales[..., None]


def _q4_k(blocks: Tensor) -> Tensor:
    return _scaled_by_six_bits(blocks, _fields(blocks[..., 16:], 4, 32))


def _q5_k(blocks: Tensor) -> Tensor:
    high = _fields(blocks[..., 16:48], 1, 32)
    return _scaled_by_six_bits(blocks, _fields(blocks[..., 48:], 4, 32) | high << 4)


def _q6_k(blocks: Tensor) -> Tensor:
    quants = _fields(blocks[..., :128], 4, 64) | _fields(blocks[..., 128:192], 2, 32) << 4
    scales = _half(blocks, 208) * _signed(blocks[..., 192:208])  # [M, blocks, 16]
    return _runs(quants.float() - 32.0, 16) * scales[..., None]


def _iq4_xs(blocks: Tensor) -> Tensor:
    low = blocks[..., 4:8, None] >> _shifts(blocks, 4) & 15  # [M, blocks, 4, 2]
    high = blocks[..., 2:4, None] >> _shifts(blocks, 2) & 3  # [M, blocks, 2, 4]
    scales = _half(blocks, 0) * ((low.flatten(-2) | high.flatten(-2) << 4).float() - 32.0)
    quants = _on_curve(_fields(blocks[..., 8:], 4, 16))
    return _runs(quants, 32) * scales[..., None]


def _fp8(blocks: Tensor) -> Tensor:
    scales = blocks[..., :4].contiguous().view(torch.float32)
    return blocks[..., 4:].contiguous().view(torch.float8_e4m3fn).float() * scales


def _scaled_by_six_bits(blocks: Tensor, quants: Tensor) -> Tensor:
    """Q4_K and Q5_K: codes [M, blocks, 256] by the 12 bytes of scales and minima behind d and m.

    The first four of each have their six bits in a byte of their own; the others have four in the
    last bytes and two in what the first ones leave free.
    """
    first, second, third = blocks[..., 4:8], blocks[..., 8:12], blocks[..., 12:16]
    scales = torch.cat((first & 63, third & 15 | first >> 2 & 48), dim=-1)
    minima = torch.cat((second & 63, third >> 4 | second >> 2 & 48), dim=-1)
    step, least = _half(blocks, 0) * scales.float(), _half(blocks, 2) * minima.float()
    return _runs(quants.float(), 32) * step[..., None] - least[..., None]


def _codes(packed: Tensor, bits: int, run: int) -> Tensor:
    return _fields(packed, bits, run).float()


def _fields(packed: Tensor, bits: int, run: int) -> Tensor:
    """Fields of so many bits, uint8 [M, blocks, n] to [M, blocks, n * 8 / bits], by runs of bytes.

    A run of bytes holds its lowest fields first, one byte after the other.
    """
    runs = packed.reshape(*packed.shape[:2], -1, 1, run)
    return (runs >> _shifts(packed, bits)[:, None] & (1 << bits) - 1).flatten(2)


def _runs(elements: Tensor, size: int) -> Tensor:
    """[M, blocks, n] to [M, blocks, n / size, size]: the elements that share a scale."""
    return elements.reshape(*elements.shape[:-1], -1, size)


def _shifts(like: Tensor, bits: int) -> Tensor:
    """Where the fields of a byte begin, lowest first."""
    return torch.arange(0, 8, bits, dtype=torch.uint8, device=like.device)


def _fifth_bits(blocks: Tensor, offset: int) -> Tensor:
    """Return 16 where an element's bit is set in the 4 bytes at *offset*, float32 [.., .., 32]."""
    bits = blocks[..., offset : offset + 4, None] >> _shifts(blocks, 1) & 1  # [M, blocks, 4, 8]
    return bits.flatten(-2).float() * 16.0


def _half(blocks: Tensor, offset: int) -> Tensor:
    """Return the float16 at a byte offset of every block, as float32 [M, blocks, 1]."""
    return blocks[..., offset : offset + 2].contiguous().view(torch.float16).float()


def _signed(packed: Tensor) -> Tensor:
    return packed.contiguous().view(torch.int8).float()


def _on_curve(codes: Tensor) -> Tensor:
    return torch.tensor(CURVE, dtype=torch.float32, device=codes.device)[codes.int()]


UNPACK: dict[str, Callable[[Tensor], Tensor]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "IQ4_NL": _iq4_nl,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "IQ4_XS": _iq4_xs,
    "FP8": _fp8,
}
"""The quantised types."""
