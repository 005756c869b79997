"""Causal attention over the paged cache, by position."""

from __future__ import annotations

from torch import Tensor, nn

from cortex.models.batch import Batch
from cortex.models.kernels import ops
from cortex.models.rope import Rotation


class PagedAttention(nn.Module):
    """Softmax attention (Vaswani et al., arXiv:1706.03762) whose keys and values lie in blocks.

    Grouped queries (Ainslie et al., arXiv:2305.13245): query head n reads key-value head
    n // (N / K). Queries and keys are turned by their positions first (``models.rope``). Prompt
    chunks and single tokens are the same thing here: a token sees the positions of its sequence up
    to its own.
    """

    def __init__(self, layer: int, scale: float) -> None:
        super().__init__()
        self.layer = layer
        self.scale = scale

    def forward(self, q: Tensor, k: Tensor, v: Tensor, rotation: Rotation, batch: Batch) -> Tensor:
        """Q [T, N, D], k and v [T, K, D] -> [T, N, D]; k, turned, and v go into the cache first."""
        keys, values = batch.cache.keys[self.layer], batch.cache.values[self.layer]
        q = ops.rotate_and_store(q, k, v, *rotation, keys=keys, values=values, slots=batch.slots)
        return ops.attention(q, keys, values, batch, self.scale)
