"""What this device is to torch, and what has to be asked of CUDA by name.

A ``cpu:N`` is a share of the host, which torch knows as ``cpu``; a ``cuda:N`` is that GPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor

from cortex.models.kernels.graphs import NO_CAPTURE
from cortex.runtime.device.refusal import DeviceLost

_M_ARENA_MAX = -8


def torch_device(name: str) -> torch.device:
    """Return torch's device for ``cpu:1`` or ``cuda:0``."""
    return torch.device("cpu" if name.startswith("cpu") else name)


def open_device(device: torch.device) -> None:
    """Make the context, also for this thread; raise DeviceLost where there is none to have."""
    if device.type != "cuda":
        return
    try:
        torch.cuda.mem_get_info(device)
        torch.cuda.set_device(device)
    except (RuntimeError, AssertionError) as exc:  # the second: a torch built without CUDA
        raise DeviceLost(f"{device} cannot be used: {exc}") from exc


def measured_free_bytes(device: torch.device) -> int | None:
    """Return what the device says is free; None for a CPU, which its processes share."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None


def side_stream(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Return a context whose work does not queue behind the steps of the default stream."""
    if device.type != "cuda":
        return contextlib.nullcontext()
    return torch.cuda.stream(_side_stream(device))


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the one of a device: cuBLAS keeps up to 32 MiB for each that saw a product."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call] # torch's


def wait_for_stream(device: torch.device) -> None:
    """Return when what this thread asked of the device is done; no memory it uses is freed before.

    The caching allocator would else hand a block to the loader's stream while a step's still
    reads it.
    """
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def upload(
    values: Sequence[Any] | npt.NDArray[Any] | Tensor, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Return *values*, numbers or lists of them, on *device*, which may still be fetching them.

    A copy from pinned memory is queued, one from any other is waited for; torch keeps the pinned
    memory until the copy is over.
    """
    if device.type != "cuda":
        return torch.as_tensor(values, dtype=dtype, device=device)
    return torch.as_tensor(values, dtype=dtype).pin_memory().to(device, non_blocking=True)


def fetch(tensors: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
    """Begin to copy *tensors* to the host; the function returned waits until they are there."""
    if not tensors or tensors[0].device.type != "cuda":
        return lambda: list(tensors)
    copies = [
        torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(
            tensor, non_blocking=True
        )
        for tensor in tensors
    ]
    arrived = torch.cuda.Event()  # type: ignore[no-untyped-call] # torch's
    arrived.record()

    def wait() -> list[Tensor]:
        arrived.synchronize()
        return copies

    return wait


def share_one_heap() -> None:
    """Have all threads allocate from one heap; call it before there are any.

    glibc gives each thread a heap of its own and never trims the top of any but the first, so up to
    64 MB of what the loader thread had allocated stayed after an unload, now and then.
    """
    with contextlib.suppress(AttributeError):  # a C library other than glibc
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)


def reclaim(device: torch.device) -> None:
    """Give memory that nothing refers to back to the device, or to the host.

    On a GPU it waits for a graph that is being captured.
    """
    gc.collect()
    if device.type == "cuda":
        with NO_CAPTURE:
            torch.cuda.empty_cache()
    else:
        with contextlib.suppress(AttributeError):  # a C library other than glibc trims by itself
            ctypes.CDLL(None).malloc_trim(0)
