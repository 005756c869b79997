"""Attention with an output gate, as it stands among the recurrent layers of a hybrid.

    q, k = rotate(RMSNorm(W_q x)), rotate(RMSNorm(W_k x))        of each head only the first part
    y = W_o (attention(q, k, W_v x) * sigmoid(W_g x))

A checkpoint has W_q and W_g in one tensor, per head the rows of the query and then those of the
gate; they are brought one below the other as they are read (``gated_delta_net`` says how). The
norms' weights are centred on zero there.

Source: huggingface/transformers, models/qwen3_next/modeling_qwen3_next.py (Qwen3NextAttention).
Shapes as in ``models.batch``; H hidden size, N query heads of this rank.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from cortex.models.attention import PagedAttention
from cortex.models.batch import Batch
from cortex.models.kernels import ops
from cortex.models.layers import RMSNorm
from cortex.models.linear import ColumnParallel, RowParallel
from cortex.models.parallel import ALONE, Cut, Group
from cortex.models.rope import Rotation


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """The sizes of the attention layers."""

    heads: int
    kv_heads: int
    head_dim: int
    eps: float  # of the norms of queries and keys


class GatedAttention(nn.Module):
    """One layer."""

    def __init__(
        self, hidden_size: int, shape: AttentionShape, layer: int, group: Group = ALONE
    ) -> None:
        """It is the *layer*-th of those that have keys and values."""
        super().__init__()
        self.d = shape.head_dim
        self.n, self.k = shape.heads // group.ranks, group.count(shape.kv_heads)
        kv = group.heads(shape.kv_heads, self.d)
        self.qkv_proj = ColumnParallel(hidden_size, _queries_before_gates(shape, group), kv, kv)
        self.o_proj = RowParallel(shape.heads * self.d, hidden_size, group=group)
        self.q_norm = RMSNorm(self.d, shape.eps, is_centred=True)
        self.k_norm = RMSNorm(self.d, shape.eps, is_centred=True)
        self.attend = PagedAttention(layer=layer, scale=self.d**-0.5)

    def forward(self, x: Tensor, rotation: Rotation, batch: Batch) -> Tensor:
        """[T, H] -> [T, H]; writes this layer's keys and values into the cache of *batch*."""
        qkv = self.qkv_proj(x).unflatten(-1, (2 * self.n + 2 * self.k, self.d))
        q, gate, k, v = qkv.split([self.n, self.n, self.k, self.k], dim=-2)
        out = self.attend(self.q_norm(q), self.k_norm(k), v, rotation, batch)
        return self.o_proj(ops.sigmoid_multiply(out.flatten(-2), gate.flatten(-2)))


def _queries_before_gates(shape: AttentionShape, group: Group) -> Cut:
    """Return a rank's rows of per head [query | gate]: all its queries, then their gates."""
    if shape.heads % group.ranks:
        raise ValueError(f"{shape.heads} query heads do not divide among {group.ranks} ranks")
    mine = shape.heads // group.ranks
    d, heads = shape.head_dim, range(group.rank * mine, (group.rank + 1) * mine)
    begins = [2 * d * head + d * is_gate for is_gate in (False, True) for head in heads]
    return Cut(2 * d * shape.heads, tuple((begin, begin + d) for begin in begins))
