"""A step's plan becomes a batch of tensors, and a model's logits of it."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import Protocol

import torch
from torch import Tensor

from cortex.ipc.engine_options import DEFAULT_SEQUENCES
from cortex.models.batch import Batch, CacheShape, KVCache
from cortex.runtime.device.cuda import upload
from cortex.runtime.device.row import Chosen, Row
from cortex.runtime.device.sampler import sample
from cortex.runtime.device.step_plan import StepPlan

BLOCK_TOKENS = 16
STATES_AT_ONCE = 8
"""So many states are copied by one operation, which holds them for that long."""


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
    def caches(self) -> CacheShape:
        """What this rank keeps of a sequence between steps."""

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

    def new_cache(self, blocks: int, block_tokens: int, state_slots: int = 0, /) -> KVCache:
        """Allocate a paged cache on the model's device, and slots for recurrent states."""

    def recorded(self, cache: KVCache, max_sequences: int, /) -> Callable[[Batch], Tensor]:
        """Return what computes as ``module`` does, only faster, and the logits' life is a step.

        At most *max_sequences* have one token each in a step that it is made for.
        """


def kv_bytes_per_token(model: ServableModel) -> int:
    """Return the memory of one position's keys and values in all layers."""
    shape = model.caches
    elements = 2 * shape.layers * shape.kv_heads * shape.head_dim
    return elements * model.kv_dtype.itemsize


def state_copy_bytes(model: ServableModel) -> int:
    """Return the memory that copying states takes: of one layer, so many at once."""
    shape = model.caches.state
    return STATES_AT_ONCE * shape.bytes // shape.layers if shape else 0


def state_bytes(model: ServableModel) -> int:
    """Return the memory of one sequence's recurrent states; 0 for a model without them."""
    return model.caches.state.bytes if model.caches.state else 0


class Launched(Protocol):
    """A step that goes on."""

    def result(self) -> list[Chosen]:
        """Wait for it, and return what each row chose; raise what it failed with."""


@dataclass(frozen=True, slots=True)
class Finished:
    """A step that was over when its launch returned."""

    chosen: list[Chosen]

    def result(self) -> list[Chosen]:
        """Return what each row chose."""
        return self.chosen


class Runner(Protocol):
    """What the engine asks for steps."""

    @property
    def vocab_size(self) -> int:
        """V; token ids are below it."""

    @property
    def runs_ahead(self) -> bool:
        """Whether a step goes on after its launch, so that the next one can be prepared.

        The next plan may then hold ``UNKNOWN`` tokens: those that the launched step chooses, of
        the same sequences.
        """

    def launch(self, plan: StepPlan, rows: Sequence[Row]) -> Launched:
        """Begin *plan* and choose by its logits as *rows* say; both are in the same order."""

    def hidden(self, plan: StepPlan) -> Tensor:
        """Compute *plan* -> [T, H] float32, a row for each of its tokens."""


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
        max_sequences: int = DEFAULT_SEQUENCES,
        is_recorded: bool = True,
    ) -> None:
        self.vocab_size = model.vocab_size
        self._module = model.recorded(cache, max_sequences) if is_recorded else model.module
        self._hidden = model.module.hidden
        self._cache = cache
        self._device = device

    @property
    def runs_ahead(self) -> bool:
        """No: a step is over when ``launch`` returns."""
        return False

    @property
    def buffer_bytes(self) -> int:
        """Memory that the recorded steps keep, so far."""
        kept: int = getattr(self._module, "buffer_bytes", 0)
        return kept

    def launch(self, plan: StepPlan, rows: Sequence[Row]) -> Launched:
        """Compute *plan*, which may be empty, and choose by its logits as *rows* say."""
        if not plan.sequences:
            return Finished([])
        return Finished(sample(self.forward(plan), rows))

    def forward(self, plan: StepPlan) -> Tensor:
        """Compute *plan* -> [R, V] float32, in the order of its rows, and copy states around it."""
        with torch.inference_mode():
            self._copy_states(plan.restores)
            logits = self._module(self._batch(plan))
            self._copy_states(plan.snapshots)
            return logits[: plan.rows]

    def hidden(self, plan: StepPlan) -> Tensor:
        """Compute *plan* -> [T, H] float32, a row for each of its tokens."""
        with torch.inference_mode():
            return self._hidden(self._batch(plan))

    def _batch(self, plan: StepPlan) -> Batch:
        return make_batch(plan, self._cache, self._device)

    def _copy_states(self, pairs: Sequence[tuple[int, int]]) -> None:
        for begin in range(0, len(pairs), STATES_AT_ONCE):
            sources, targets = _uploaded(
                *map(list, zip(*pairs[begin : begin + STATES_AT_ONCE], strict=True)),
                dtype=torch.int64,
                device=self._device,
            )
            self._cache.copy_states(sources, targets)


def make_batch(plan: StepPlan, cache: KVCache, device: torch.device) -> Batch:
    """Lay the tokens of *plan* end to end; two uploads bring all of it to the *device*.

    In lists, because it runs when the caches hold nothing but weights: whatever calls of numpy
    save of a loop, fetching their code costs more (0.4 ms a step, instead of 0.25).

    A plan that samples nothing still asks for the last token's logits: no model has to know what a
    product with no rows is.
    """
    sequences = plan.sequences
    ends = list(accumulate(len(s.token_ids) for s in sequences))
    longest = max(len(s.block_table) for s in sequences)
    token_ids, positions, slots, state_slots, sampled = _uploaded(
        [t for s in sequences for t in s.token_ids],
        [p for s in sequences for p in range(s.first_position, s.end_position)],
        _slots(plan, cache.block_tokens),
        [s.state_slot for s in sequences] if cache.states else [],
        [i for s, end in zip(sequences, ends, strict=True) for i in range(end - s.rows, end)]
        or [ends[-1] - 1],
        dtype=torch.int64,
        device=device,
    )
    query_starts, context_tokens, blocks = _uploaded(
        [0, *ends],
        [s.end_position for s in sequences],
        [b for s in sequences for b in s.block_table + [0] * (longest - len(s.block_table))],
        dtype=torch.int32,
        device=device,
    )
    return Batch(
        token_ids=token_ids,
        positions=positions,
        slots=slots,
        query_starts=query_starts,
        context_tokens=context_tokens,
        block_tables=blocks.view(-1, longest),
        sampled=sampled,
        cache=cache,
        state_slots=state_slots if cache.states else None,
    )


def _slots(plan: StepPlan, block_tokens: int) -> list[int]:
    return [
        planned.block_table[position // block_tokens] * block_tokens + position % block_tokens
        for planned in plan.sequences
        for position in range(planned.first_position, planned.end_position)
    ]


def _uploaded(*parts: list[int], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """Return *parts*, which lie in one piece of memory there."""
    whole = array("q" if dtype == torch.int64 else "i", chain.from_iterable(parts))
    memory = upload(torch.frombuffer(whole, dtype=dtype), dtype, device)
    return torch.split(memory, [len(part) for part in parts])
