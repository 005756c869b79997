"""A model's step on a CPU as one call: its operations are recorded once and run as a list.

    record   the model is called with a batch of buffers; every operation is written down with the
             addresses it works on instead of being run
    run      the step's tensors are copied into those buffers, and program.c does the rest

Nothing is known of a model here: whatever it makes of the operations of ``ops`` is recorded. It may
look at tensors in other ways, by views, but not compute with them otherwise: such a model is not
recorded and runs operation by operation, which is also the way to debug one.

What the ranks of a group do together (``all_reduce``, ``all_gather``) cuts the list: the operations
before it are run, then it, on the rows that the step has, then those after it.

Intermediate results lie in buffers that are used again as soon as the model has let go of them.
Buffers have room for a number of tokens; a larger step records the model anew.
"""

from __future__ import annotations

import ctypes
import logging
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cortex.models.batch import Batch, KVCache
from cortex.models.kernels.cpu import RECORDING, CpuKernels, Recorder
from cortex.models.kernels.op import OPERATIONS, Op, Step
from cortex.models.parallel import Group

Model = Callable[[Batch], Tensor]
ALIGNMENT = 64
NEW_MEMORY = {torch.ops.aten.empty.memory_format}
"""What the recorder itself asks of torch; a model that writes there has to compute first."""

LOOK_UPS = frozenset({"rows", "tiled_rows", "rows_of_share"})
"""Operations that fail for want of a row; all others for want of memory."""

log = logging.getLogger(__name__)


class Together(NamedTuple):
    """What the ranks do between two operations, on so many rows of the step."""

    after: int  # operations of the list
    is_sampled: bool  # whether its rows are those with logits, not all tokens
    run: Callable[[int], object]


class NotRecordable(Exception):
    """The model computes something that is none of the operations; the text says what."""


@dataclass(frozen=True, slots=True)
class Room:
    """For how much a program has buffers."""

    tokens: int
    sampled: int
    sequences: int
    blocks: int  # of a sequence

    @classmethod
    def for_batch(cls, batch: Batch) -> Room:
        """Return room for *batch*, and for others up to twice as large."""
        sequences, blocks = batch.block_tables.shape
        counts = (batch.token_ids.size(0), batch.sampled.size(0), sequences, blocks)
        return cls(*(1 << (count - 1).bit_length() for count in counts))

    def covers(self, other: Room) -> bool:
        """Whether there is as much room as in *other*."""
        return (
            self.tokens >= other.tokens
            and self.sampled >= other.sampled
            and self.sequences >= other.sequences
            and self.blocks >= other.blocks
        )

    def and_more(self, other: Room) -> Room:
        """Return room for both."""
        return Room(
            max(self.tokens, other.tokens),
            max(self.sampled, other.sampled),
            max(self.sequences, other.sequences),
            max(self.blocks, other.blocks),
        )


class Program:
    """A recorded model; calling it is calling the model. The logits are valid until the next call.

    *kernels* are the compiled operations of ``cpu``.
    """

    def __init__(self, model: Model, cache: KVCache, kernels: CpuKernels) -> None:
        self._model = model
        self.cache = cache
        self._kernels = kernels
        self._recording: _Recording | None = None
        self._is_recordable = True
        self._seconds: Any = None

    def __call__(self, batch: Batch) -> Tensor:
        """Return the logits [R, V]."""
        if self._is_recordable:
            try:
                return self._recorded(batch).run(batch, self._seconds)
            except NotRecordable as exc:
                self._is_recordable = False
                log.warning("the model runs operation by operation, which is slower: %s", exc)
        return self._model(batch)

    @property
    def buffer_bytes(self) -> int:
        """Memory of the intermediate results."""
        return self._recording.buffer_bytes if self._recording else 0

    def profile(self) -> Mapping[str, float]:
        """Return the seconds spent in each kind of operation since the last call; 0 at the first.

        Time is taken from the first call on.
        """
        seconds, self._seconds = self._seconds, (ctypes.c_double * len(OPERATIONS))()
        return dict(zip(OPERATIONS, seconds or [0.0] * len(OPERATIONS), strict=True))

    def _recorded(self, batch: Batch) -> _Recording:
        needed, recording = Room.for_batch(batch), self._recording
        if recording is None or not recording.room.covers(needed):
            room = needed if recording is None else needed.and_more(recording.room)
            self._recording = recording = None  # its buffers go before new ones come
            self._recording = recording = _Recording(self._model, self.cache, self._kernels, room)
        return recording


