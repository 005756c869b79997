"""Which exceptions of torch mean what for the device."""

from __future__ import annotations

import torch

_OUT_OF_MEMORY = (
    "DefaultCPUAllocator: can't allocate",
    "CUDA error: out of memory",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED",
    "Triton Error [CUDA]: out of memory",
)
"""All but the first are allocations that went past torch's allocator, a library's or a kernel's."""

_FAULTS = "CUDA error", "CUDA driver error", "cuDNN error", "Triton Error [CUDA]"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether *error* is an allocation that failed, after which the device is still fine."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in _OUT_OF_MEMORY)
    )


def is_device_fault(error: BaseException) -> bool:
    """Whether *error* says that the device itself failed; everything else is a bug of ours.

    CUDA's own errors are ``torch.AcceleratorError``; those of its libraries are plain
    RuntimeErrors that begin alike. What a kernel did wrong may first be seen by the next launch,
    which is often Triton's.
    """
    if is_out_of_memory(error):
        return False
    return isinstance(error, torch.AcceleratorError) or (
        isinstance(error, RuntimeError) and str(error).startswith(_FAULTS)
    )
