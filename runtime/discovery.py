"""Which GPUs this host has and how they are: NVML, and every way it can be missing.

``GpuProbe`` is all we ask of a driver. Its readings block, sometimes for long while a GPU is busy,
so ``readings.py`` takes them in a thread, and everybody else reads the last good ones. A host
without driver, with a driver upgraded under a running kernel, or without GPUs is a normal host: it
serves on its CPU and ``/discovery`` says why.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import pynvml as untyped_pynvml

pynvml: Any = untyped_pynvml

T = TypeVar("T")

KERNEL_MODULE = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True, slots=True)
class Gpu:
    """What does not change: ``index`` is CUDA's when devices are ordered by PCI bus.

    ``memory_bytes`` is 0 where the GPU does not say, as those that share the host's memory do.
    """

    index: int
    name: str
    uuid: str
    memory_bytes: int
    compute_capability: str | None = None


@dataclass(frozen=True, slots=True)
class Holder:
    """A process that holds memory of a GPU; how much is 0 where the driver does not say."""

    pid: int
    held_bytes: int


@dataclass(frozen=True, slots=True)
class Reading:
    """What changes on a device; None where nobody says."""

    used_bytes: int | None = None
    free_bytes: int | None = None
    utilization_pct: int | None = None
    temp_c: int | None = None
    holders: tuple[Holder, ...] = ()
    """Of a GPU's memory, ours among them; pids as the first PID namespace counts."""


@dataclass(frozen=True, slots=True)
class Inventory:
    """The GPUs of this host, or in words why there is none to be used."""

    gpus: tuple[Gpu, ...] = ()
    driver_version: str | None = None
    cuda_version: str | None = None
    unavailable_reason: str | None = None

    def visible(self, selection: str | None) -> Inventory:
        """Return what CUDA will see under ``CUDA_VISIBLE_DEVICES=selection``, as it numbers it.

        CUDA takes indices and beginnings of UUIDs, and stops at the first it does not know.
        """
        if selection is None:
            return self
        chosen: list[Gpu] = []
        for word in filter(None, (part.strip() for part in selection.split(","))):
            gpu = next((g for g in self.gpus if _is_meant(g, word)), None)
            if gpu is None:
                break
            chosen.append(gpu)
        renumbered = tuple(
            Gpu(i, g.name, g.uuid, g.memory_bytes, g.compute_capability)
            for i, g in enumerate(chosen)
        )
        reason = self.unavailable_reason
        if self.gpus and not renumbered:
            reason = f"CUDA_VISIBLE_DEVICES={selection!r} hides every GPU of this host"
        return Inventory(renumbered, self.driver_version, self.cuda_version, reason)


def _is_meant(gpu: Gpu, word: str) -> bool:
    return gpu.uuid.startswith(word) if word.startswith("GPU-") else word == str(gpu.index)


class ProbeFailed(Exception):
    """A GPU that was there cannot be read now."""


class GpuProbe(Protocol):
    """What we ask of a GPU driver; both calls may block."""

    def inventory(self) -> Inventory:
        """Return the GPUs, or why there are none; never raises for a driver that is missing."""
        ...

    def read(self, gpu: Gpu) -> Reading:
        """Return how *gpu* is now; raise ProbeFailed."""
        ...


class NvmlProbe:
    """NVIDIA's management library, through nvidia-ml-py."""

    def inventory(self) -> Inventory:
        """Return the GPUs, or why there are none."""
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError as exc:
            return Inventory(unavailable_reason=_why_not(exc))
        gpus: list[Gpu] = []
        try:
            gpus.extend(_gpu(i) for i in range(pynvml.nvmlDeviceGetCount()))
        except pynvml.NVMLError as exc:
            return Inventory(unavailable_reason=f"NVML cannot list the GPUs: {exc}")
        return Inventory(
            gpus=tuple(gpus),
            driver_version=_or_none(lambda: str(pynvml.nvmlSystemGetDriverVersion())),
            cuda_version=_or_none(lambda: _cuda(pynvml.nvmlSystemGetCudaDriverVersion_v2())),
            unavailable_reason=None if gpus else "the NVIDIA driver is there, but no GPU",
        )

    def read(self, gpu: Gpu) -> Reading:
        """Return how *gpu* is now; a field that this GPU does not offer is None."""
        try:
            handle = pynvml.nvmlDeviceGetHandleByUUID(gpu.uuid)
        except pynvml.NVMLError as exc:
            raise ProbeFailed(str(exc)) from exc
        memory = _or_none(lambda: pynvml.nvmlDeviceGetMemoryInfo(handle))
        return Reading(
            used_bytes=None if memory is None else int(memory.used),
            free_bytes=None if memory is None else int(memory.free),
            utilization_pct=_or_none(lambda: int(pynvml.nvmlDeviceGetUtilizationRates(handle).gpu)),
            temp_c=_or_none(
                lambda: int(pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU))
            ),
            holders=tuple(
                Holder(int(process.pid), int(process.usedGpuMemory or 0))
                for process in _or_none(
                    lambda: pynvml.nvmlDeviceGetComputeRunningProcesses_v3(handle)
                )
                or ()
            ),
        )


def _gpu(index: int) -> Gpu:
    handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    capability = _or_none(lambda: pynvml.nvmlDeviceGetCudaComputeCapability(handle))
    memory = _or_none(lambda: pynvml.nvmlDeviceGetMemoryInfo(handle))
    return Gpu(
        index=index,
        name=str(pynvml.nvmlDeviceGetName(handle)),
        uuid=str(pynvml.nvmlDeviceGetUUID(handle)),
        memory_bytes=0 if memory is None else int(memory.total),
        compute_capability=None if capability is None else f"{capability[0]}.{capability[1]}",
    )


def _or_none(ask: Callable[[], T]) -> T | None:
    """Return the answer, or None where this driver or GPU has none."""
    try:
        return ask()
    except pynvml.NVMLError:
        return None


def _cuda(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def _why_not(exc: Any) -> str:
    match exc.value:
        case pynvml.NVML_ERROR_LIBRARY_NOT_FOUND:
            return "no NVIDIA driver is installed (libnvidia-ml.so.1 was not found)"
        case pynvml.NVML_ERROR_DRIVER_NOT_LOADED:
            return "the NVIDIA kernel module is not loaded"
        case pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH:
            module = kernel_module_version(KERNEL_MODULE)
            library = _or_none(lambda: str(pynvml.nvmlSystemGetNVMLVersion())) or "unknown"
            return (
                f"NVIDIA driver/library version mismatch: the library is {library}, the kernel "
                f"module is {module}; reboot, or reload the kernel module"
            )
        case pynvml.NVML_ERROR_NO_PERMISSION:
            return "this user may not open the NVIDIA devices"
        case _:
            return f"NVML does not start: {exc}"


def kernel_module_version(path: Path) -> str:
    """Return the version of the NVIDIA kernel module that runs, or ``unknown``."""
    try:
        found = re.search(r"Kernel Module.*?\s(\d+(?:\.\d+)+)", path.read_text())
    except OSError:
        found = None
    return found[1] if found else "unknown"