class _Recording:
    """The operations of one model for up to so many tokens, and their buffers."""

    def __init__(self, model: Model, cache: KVCache, kernels: CpuKernels, room: Room) -> None:
        self.room = room
        self._library = kernels.library
        self._inputs = _inputs(room, cache)
        recorder = _Recorder(kernels, self._inputs, room)
        with _OnlyViews():  # type: ignore[no-untyped-call] # torch's
            token = RECORDING.set(recorder)
            try:
                self._logits = model(self._inputs)
            finally:
                RECORDING.reset(token)
        self._ops = (Op * len(recorder.ops))(*recorder.ops)
        self._together = recorder.together
        self._slabs = recorder.slabs  # which all of them work on

    @property
    def buffer_bytes(self) -> int:
        """Memory of the intermediate results."""
        return sum(slab.numel() for slab in self._slabs)

    def run(self, batch: Batch, seconds: Any) -> Tensor:
        """Return the logits of *batch*."""
        inputs = self._inputs
        sequences, blocks = batch.block_tables.shape
        tokens, sampled = batch.token_ids.size(0), batch.sampled.size(0)
        _put(inputs.token_ids, batch.token_ids)
        _put(inputs.positions, batch.positions)
        _put(inputs.slots, batch.slots)
        _put(inputs.query_starts, batch.query_starts)
        _put(inputs.context_tokens, batch.context_tokens)
        _put(inputs.sampled, batch.sampled)
        if batch.state_slots is not None:
            assert inputs.state_slots is not None
            _put(inputs.state_slots, batch.state_slots)
        if sequences == 1:
            _put(inputs.block_tables, batch.block_tables)
        else:
            inputs.block_tables[:sequences, :blocks] = batch.block_tables
        step = Step(tokens, sampled, sequences, torch.get_num_threads())
        done = 0
        for together in self._together:
            self._run_ops(done, together.after, step, seconds)
            together.run(sampled if together.is_sampled else tokens)
            done = together.after
        self._run_ops(done, len(self._ops), step, seconds)
        return self._logits[:sampled]

    def _run_ops(self, first: int, end: int, step: Step, seconds: Any) -> None:
        ops, count = ctypes.addressof(self._ops), len(self._ops)
        failed = self._library.cortex_run(ops, count, first, end, ctypes.addressof(step), seconds)
        if failed:
            raise _failure(OPERATIONS[failed - 1])


def _put(to: Tensor, values: Tensor) -> None:
    """Copy *values* to where *to* begins; a slice's assignment costs ten times as much."""
    values = values.contiguous()
    ctypes.memmove(to.data_ptr(), values.data_ptr(), values.nbytes)


