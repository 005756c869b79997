"""A model on its device: what the engine must know to feed it, and its caches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cortex.models.batch import Batch, CacheShape, KVCache, RecurrentState, StateShape
from cortex.models.execution import DEFAULT, Execution
from cortex.models.kernels import cpu
from cortex.models.kernels.graphs import CudaCapture, DecodeGraphs
from cortex.models.kernels.program import Program
from cortex.models.layers import Decoder
from cortex.models.linear import Projection
from cortex.models.mixture import Experts
from cortex.models.quantization import Matrix


@dataclass
class LoadedModel:
    """A model on its device, and what the engine must know to feed it."""

    module: Decoder
    device: torch.device
    dtype: torch.dtype  # of activations
    caches: CacheShape  # of this rank
    kv_dtype: torch.dtype
    vocab_size: int
    max_position_embeddings: int
    weights_bytes: int
    execution: Execution = DEFAULT

    def __post_init__(self) -> None:
        """Tell the products how to multiply; attention finds it in the cache."""
        for child in self.module.modules():
            if isinstance(child, (Projection, Experts)):
                child.is_batch_invariant = self.execution.is_batch_invariant

    def new_cache(self, blocks: int, block_tokens: int, state_slots: int = 0) -> KVCache:
        """Allocate an empty cache of *blocks* blocks of *block_tokens* positions.

        A model with recurrent layers gets *state_slots* slots for their states beside it. On a GPU
        there is one more of both, the scratch block and slot.
        """
        shape, extra = self.caches, int(self.device.type == "cuda")
        states = _new_states(shape.state, state_slots + extra, self.device)
        if self.device.type == "cpu" and block_tokens == cpu.BLOCK_TOKENS:
            layers = [
                cpu.new_cache_layer(blocks, shape.kv_heads, shape.head_dim, self.kv_dtype)
                for _ in range(shape.layers)
            ]
            keys, values = [k for k, _ in layers], [v for _, v in layers]
            return KVCache(keys, values, block_tokens, states=states)
        layer = (blocks + extra, block_tokens, shape.kv_heads, shape.head_dim)
        keys, values = (
            [
                torch.empty(layer, dtype=self.kv_dtype, device=self.device)
                for _ in range(shape.layers)
            ]
            for _ in range(2)
        )
        return KVCache(
            keys,
            values,
            block_tokens,
            blocks if extra else None,
            self.execution,
            states,
            state_slots if extra and states else None,
        )

    def recorded(self, cache: KVCache, max_sequences: int = 16) -> Callable[[Batch], Tensor]:
        """Return what computes a step with *cache* as the module does, only faster.

        On a CPU that is a recording, on a GPU graphs of the decode steps of up to *max_sequences*;
        the logits of both are valid until the next step.
        """
        if self.device.type == "cuda" and self.execution.has_graphs:
            return DecodeGraphs(
                self.module,
                cache,
                CudaCapture(self.device),
                max_sequences=max_sequences,
                context_tokens=self.max_position_embeddings,
            )
        kernels = cpu.kernels() if self.device.type == "cpu" else None
        if kernels is None or self.dtype != torch.float32:
            return self.module
        return Program(self.module, cache, kernels)


def resident_bytes(module: nn.Module) -> int:
    """Memory that the weights of *module* take, each shared one counted once."""
    matrices = sum(child.bytes for child in module.modules() if isinstance(child, Matrix))
    return matrices + sum(buffer.numel() * buffer.element_size() for buffer in module.buffers())


def _new_states(shape: StateShape | None, slots: int, device: torch.device) -> list[RecurrentState]:
    if shape is None:
        return []
    kept = (shape.channels, shape.kernel - 1)
    delta = (shape.heads, shape.key_dim, shape.value_dim)
    return [
        RecurrentState(
            torch.zeros(slots, *kept, device=device), torch.zeros(slots, *delta, device=device)
        )
        for _ in range(shape.layers)
    ]
