"""``GET /v1/models`` and the other looks at the fleet."""

from typing import Any

import aiohttp
import msgspec
import pytest
from yarl import URL

from cortex.gateway.app import Gateway
from cortex.gateway.catalogue import BUILT_IN, Catalogue, Limits, Profile
from cortex.ipc.node_api import EMBEDDED_MODEL, ModelStatus, Servable, Version
from cortex.ipc.openai_answers import ModelList
from fakes import FakeNeuron, gateway_config, until

ANTHROPIC = {"anthropic-version": "2023-06-01"}
CATALOGUE = Catalogue(
    {
        "cold": Profile("cold", limit=Limits(context=64)),
        "named": Profile("named", source="file:/x.gguf"),
    },
    {"nick": "warm", "ghost": "nobody-has-it"},
)


async def get(session: aiohttp.ClientSession, url: str, **headers: str) -> tuple[int, Any]:
    async with session.get(url, headers=headers) as response:
        return response.status, await response.json()


async def listed(
    session: aiohttp.ClientSession, *neurons: FakeNeuron, catalogue: Catalogue = CATALOGUE
) -> dict[str, Any]:
    """Return the entries by id, as a gateway in front of *neurons* lists them."""
    async with Gateway(gateway_config(*neurons), catalogue) as gateway:
        await gateway.poller.first_round()
        _, body = await get(session, gateway.url + "/v1/models")
    return {entry["id"]: entry for entry in body["data"]}


async def test_models_of_several_nodes_are_merged_in_a_stable_order(
    session: aiohttp.ClientSession,
) -> None:
    async with FakeNeuron(["warm", "z"], "b") as b, FakeNeuron(["a", "warm"], "a") as a:
        found = await listed(session, b, a)

    assert list(found) == ["a", "cold", "named", "nick", "warm", "z"]
    assert found["warm"]["locations"] == [
        {"node": "a", "status": "loaded"},
        {"node": "b", "status": "loaded"},
    ]


async def test_an_entry_has_the_openai_fields(session: aiohttp.ClientSession) -> None:
    async with FakeNeuron(["warm"]) as a:
        found = await listed(session, a)

    entry = found["warm"]
    assert (entry["object"], entry["created"], entry["owned_by"]) == ("model", 0, "cortex")
    assert entry["loaded"]


async def test_a_cold_model_is_listed_as_not_loaded(session: aiohttp.ClientSession) -> None:
    async with FakeNeuron() as a:
        found = await listed(session, a)

    assert (found["cold"]["loaded"], found["cold"]["locations"]) == (False, [])
    assert found["cold"]["context_length"] == 64


async def test_the_embedded_model_is_listed_without_a_catalogue(
    session: aiohttp.ClientSession,
) -> None:
    async with FakeNeuron() as a:
        assert list(await listed(session, a, catalogue=BUILT_IN)) == [EMBEDDED_MODEL]


async def test_the_tightest_limit_counts(session: aiohttp.ClientSession) -> None:
    async with FakeNeuron(["warm"], "a") as a, FakeNeuron(["warm"], "b") as b:
        a.models["warm"].context, b.models["warm"].context = 512, 256
        found = await listed(session, a, b)

    assert [found["warm"][name] for name in ("context_length", "max_model_len")] == [256, 256]


async def test_an_unknown_limit_is_left_out(session: aiohttp.ClientSession) -> None:
    async with FakeNeuron(["warm"]) as a:
        a.models["warm"].context = None
        found = await listed(session, a)

    assert not {"context_length", "max_model_len", "max_input_tokens"} & found["warm"].keys()


async def test_an_alias_mirrors_its_model(session: aiohttp.ClientSession) -> None:
    async with FakeNeuron(["warm"]) as a:
        found = await listed(session, a)

    assert {**found["nick"], "id": "warm"} == found["warm"]


async def test_a_source_is_listed_by_the_name_of_its_profile(
    session: aiohttp.ClientSession,
) -> None:
    async with FakeNeuron(["file:/x.gguf"]) as a:
        found = await listed(session, a)

    assert found["named"]["loaded"]
    assert "file:/x.gguf" not in found


