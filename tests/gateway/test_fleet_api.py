"""What operators ask of the fleet over HTTP: every answer has its documented shape."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import aiohttp
import msgspec
import pytest

from cortex.gateway.app import Gateway
from cortex.gateway.catalogue import Catalogue, Profile
from cortex.gateway.config import Engine, Entitlements, Key
from cortex.gateway.state import FILE
from cortex.ipc import fleet_api
from cortex.ipc.errors import Unloadable
from cortex.ipc.fleet_api import (
    Drain,
    DrainAnswer,
    FleetView,
    LoadAnswer,
    PinAnswer,
    PlacementView,
    UndrainAnswer,
    UnloadAnswer,
    UnpinAnswer,
)
from cortex.ipc.node_api import Servable
from fakes import FakeNeuron, gateway_config, until

COLD = Catalogue({"m": Profile("m"), "bound": Profile("bound", pinned_on=("b",))}, {"nick": "m"})
CHAT = "/v1/chat/completions"
T = TypeVar("T")


class Operator:
    """Asks a gateway, and holds its answers to their shapes: nothing missing, nothing more."""

    def __init__(self, gateway: Gateway, session: aiohttp.ClientSession) -> None:
        self.gateway = gateway
        self._session = session
        self.headers: dict[str, str] = {}

    async def get(self, path: str, shape: type[T]) -> T:
        return await self.ask("GET", path, None, shape)

    async def post(self, path: str, shape: type[T], **body: Any) -> T:
        return await self.ask("POST", path, body, shape)

    async def ask(self, method: str, path: str, body: Any, shape: type[T]) -> T:
        status, text = await self.raw(method, path, body)
        assert status in (200, 202), text
        answer = msgspec.json.decode(text, type=shape)
        assert msgspec.json.decode(text) == msgspec.json.decode(msgspec.json.encode(answer))
        return answer

    async def refusal(self, path: str, **body: Any) -> tuple[int, str]:
        status, text = await self.raw("POST", path, body)
        return status, msgspec.json.decode(text)["error"]["code"]

    async def raw(self, method: str, path: str, body: Any = None) -> tuple[int, bytes]:
        url = self.gateway.url + path
        async with self._session.request(method, url, json=body, headers=self.headers) as response:
            return response.status, await response.read()


@asynccontextmanager
async def operator(
    *neurons: FakeNeuron, catalogue: Catalogue = COLD, state: Path | None = None, **options: Any
) -> AsyncIterator[Operator]:
    config = gateway_config(*neurons, **options)
    async with (
        Gateway(config, catalogue, state=state) as gateway,
        aiohttp.ClientSession() as session,
    ):
        await gateway.poller.first_round()
        yield Operator(gateway, session)


async def test_the_fleet_is_in_the_contract_whatever_it_is_doing() -> None:
    async with FakeNeuron(["m", "sick", "cold"], "a") as a, FakeNeuron(name="b") as b:
        await b.stop()
        a.may_load.clear()
        a.models["cold"].status = "loading"
        a.models["sick"].servable = Servable(ok=False, reason="low_memory", detail="3 MB")
        async with operator(a, b) as ops:
            ops.gateway.fleet.drained.add("a")

            view = await ops.get("/fleet", FleetView)

    up, down = view.nodes
    assert (up.name, up.healthy, up.takes_requests, up.why) == (
        *("a", True, False, "drained by an operator"),
    )
    assert (up.draining, up.drain) == (True, Drain(False, 0, ["m", "sick", "cold"]))
    assert [(m.id, m.status, m.footprint_mb) for m in up.models] == [
        ("m", "loaded", 100),
        ("sick", "loaded", 100),
        ("cold", "loading", 100),
    ]
    assert (up.devices[0].vram_total_mb, up.devices[0].vram_free_mb) == (1010, 1000)
    assert (down.why, down.devices, down.models) == (
        *("down: cannot be reached (connection refused)", [], []),
    )


async def test_a_model_is_shown_under_the_name_that_clients_say() -> None:
    catalogue = Catalogue({"m": Profile("m", source="file:/m.gguf", residency_priority=7)})
    async with FakeNeuron(["file:/m.gguf"]) as a, operator(a, catalogue=catalogue) as ops:
        a.models["file:/m.gguf"].in_flight = 2
        await ops.gateway.poller.refresh("a")

        (node,) = (await ops.get("/fleet", FleetView)).nodes

    (model,) = node.models
    assert (model.id, model.node_id, model.residency_class, model.in_flight) == (
        *("m", "file:/m.gguf", 7, 2),
    )


async def test_a_load_that_runs_is_shown_with_how_far_it_is_and_who_waits() -> None:
    async with FakeNeuron() as a, operator(a) as ops:
        a.may_load.clear()
        await ops.post("/fleet/models/load", LoadAnswer, model="m")
        await until(lambda: any(load.progress for load in ops.gateway.lifecycle.loads))

        (load,) = (await ops.get("/fleet", FleetView)).loads

    assert (load.model, load.node, load.phase, load.waiting_requests) == ("m", "a", "loading", 0)
    assert load.progress is not None
    assert load.progress.phase == "downloading"


async def test_an_engine_is_shown_as_one() -> None:
    async with FakeNeuron(name="a") as a, FakeNeuron(["big"], "ray") as ray:
        engines = (Engine("ray", ray.url),)
        async with operator(a, engines=engines) as ops:
            view = await ops.get("/fleet", FleetView)

    assert [(node.name, node.is_engine) for node in view.nodes] == [("a", False), ("ray", True)]


async def test_when_an_idle_model_will_go_is_told() -> None:
    catalogue = Catalogue({"m": Profile("m", idle_unload_seconds=500.0)})
    async with FakeNeuron(["m", "n"]) as a, operator(a, catalogue=catalogue) as ops:
        (node,) = (await ops.get("/fleet", FleetView)).nodes
        await ops.post("/fleet/models/pin", PinAnswer, model="m")
        (after,) = (await ops.get("/fleet", FleetView)).nodes

    told, never = (model.unload_in_seconds for model in node.models)
    assert told is not None
    assert 0 < told <= 500
    assert (never, after.models[0].unload_in_seconds, after.models[0].pinned) == (None, None, True)


async def test_where_a_model_would_go_is_told_without_loading_it() -> None:
    async with FakeNeuron() as a, operator(a) as ops:
        placed = await ops.get("/fleet/placement?model=nick", PlacementView)

    assert (placed.model, placed.chosen, placed.fits, a.requests("/models/load")) == (
        *("m", "a", "now", []),
    )


async def test_why_a_model_can_go_nowhere_is_told() -> None:
    async with FakeNeuron() as a, operator(a) as ops:
        placed = await ops.get("/fleet/placement?model=bound", PlacementView)

    assert placed.chosen is None
    assert placed.refusal is not None
    assert "it may run on b only" in placed.refusal["message"]


@pytest.mark.parametrize(
    ("query", "status", "code"),
    [("?model=x", 404, "model_not_found"), ("", 400, "missing_model_field")],
)
async def test_a_placement_of_nothing_is_refused(query: str, status: int, code: str) -> None:
    async with FakeNeuron() as a, operator(a) as ops:
        answered, text = await ops.raw("GET", f"/fleet/placement{query}")

    assert (answered, msgspec.json.decode(text)["error"]["code"]) == (status, code)


async def test_loads_and_unloads_are_in_the_contract() -> None:
    async with FakeNeuron() as a, operator(a) as ops:
        begun = await ops.post("/fleet/models/load", LoadAnswer, model="nick")
        waited = await ops.post("/fleet/models/load", LoadAnswer, model="m", wait=True)
        again = await ops.post("/fleet/models/load", LoadAnswer, model="m", node="a")
        gone = await ops.post("/fleet/models/unload", UnloadAnswer, model="nick")

    assert (begun.status, begun.model) == ("loading", "m")
    assert waited == again == LoadAnswer("loaded", "m", "a")
    assert gone == UnloadAnswer(["a"])


async def test_what_a_load_is_refused_with_is_what_who_waits_gets() -> None:
    async with FakeNeuron() as a, operator(a) as ops:
        a.refuses_load = Unloadable("it is in no format that I read", kind="unsupported")

        assert await ops.refusal("/fleet/models/load", model="m", wait=True) == (422, "unloadable")


async def test_a_pin_is_where_the_model_is() -> None:
    async with (
        FakeNeuron(["m"], "a") as a,
        FakeNeuron(name="b") as b,
        operator(a, b) as ops,
    ):
        pinned = await ops.post("/fleet/models/pin", PinAnswer, model="nick")
        snapshot = ops.gateway.fleet.snapshot()
        unpinned = await ops.post("/fleet/models/unpin", UnpinAnswer, model="m")
        after = ops.gateway.fleet.snapshot()

    assert (pinned, snapshot.pinned) == (PinAnswer(["a"], loaded=True), {("a", "m")})
    assert (unpinned, after.pinned) == (UnpinAnswer(["a"]), set())


async def test_a_pin_of_what_is_not_loaded_is_wherever_it_may_be_and_loads_nothing() -> None:
    async with (
        FakeNeuron(name="a") as a,
        FakeNeuron(name="b") as b,
        operator(a, b) as ops,
    ):
        anywhere = await ops.post("/fleet/models/pin", PinAnswer, model="m")
        bound = await ops.post("/fleet/models/pin", PinAnswer, model="bound")
        named = await ops.post("/fleet/models/pin", PinAnswer, model="m", node="b")

    assert (anywhere, bound, named) == (
        PinAnswer(["a", "b"], loaded=False),
        PinAnswer(["b"], loaded=False),
        PinAnswer(["b"], loaded=False),
    )
    assert a.requests("/models/load") == b.requests("/models/load") == []


async def test_one_of_two_pins_is_taken_back() -> None:
    async with (
        FakeNeuron(["m"], "a") as a,
        FakeNeuron(["m"], "b") as b,
        operator(a, b) as ops,
    ):
        await ops.post("/fleet/models/pin", PinAnswer, model="m")
        one = await ops.post("/fleet/models/unpin", UnpinAnswer, model="m", node="a")
        none = await ops.post("/fleet/models/unpin", UnpinAnswer, model="m", node="a")
        left = ops.gateway.fleet.snapshot().pinned

    assert (one.nodes, none.nodes, left) == (["a"], [], {("b", "m")})


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({"model": "stranger"}, 404, "model_not_found"),
        ({"model": "m", "node": "x"}, 400, "invalid_request"),
        ({"model": "m", "node": "ray"}, 400, "invalid_request"),
        ({"model": "bound", "node": "a"}, 400, "invalid_request"),
        ({"model": "big"}, 404, "model_not_found"),
        ({}, 400, "invalid_request"),
        ({"model": "m", "force": True}, 400, "invalid_request"),
    ],
    ids=["unknown", "no node", "an engine", "not allowed there", "of an engine", "none", "more"],
)
async def test_a_pin_that_can_never_count_is_refused(
    body: dict[str, Any], status: int, code: str
) -> None:
    async with (
        FakeNeuron() as a,
        FakeNeuron(["big"], "ray") as ray,
        operator(a, engines=(Engine("ray", ray.url),)) as ops,
    ):
        refused = await ops.refusal("/fleet/models/pin", **body)
        pinned = ops.gateway.fleet.snapshot().pinned

    assert (refused, pinned) == ((status, code), set())


async def test_pins_and_drains_outlive_the_gateway(tmp_path: Path) -> None:
    state = tmp_path / FILE
    async with FakeNeuron(["m"], "a") as a, FakeNeuron(name="b") as b:
        async with operator(a, b, state=state) as ops:
            await ops.post("/fleet/models/pin", PinAnswer, model="m", node="a")
            await ops.post("/fleet/models/pin", PinAnswer, model="m", node="b")
            await ops.post("/fleet/models/unpin", UnpinAnswer, model="m", node="b")
            for node in ("a", "b"):
                await ops.post(f"/fleet/nodes/{node}/drain", DrainAnswer)
            await ops.post("/fleet/nodes/a/undrain", UndrainAnswer)
        async with operator(a, b, state=state) as ops:
            fleet = ops.gateway.fleet

    assert (fleet.pinned, fleet.drained) == ({("a", "m")}, {"b"})


async def test_a_node_that_is_drained_gets_nothing_new_and_loses_its_models_in_the_end() -> None:
    async with FakeNeuron(["m"], "a") as a, operator(a) as ops:
        a.may_finish.clear()
        async with aiohttp.ClientSession() as session:
            body = {"model": "m", "stream": True, "messages": []}
            running = await session.post(ops.gateway.url + CHAT, json=body)
            await a.answering.wait()
            begun = await ops.post("/fleet/nodes/a/drain", DrainAnswer)
            refused = await ops.raw("POST", CHAT, {"model": "m", "messages": []})
            assert a.requests("/models/unload") == []
            a.may_finish.set()
            answer = await running.text()
            await until(lambda: "m" not in a.models)
            await ops.gateway.poller.refresh("a")
            (node,) = (await ops.get("/fleet", FleetView)).nodes

    assert (begun.status, begun.drain) == ("draining", Drain(False, 1, ["m"]))
    assert refused[0] == 503
    assert b"drain" in refused[1]
    assert answer.endswith("[DONE]\n\n")
    assert a.requests("/models/unload")[0].body == {"model_id": "m", "force": False}
    assert (node.drain, node.healthy) == (Drain(True, 0, []), True)


async def test_a_node_that_is_drained_and_empty_is_drained_at_once() -> None:
    async with FakeNeuron() as a, operator(a) as ops:
        first = await ops.post("/fleet/nodes/a/drain", DrainAnswer)
        again = await ops.post("/fleet/nodes/a/drain", DrainAnswer)

    assert first == again == DrainAnswer("a", Drain(True, 0, []), "drained")


async def test_a_model_of_a_drained_node_is_loaded_elsewhere() -> None:
    async with (
        FakeNeuron(["m"], "a") as a,
        FakeNeuron(name="b") as b,
        operator(a, b) as ops,
    ):
        await ops.post("/fleet/nodes/a/drain", DrainAnswer)

        status, _ = await ops.raw("POST", CHAT, {"model": "m", "messages": []})

    assert (status, len(b.requests(CHAT)), a.requests(CHAT)) == (200, 1, [])


async def test_an_undrained_node_serves_again() -> None:
    async with FakeNeuron(name="a") as a, operator(a) as ops:
        await ops.post("/fleet/nodes/a/drain", DrainAnswer)
        undrained = await ops.post("/fleet/nodes/a/undrain", UndrainAnswer)
        again = await ops.post("/fleet/nodes/a/undrain", UndrainAnswer)

        status, _ = await ops.raw("POST", CHAT, {"model": "m", "messages": []})

    assert (undrained, again, status) == (UndrainAnswer("a"), UndrainAnswer("a"), 200)


async def test_a_drain_of_a_node_that_is_down_counts_what_is_ours() -> None:
    async with FakeNeuron(["m"], "a") as a:
        await a.stop()
        async with operator(a) as ops:
            with ops.gateway.fleet.holding("a", "m"):
                begun = await ops.post("/fleet/nodes/a/drain", DrainAnswer)
            (node,) = (await ops.get("/fleet", FleetView)).nodes

    assert (begun.drain, node.drain) == (Drain(False, 1, []), Drain(True, 0, []))


@pytest.mark.parametrize("verb", ["drain", "undrain"])
async def test_a_mistake_in_a_drain_is_said(verb: str) -> None:
    async with FakeNeuron() as a, operator(a) as ops:
        unknown = await ops.refusal(f"/fleet/nodes/x/{verb}")
        more = await ops.refusal(f"/fleet/nodes/a/{verb}", force=True)
        status, _ = await ops.raw("POST", f"/fleet/nodes/a/{verb}")

    assert (unknown, more, status) == (*((400, "invalid_request"), (400, "invalid_request"), 200),)


VERBS = [
    ("/fleet/models/load", {"model": "m"}),
    ("/fleet/models/unload", {"model": "m"}),
    ("/fleet/models/pin", {"model": "m"}),
    ("/fleet/models/unpin", {"model": "m"}),
    ("/fleet/nodes/a/drain", {}),
    ("/fleet/nodes/a/undrain", {}),
]
DOORS = Entitlements(
    require_auth=True,
    keys=(Key("sk-of-the-operator", "boss", operator=True), Key("sk-of-a-guest", "guest")),
)


@pytest.mark.parametrize(("path", "body"), VERBS, ids=[path for path, _ in VERBS])
async def test_where_keys_are_required_only_an_operator_s_changes_the_fleet(
    path: str, body: dict[str, Any]
) -> None:
    async with FakeNeuron(["m"]) as a, operator(a, entitlements=DOORS) as ops:
        ops.headers = {"x-api-key": "sk-of-a-guest"}
        looked, _ = await ops.raw("GET", "/fleet")
        refused = await ops.refusal(path, **body)
        ops.headers = {"x-api-key": "sk-of-the-operator"}
        done, _ = await ops.raw("POST", path, body)

    assert (looked, refused, done) == (200, (403, "operator_only"), 200)


@pytest.mark.parametrize("path", ["load", "unload", "pin", "unpin"])
async def test_an_operator_s_key_may_be_kept_from_a_model(path: str) -> None:
    keys = (Key("sk-of-the-operator", "boss", models=["other"], operator=True),)
    doors = Entitlements(require_auth=True, keys=keys)
    async with FakeNeuron(["m"]) as a, operator(a, entitlements=doors) as ops:
        ops.headers = {"x-api-key": "sk-of-the-operator"}

        refused = await ops.refusal(f"/fleet/models/{path}", model="m")

    assert refused == (403, "model_not_allowed")


@pytest.mark.parametrize("path", ["/fleet", "/fleet/placement?model=m"])
async def test_a_key_that_may_use_some_models_does_not_see_the_others_in_the_fleet(
    path: str,
) -> None:
    keys = (Key("sk-of-a-lodger", "lodger", models=["m"]),)
    doors = Entitlements(require_auth=True, keys=keys)
    async with FakeNeuron(["m", "other"]) as a, operator(a, entitlements=doors) as ops:
        ops.headers = {"x-api-key": "sk-of-a-lodger"}

        status, body = await ops.raw("GET", path)

    assert status == 403
    assert b'"code": "operator_only"' in body


def test_every_shape_of_the_fleet_is_documented() -> None:
    shapes = [
        shape
        for shape in vars(fleet_api).values()
        if isinstance(shape, type) and shape.__module__ == fleet_api.__name__
    ]

    assert len(shapes) > 15
    assert [shape.__name__ for shape in shapes if not shape.__doc__] == []
