"""NVML, and every way it can be missing, against a library that is faked below pynvml."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pynvml as untyped_pynvml
import pytest

from cortex.runtime import discovery
from cortex.runtime.discovery import (
    Gpu,
    Holder,
    Inventory,
    NvmlProbe,
    ProbeFailed,
    Reading,
    kernel_module_version,
)

pynvml: Any = untyped_pynvml
MIB = 2**20


class FakeNvml:
    """Stands for libnvidia-ml.so.1: functions take ctypes references and return codes.

    ``failing`` maps a function's name to the code it returns; a function that is not here is
    missing from the library.
    """

    def __init__(
        self,
        gpus: int = 1,
        failing: dict[str, int] | None = None,
        processes: list[tuple[int, int]] | None = None,
    ) -> None:
        self._gpus = gpus
        self._processes = processes or []
        self._failing = failing or {}

    def __getattr__(self, name: str) -> Any:
        answers: dict[str, Callable[..., object]] = {
            "nvmlInitWithFlags": lambda _flags: None,
            "nvmlDeviceGetCount_v2": lambda count: fill(count, self._gpus),
            "nvmlDeviceGetHandleByIndex_v2": lambda _index, _handle: None,
            "nvmlDeviceGetHandleByUUID": lambda _uuid, _handle: None,
            "nvmlDeviceGetName": lambda _handle, text, _size: write(text, "NVIDIA H200"),
            "nvmlDeviceGetUUID": lambda _handle, text, _size: write(text, "GPU-1"),
            "nvmlDeviceGetMemoryInfo": memory,
            "nvmlDeviceGetCudaComputeCapability": capability,
            "nvmlDeviceGetUtilizationRates": lambda _h, rates: setattr(rates._obj, "gpu", 37),
            "nvmlDeviceGetComputeRunningProcesses_v3": self._list_processes,
            "nvmlDeviceGetTemperature": lambda _h, _sensor, value: fill(value, 61),
            "nvmlSystemGetDriverVersion": lambda text, _size: write(text, "580.1"),
            "nvmlSystemGetNVMLVersion": lambda text, _size: write(text, "13.580.1"),
            "nvmlSystemGetCudaDriverVersion_v2": lambda value: fill(value, 13010),
            "nvmlErrorString": lambda _code: b"an error",
        }
        if name not in answers:
            raise AttributeError(name)
        return FakeFunction(answers[name], self._failing.get(name, 0))

    def _list_processes(self, _handle: Any, count: Any, rows: Any) -> int:
        if rows is None:
            fill(count, len(self._processes))
            return int(pynvml.NVML_ERROR_INSUFFICIENT_SIZE) if self._processes else 0
        for row, (pid, held_bytes) in zip(rows, self._processes, strict=False):
            row.pid, row.usedGpuMemory = pid, held_bytes
        fill(count, len(self._processes))
        return 0


class FakeFunction:
    """A ctypes function: callable, with room for ``argtypes`` and ``restype``."""

    def __init__(self, answer: Callable[..., Any], code: int) -> None:
        self._answer = answer
        self._code = code

    def __call__(self, *arguments: Any) -> int:
        if self._code:
            return self._code
        answered = self._answer(*arguments)
        return answered if isinstance(answered, int) else 0


def fill(reference: Any, value: int) -> None:
    """Write what a ``byref`` points at."""
    reference._obj.value = value


def write(buffer: Any, text: str) -> None:
    """Write into a string buffer."""
    buffer.value = text.encode()


def memory(_handle: Any, info: Any) -> None:
    """Fill a memory structure."""
    info._obj.total, info._obj.used, info._obj.free = 1000 * MIB, 400 * MIB, 600 * MIB


def capability(_handle: Any, major: Any, minor: Any) -> None:
    """Write compute capability 9.0."""
    fill(major, 9)
    fill(minor, 0)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that puts a FakeNvml where pynvml looks for the library."""

    def install(**options: Any) -> None:
        monkeypatch.setattr(pynvml, "nvmlLib", FakeNvml(**options))
        monkeypatch.setattr(pynvml, "_nvmlGetFunctionPointer_cache", {})

    return install


def test_gpus_are_found_with_what_they_are(library: Callable[..., None]) -> None:
    library(gpus=2)

    inventory = NvmlProbe().inventory()

    assert [gpu.index for gpu in inventory.gpus] == [0, 1]
    assert inventory.gpus[0] == Gpu(0, "NVIDIA H200", "GPU-1", 1000 * MIB, "9.0")
    assert (inventory.driver_version, inventory.cuda_version) == ("580.1", "13.1")
    assert inventory.unavailable_reason is None


def test_a_gpu_is_read(library: Callable[..., None]) -> None:
    library()

    reading = NvmlProbe().read(Gpu(0, "NVIDIA H200", "GPU-1", 0))

    assert reading == Reading(400 * MIB, 600 * MIB, utilization_pct=37, temp_c=61)


def test_who_holds_memory_of_a_gpu_is_read_too(library: Callable[..., None]) -> None:
    unknown = pynvml.NVML_VALUE_NOT_AVAILABLE_ulonglong.value
    library(processes=[(41, 300 * MIB), (42, unknown)])

    reading = NvmlProbe().read(Gpu(0, "NVIDIA H200", "GPU-1", 0))

    assert reading.holders == (Holder(41, 300 * MIB), Holder(42, 0))


