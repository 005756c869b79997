"""The gated delta rule in plain torch (Yang et al., arXiv:2412.06464): what kernels are held to.

A head keeps a matrix S of key_dim x value_dim in place of keys and values. Each token fades it by
e^g and corrects what it answers to the token's key towards the token's value, as far as beta says:

    S <- e^g S        S <- S + k (beta (v - S^T k))^T        out = S^T q / sqrt(key_dim)

with g = rate * softplus(a + bias), rate < 0, beta = sigmoid(b), and q and k of length one. Queries,
keys and values have passed a short causal convolution and silu before.

A chunk of tokens does it in a few products: with G the sum of g from the chunk's beginning on, what
the tokens write is the solution U of a unit triangular system, since each corrects what those
before it wrote:

    U[i] = beta[i] (v[i] - e^G[i] S^T k[i] - sum over j < i of e^(G[i] - G[j]) (k[i] k[j]) U[j])
    out[i] = e^G[i] S^T q[i] + sum over j <= i of e^(G[i] - G[j]) (q[i] k[j]) U[j]
    S <- e^G[end] S + sum over j of e^(G[end] - G[j]) k[j] U[j]^T

It is solved row by row, in float32. The inverse of the triangular matrix by repeated squaring is
quicker, and overflows on prompts that repeat themselves, whose keys are all alike. Every exponent
here is of a sum of some g, hence at most 0.

Shapes as in ``models.batch``; C channels of the convolution, in the order queries, keys, values; V
value heads. A query-key head serves V / K value heads, which follow each other or, where *tiled*,
lie K apart.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from cortex.models.batch import Batch

CHUNK_TOKENS = 64
NORM_EPS = 1e-6
"""Added to the squared length of queries and keys."""


@dataclass(frozen=True, slots=True)
class DeltaHeads:
    """The heads of one rank."""

    keys: int
    values: int
    key_dim: int
    value_dim: int
    is_tiled: bool = False

    @property
    def channels(self) -> int:
        """What the convolution sees of a token."""
        return 2 * self.keys * self.key_dim + self.values * self.value_dim


class Tokens(NamedTuple):
    """What the rule sees of the tokens of a sequence, all float32; k has length one."""

    q: Tensor  # [T, V, key_dim], of length 1 / sqrt(key_dim)
    k: Tensor  # [T, V, key_dim]
    v: Tensor  # [T, V, value_dim]
    g: Tensor  # [T, V]
    beta: Tensor  # [T, V]


def convolve_chunk(x: Tensor, weight: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    """X [T, C] of one sequence, behind *before* [C, kernel - 1] -> silu [T, C], and what is kept.

    The weight is [C, kernel], its last column that of the token itself.
    """
    seen = torch.cat((before, x.T.float()), dim=1)
    y = F.conv1d(seen[None], weight[:, None], groups=weight.size(0))[0]
    return F.silu(y).T.to(x.dtype), seen[:, x.size(0) :]


def convolve_token(x: Tensor, weight: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    """X [S, C], one token of each sequence, behind *before* [S, C, kernel - 1]; as for a chunk."""
    seen = torch.cat((before, x.float()[..., None]), dim=2)
    return F.silu((seen * weight).sum(dim=2)).to(x.dtype), seen[..., 1:]


def gates(ba: Tensor, rate: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """[b | a] [T, 2 V], rate and bias [V] -> g and beta, float32 [T, V]."""
    b, a = ba.float().chunk(2, dim=-1)
    return rate * F.softplus(a + bias), b.sigmoid()


def recurrent_delta_rule(tokens: Tokens, state: Tensor) -> tuple[Tensor, Tensor]:
    """One sequence, token by token: what ``chunk_delta_rule`` returns."""
    outputs = []
    for q, k, v, g, beta in zip(*tokens, strict=True):
        state = g.exp()[:, None, None] * state
        answers = torch.einsum("vij,vi->vj", state, k)
        state = state + k[:, :, None] * (beta[:, None] * (v - answers))[:, None]
        outputs.append(torch.einsum("vij,vi->vj", state, q))
    return torch.stack(outputs), state


def chunk_delta_rule(tokens: Tokens, state: Tensor) -> tuple[Tensor, Tensor]:
    """One sequence, chunk by chunk: outputs [T, V, value_dim], and the state behind them.

    The state is float32 [V, key_dim, value_dim].
    """
    outputs = []
    for chunk in zip(*(torch.split(x, CHUNK_TOKENS) for x in tokens), strict=True):
        out, state = _chunk(Tokens(*(x.transpose(0, 1) for x in chunk)), state)
        outputs.append(out.transpose(0, 1))
    return torch.cat(outputs), state


def _chunk(chunk: Tokens, state: Tensor) -> tuple[Tensor, Tensor]:
    """One chunk of n tokens, heads first: [V, n, ...]."""
    q, k, v, g, beta = chunk
    fade = _fade(g)
    since_begin = g.cumsum(1).exp()[..., None]  # e^G
    keys = k.transpose(1, 2)
    wanted = beta[..., None] * (v - since_begin * (k @ state))
    written = _solve(beta[..., None] * fade * (k @ keys), wanted)
    out = since_begin * (q @ state) + (fade * (q @ keys)) @ written
    left = fade[:, -1, :, None] * written
    return out, since_begin[:, -1:] * state + keys @ left


def _fade(g: Tensor) -> Tensor:
    """[V, n] -> [V, n, n]: e to the sum of g behind token j up to token i; 0 for j > i.

    Each sum by itself: the difference of two long ones would have lost the short one between.
    """
    n = g.size(1)
    ones = torch.ones(n, n, dtype=torch.bool, device=g.device)
    sums = g[:, :, None].masked_fill(~ones.tril(-1), 0.0).cumsum(1)
    return sums.masked_fill(ones.triu(1), -torch.inf).exp()


def _solve(below: Tensor, b: Tensor) -> Tensor:
    """Solve (1 + what *below* [V, n, n] has below its diagonal) U = b by forward substitution."""
    rows = [b[:, :1]]
    for i in range(1, b.size(1)):
        rows.append(b[:, i : i + 1] - below[:, i : i + 1, :i] @ torch.cat(rows, dim=1))
    return torch.cat(rows, dim=1)


def causal_convolution(x: Tensor, weight: Tensor, kept: Tensor, batch: Batch) -> Tensor:
    """Convolve x [T, C] along each sequence -> silu of that, [T, C]; *kept* [slots, C, kernel - 1].

    The weight is float32 [C, kernel]; what a sequence's next token needs of these is kept.
    """
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    for tokens, slot, is_first in _sequences(batch):
        before = torch.zeros_like(kept[slot]) if is_first else kept[slot]
        y[tokens], kept[slot] = convolve_chunk(x[tokens], weight, before)
    return y


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
    """[q | k | v] [T, C] and [b | a] [T, 2 V] -> [T, V, value_dim]; states [slots, V, ...]."""
    all_tokens = Tokens(*split_heads(qkv, heads), *gates(ba, rate, bias))
    out = torch.empty_like(all_tokens.v)
    for tokens, slot, is_first in _sequences(batch):
        state = torch.zeros_like(states[slot]) if is_first else states[slot]
        is_one = tokens.stop - tokens.start == 1
        rule = recurrent_delta_rule if is_one else chunk_delta_rule
        out[tokens], states[slot] = rule(Tokens(*(x[tokens] for x in all_tokens)), state)
    return out.to(qkv.dtype)


def gated_rms_norm(x: Tensor, z: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm of each head of x [T, V, value_dim], times silu of z [T, V * value_dim] -> the same.

    The result is [T, V * value_dim]; the weight is float32 [value_dim].
    """
    wide = x.float()
    normed = weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps))
    return (normed.flatten(1) * F.silu(z.float())).to(x.dtype)


