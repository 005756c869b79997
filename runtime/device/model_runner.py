"""A step's plan becomes a batch of tensors, and a model's logits of it."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor

from cortex.models.batch import Batch, KVCache
from cortex.runtime.device.scheduler import StepPlan

BLOCK_TOKENS = 16


class Module(Protocol):
    """``cortex.models.layers.Decoder``."""

    def __call__(self, batch: Batch, /) -> Tensor:
        """Return the logits of the tokens that *batch* names, float32 [R, V]."""

    def hidden(self, batch: Batch, /) -> Tensor:
        """Return what the head would see of every token, float32 [T, H]."""


class ServableModel(Protocol):
    """What ``cortex.models.weights.load_model`` returns, as far as the engine looks at it."""

    @property
    def module(self) -> Module:
        """The architecture with its weights."""

    @property
    def num_layers(self) -> int:
        """Layers that have a KV cache."""

    @property
    def num_kv_heads(self) -> int:
        """Key-value heads per layer."""

    @property
    def head_dim(self) -> int:
        """Elements of one key or value."""

    @property
    def kv_dtype(self) -> torch.dtype:
        """Type of the cache's elements."""

    @property
    def vocab_size(self) -> int:
        """V; token ids are below it."""

    @property
    def max_position_embeddings(self) -> int:
        """The longest context that the model was made for."""

    @property
    def weights_bytes(self) -> int:
        """Memory of the weights on the device."""

    def new_cache(self, blocks: int, block_tokens: int) -> KVCache:
        """Allocate a paged cache on the model's device."""

    def recorded(self, cache: KVCache) -> Callable[[Batch], Tensor]:
        """Return what computes as ``module`` does, only faster; valid until the next call."""


def kv_bytes_per_token(model: ServableModel) -> int:
    """Return the memory of one position's keys and values in all layers."""
    elements = 2 * model.num_layers * model.num_kv_heads * model.head_dim
    return elements * model.kv_dtype.itemsize


class ModelRunner:
    """One model with its cache on one device; the logits of a step are valid until the next.

    Where ``is_recorded`` is False it computes operation by operation, as the module is written.
    """

    def __init__(
        self,
        model: ServableModel,
        cache: KVCache,
        device: torch.device,
        *,
        is_recorded: bool = True,
    ) -> None:
        self.vocab_size = model.vocab_size
        self._module = model.recorded(cache) if is_recorded else model.module
        self._hidden = model.module.hidden
        self._cache = cache
        self._device = device

    def forward(self, plan: StepPlan) -> Tensor:
        """Compute *plan* -> [R, V] float32, a row for each of its ``sampled``."""
        with torch.inference_mode():
            logits = self._module(make_batch(plan, self._cache, self._device))
            return logits[: len(plan.sampled)]

    def hidden(self, plan: StepPlan) -> Tensor:
        """Compute *plan* -> [T, H] float32, a row for each of its tokens."""
        with torch.inference_mode():
            return self._hidden(make_batch(plan, self._cache, self._device))


def make_batch(plan: StepPlan, cache: KVCache, device: torch.device) -> Batch:
    """Lay the tokens of *plan* end to end.

    A plan that samples nothing still asks for the last token's logits: no model has to know what a
    product with no rows is.
    """
    sequences = plan.sequences
    ends = list(accumulate(len(planned.token_ids) for planned in sequences))
    sampled = [end - 1 for end, planned in zip(ends, sequences, strict=True) if planned.samples]
    longest = max(len(planned.block_table) for planned in sequences)

    def on_device(values: list[int] | list[list[int]], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    return Batch(
        token_ids=on_device([t for s in sequences for t in s.token_ids], torch.int64),
        positions=on_device(
            [p for s in sequences for p in range(s.first_position, s.end_position)], torch.int64
        ),
        slots=on_device(_slots(plan, cache.block_tokens), torch.int64),
        query_starts=on_device([0, *ends], torch.int32),
        context_tokens=on_device([s.end_position for s in sequences], torch.int32),
        block_tables=on_device(
            [s.block_table + [0] * (longest - len(s.block_table)) for s in sequences], torch.int32
        ),
        sampled=on_device(sampled or [ends[-1] - 1], torch.int64),
        cache=cache,
    )


def _slots(plan: StepPlan, block_tokens: int) -> list[int]:
    return [
        planned.block_table[position // block_tokens] * block_tokens + position % block_tokens
        for planned in plan.sequences
        for position in range(planned.first_position, planned.end_position)
    ]