def test_a_driver_that_lists_no_processes_is_read_all_the_same(
    library: Callable[..., None],
) -> None:
    name = "nvmlDeviceGetComputeRunningProcesses_v3"
    library(failing={name: pynvml.NVML_ERROR_NOT_SUPPORTED})

    assert NvmlProbe().read(Gpu(0, "NVIDIA H200", "GPU-1", 0)).holders == ()


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, "no NVIDIA driver is installed"),
        (pynvml.NVML_ERROR_DRIVER_NOT_LOADED, "kernel module is not loaded"),
        (pynvml.NVML_ERROR_NO_PERMISSION, "may not open the NVIDIA devices"),
        (pynvml.NVML_ERROR_UNKNOWN, "NVML does not start"),
    ],
)
def test_a_driver_that_does_not_start_says_why(
    library: Callable[..., None], code: int, words: str
) -> None:
    library(failing={"nvmlInitWithFlags": code})

    inventory = NvmlProbe().inventory()

    assert inventory.gpus == ()
    assert words in (inventory.unavailable_reason or "")


def test_no_library_at_all_is_a_host_without_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pynvml, "nvmlLib", None)
    monkeypatch.setattr(pynvml, "CDLL", missing)
    monkeypatch.setattr(pynvml, "_nvmlGetFunctionPointer_cache", {})

    assert "was not found" in (NvmlProbe().inventory().unavailable_reason or "")


def missing(_name: str) -> None:
    """Load no library."""
    raise OSError("cannot open shared object file")


def test_an_upgraded_driver_names_both_versions_and_the_cure(
    library: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    module = tmp_path / "version"
    module.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.5  Tue\n")
    monkeypatch.setattr(discovery, "KERNEL_MODULE", module)
    library(failing={"nvmlInitWithFlags": pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH})

    reason = NvmlProbe().inventory().unavailable_reason or ""

    assert "the library is 13.580.1, the kernel module is 570.5; reboot" in reason


def test_an_open_kernel_module_has_a_version_too(tmp_path: Path) -> None:
    path = tmp_path / "version"
    path.write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release\n")

    assert kernel_module_version(path) == "580.65.06"
    assert kernel_module_version(tmp_path / "none") == "unknown"


def test_a_driver_without_gpus_says_so(library: Callable[..., None]) -> None:
    library(gpus=0)

    assert NvmlProbe().inventory().unavailable_reason == "the NVIDIA driver is there, but no GPU"


def test_gpus_that_cannot_be_listed_are_none(library: Callable[..., None]) -> None:
    library(failing={"nvmlDeviceGetHandleByIndex_v2": pynvml.NVML_ERROR_GPU_IS_LOST})

    inventory = NvmlProbe().inventory()

    assert inventory.gpus == ()
    assert "cannot list" in (inventory.unavailable_reason or "")


@pytest.mark.parametrize(
    ("function", "field"),
    [
        ("nvmlDeviceGetMemoryInfo", "used_bytes"),
        ("nvmlDeviceGetUtilizationRates", "utilization_pct"),
        ("nvmlDeviceGetTemperature", "temp_c"),
    ],
)
def test_a_field_that_a_gpu_does_not_offer_is_none(
    library: Callable[..., None], function: str, field: str
) -> None:
    library(failing={function: pynvml.NVML_ERROR_NOT_SUPPORTED})

    assert getattr(NvmlProbe().read(Gpu(0, "", "GPU-1", 0)), field) is None


def test_a_gpu_that_does_not_say_its_memory_has_none(library: Callable[..., None]) -> None:
    library(failing={"nvmlDeviceGetMemoryInfo": pynvml.NVML_ERROR_NOT_SUPPORTED})

    assert NvmlProbe().inventory().gpus[0].memory_bytes == 0


def test_a_gpu_that_is_gone_fails_its_reading(library: Callable[..., None]) -> None:
    library(failing={"nvmlDeviceGetHandleByUUID": pynvml.NVML_ERROR_GPU_IS_LOST})

    with pytest.raises(ProbeFailed):
        NvmlProbe().read(Gpu(0, "", "GPU-1", 0))


TWO = Inventory((Gpu(0, "a", "GPU-aa", 1), Gpu(1, "b", "GPU-bb", 2)), driver_version="580.1")


@pytest.mark.parametrize(
    ("selection", "names"),
    [
        (None, ["a", "b"]),
        ("1", ["b"]),
        ("1,0", ["b", "a"]),
        ("GPU-bb", ["b"]),
        ("0,7,1", ["a"]),
        ("-1", []),
        ("", []),
    ],
)
def test_gpus_are_numbered_as_cuda_will_see_them(selection: str | None, names: list[str]) -> None:
    visible = TWO.visible(selection)

    assert [gpu.name for gpu in visible.gpus] == names
    assert [gpu.index for gpu in visible.gpus] == list(range(len(names)))


def test_hiding_every_gpu_is_a_reason() -> None:
    assert "hides every GPU" in (TWO.visible("-1").unavailable_reason or "")


def test_nothing_to_hide_keeps_its_own_reason() -> None:
    assert Inventory(unavailable_reason="no driver").visible("0").unavailable_reason == "no driver"
