"""File descriptors that travel to a forked child, and the memory and wake-ups made of them.

Nothing here has a name in a file system: what a killed process leaves behind, the kernel frees.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import resource
from multiprocessing import reduction
from typing import Protocol, Self

_MFD_NOEXEC_SEAL = 0x0008  # Linux 6.3; older kernels answer EINVAL


def allow_many_descriptors() -> None:
    """Let this process have as many open files as it may; a stream through a gateway takes two.

    Most systems begin with 1024, for select(2), which is therefore never called.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class _Duplicate(Protocol):
    def detach(self) -> int: ...


class Descriptor:
    """An open file that may be sent along while a ``multiprocessing.Process`` starts.

    On the far side ``fd`` is a fresh descriptor of the same open file; the sender keeps its own.
    """

    __slots__ = ("fd",)

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def fileno(self) -> int:
        """Return the descriptor, for select and friends."""
        return self.fd

    def close(self) -> None:
        """Close it; closing twice is not an error."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def __reduce__(self) -> tuple[object, tuple[object]]:
        return Descriptor._arrive, (reduction.DupFd(self.fd),)

    @classmethod
    def _arrive(cls, duplicate: _Duplicate) -> Self:
        fd = duplicate.detach()
        os.set_inheritable(fd, False)  # SCM_RIGHTS delivers without close-on-exec
        return cls(fd)


def sealed_memory(name: str, size_bytes: int) -> Descriptor:
    """Return anonymous memory whose size can never change again, so a mapping never gets SIGBUS."""
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    try:
        fd = os.memfd_create(name, flags | _MFD_NOEXEC_SEAL)
    except OSError as exc:
        if exc.errno != errno.EINVAL:
            raise
        fd = os.memfd_create(name, flags)
    os.ftruncate(fd, size_bytes)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
    return Descriptor(fd)


def wake_up() -> Descriptor:
    """Return an eventfd that both sides use without blocking."""
    return Descriptor(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))


def mapped(memory: Descriptor, *, writable: bool) -> mmap.mmap:
    """Map all of *memory*, shared."""
    protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
    return mmap.mmap(memory.fd, os.fstat(memory.fd).st_size, mmap.MAP_SHARED, protection)
