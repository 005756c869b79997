"""Which exceptions of torch mean what for the device."""

from __future__ import annotations

import torch

_OUT_OF_MEMORY = "DefaultCPUAllocator: can't allocate", "CUDA error: out of memory"
"""The second is an allocation that went past torch's allocator, such as a library's."""

_FAULTS = "CUDA error", "CUDA driver error", "cuDNN error"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether *error* is an allocation that failed, after which the device is still fine."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in _OUT_OF_MEMORY)
    )


def is_device_fault(error: BaseException) -> bool:
    """Whether *error* says that the device itself failed; everything else is a bug of ours.

    CUDA's own errors are ``torch.AcceleratorError``; those of its libraries are plain
    RuntimeErrors that begin alike.
    """
    if is_out_of_memory(error):
        return False
    return isinstance(error, torch.AcceleratorError) or (
        isinstance(error, RuntimeError) and str(error).startswith(_FAULTS)
    )
