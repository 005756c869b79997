"""Why a node takes no requests, in words."""

from dataclasses import replace

import pytest

from cortex.gateway.catalogue import Catalogue
from cortex.gateway.config import Eviction
from cortex.gateway.fleet import FleetSnapshot, Node
from cortex.gateway.fleet_view import FleetViewer
from cortex.ipc.fleet_api import FleetNode
from cortex.ipc.node_api import DeviceHealth, Health, ModelInfo, Servable

UP = Node("a", "http://a").answered(Health(1.0), [], {}, 1.0)


def shown(node: Node) -> FleetNode:
    return FleetViewer(FleetSnapshot((node,), {}), Catalogue(), Eviction()).node(node)


@pytest.mark.parametrize(
    ("node", "takes_requests", "why"),
    [
        (UP, True, None),
        (Node("a", "http://a"), False, "down: not polled yet"),
        (replace(UP, is_healthy=False, error="node a is gone"), False, "down: is gone"),
        (replace(UP, is_healthy=False), False, "down"),
        (replace(UP, is_drained=True), False, "drained by an operator"),
        (
            replace(UP, health=Health(1.0, draining=True)),
            False,
            "about to stop: it finishes what runs",
        ),
        (replace(UP, breaker="open"), False, "closed by its breaker: it broke what it was given"),
    ],
    ids=["up", "not polled", "down", "down without a word", "drained", "stopping", "breaker"],
)
def test_a_node_that_takes_no_requests_has_its_reason(
    node: Node, takes_requests: bool, why: str | None
) -> None:
    view = shown(node)

    assert (view.takes_requests, view.why) == (takes_requests, why)


def test_a_device_whose_total_is_not_known_is_shown_without() -> None:
    node = replace(UP, health=Health(1.0, [DeviceHealth(0, "cpu:0", "ready")]))

    (device,) = shown(node).devices

    assert (device.name, device.vram_total_mb) == ("cpu:0", None)


def test_a_model_of_an_engine_is_never_unloaded_for_being_idle() -> None:
    info = ModelInfo("m", "openai", "loaded", [], Servable(ok=True))
    engine = replace(UP, is_engine=True, models=(info,))
    viewer = FleetViewer(FleetSnapshot((engine,), {}), Catalogue(), Eviction(idle_unload_seconds=1))

    (model,) = viewer.node(engine).models

    assert model.unload_in_seconds is None
