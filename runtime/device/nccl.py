"""NCCL through ctypes: the collectives of GPUs, on the stream of whoever calls.

torch's own process groups put a collective on a stream of theirs and watch it from threads of
theirs, which end the process when they please. Called directly, a collective is one more kernel of
the step: in the order of the stream, captured with the graph that the step is, and given up by
``abort`` where a rank does not come.

The library is the one that torch has loaded. What is called, and the numbers of types and
operations, are those of nccl.h, unchanged since 2.19 (float8 since 2.24).

NCCL connects its ranks at the first call that needs it: a new communicator makes one of each kind
at once, so that no connection is made while a graph is captured, and what they take is taken before
anybody counts what is free.

A rank that dies is not noticed by the kernels of the others, which go on waiting on the device: it
is the supervisor who ends them.
"""

from __future__ import annotations

import ctypes
import os
import threading
from ctypes import POINTER, byref, c_char, c_char_p, c_int, c_size_t, c_void_p
from datetime import timedelta
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import structlog
import torch
from torch import Tensor
from torch.distributed import Store  # type: ignore[attr-defined] # torch's

from cortex.runtime.device.refusal import DeviceLost, PeerLost

UNIQUE_ID_BYTES = 128
SUM = 0
IN_PROGRESS = 7
TYPES = {
    torch.int8: 0,
    torch.uint8: 1,
    torch.int32: 2,
    torch.int64: 4,
    torch.float16: 6,
    torch.float32: 7,
    torch.float64: 8,
    torch.bfloat16: 9,
    torch.float8_e4m3fn: 10,
    torch.float8_e5m2: 11,
}
ID_WAITS_SECONDS = 120.0
SETTINGS = {
    "NCCL_GRAPH_REGISTER": "0",  # it has the ranks wait for each other within a capture
    "NCCL_SOCKET_IFNAME": "lo",  # all of them are on this host
}
"""Unless the environment says otherwise."""
CONNECTING_ELEMENTS = (1, 1 << 14, 1 << 18, 1 << 22)
"""Of sums and gathers for which NCCL has different algorithms."""
_log = structlog.get_logger()


class UniqueId(ctypes.Structure):
    """What the ranks of a communicator find each other by."""

    _fields_ = (("internal", c_char * UNIQUE_ID_BYTES),)


_SIGNATURES: dict[str, tuple[object, ...]] = {
    "ncclGetVersion": (POINTER(c_int),),
    "ncclGetUniqueId": (POINTER(UniqueId),),
    "ncclCommInitRank": (POINTER(c_void_p), c_int, UniqueId, c_int),
    "ncclCommDestroy": (c_void_p,),
    "ncclCommAbort": (c_void_p,),
    "ncclCommGetAsyncError": (c_void_p, POINTER(c_int)),
    "ncclAllReduce": (c_void_p, c_void_p, c_size_t, c_int, c_int, c_void_p, c_void_p),
    "ncclAllGather": (c_void_p, c_void_p, c_size_t, c_int, c_void_p, c_void_p),
}


