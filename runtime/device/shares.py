"""How likely tokens are beside the likeliest, the same bits on every device.

    share(i) = exp((x_i - max(x)) * (1 / temperature))

in float64, by single additions and products, each rounded, which no device may do otherwise: the
exponential of a library differs from the next one's in its last bits. Those of the compiled path
(models/kernels/sampling.c) are these. The exponential is within 2**-50 of the true one:

    exp(r + n ln 2) = 2**n p(r),  |r| <= ln(2) / 2

with p, of degree 10, the polynomial whose largest relative error is least (Remez's exchange).
"""

from __future__ import annotations

import torch
from torch import Tensor

SPREAD = 32.0
"""What is less likely by exp(32) is taken for exp(32) less likely: in units of 2**-44 it is 0."""
_LARGEST_RATE = 1e300
_LOG2_E = float.fromhex("0x1.71547652b82fep+0")
_LN2_HIGH = float.fromhex("0x1.62e42fee00000p-1")  # times a whole number below 2**21 it is exact
_LN2_LOW = float.fromhex("0x1.a39ef35793c76p-33")
_POWERS = (  # of r**10 to r**2
    2.7476779552864355e-07,
    2.7635005925865986e-06,
    2.4801931856589663e-05,
    0.00019841185203323114,
    0.0013888888516006123,
    0.008333333370891925,
    0.041666666668137634,
    0.16666666666611513,
    0.49999999999998324,
)


def rate(temperature: float) -> float:
    """Return what distances are multiplied by; finite also for a vanishing *temperature*."""
    return min(1 / temperature, _LARGEST_RATE)


def shares(logits: Tensor, rates: Tensor | None = None) -> Tensor:
    """[R, V] -> [R, V] float64, 1 for the likeliest; *rates* are [R, 1], or all 1."""
    exact = logits.double()
    below = exact - exact.amax(dim=-1, keepdim=True)
    if rates is not None:
        below.mul_(rates)
    return _exp(below.clamp_(min=-SPREAD))


def _exp(x: Tensor) -> Tensor:
    """Return exp(x) for -SPREAD <= x <= 0, float64; *x* is used up."""
    n = (x * _LOG2_E).round_()
    r = x.sub_(n * _LN2_HIGH).sub_(n * _LN2_LOW)
    p = r * _POWERS[0]
    for power in _POWERS[1:]:
        p.add_(power).mul_(r)
    p.mul_(r).add_(r).add_(1.0)
    return p.mul_(n.long().add_(1023).bitwise_left_shift_(52).view(torch.float64))