async def test_what_is_loaded_but_not_servable_does_not_count_as_loaded(
    session: aiohttp.ClientSession,
) -> None:
    async with FakeNeuron(["warm"]) as a:
        a.models["warm"].servable = Servable(ok=False)
        found = await listed(session, a)

    assert not found["warm"]["loaded"]


async def test_a_load_that_failed_is_no_model(session: aiohttp.ClientSession) -> None:
    async with FakeNeuron(["warm"]) as a:
        a.models["warm"].status = "failed"
        found = await listed(session, a)

    assert "warm" not in found


async def test_models_of_a_node_that_is_down_are_not_listed(
    session: aiohttp.ClientSession,
) -> None:
    async with FakeNeuron(["warm"]) as a, Gateway(gateway_config(a), CATALOGUE) as gateway:
        await gateway.poller.first_round()
        a.is_out_of_order = True
        await until(lambda: not gateway.fleet.node("a").is_healthy)
        _, body = await get(session, gateway.url + "/v1/models")

    assert [entry["id"] for entry in body["data"]] == ["cold", "named"]


@pytest.mark.parametrize("path", ["org/model:x", "org%2Fmodel%3Ax"])
async def test_one_model_is_found_by_an_id_with_slashes_escaped_or_not(
    session: aiohttp.ClientSession, path: str
) -> None:
    async with FakeNeuron(["org/model:x"]) as a, Gateway(gateway_config(a)) as gateway:
        await gateway.poller.first_round()
        url = URL(f"{gateway.url}/v1/models/{path}", encoded=True)
        async with session.get(url) as response:
            body = await response.json()

    assert (response.status, body["id"]) == (200, "org/model:x")


async def test_a_model_that_nobody_has_is_404(session: aiohttp.ClientSession) -> None:
    async with FakeNeuron() as a, Gateway(gateway_config(a)) as gateway:
        status, body = await get(session, gateway.url + "/v1/models/x")

    assert (status, body["error"]["code"]) == (404, "model_not_found")


async def test_anthropic_clients_get_their_form(session: aiohttp.ClientSession) -> None:
    async with FakeNeuron(["warm"]) as a, Gateway(gateway_config(a), CATALOGUE) as gateway:
        await gateway.poller.first_round()
        url = gateway.url + "/v1/models"
        _, page = await get(session, url + "?limit=2", **ANTHROPIC)
        _, rest = await get(session, url + "?after_id=named", **ANTHROPIC)
        _, before = await get(session, url + "?before_id=named&limit=1", **ANTHROPIC)
        _, one = await get(session, url + "/warm", **ANTHROPIC)

    assert [entry["id"] for entry in page["data"]] == ["cold", "named"]
    assert (page["first_id"], page["last_id"], page["has_more"]) == ("cold", "named", True)
    assert [entry["id"] for entry in rest["data"]] == ["nick", "warm"]
    assert [entry["id"] for entry in before["data"]] == ["cold"]
    assert (one["type"], one["max_input_tokens"], one["lifecycle"]) == ("model", 4096, "active")


@pytest.mark.parametrize("limit", ["x", "", "0", "-1", "²", "9" * 5000])
async def test_a_limit_that_is_no_number_is_refused(
    session: aiohttp.ClientSession, limit: str
) -> None:
    async with FakeNeuron() as a, Gateway(gateway_config(a)) as gateway:
        url = f"{gateway.url}/v1/models?limit={limit}"
        status, body = await get(session, url, **ANTHROPIC)

    assert (status, body["error"]["param"]) == (400, "limit")


async def test_the_list_is_in_the_contract(session: aiohttp.ClientSession) -> None:
    async with (
        FakeNeuron(["warm"]) as a,
        Gateway(gateway_config(a)) as gateway,
        session.get(gateway.url + "/v1/models") as response,
    ):
        assert msgspec.json.decode(await response.read(), type=ModelList).object == "list"


async def test_health_tells_how_many_nodes_are_up(session: aiohttp.ClientSession) -> None:
    async with FakeNeuron(name="a") as a, FakeNeuron(name="b") as b:
        await b.stop()
        async with Gateway(gateway_config(a, b)) as gateway:
            await gateway.poller.first_round()
            status, body = await get(session, gateway.url + "/health")

    assert (status, body) == (200, {"status": "impaired", "nodes": {"healthy": 1, "total": 2}})


