"""What one forward pass sees: the tokens of a step, and where their keys and values live.

Shapes, here and in every architecture: T tokens of all sequences in the batch laid end to end,
S sequences, R tokens whose logits are wanted, B blocks of the longest block table, K key-value
heads, D head size, V vocabulary.

A sequence's keys and values lie in blocks of ``KVCache.block_tokens`` positions; position p of
sequence s is slot ``block_tables[s, p // block_tokens] * block_tokens + p % block_tokens`` (paged
attention: Kwon et al., arXiv:2309.06180). There is no prefill phase and no decode phase: a sequence
brings as many tokens as the scheduler gave it.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from cortex.models.execution import DEFAULT, Execution


@dataclass(frozen=True, slots=True)
class KVCache:
    """The paged cache of one model on one device; a layer writes and reads its own entry."""

    keys: list[Tensor]  # per layer, [blocks, block_tokens, K, D]
    values: list[Tensor]  # per layer, [blocks, block_tokens, K, D]
    block_tokens: int
    scratch_block: int | None = None  # of these blocks; no sequence's: what pads a step writes here
    execution: Execution = DEFAULT

    @property
    def blocks(self) -> int:
        """How many blocks there are, the scratch block among them."""
        return self.keys[0].size(0)

    @property
    def bytes(self) -> int:
        """Memory of all layers."""
        return sum(t.numel() * t.element_size() for t in (*self.keys, *self.values))


@dataclass(frozen=True, slots=True)
class Batch:
    """The tokens of one step and where they belong; the only context a model sees."""

    token_ids: Tensor  # [T] int64
    positions: Tensor  # [T] int64, position of each token in its own sequence
    slots: Tensor  # [T] int64, where each token's key and value go
    query_starts: Tensor  # [S + 1] int32, the tokens of sequence s are query_starts[s]:[s + 1]
    context_tokens: Tensor  # [S] int32, positions of s in the cache after this step
    block_tables: Tensor  # [S, B] int32, padded with 0
    sampled: Tensor  # [R] int64, indices into T of the tokens we want logits for
    cache: KVCache
