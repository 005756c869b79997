"""What one forward pass sees: the tokens of a step, and where their keys and values live.

Shapes, here and in every architecture: T tokens of all sequences in the batch laid end to end,
S sequences, R tokens whose logits are wanted, B blocks of the longest block table, K key-value
heads, D head size, V vocabulary.

A sequence's keys and values lie in blocks of ``KVCache.block_tokens`` positions; position p of
sequence s is slot ``block_tables[s, p // block_tokens] * block_tokens + p % block_tokens`` (paged
attention: Kwon et al., arXiv:2309.06180). There is no prefill phase and no decode phase: a sequence
brings as many tokens as the scheduler gave it.

A recurrent layer (``models.gated_delta_net``) keeps a state of fixed size instead, in the slot that
``state_slots`` names. A sequence whose first token of the step is at position 0 begins with zeros,
whatever lies there; a state that may be needed again is copied to another slot between two steps.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from cortex.models.execution import DEFAULT, Execution


@dataclass(frozen=True, slots=True)
class StateShape:
    """The recurrent state that the Gated DeltaNet layers of one rank keep of a sequence."""

    layers: int
    channels: int  # of the causal convolution
    kernel: int  # of which the last kernel - 1 inputs are kept
    heads: int
    key_dim: int
    value_dim: int

    @property
    def bytes(self) -> int:
        """Memory of one sequence in all layers; all of it is float32."""
        elements = self.channels * (self.kernel - 1) + self.heads * self.key_dim * self.value_dim
        return self.layers * elements * 4


@dataclass(frozen=True, slots=True)
class CacheShape:
    """What one rank of a model keeps of a sequence between steps."""

    layers: int  # with softmax attention, hence with keys and values
    kv_heads: int
    head_dim: int
    state: StateShape | None = None


@dataclass(frozen=True, slots=True)
class RecurrentState:
    """The state of one layer, in slots; one sequence or snapshot holds a slot in every layer."""

    conv: Tensor  # [slots, channels, kernel - 1] float32, the oldest input first
    delta: Tensor  # [slots, heads, key_dim, value_dim] float32


@dataclass(frozen=True, slots=True)
class KVCache:
    """The caches of one model on one device; a layer writes and reads its own entry."""

    keys: list[Tensor]  # per layer, [blocks, block_tokens, K, D]
    values: list[Tensor]  # per layer, [blocks, block_tokens, K, D]
    block_tokens: int
    scratch_block: int | None = None  # of these blocks; no sequence's: what pads a step writes here
    execution: Execution = DEFAULT
    states: list[RecurrentState] = field(default_factory=list)  # per recurrent layer
    scratch_slot: int | None = None  # of the states', as scratch_block is of the blocks

    @property
    def blocks(self) -> int:
        """How many blocks there are, the scratch block among them."""
        return self.keys[0].size(0)

    @property
    def bytes(self) -> int:
        """Memory of all layers."""
        states = (tensor for state in self.states for tensor in (state.conv, state.delta))
        return sum(t.numel() * t.element_size() for t in (*self.keys, *self.values, *states))

    def copy_states(self, sources: Tensor, targets: Tensor) -> None:
        """Copy the states in the slots *sources* to *targets*, [P] int64 each, all at once.

        A slot may be both, a target only once.
        """
        for state in self.states:
            for tensor in (state.conv, state.delta):
                tensor.index_copy_(0, targets, tensor.index_select(0, sources))


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
    state_slots: Tensor | None = None  # [S] int64, where the recurrent state of s lies
