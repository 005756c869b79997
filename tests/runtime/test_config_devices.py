"""Which devices run and what each may take."""

import pytest

from cortex.ipc.settings import ConfigError
from cortex.runtime.config import DeviceConfig, DeviceSpec, NeuronConfig
from cortex.runtime.device_budget import resolve_devices
from cortex.runtime.discovery import Gpu, Inventory
from cortex.runtime.host import Host

MIB = 2**20
HOST = Host(cores=8, memory_bytes=10_000 * MIB)
H200 = Gpu(0, "NVIDIA H200", "GPU-a", 140_000 * MIB, "9.0")


def devices(*configured: DeviceConfig, gpus: tuple[Gpu, ...] = ()) -> list[DeviceSpec]:
    """Return what the *configured* devices, or ``auto``, become."""
    config = NeuronConfig(devices=list(configured) if configured else "auto")
    return resolve_devices(config, Inventory(gpus), HOST)


def test_auto_is_one_cpu_where_there_is_no_gpu() -> None:
    assert devices() == [DeviceSpec(0, "cpu:0", 8_000 * MIB, 8)]


def test_auto_is_every_gpu() -> None:
    other = Gpu(1, "NVIDIA H200", "GPU-b", 141_000 * MIB)

    assert devices(gpus=(H200, other)) == [
        DeviceSpec(0, "cuda:0", 140_000 * MIB),
        DeviceSpec(1, "cuda:1", 141_000 * MIB),
    ]


def test_cpu_devices_share_equally() -> None:
    both = devices(DeviceConfig("cpu:0"), DeviceConfig("cpu:1"))

    assert both == [
        DeviceSpec(0, "cpu:0", 4_000 * MIB, 4),
        DeviceSpec(1, "cpu:1", 4_000 * MIB, 4),
    ]


def test_a_cpu_device_with_numbers_leaves_the_rest_to_the_others() -> None:
    asked = DeviceConfig("cpu:0", memory_mb=2_000, threads=6)

    _, rest = devices(asked, DeviceConfig("cpu:1"))

    assert (rest.memory_bytes, rest.threads) == (6_000 * MIB, 2)


@pytest.mark.parametrize(
    ("first", "words"),
    [
        (DeviceConfig("cpu:0", threads=8), "8 threads together and leave nothing"),
        (DeviceConfig("cpu:0", memory_mb=9_000), "9000 memory_mb together"),
        (DeviceConfig("cuda:0"), "'cuda:0' cannot be used: this host has 0"),
    ],
)
def test_nothing_is_oversubscribed(first: DeviceConfig, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        devices(first, DeviceConfig("cpu:1"))


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (DeviceConfig("cuda:0", threads=2), "threads is an option of cpu devices"),
        (DeviceConfig("cuda:0", memory_mb=200_000), "has 140000 MB, not 200000"),
        (DeviceConfig("cuda:1"), "give it memory_mb"),
    ],
)
def test_a_gpu_is_not_asked_for_what_it_has_not(asked: DeviceConfig, words: str) -> None:
    silent = Gpu(1, "NVIDIA GB10", "GPU-b", 0)

    with pytest.raises(ConfigError, match=words):
        devices(asked, gpus=(H200, silent))


def test_why_there_is_no_gpu_is_said_where_one_is_asked_for() -> None:
    config = NeuronConfig(devices=[DeviceConfig("cuda:0")])
    inventory = Inventory(unavailable_reason="the NVIDIA kernel module is not loaded")

    with pytest.raises(ConfigError, match="kernel module is not loaded"):
        resolve_devices(config, inventory, HOST)
