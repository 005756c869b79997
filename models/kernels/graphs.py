"""Decode steps of a model on a GPU, captured as CUDA graphs and launched as one piece.

    capture   for each bucket, largest first: the model is called with a batch of buffers, and what
              it asks of the device is written down instead of being run
    replay    a step of S sequences with one token each is copied into the first S rows of the
              buffers, and the graph of the smallest bucket that holds S runs

      buckets     1   2   4   8   16   24   32   48   64   96   128 ... the most sequences there are

Rows from S on are padding: token 0 at position 0 of the cache's scratch block, which no sequence
owns, with a context of 1, and with the scratch slot for a recurrent state. They read nothing but
what they have written, and their logits are dropped. A step that is more than one token per
sequence runs operation by operation.

Graphs are captured while the model is being loaded, on the thread that loads it: a capture takes a
tenth of a second and may not be in the way of other models' steps. ``thread_local`` capture refuses
unsafe calls of the capturing thread alone, and the stream of the capture does not wait for that of
the steps. Only emptying torch's allocator is impossible during a capture, on any thread;
``NO_CAPTURE`` keeps the two apart. All graphs of a model share one pool of memory: they never run
at the same time, and the largest is captured first, so that the others fit into its room.

Where a capture fails, no graph is used and a warning says so: the model then runs as it is written.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

from cortex.models.batch import Batch, KVCache

Model = Callable[[Batch], Tensor]
WARM_UPS = 2
"""Calls before a capture; in the first kernels are compiled, loaded and perhaps timed."""

NO_CAPTURE = threading.Lock()
"""Held while a graph is captured, and by whoever empties torch's allocator."""

log = logging.getLogger(__name__)


class Graph(Protocol):
    """A step that was captured."""

    @property
    def logits(self) -> Tensor:
        """What the last replay computes, [bucket, V] float32."""

    def replay(self) -> None:
        """Have the device run it, after what it was asked for before."""


class Capture(Protocol):
    """The graph API of a device, and the memory of what it captured."""

    def __call__(self, compute: Callable[[], Tensor], /) -> Graph:
        """Write down what *compute* asks of the device."""

    @property
    def bytes(self) -> int:
        """Memory that the graphs keep."""


