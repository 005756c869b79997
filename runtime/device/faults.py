"""Which exceptions of torch mean what for the device."""

from __future__ import annotations

import torch


def is_out_of_memory(error: BaseException) -> bool:
    """Whether *error* is an allocation that failed, after which the device is still fine."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate" in str(error)
    )


def is_device_fault(error: BaseException) -> bool:
    """Whether *error* says that the device itself failed; everything else is a bug of ours.

    CUDA's own errors are ``torch.AcceleratorError``; those of its libraries are plain
    RuntimeErrors that begin alike.
    """
    if is_out_of_memory(error):
        return False
    return isinstance(error, torch.AcceleratorError) or (
        isinstance(error, RuntimeError) and str(error).startswith(("CUDA error", "cuDNN error"))
    )