class _Recorder(Recorder):
    """Writes operations down; what they return has a place, and nothing in it yet."""

    def __init__(self, kernels: CpuKernels, inputs: Batch, room: Room) -> None:
        self.library = kernels.library
        self.ops: list[Op] = []
        self.together: list[Together] = []
        self.slabs: list[Tensor] = []
        self._free: list[Tensor] = []
        self._room = room
        self._is_sampled = {
            inputs.token_ids.data_ptr(): False,
            inputs.positions.data_ptr(): False,
            inputs.sampled.data_ptr(): True,
        }

    def new(self, like: Tensor, *columns: int) -> Tensor:
        """Return a place for as many rows as *like* has."""
        is_sampled = self._has_logits(like)
        rows = self._room.sampled if is_sampled else self._room.tokens
        count = rows
        for size in columns:
            count *= size
        slab = self._slab(count * 4)
        self._is_sampled[slab.data_ptr()] = is_sampled
        lease = (ctypes.c_char * (count * 4)).from_address(slab.data_ptr())
        weakref.finalize(lease, self._free.append, slab)  # once no tensor looks at it any more
        return torch.frombuffer(lease, dtype=torch.float32).view(rows, *columns)

    def do(self, name: str, rows_of: Tensor, *arguments: float, sequences: int = 0) -> int:
        """Write the operation down."""
        del sequences  # the step brings it
        self.ops.append(Op.of(name, arguments, is_sampled=self._has_logits(rows_of)))
        return 0

    def all_reduce(self, x: Tensor, group: Group) -> Tensor:
        """Write down that [M, N] is summed over the ranks of *group*, in place; return it."""
        assert group.collectives is not None, "a group that only loads computes nothing"
        place, reduce = _place(x), group.collectives.all_reduce
        self._cut(x, lambda rows: reduce(place[:rows]))
        return x

    def all_gather(self, x: Tensor, group: Group) -> Tensor:
        """Write down that [M, n] of all ranks is put side by side -> [M, n * ranks]."""
        assert group.collectives is not None, "a group that only loads computes nothing"
        y = self.new(x, x.size(1) * group.ranks)
        place, to, gather = _place(x), _place(y), group.collectives.all_gather
        self._cut(x, lambda rows: to[:rows].copy_(gather(place[:rows])))
        return y

    def _cut(self, rows_of: Tensor, run: Callable[[int], object]) -> None:
        self.together.append(Together(len(self.ops), self._has_logits(rows_of), run))

    def _has_logits(self, x: Tensor) -> bool:
        return self._is_sampled[x.untyped_storage().data_ptr()]

    def _slab(self, size: int) -> Tensor:
        """Return memory of at least *size* bytes: the smallest that is free, else new."""
        fitting = [at for at, slab in enumerate(self._free) if slab.numel() >= size]
        if fitting:  # the list stays the same one: every lease gives its slab back to it
            return self._free.pop(min(fitting, key=lambda at: self._free[at].numel()))
        slab = torch.empty(-(-size // ALIGNMENT) * ALIGNMENT, dtype=torch.uint8)
        self.slabs.append(slab)
        return slab


def _place(x: Tensor) -> Tensor:
    """Return where *x* lies, as a tensor that does not keep others from lying there later."""
    memory = (ctypes.c_char * x.nbytes).from_address(x.data_ptr())
    return torch.frombuffer(memory, dtype=x.dtype).view(x.shape)


def _failure(operation: str) -> Exception:
    """Return what its method in ``cpu`` raises."""
    if operation in LOOK_UPS:
        return IndexError("a token id is out of range")
    return MemoryError(f"no memory for an operation of the step: {operation}")


def _inputs(room: Room, cache: KVCache) -> Batch:
    def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype)

    return Batch(
        token_ids=zeros(room.tokens, dtype=torch.int64),
        positions=zeros(room.tokens, dtype=torch.int64),
        slots=zeros(room.tokens, dtype=torch.int64),
        query_starts=zeros(room.sequences + 1, dtype=torch.int32),
        context_tokens=zeros(room.sequences, dtype=torch.int32),
        block_tables=zeros(room.sequences, room.blocks, dtype=torch.int32),
        sampled=zeros(room.sampled, dtype=torch.int64),
        cache=cache,
        state_slots=zeros(room.sequences, dtype=torch.int64),
    )


class _OnlyViews(TorchDispatchMode):  # type: ignore[no-untyped-call] # torch's
    """Refuses what would compute something that the recording does not see."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Spare every device process the import of torch's compiler, 0.9 s and 75 MB."""
        return False

    def __torch_dispatch__(
        self,
        func: Any,
        _types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if not func.is_view and func not in NEW_MEMORY:
            raise NotRecordable(f"it uses {func}")
        return func(*args, **(kwargs or {}))
