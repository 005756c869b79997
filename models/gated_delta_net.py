"""Gated DeltaNet, attention whose memory has a fixed size (Yang et al., arXiv:2412.06464).

    q, k, v = silu(conv(W x))        over the last few tokens, each channel by itself
    g = -exp(A_log) softplus(W_a x + dt_bias)        beta = sigmoid(W_b x)
    y = W_o (RMSNorm(delta_rule(q, k, v, g, beta)) * silu(W_z x))

The rule is in ``kernels.reference_delta``. A sequence keeps the last inputs of the convolution and
one matrix per value head (``batch.RecurrentState``).

Checkpoints order the rows of the projections in several ways. In memory there is one: queries,
keys, values and z one below the other, and b before a; rows are brought there as they are read,
because a ``Cut`` may name its ranges in any order. K key heads, V value heads, R of them each:

    stacked    [q | k | v], [z], [b], [a]                        value heads of a key head together
    grouped    per key head [q | k | R v | R z], [R b | R a]     the same
    tiled      as stacked, but value head r of every key head before head r + 1 of any; so are GGUF
               files of Qwen3.5. It stays, as the columns of W_o could not be moved in blocks of 256

Ranks split the key heads, each with the value heads that read it.

Source: huggingface/transformers, models/qwen3_next and models/qwen3_5; parameter names are those of
their checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from cortex.models.batch import Batch, StateShape
from cortex.models.kernels import ops
from cortex.models.kernels.reference_delta import DeltaHeads
from cortex.models.layers import RMSNorm, Vector
from cortex.models.linear import ColumnParallel, RowParallel
from cortex.models.parallel import ALONE, Cut, Group


@dataclass(frozen=True, slots=True)
class DeltaShape:
    """The sizes of a layer, and the order of its rows in the checkpoint."""

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    kernel: int  # tokens that the convolution sees
    is_tiled: bool = False
    has_grouped_qkvz: bool = False
    has_grouped_ba: bool = False

    def heads(self, group: Group = ALONE) -> DeltaHeads:
        """Return the heads of a rank; raise ValueError where they do not divide."""
        if self.key_heads % group.ranks:
            raise ValueError(
                f"{self.key_heads} key heads of the delta rule do not divide among "
                f"{group.ranks} ranks"
            )
        keys, values = self.key_heads // group.ranks, self.value_heads // group.ranks
        return DeltaHeads(keys, values, self.key_dim, self.value_dim, self.is_tiled)

    def state(self, layers: int, group: Group = ALONE) -> StateShape:
        """Return what *layers* of them keep of a sequence on a rank."""
        heads = self.heads(group)
        return StateShape(
            layers, heads.channels, self.kernel, heads.values, self.key_dim, self.value_dim
        )

    def qkv(self, group: Group) -> Cut:
        """Return a rank's rows of [q | k | v]."""
        keys = self.key_heads * self.key_dim
        return group.shares(keys, keys, *self._runs(self.value_dim))

    def values(self, group: Group, size: int) -> Cut:
        """Return a rank's part of something that has *size* elements per value head."""
        return group.shares(*self._runs(size))

    def qkvz_rows(self, group: Group) -> tuple[Cut, ...]:
        """Return a rank's rows of the tensors that become [q | k | v | z]."""
        if not self.has_grouped_qkvz:
            return self.qkv(group), self.values(group, self.value_dim)
        values = self._each * self.value_dim
        return (self._of_groups(group, self.key_dim, self.key_dim, values, values),)

    def ba_rows(self, group: Group) -> tuple[Cut, ...]:
        """Return a rank's rows of the tensors that become [b | a]."""
        if not self.has_grouped_ba:
            return self.values(group, 1), self.values(group, 1)
        return (self._of_groups(group, self._each, self._each),)

    @property
    def _each(self) -> int:
        """Value heads of a key head."""
        return self.value_heads // self.key_heads

    def _runs(self, size: int) -> Iterator[int]:
        """Sizes of what ranks share evenly: all value heads, or each tile of them by itself."""
        runs = self._each if self.is_tiled else 1
        return iter([self.value_heads * size // runs] * runs)

    def _of_groups(self, group: Group, *sizes: int) -> Cut:
        """Return a rank's rows of groups of *sizes*, one per key head: first the first of each."""
        each, mine = sum(sizes), self.heads(group).keys
        heads = range(group.rank * mine, (group.rank + 1) * mine)
        begins = [sum(sizes[:at]) for at in range(len(sizes))]
        ranges = [
            (head * each + begin, head * each + begin + size)
            for begin, size in zip(begins, sizes, strict=True)
            for head in heads
        ]
        return Cut(self.key_heads * each, tuple(ranges))


class GatedDeltaNet(nn.Module):
    """One layer, which stands where a transformer has its attention."""

    def __init__(
        self, hidden_size: int, shape: DeltaShape, layer: int, eps: float, group: Group = ALONE
    ) -> None:
        """It is the *layer*-th of those that have a state."""
        super().__init__()
        self.layer = layer
        self.heads = shape.heads(group)
        values = shape.values(group, shape.value_dim)
        self.in_proj_qkvz = ColumnParallel(hidden_size, *shape.qkvz_rows(group))
        self.in_proj_ba = ColumnParallel(hidden_size, *shape.ba_rows(group))
        self.conv1d = Vector(shape.qkv(group), shape.kernel)
        self.A_log = Vector(shape.values(group, 1), kind="", is_log=True)  # value: -exp(A_log)
        self.dt_bias = Vector(shape.values(group, 1), kind="")
        self.norm = RMSNorm(shape.value_dim, eps)
        self.out_proj = RowParallel(values, hidden_size, group=group)

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        """[T, H] -> [T, H]; reads and writes the states of the sequences of *batch*."""
        state, channels = batch.cache.states[self.layer], self.heads.channels
        qkvz = self.in_proj_qkvz(x)
        qkv, z = qkvz[:, :channels], qkvz[:, channels:]
        qkv = ops.causal_convolution(qkv, self.conv1d.value, state.conv, batch)
        out = ops.gated_delta_rule(
            qkv,
            self.in_proj_ba(x),
            self.A_log.value,
            self.dt_bias.value,
            states=state.delta,
            heads=self.heads,
            batch=batch,
        )
        return self.out_proj(ops.gated_rms_norm(out, z, self.norm.weight, self.norm.eps))
