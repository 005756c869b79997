"""Rotary position embedding (Su et al., arXiv:2104.09864), in the halves convention.

Element i of what turns of a head turns with the element half of that behind it. GGUF files of llama
store queries and keys for the other convention, neighbours turning together; ``landing`` reorders
them. Here is how far each token turns; ``attention`` turns its queries and keys.

The angle of pair i of D / 2 is position * theta^(-2 i / D). Models made for longer contexts than
they were trained on turn slower, in one of these ways:

    Linear    all pairs, by one factor (arXiv:2306.15595)
    Llama3    those that turn less than a few times in the context trained on, by a factor;
              between slow and fast ones it falls to 1 (arXiv:2407.21783, and its model code)
    Yarn      the same with another ramp, and queries and keys grow a little (arXiv:2309.00071)
    Factors   each pair by its own factor, as GGUF files write Llama 3's way
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cortex.models.kernels import ops


class Rotation(NamedTuple):
    """The turn of each token: cosines and sines, float32 [T, D / 2]."""

    cosines: Tensor
    sines: Tensor


@dataclass(frozen=True, slots=True)
class Linear:
    """Every position counts as 1 / factor of one."""

    factor: float


@dataclass(frozen=True, slots=True)
class Llama3:
    """Pairs that turn low_turns times or less in original_tokens slow down by factor.

    Those that turn high_turns times or more stay as they are.
    """

    factor: float
    low_turns: float
    high_turns: float
    original_tokens: int


@dataclass(frozen=True, slots=True)
class Yarn:
    """Pairs that turn slow_turns times in original_tokens slow down by factor, fast ones do not.

    Between them runs a straight ramp by the number of the pair, from whole number to whole number
    where it is *truncated*. Queries and keys are *magnitude* times as large.
    """

    factor: float
    original_tokens: int
    magnitude: float
    fast_turns: float = 32.0
    slow_turns: float = 1.0
    is_truncated: bool = True


@dataclass(frozen=True, slots=True)
class Factors:
    """Pair i slows down by values[i]."""

    values: tuple[float, ...]


Scaling = Linear | Llama3 | Yarn | Factors


@dataclass(frozen=True, slots=True)
class Rope:
    """The rotary positions of a model; the first *dim* elements of a head turn."""

    dim: int
    theta: float
    scaling: Scaling | None = None

    @property
    def magnitude(self) -> float:
        """How much larger queries and keys become."""
        return self.scaling.magnitude if isinstance(self.scaling, Yarn) else 1.0


class Rotary(nn.Module):
    """Positions to rotations."""

    frequencies: Tensor  # [D / 2] float32

    def __init__(self, rope: Rope) -> None:
        super().__init__()
        self.magnitude = rope.magnitude
        self.register_buffer("frequencies", frequencies(rope))

    def forward(self, positions: Tensor) -> Rotation:
        """[T] -> rotations of T tokens, the same for every layer."""
        return Rotation(*ops.rotation(positions, self.frequencies, self.magnitude))


def frequencies(rope: Rope) -> Tensor:
    """Return how far each pair turns with one position, [D / 2] float32."""
    exponents = torch.arange(0, rope.dim, 2, dtype=torch.float32) / rope.dim
    plain = 1.0 / rope.theta**exponents
    match rope.scaling:
        case None:
            return plain
        case Linear(factor):
            return plain / factor
        case Factors(values):
            return plain / torch.tensor(values)
        case Llama3():
            return _between(plain, rope.scaling.factor, _llama3_share(plain, rope.scaling))
        case Yarn():
            return _between(plain, rope.scaling.factor, _yarn_share(rope, rope.scaling))


def _between(plain: Tensor, factor: float, share: Tensor) -> Tensor:
    """Return frequencies of which *share* stays as it is and the rest slows down by *factor*."""
    return plain * share + plain / factor * (1 - share)


def _llama3_share(plain: Tensor, scaling: Llama3) -> Tensor:
    turns = scaling.original_tokens * plain / (2 * math.pi)
    share = (turns - scaling.low_turns) / (scaling.high_turns - scaling.low_turns)
    return share.clamp(0, 1)


def _yarn_share(rope: Rope, scaling: Yarn) -> Tensor:
    def pair_of(turns: float) -> float:
        """Return which pair, in fractions, turns so often in the context trained on."""
        inverse = scaling.original_tokens / (turns * 2 * math.pi)
        return rope.dim * math.log(inverse) / (2 * math.log(rope.theta))

    first, last = pair_of(scaling.fast_turns), pair_of(scaling.slow_turns)
    if scaling.is_truncated:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rope.dim - 1)
    length = last - first or 0.001
    ramp = (torch.arange(rope.dim // 2, dtype=torch.float32) - first) / length
    return 1 - ramp.clamp(0, 1)
