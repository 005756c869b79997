"""Rotary position embedding (Su et al., arXiv:2104.09864), in the halves convention.

Element i of a head's first half turns with element i of its second half. GGUF files of llama store
queries and keys for the other convention, neighbours turning together; ``weights`` reorders them.
Here is how far each token turns; ``attention`` turns its queries and keys.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from cortex.models.kernels import ops


class Rotation(NamedTuple):
    """The turn of each token: cosines and sines, float32 [T, D / 2]."""

    cosines: Tensor
    sines: Tensor


class Rotary(nn.Module):
    """Positions to rotations; the frequencies are theta^(-2 i / D)."""

    frequencies: Tensor  # [D / 2] float32

    def __init__(self, head_dim: int, theta: float) -> None:
        super().__init__()
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
        self.register_buffer("frequencies", 1.0 / theta**exponents)

    def forward(self, positions: Tensor) -> Rotation:
        """[T] -> rotations of T tokens, the same for every layer."""
        return Rotation(*ops.rotation(positions, self.frequencies))