async def test_health_is_ok_where_every_node_is_up(session: aiohttp.ClientSession) -> None:
    async with (
        FakeNeuron(name="a") as a,
        FakeNeuron(name="b") as b,
        Gateway(gateway_config(a, b)) as gateway,
    ):
        await gateway.poller.first_round()
        _, body = await get(session, gateway.url + "/health")

    assert body == {"status": "ok", "nodes": {"healthy": 2, "total": 2}}


async def test_health_without_nodes_is_degraded(session: aiohttp.ClientSession) -> None:
    async with FakeNeuron() as a:
        await a.stop()
        async with Gateway(gateway_config(a)) as gateway:
            _, body = await get(session, gateway.url + "/health")

    assert body["status"] == "degraded"


@pytest.mark.parametrize("status", ["loaded", "recovering"])
async def test_health_names_what_cannot_be_served(
    session: aiohttp.ClientSession, status: ModelStatus
) -> None:
    async with FakeNeuron(["m"]) as a, Gateway(gateway_config(a)) as gateway:
        a.models["m"].status = status
        a.models["m"].servable = Servable(ok=False, reason="low_memory", detail="3 MB")
        await gateway.poller.refresh("a")
        _, body = await get(session, gateway.url + "/health")

    assert (body["status"], body["unservable"]) == (
        "impaired",
        [{"node": "a", "model": "m", "reason": "low_memory", "detail": "3 MB"}],
    )


async def test_a_model_that_is_only_full_is_no_fault(session: aiohttp.ClientSession) -> None:
    async with FakeNeuron(["m"]) as a, Gateway(gateway_config(a)) as gateway:
        a.models["m"].servable = Servable(ok=False, reason="overloaded", detail="32 of 32 seats")
        await gateway.poller.refresh("a")
        _, health = await get(session, gateway.url + "/health")
        _, listed = await get(session, gateway.url + "/v1/models/m")

    assert health["status"] == "ok"
    assert listed["loaded"]


@pytest.mark.parametrize("path", ["/", "/api/hello", "/health"])
async def test_a_head_request_is_answered(session: aiohttp.ClientSession, path: str) -> None:
    async with (
        FakeNeuron() as a,
        Gateway(gateway_config(a)) as gateway,
        session.head(gateway.url + path) as response,
    ):
        assert response.status == 200


async def test_the_fleet_shows_nodes_devices_models_and_why(
    session: aiohttp.ClientSession,
) -> None:
    async with FakeNeuron(["m"], "a") as a, FakeNeuron(name="b") as b:
        await b.stop()
        async with Gateway(gateway_config(a, b)) as gateway:
            await gateway.poller.first_round()
            _, body = await get(session, gateway.url + "/fleet")

    up, down = body["nodes"]
    assert (up["healthy"], up["devices"][0]["name"], up["models"][0]["id"]) == (True, "cpu:0", "m")
    assert (down["healthy"], down["devices"], down["error"]) == (
        False,
        [],
        "node b cannot be reached (connection refused)",
    )


async def test_what_a_node_had_before_it_went_down_is_not_shown(
    neuron: FakeNeuron, session: aiohttp.ClientSession
) -> None:
    async with Gateway(gateway_config(neuron)) as gateway:
        await gateway.poller.first_round()
        neuron.is_out_of_order = True
        await until(lambda: not gateway.fleet.node("a").is_healthy)
        _, body = await get(session, gateway.url + "/fleet")

    (node,) = body["nodes"]
    assert (node["healthy"], node["models"], node["devices"], node["load"]) == (False, [], [], [])


async def test_a_model_on_a_node_that_drains_does_not_count_as_loaded(
    session: aiohttp.ClientSession,
) -> None:
    async with FakeNeuron(["warm"]) as a:
        a.draining = True
        found = await listed(session, a)

    assert found["warm"]["loaded"] is False


async def test_the_version_is_in_the_contract(session: aiohttp.ClientSession) -> None:
    async with (
        FakeNeuron() as a,
        Gateway(gateway_config(a)) as gateway,
        session.get(gateway.url + "/version") as response,
    ):
        assert msgspec.json.decode(await response.read(), type=Version).package_version