@cache
def library() -> ctypes.CDLL:
    """Return NCCL, loaded once per process; raise DeviceLost where this host has none."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    for name in ("libnccl.so.2", *_wheel_libraries()):
        try:
            nccl = ctypes.CDLL(name)
        except OSError:
            continue
        for function, arguments in _SIGNATURES.items():
            getattr(nccl, function).argtypes = arguments
        nccl.ncclGetErrorString.restype = c_char_p
        return nccl
    raise DeviceLost("libnccl.so.2 is not here: ranks on GPUs need it (it comes with torch)")


def version() -> int:
    """Return it as NCCL writes it: 22703 is 2.27.3."""
    number = c_int()
    _check(library().ncclGetVersion(byref(number)), "ncclGetVersion")
    return number.value


def unique_id() -> bytes:
    """Return a new one; the first rank makes it and tells the others."""
    made = UniqueId()
    _check(library().ncclGetUniqueId(byref(made)), "ncclGetUniqueId")
    return bytes(made)


class NcclCollectives:
    """One communicator. Its calls are queued on the current stream, and may be captured."""

    def __init__(self, identity: bytes, device: torch.device, rank: int, ranks: int) -> None:
        """Meet the others, who know the same *identity*; raise PeerLost. Waits for all of them."""
        self._ranks = ranks
        self._device = device
        self._nccl = library()
        self._handle = c_void_p()
        self._lock = threading.Lock()
        with torch.cuda.device(device):
            _check(
                self._nccl.ncclCommInitRank(
                    byref(self._handle), ranks, UniqueId.from_buffer_copy(identity), rank
                ),
                "ncclCommInitRank",
            )

    @classmethod
    def meeting(cls, store: Store, device: torch.device, rank: int, ranks: int) -> NcclCollectives:
        """Meet the others in *store*, which nothing else uses; raise PeerLost."""
        try:
            if rank == 0:
                store.set("id", unique_id().hex())
            store.wait(["id"], timedelta(seconds=ID_WAITS_SECONDS))
            identity = bytes.fromhex(store.get("id").decode())
        except RuntimeError as exc:
            raise PeerLost("the first rank did not come to meet the others") from exc
        made = cls(identity, device, rank, ranks)
        made.connect()
        return made

    def connect(self) -> None:
        """Make all connections; every rank does. Raise PeerLost."""
        try:
            for elements in CONNECTING_ELEMENTS:
                x = torch.zeros((1, elements), dtype=torch.bfloat16, device=self._device)
                self.all_gather(self.all_reduce(x))
            self._wait()
            self.check()
        except PeerLost:
            self.abort()
            raise

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum contiguous *x* over the ranks, in place, and return it; the same bits on all."""
        address, stream = x.data_ptr(), self._stream()
        _check(
            self._nccl.ncclAllReduce(
                address, address, x.numel(), TYPES[x.dtype], SUM, self._handle, stream
            ),
            "ncclAllReduce",
        )
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        """[M, n] of every rank -> [M, n * ranks], in the order of the ranks."""
        parts = x.new_empty(self._ranks, *x.shape)
        _check(
            self._nccl.ncclAllGather(
                x.data_ptr(),
                parts.data_ptr(),
                x.numel(),
                TYPES[x.dtype],
                self._handle,
                self._stream(),
            ),
            "ncclAllGather",
        )
        return parts.transpose(0, 1).flatten(1)

    def check(self) -> None:
        """Raise PeerLost where something that was queued has failed meanwhile."""
        error = c_int()
        _check(
            self._nccl.ncclCommGetAsyncError(self._handle, byref(error)), "ncclCommGetAsyncError"
        )
        _check(error.value, "a collective")

    def abort(self) -> None:
        """Give up what is queued, and the communicator; from any thread, once."""
        self._end(self._nccl.ncclCommAbort, "ncclCommAbort")

    def close(self) -> None:
        """Give up the communicator, in a thread of its own: NCCL waits for all ranks to do so."""
        threading.Thread(
            target=self._end,
            args=(self._nccl.ncclCommDestroy, "ncclCommDestroy"),
            name="nccl-close",
            daemon=True,
        ).start()

    def _end(self, end: object, name: str) -> None:
        with self._lock:
            handle, self._handle = self._handle, c_void_p()
        if not handle.value:
            return
        with torch.cuda.device(self._device):
            result = end(handle)  # type: ignore[operator] # ctypes' functions have no type
        if result not in (0, IN_PROGRESS):
            _log.warning("a communicator did not end well", call=name, error=_words(result))

    def _stream(self) -> int:
        return torch.cuda.current_stream(self._device).cuda_stream

    def _wait(self) -> None:
        torch.cuda.current_stream(self._device).synchronize()


def _check(result: int, what: str) -> None:
    if result not in (0, IN_PROGRESS):
        raise PeerLost(f"{what} failed: {_words(result)}")


def _words(result: int) -> str:
    words: bytes = library().ncclGetErrorString(result)
    return words.decode()


def _wheel_libraries() -> list[str]:
    """Return where the wheel that torch depends on keeps it."""
    spec = find_spec("nvidia")
    roots = spec.submodule_search_locations if spec else None
    found = (Path(root) / "nccl/lib/libnccl.so.2" for root in roots or ())
    return [str(path) for path in found if path.exists()]
