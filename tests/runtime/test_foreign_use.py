"""What others hold of a device, and who is told."""

from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from cortex.runtime import readings as readings_module
from cortex.runtime.config import DeviceSpec
from cortex.runtime.discovery import Gpu, Holder, Inventory, Reading
from cortex.runtime.foreign_use import MUCH_BYTES, ForeignUse, of_cpus, of_gpu
from cortex.runtime.host import Host, counts_all_processes
from cortex.runtime.readings import Readings
from fake_node import FakeDevice

MIB = 2**20
GIB = 2**30
GPU = Gpu(0, "NVIDIA H200", "GPU-a", 140 * GIB, "9.0")


def test_a_gpu_is_shared_with_whoever_is_not_ours() -> None:
    use = of_gpu([Holder(7, 5 * GIB), Holder(8, 2 * GIB), Holder(9, GIB)], ours={7})

    assert use == ForeignUse(3 * GIB, (Holder(8, 2 * GIB), Holder(9, GIB)))
    assert use.words == (
        "; 3072 MB of it are held by other processes: pid 8 (2048 MB), pid 9 (1024 MB)"
    )


def test_cpu_devices_miss_what_the_host_has_no_more() -> None:
    assert of_cpus(budget_bytes=10 * GIB, available_bytes=3 * GIB, held_bytes=4 * GIB) == (
        ForeignUse(3 * GIB)
    )
    assert of_cpus(budget_bytes=10 * GIB, available_bytes=8 * GIB, held_bytes=4 * GIB) == (
        ForeignUse()
    )


def test_a_cpu_refusal_names_the_megabytes_and_no_process() -> None:
    assert ForeignUse(2 * GIB).words == (
        "; other processes of this host have taken 2048 MB of its budget"
    )


def test_what_a_desktop_takes_is_not_worth_a_word() -> None:
    assert ForeignUse(10 * MIB, (Holder(3, 10 * MIB),)).words == ""


@pytest.mark.parametrize(
    ("use", "is_said"),
    [
        (ForeignUse(2 * GIB, (Holder(8, 2 * GIB),)), False),
        (ForeignUse(2 * GIB + MIB, (Holder(8, 2 * GIB + MIB),)), False),
        (ForeignUse(2 * GIB + MUCH_BYTES, (Holder(8, 2 * GIB + MUCH_BYTES),)), True),
        (ForeignUse(2 * GIB, (Holder(9, 2 * GIB),)), True),
        (ForeignUse(), True),
    ],
)
def test_a_change_is_said_when_it_is_large_or_somebody_else_s(
    use: ForeignUse, is_said: bool
) -> None:
    assert use.differs_from(ForeignUse(2 * GIB, (Holder(8, 2 * GIB),))) is is_said


def test_little_and_less_are_the_same() -> None:
    assert not ForeignUse(MIB).differs_from(ForeignUse())


class Shared:
    """A GPU of which others hold what the test says, and our process 7."""

    def __init__(self) -> None:
        self.others: list[Holder] = []

    def inventory(self) -> Inventory:
        return Inventory((GPU,))

    def read(self, _gpu: Gpu) -> Reading:
        return Reading(holders=(Holder(7, GIB), *self.others))


@pytest.fixture
def device() -> FakeDevice:
    return FakeDevice(DeviceSpec(0, "cuda:0", 140 * GIB), pid=7)


def readings_of(shared: Shared, device: FakeDevice) -> Readings:
    readings = Readings(shared, shared.inventory(), [device])
    readings._are_pids_known = True
    return readings


async def test_it_is_logged_once_when_it_begins_and_once_when_it_ends(device: FakeDevice) -> None:
    shared = Shared()
    readings = readings_of(shared, device)
    with capture_logs() as log:
        await readings.refresh()
        shared.others = [Holder(8, 2 * GIB)]
        for _ in range(4):
            await readings.refresh()
        shared.others = []
        for _ in range(4):
            await readings.refresh()

    assert [(line["event"], line.get("mb"), line.get("pids")) for line in log] == [
        ("others use the memory of a device", 2048, [8]),
        ("the memory of a device is its own again", None, None),
    ]


async def test_a_process_that_is_only_just_ending_is_not_worth_a_word(device: FakeDevice) -> None:
    shared = Shared()
    readings = readings_of(shared, device)
    await readings.refresh()
    with capture_logs() as log:
        device.pid, shared.others = 9, []
        await readings.refresh()
        device.pid = 7
        await readings.refresh()

    assert log == []


async def test_in_a_container_nobody_can_say(device: FakeDevice) -> None:
    readings = readings_of(Shared(), device)
    readings._are_pids_known = False
    await readings.refresh()

    assert readings.foreign_use_of(device) is None


async def test_cpu_devices_are_judged_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readings_module, "resident_bytes", lambda pid: pid * GIB)
    monkeypatch.setattr(Host, "read", staticmethod(lambda: Host(2, 3 * GIB)))
    devices = [
        FakeDevice(DeviceSpec(index, f"cpu:{index}", 5 * GIB, 1), pid=index + 1)
        for index in range(2)
    ]
    shared: Any = Shared()
    readings = Readings(shared, Inventory(), devices)
    await readings.refresh()

    assert [readings.foreign_use_of(device) for device in devices] == [ForeignUse(4 * GIB)] * 2


def test_process_numbers_are_trusted_outside_of_containers_only(tmp_path: Path) -> None:
    ns = tmp_path / "self" / "ns"
    ns.mkdir(parents=True)

    assert not counts_all_processes(tmp_path)
    for target, are_known in (("pid:[4026531836]", True), ("pid:[4026532511]", False)):
        (ns / "pid").unlink(missing_ok=True)
        (ns / "pid").symlink_to(target)
        assert counts_all_processes(tmp_path) is are_known
