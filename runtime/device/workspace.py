"""How much memory a step needs beside weights and cache, measured on small steps of the model.

After each operation of a step, what is alive is a part that does not depend on the tokens of the
step (weights that are being unpacked) and one that grows in proportion to them. So two steps of
few tokens foretell, operation by operation, a step of many, and the largest of these is its peak;
between a short and a long context, a straight line does.

Only tensors of the measuring thread are counted, so that a load can be measured beside the steps of
other models. What a kernel allocates inside itself is not seen.

Steps that are recorded (on a CPU) are all buffers, which stay from step to step and have room for a
power of two of tokens: two small recordings foretell what a large one takes. CUDA graphs keep the
memory of a decode step, beside what a step without a graph takes. What they will keep is foretold
like any step, from one of as many tokens as the largest graph has rows.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cortex.ipc.messages import SamplingParams
from cortex.models.batch import KVCache
from cortex.runtime.device.model_runner import BLOCK_TOKENS, ModelRunner, ServableModel
from cortex.runtime.device.step_plan import PlannedSequence, StepPlan

_PROBE_TOKENS = 4, 8
_CHUNK_PROBE_TOKENS = 64, 128  # recurrent layers compute by chunks: of whole ones memory is a line
_GPU_PROBE_TOKENS = 256, 512  # a GPU unpacks weights for so many, and sorts them by expert
_PROBE_CONTEXT_TOKENS = 4096  # a straight line from here on
_LOGIT_BYTES = 4
_POOL_SLACK = 1.25  # torch's allocator rounds up, and splits what it has


@dataclass(frozen=True, slots=True)
class Workspace:
    """Memory of a largest step: a part that does not depend on the context, and one that does.

    ``graph_bytes`` of the first part are what CUDA graphs are expected to keep.
    """

    fixed_bytes: int
    bytes_per_context_token: int
    graph_bytes: int = 0

    def at(self, context_tokens: int) -> int:
        """Return the bytes for a sequence of *context_tokens*."""
        return self.fixed_bytes + self.bytes_per_context_token * context_tokens


class _LivingTensors(TorchDispatchMode):  # type: ignore[no-untyped-call] # torch's
    """Counts the bytes of the tensors made in the block and alive, after each operation."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call] # torch's
        self.history_bytes: list[int] = []
        self._bytes = 0
        self._storages: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Spare every device process the import of torch's compiler, 0.9 s and 75 MB."""
        return False

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        _types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        for tensor in _tensors([args, kwargs]):  # what came from outside the block, weights say
            self._count(tensor, 0)
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            self._count(tensor, tensor.untyped_storage().nbytes())
        self.history_bytes.append(self._bytes)
        return result

    def _count(self, tensor: Tensor, size: int) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata  # noqa: SLF001 - a storage has no other name
        if key in self._storages:
            return

        def gone(_: weakref.ref[torch.UntypedStorage]) -> None:
            del self._storages[key]
            self._bytes -= size

        self._storages[key] = weakref.ref(storage, gone)
        self._bytes += size


def living_bytes(compute: Callable[[], object]) -> list[int]:
    """Return what tensors made by *compute* held after each of its operations."""
    living = _LivingTensors()
    with living:
        compute()
    return living.history_bytes


def measure_workspace(
    model: ServableModel,
    device: torch.device,
    token_budget: int,
    beside_bytes: int,
    graph_rows: Sequence[int] = (),
) -> Workspace:
    """Run *model* on small steps; *beside_bytes* is what sampling takes after a step.

    *graph_rows* are the numbers of rows that decode steps will be captured of.
    """
    far = min(_PROBE_CONTEXT_TOKENS, model.max_position_embeddings)
    probes = probe_tokens(device.type, has_states=model.caches.state is not None)
    near = min(probes[-1], far)
    cache = model.new_cache(1, BLOCK_TOKENS, 1)
    if device.type == "cpu" and (kept := _foretell_buffers(model, cache, near, token_budget)):
        return Workspace(kept + beside_bytes, bytes_per_context_token=0)
    runner = ModelRunner(model, cache, device, is_recorded=False)
    for count in {min(_PROBE_TOKENS[-1], near), near}:
        _run(runner, count, near)  # uncounted: a first step may try out and compile kernels
    foretell = partial(_foretell, runner, probes=probes)
    at_near, at_far = (foretell(token_budget, context) for context in (near, far))
    growth = max(0, at_far - at_near) // max(1, far - near)
    graph_bytes = 0
    if graph_rows:
        logits_bytes = sum(graph_rows) * model.vocab_size * _LOGIT_BYTES
        rows = max(graph_rows)
        few = foretell if rows >= probes[0] else partial(_foretell, runner, probes=_PROBE_TOKENS)
        graph_bytes = logits_bytes + int(_POOL_SLACK * few(rows, far))
    return Workspace(
        fixed_bytes=max(0, at_near - growth * near) + beside_bytes + graph_bytes,
        bytes_per_context_token=growth,
        graph_bytes=graph_bytes,
    )


def probe_tokens(device_type: str, *, has_states: bool) -> tuple[int, int]:
    """Return the tokens of two small steps that do what a large one does."""
    if device_type == "cuda":
        return _GPU_PROBE_TOKENS
    return _CHUNK_PROBE_TOKENS if has_states else _PROBE_TOKENS


def _foretell_buffers(model: ServableModel, cache: KVCache, context: int, tokens: int) -> int:
    """Return what recorded steps of up to *tokens* keep; 0 where there is nothing to record."""
    few, more = (min(count, context) for count in _PROBE_TOKENS)
    kept = []
    for count in (few, more):
        runner = ModelRunner(model, cache, torch.device("cpu"))
        _run(runner, count, context)
        kept.append(runner.buffer_bytes)
    room = 1 << (tokens - 1).bit_length()
    return kept[0] + (kept[1] - kept[0]) * (room - few) // max(1, more - few)


def _foretell(runner: ModelRunner, tokens: int, context: int, probes: tuple[int, int]) -> int:
    """Return the peak of a step of *tokens*, as if they fitted into *context*."""
    few, more = (min(count, context) for count in probes)
    at_few, at_more = _history(runner, few, context), _history(runner, more, context)
    if few == more or len(at_few) != len(at_more):  # other tokens, other operations: a bound
        return max(at_more) * -(-tokens // more)
    times = (tokens - few) / (more - few)
    return int(max(a + (b - a) * times for a, b in zip(at_few, at_more, strict=True)))


def _history(runner: ModelRunner, tokens: int, context: int) -> list[int]:
    return living_bytes(lambda: _run(runner, tokens, context))


def _run(runner: ModelRunner, tokens: int, context: int) -> Tensor:
    """Run a step of *tokens* at the end of *context*, all of it in block 0."""
    step = PlannedSequence(
        sequence_id=0,
        token_ids=[0] * tokens,
        first_position=context - tokens,
        block_table=[0] * -(-context // BLOCK_TOKENS),
        is_last=True,
        sampling=SamplingParams(temperature=0.0, max_tokens=1, seed=0),
    )
    return runner.forward(StepPlan([step]))


def _tensors(tree: Any) -> Iterable[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        yield from _tensors(list(tree.values()))
    elif isinstance(tree, list | tuple):
        for branch in tree:
            yield from _tensors(branch)
