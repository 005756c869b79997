"""What this device is to torch, and what has to be asked of CUDA by name.

A ``cpu:N`` is a share of the host, which torch knows as ``cpu``; a ``cuda:N`` is that GPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc

import torch

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
    return torch.cuda.stream(torch.cuda.Stream(device))  # type: ignore[no-untyped-call] # torch's


def wait_for_stream(device: torch.device) -> None:
    """Return when what this thread asked of the device is done; no memory it uses is freed before.

    The caching allocator would else hand a block to the loader's stream while a step's still
    reads it.
    """
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def share_one_heap() -> None:
    """Have all threads allocate from one heap; call it before there are any.

    glibc gives each thread a heap of its own and never trims the top of any but the first, so up to
    64 MB of what the loader thread had allocated stayed after an unload, now and then.
    """
    with contextlib.suppress(AttributeError):  # a C library other than glibc
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)


def reclaim(device: torch.device) -> None:
    """Give memory that nothing refers to back to the device, or to the host."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    else:
        with contextlib.suppress(AttributeError):  # a C library other than glibc trims by itself
            ctypes.CDLL(None).malloc_trim(0)