def sigmoid_multiply(x: Tensor, gate: Tensor) -> Tensor:
    """[T, K] times sigmoid of a gate [T, K] -> [T, K]."""
    return (x.float() * gate.float().sigmoid()).to(x.dtype)


def split_heads(qkv: Tensor, heads: DeltaHeads) -> tuple[Tensor, Tensor, Tensor]:
    """[T, C] -> queries and keys [T, V, key_dim] of length one, values [T, V, value_dim]."""
    keys = heads.keys * heads.key_dim
    sizes = [keys, keys, heads.values * heads.value_dim]
    q, k, v = torch.split(qkv.float(), sizes, dim=-1)
    q, k = (_normalised(x.reshape(-1, heads.keys, heads.key_dim)) for x in (q, k))
    q, k = (_for_values(x, heads) for x in (q * heads.key_dim**-0.5, k))
    return q, k, v.reshape(-1, heads.values, heads.value_dim)


def _normalised(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + NORM_EPS)


def _for_values(x: Tensor, heads: DeltaHeads) -> Tensor:
    """[T, K, key_dim] -> [T, V, key_dim], for each value head the query or key that it reads."""
    times = heads.values // heads.keys
    return x.repeat(1, times, 1) if heads.is_tiled else x.repeat_interleave(times, dim=1)


def _sequences(batch: Batch) -> Iterator[tuple[slice, int, bool]]:
    """Yield of each sequence its tokens, the slot of its state, and whether it begins here."""
    assert batch.state_slots is not None, "a recurrent layer needs slots"
    if batch.state_slots.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("the delta rule by plain torch asks the device for lengths")
    starts, contexts = batch.query_starts.tolist(), batch.context_tokens.tolist()
    for index, slot in enumerate(batch.state_slots.tolist()):
        tokens = slice(starts[index], starts[index + 1])
        yield tokens, slot, contexts[index] == tokens.stop - tokens.start