def buckets(max_sequences: int) -> list[int]:
    """Return how many rows are captured for up to *max_sequences*, smallest first."""
    sizes, power = [1, 2, 4, 8], 16
    while power < max_sequences:
        sizes += [power, power * 3 // 2]
        power *= 2
    return [*(size for size in sizes if size < max_sequences), max_sequences]


class DecodeGraphs:
    """A model whose decode steps are graphs; calling it is calling the model.

    The logits are valid until the next call. *cache* has a scratch block; a sequence has at most
    *context_tokens* positions. What is longer, or more, runs without a graph.
    """

    def __init__(
        self,
        model: Model,
        cache: KVCache,
        capture: Capture,
        *,
        max_sequences: int,
        context_tokens: int,
    ) -> None:
        self._model = model
        self._capture = capture
        width = min(cache.blocks, -(-context_tokens // cache.block_tokens))
        self._inputs = _padding(cache, max_sequences, width)
        self._graphs: dict[int, Graph] = {}
        self._used_rows = 0  # the rows from here on are padding
        self._capture_all(buckets(max_sequences))

    def __call__(self, batch: Batch) -> Tensor:
        """Return the logits [R, V]."""
        graph = self._graph_for(batch)
        if graph is None:
            return self._model(batch)
        rows = batch.context_tokens.size(0)
        self._put(batch, rows)
        graph.replay()
        if batch.sampled.size(0) == rows:  # all of them, then: indices are distinct and in order
            return graph.logits[:rows]
        return graph.logits.index_select(0, batch.sampled)

    @property
    def buffer_bytes(self) -> int:
        """Memory of the graphs and of what they read."""
        inputs = (getattr(self._inputs, name) for name in _ROWS)
        return self._capture.bytes + sum(rows.nbytes for rows in inputs if rows is not None)

    @property
    def sizes(self) -> list[int]:
        """The buckets that there are graphs of, smallest first."""
        return sorted(self._graphs)

    @torch.inference_mode()
    def _capture_all(self, sizes: list[int]) -> None:
        for size in reversed(sizes):
            batch = _first_rows(self._inputs, size)
            try:
                self._graphs[size] = self._capture(lambda batch=batch: self._model(batch))  # type: ignore[misc] # mypy cannot infer it
            except Exception as exc:  # noqa: BLE001 - whatever cannot be captured can still be run
                self._graphs.clear()
                log.warning(
                    "decode steps run without CUDA graphs, which is slower: capturing %d rows "
                    "failed: %s: %s",
                    size,
                    type(exc).__name__,
                    exc,
                )
                return

    def _graph_for(self, batch: Batch) -> Graph | None:
        rows, blocks = batch.block_tables.shape
        if batch.token_ids.size(0) != rows or blocks > self._inputs.block_tables.size(1):
            return None
        size = next((size for size in self.sizes if size >= rows), None)
        return None if size is None else self._graphs[size]

    def _put(self, batch: Batch, rows: int) -> None:
        """Copy the rows of *batch*, and make padding of those that only the last step had."""
        inputs, blocks = self._inputs, batch.block_tables.size(1)
        inputs.token_ids[:rows].copy_(batch.token_ids)
        inputs.positions[:rows].copy_(batch.positions)
        inputs.slots[:rows].copy_(batch.slots)
        inputs.context_tokens[:rows].copy_(batch.context_tokens)
        inputs.block_tables[:rows, :blocks].copy_(batch.block_tables)
        if batch.state_slots is not None and inputs.state_slots is not None:
            inputs.state_slots[:rows].copy_(batch.state_slots)
        if self._used_rows > rows:
            _pad(inputs, slice(rows, self._used_rows))
        self._used_rows = rows


_ROWS = (
    *("token_ids", "positions", "slots", "query_starts", "context_tokens", "block_tables"),
    "state_slots",
)


def _padding(cache: KVCache, rows: int, blocks: int) -> Batch:
    """Return *rows* sequences of one token each that nobody asked for."""
    like = cache.keys[0]

    def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=like.device)

    batch = Batch(
        token_ids=zeros(rows, dtype=torch.int64),
        positions=zeros(rows, dtype=torch.int64),
        slots=zeros(rows, dtype=torch.int64),
        query_starts=torch.arange(rows + 1, dtype=torch.int32, device=like.device),
        context_tokens=zeros(rows, dtype=torch.int32),
        block_tables=zeros(rows, blocks, dtype=torch.int32),
        sampled=torch.arange(rows, device=like.device),
        cache=cache,
        state_slots=zeros(rows, dtype=torch.int64) if cache.states else None,
    )
    _pad(batch, slice(rows))
    return batch


def _pad(batch: Batch, rows: slice) -> None:
    cache = batch.cache
    assert cache.scratch_block is not None, "padding has to write somewhere"
    batch.token_ids[rows] = 0
    batch.positions[rows] = 0
    batch.slots[rows] = cache.scratch_block * cache.block_tokens
    batch.context_tokens[rows] = 1
    batch.block_tables[rows, 0] = cache.scratch_block  # a context of 1 looks at no other
    if batch.state_slots is not None:
        assert cache.scratch_slot is not None, "padding has to keep a state somewhere"
        batch.state_slots[rows] = cache.scratch_slot


def _first_rows(batch: Batch, rows: int) -> Batch:
    return Batch(
        token_ids=batch.token_ids[:rows],
        positions=batch.positions[:rows],
        slots=batch.slots[:rows],
        query_starts=batch.query_starts[: rows + 1],
        context_tokens=batch.context_tokens[:rows],
        block_tables=batch.block_tables[:rows],
        sampled=batch.sampled[:rows],
        cache=batch.cache,
        state_slots=None if batch.state_slots is None else batch.state_slots[:rows],
    )


class CudaCapture:
    """Captures with torch's ``CUDAGraph`` into one pool.

    Warm-ups run on the caller's stream, captures on one on which nothing else ever runs: torch
    gives cuBLAS one workspace per stream, which the graphs go on using, and a step that ran there
    beside a replay would write to it at the same time.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, compute: Callable[[], Tensor]) -> CudaGraph:
        """Warm up, then write down; raise what *compute* or CUDA does."""
        for _ in range(WARM_UPS):
            compute()
        torch.cuda.current_stream(self._device).synchronize()
        with NO_CAPTURE, torch.cuda.stream(_capture_stream(self._device)):
            return self._captured(compute)

    @property
    def bytes(self) -> int:
        """Memory of the pool."""
        segments: list[dict[str, Any]] = torch.cuda.memory_snapshot()  # type: ignore[no-untyped-call] # torch's
        return sum(
            segment["total_size"]
            for segment in segments
            if tuple(segment["segment_pool_id"]) == tuple(self._pool)
        )

    def _captured(self, compute: Callable[[], Tensor]) -> CudaGraph:
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        try:
            logits = compute()
        except BaseException:
            with contextlib.suppress(RuntimeError):  # says once more that the capture was spoilt
                graph.capture_end()
            raise
        graph.capture_end()
        return CudaGraph(graph, logits)


@cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """Return a stream of high priority: of others torch has 32, and gives them out again."""
    return torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call] # torch's


class CudaGraph:
    """A captured step."""

    def __init__(self, graph: torch.cuda.CUDAGraph, logits: Tensor) -> None:
        self._graph = graph
        self.logits = logits

    def replay(self) -> None:
        """Launch it on the current stream."""
        self._graph.replay()
