"""What models have held is measured once, kept, and found again on devices of the same kind."""

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from cortex.gateway.catalogue import Profile
from cortex.gateway.fleet import Node
from cortex.gateway.footprints import Footprints, class_of
from cortex.gateway.state import StateFile
from cortex.ipc.node_api import DeviceInfo, Discovery
from memory_fleet import a_node

M = Profile("m", quant="Q4_1")


def profile_of(model: str) -> Profile | None:
    return M if model == "m" else None


@pytest.fixture
async def footprints() -> AsyncIterator[Footprints]:
    async with StateFile(None) as state:
        yield Footprints(state)


def with_devices(node: Node, *names: str) -> Node:
    infos = [DeviceInfo(i, name, 1000) for i, name in enumerate(names)]
    return replace(node, discovery=Discovery("h", "Linux", "6", infos, ["torch"]))


async def test_a_loaded_model_is_measured_on_all_its_devices(footprints: Footprints) -> None:
    footprints.saw(a_node("a", [1000, 1000], {"m": [30, 40]}), profile_of)

    shared = Profile("m", quant="Q4_1", tensor_parallel=2)
    assert footprints.of(a_node("b"), "m", shared) == 70
    assert footprints.of(a_node("b"), "m", M) is None


async def test_the_last_measurement_counts(footprints: Footprints) -> None:
    footprints.saw(a_node("a", [1000], {"m": [30]}), profile_of)
    footprints.saw(a_node("a", [1000], {"m": [20]}), profile_of)

    assert footprints.of(a_node("b"), "m", M) == 20


@pytest.mark.parametrize("state", ["loading", "failed", "unloading"])
async def test_a_model_that_is_not_loaded_is_not_measured(
    footprints: Footprints, state: str
) -> None:
    footprints.saw(a_node("a", [1000], {"m": [30]}, states={"m": state}), profile_of)

    assert footprints.of(a_node("b"), "m", M) is None


async def test_another_quant_context_or_kind_of_device_is_another_footprint(
    footprints: Footprints,
) -> None:
    footprints.saw(a_node("a", [1000], {"m": [30]}), profile_of)

    assert footprints.of(a_node("b"), "m", Profile("m", quant="Q8_0")) is None
    assert (
        footprints.of(a_node("b"), "m", Profile("m", quant="Q4_1", max_context_tokens=99)) is None
    )
    assert footprints.of(with_devices(a_node("b"), "other"), "m", M) is None


async def test_on_a_node_with_unlike_devices_the_larger_counts(footprints: Footprints) -> None:
    footprints.saw(with_devices(a_node("a", [1000], {"m": [30]}), "small"), profile_of)
    footprints.saw(with_devices(a_node("b", [1000], {"m": [50]}), "large"), profile_of)

    assert footprints.of(with_devices(a_node("c", [1000, 1000]), "small", "large"), "m", M) == 50


async def test_models_in_no_catalogue_are_measured_too(footprints: Footprints) -> None:
    footprints.saw(a_node("a", [1000], {"x": [30]}), profile_of)

    assert footprints.of(a_node("a"), "x", None) == 30


def test_a_devices_class_is_its_name_without_its_number_and_its_size() -> None:
    node = with_devices(a_node("a"), "cpu:0", "NVIDIA H200")

    assert (class_of(node, 0), class_of(node, 1)) == ("cpu, 1000 MB", "NVIDIA H200, 1000 MB")
    assert class_of(node, 7) == ""


async def test_a_node_is_measured_once_its_devices_are_known(footprints: Footprints) -> None:
    node = a_node("a", [1000], {"m": [30]})

    footprints.saw(replace(node, discovery=None), profile_of)
    before = footprints.of(node, "m", M)
    footprints.saw(node, profile_of)

    assert (before, footprints.of(node, "m", M)) == (None, 30)
    assert footprints.of(Node("new", "http://new"), "m", M) is None


async def test_measurements_outlive_the_daemon(tmp_path: Path) -> None:
    async with StateFile(tmp_path / "cortex.db") as state:
        Footprints(state).saw(a_node("a", [1000], {"m": [30]}), profile_of)
    async with StateFile(tmp_path / "cortex.db") as state:
        again = Footprints(state)
        await again.read()

    assert again.of(a_node("b"), "m", M) == 30


async def test_what_has_not_changed_is_not_written_again(tmp_path: Path) -> None:
    async with StateFile(tmp_path / "cortex.db") as state:
        footprints = Footprints(state)
        footprints.saw(a_node("a", [1000], {"m": [30]}), profile_of)
        await state.do(lambda connection: connection.execute("DELETE FROM footprints"))
        footprints.saw(a_node("a", [1000], {"m": [30]}), profile_of)
        (count,) = await state.do(
            lambda connection: connection.execute("SELECT count(*) FROM footprints").fetchone()
        )

    assert count == 0
