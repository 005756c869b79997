"""``GET /v1/models`` and the other looks at the fleet."""

from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest
from msgspec import UNSET
from yarl import URL

from cortex.gateway.app import Gateway
from cortex.gateway.catalogue import BUILT_IN, Catalogue, Cost, Limits, Profile
from cortex.gateway.config import Engine, Entitlements, Key
from cortex.gateway.fleet import Fleet
from cortex.gateway.listing import Listing
from cortex.ipc.node_api import (
    EMBEDDED_MODEL,
    Activation,
    DeviceInfo,
    Health,
    Limit,
    ModelInfo,
    ModelStatus,
    Servable,
    Version,
)
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


async def test_limits_are_told_in_every_spelling(session: aiohttp.ClientSession) -> None:
    async with FakeNeuron(["warm"]) as a:
        a.models["warm"].output = 512
        found = (await listed(session, a))["warm"]

    assert found["limit"] == {"context": 4096, "input": 4096, "output": 512}
    assert [found[f"max_{name}"] for name in ("model_len", "input_tokens", "output_tokens")] == [
        4096,
        4096,
        512,
    ]


async def test_each_limit_is_the_tightest_of_its_kind(session: aiohttp.ClientSession) -> None:
    async with FakeNeuron(["warm"], "a") as a, FakeNeuron(["warm"], "b") as b:
        a.models["warm"].context, a.models["warm"].output = 256, 128
        b.models["warm"].context, b.models["warm"].output = 512, 64
        found = await listed(session, a, b)

    assert found["warm"]["limit"] == {"context": 256, "input": 256, "output": 64}


async def test_replicas_can_together_what_each_of_them_can(session: aiohttp.ClientSession) -> None:
    async with FakeNeuron(["warm"], "a") as a, FakeNeuron(["warm"], "b") as b:
        a.models["warm"].capabilities = ["chat", "completion"]
        b.models["warm"].capabilities = ["completion", "tools"]
        b.models["warm"].tool_call = True
        found = (await listed(session, a, b))["warm"]

    assert found["capabilities"] == ["chat", "completion", "tools"]
    assert (found["tool_call"], found["reasoning"]) == (True, False)


async def test_what_nobody_knows_is_left_out(session: aiohttp.ClientSession) -> None:
    async with FakeNeuron() as a:
        found = (await listed(session, a))["named"]

    unknown = {"limit", "cost", "capabilities", "tool_call", "reasoning", "max_output_tokens"}
    assert not unknown & found.keys()


async def test_what_a_profile_declares_is_shown_until_a_node_knows_better(
    session: aiohttp.ClientSession,
) -> None:
    catalogue = Catalogue({"m": Profile("m", capabilities=("image",), limit=Limits(output=9))})
    async with FakeNeuron() as a, FakeNeuron(["m"], "b") as b:
        b.models["m"].capabilities = ["chat"]
        cold = (await listed(session, a, catalogue=catalogue))["m"]
        warm = (await listed(session, a, b, catalogue=catalogue))["m"]

    assert (cold["capabilities"], cold["limit"]) == (["image"], {"output": 9})
    assert (warm["capabilities"], warm["limit"]["context"]) == (["chat"], 4096)


@pytest.mark.parametrize(
    ("cost", "shown"),
    [
        (Cost(input=0.0, output=0.0), {"input": 0.0, "output": 0.0}),
        (
            Cost(input=0.5, output=1.5, cache_read=0.0, cache_write=0.25),
            {"input": 0.5, "output": 1.5, "cache_read": 0.0, "cache_write": 0.25},
        ),
    ],
)
async def test_a_price_is_shown_as_it_is_written(
    session: aiohttp.ClientSession, cost: Cost, shown: dict[str, float]
) -> None:
    catalogue = Catalogue({"m": Profile("m", cost=cost)})
    async with FakeNeuron() as a:
        found = await listed(session, a, catalogue=catalogue)

    assert found["m"]["cost"] == shown


async def test_what_was_known_last_is_shown_while_a_model_is_cold(
    session: aiohttp.ClientSession, tmp_path: Path
) -> None:
    catalogue = Catalogue({"m": Profile("m", limit=Limits(context=9))})
    async with FakeNeuron(["m"]) as a:
        a.models["m"].capabilities = ["chat"]
        a.models["m"].reasoning = True
        config, state = gateway_config(a), tmp_path / "cortex.db"
        async with Gateway(config, catalogue, state=state) as gateway:
            await gateway.poller.first_round()
            gateway.last_known.look(gateway.fleet.snapshot())
        a.models.clear()
        async with Gateway(config, catalogue, state=state) as gateway:
            await gateway.poller.first_round()
            _, body = await get(session, gateway.url + "/v1/models/m")

    assert (body["loaded"], body["context_length"]) == (False, 4096)
    assert (body["capabilities"], body["reasoning"]) == (["chat"], True)


async def test_a_cold_model_never_has_more_context_than_it_will_be_loaded_with(
    session: aiohttp.ClientSession,
) -> None:
    profile = Profile("m", limit=Limits(context=4096, input=4000), max_context_tokens=512)
    async with FakeNeuron() as a:
        found = await listed(session, a, catalogue=Catalogue({"m": profile}))

    assert (found["m"]["context_length"], found["m"]["max_input_tokens"]) == (512, 512)


@pytest.mark.parametrize(
    ("profile", "nodes"),
    [
        (Profile("m"), ["big", "small"]),
        (Profile("m", min_devices=2), ["big"]),
        (Profile("m", min_device_vram_mb=24000), ["big"]),
        (Profile("m", devices=[1]), ["big"]),
        (Profile("m", vram_mb=20000), ["big"]),
        (Profile("m", kv_cache_mb=20000), ["big"]),
        (Profile("m", pinned_on=("small",)), ["small"]),
    ],
)
async def test_where_a_model_could_be_is_told(
    session: aiohttp.ClientSession, profile: Profile, nodes: list[str]
) -> None:
    async with FakeNeuron(name="small") as small, FakeNeuron(name="big") as big:
        small.devices = [DeviceInfo(0, "cuda:0", 12000)]
        big.devices = [DeviceInfo(0, "cuda:0", 24000), DeviceInfo(1, "cuda:1", 24000)]
        found = await listed(session, small, big, catalogue=Catalogue({"m": profile}))

    assert found["m"]["feasible_on"] == nodes


async def test_what_no_node_could_ever_hold_is_not_offered(session: aiohttp.ClientSession) -> None:
    catalogue = Catalogue({"m": Profile("m", min_device_vram_mb=99999)}, {"nick": "m"})
    async with FakeNeuron() as a:
        found = await listed(session, a, catalogue=catalogue)

    assert found == {}


async def test_a_node_that_was_never_reached_could_hold_anything(
    session: aiohttp.ClientSession,
) -> None:
    catalogue = Catalogue({"m": Profile("m", min_device_vram_mb=99999)})
    async with FakeNeuron() as a:
        await a.stop()
        found = await listed(session, a, catalogue=catalogue)

    assert (found["m"]["feasible_on"], found["m"]["locations"]) == (["a"], [])


async def test_what_is_there_is_offered_whatever_was_thought_possible(
    session: aiohttp.ClientSession,
) -> None:
    catalogue = Catalogue({"m": Profile("m", min_device_vram_mb=99999)})
    async with FakeNeuron(["m"]) as a:
        found = await listed(session, a, catalogue=catalogue)

    assert (found["m"]["loaded"], found["m"]["feasible_on"]) == (True, ["a"])


async def test_what_cannot_be_served_is_not_shown_as_loaded_where_it_is(
    session: aiohttp.ClientSession,
) -> None:
    async with FakeNeuron(["warm", "full"]) as a:
        a.models["warm"].servable = Servable(ok=False, reason="low_memory")
        a.models["full"].servable = Servable(ok=False, reason="overloaded")
        found = await listed(session, a)

    assert found["warm"]["locations"] == [{"node": "a", "status": "unservable"}]
    assert found["full"]["locations"] == [{"node": "a", "status": "loaded"}]
    assert found["full"]["loaded"]


async def test_a_model_of_the_catalogue_whose_load_failed_is_shown_to_have(
    session: aiohttp.ClientSession,
) -> None:
    async with FakeNeuron(["cold"]) as a:
        a.models["cold"].status = "failed"
        found = await listed(session, a)

    assert not found["cold"]["loaded"]
    assert found["cold"]["locations"] == [{"node": "a", "status": "failed"}]


async def test_what_a_node_loads_when_it_starts_is_listed_before_it_is_there(
    session: aiohttp.ClientSession,
) -> None:
    async with FakeNeuron() as a:
        a.activation = Activation("pre_warming", pending=["second"], in_progress="first")
        found = await listed(session, a, catalogue=Catalogue())

    assert {name: entry["locations"] for name, entry in found.items()} == {
        "first": [{"node": "a", "status": "loading"}],
        "second": [{"node": "a", "status": "loading"}],
    }


def test_what_an_engine_has_is_offered_and_nothing_is_thought_to_fit_there() -> None:
    fleet = Fleet([], [Engine("ray", "http://ray:8000")])
    info = ModelInfo("glm-5", "engine", "loaded", [], Servable(ok=True), limit=Limit(8192))
    fleet.put(fleet.node("ray").answered(Health(0.0), [info], {}, 1.0))

    listing = Listing(fleet.snapshot(), BUILT_IN, lambda _: None, lambda *_: None)
    found = listing.entries(lambda _: True)

    assert [(entry.id, entry.loaded, entry.feasible_on) for entry in found] == [
        ("glm-5", True, ["ray"])
    ]
    assert (found[0].context_length, found[0].tool_call) == (8192, UNSET)


async def test_codex_finds_the_array_that_it_wants_and_nobody_else_does(
    session: aiohttp.ClientSession,
) -> None:
    async with FakeNeuron(["warm"]) as a, Gateway(gateway_config(a)) as gateway:
        _, codex = await get(session, gateway.url + "/v1/models?client_version=0.169.0")
        _, other = await get(session, gateway.url + "/v1/models")

    assert codex == {**other, "models": []}
    assert "models" not in other


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


async def test_health_calls_a_model_as_clients_do_and_keeps_the_path_of_its_files(
    session: aiohttp.ClientSession,
) -> None:
    catalogue = Catalogue({"house": Profile("house", source="file:/srv/private/x.gguf")})
    private = "file:/srv/private/x.gguf"
    async with FakeNeuron([private]) as a, Gateway(gateway_config(a), catalogue) as gateway:
        why = "/srv/private/x.gguf has no room"
        a.models[private].servable = Servable(ok=False, reason="low_memory", detail=why)
        await gateway.poller.refresh("a")
        _, body = await get(session, gateway.url + "/health")

    assert body["unservable"] == [
        {"node": "a", "model": "house", "reason": "low_memory", "detail": "house has no room"}
    ]


async def test_health_names_to_nobody_what_a_key_is_needed_for(
    session: aiohttp.ClientSession,
) -> None:
    keys = (Key("sk-of-a-guest", "guest", models=["other"]), Key("sk-of-a-host", "host"))
    entitlements = Entitlements(require_auth=True, keys=keys)
    async with (
        FakeNeuron(["m"]) as a,
        Gateway(gateway_config(a, entitlements=entitlements)) as gateway,
    ):
        a.models["m"].servable = Servable(ok=False, reason="low_memory")
        await gateway.poller.refresh("a")
        told = []
        for key in ("", "sk-of-a-guest", "sk-of-a-host"):
            async with session.get(gateway.url + "/health", headers={"x-api-key": key}) as response:
                told.append(await response.json())

    assert [body["status"] for body in told] == ["impaired"] * 3
    assert [len(body.get("unservable", [])) for body in told] == [0, 0, 1]


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


async def test_an_anthropic_client_is_told_what_a_model_can_do(
    session: aiohttp.ClientSession,
) -> None:
    async with FakeNeuron(["warm", "new"]) as a, Gateway(gateway_config(a)) as gateway:
        a.models["warm"].capabilities = ["chat", "completion"]
        a.models["warm"].reasoning = True
        a.models["warm"].output = 512
        await gateway.poller.refresh("a")
        _, warm = await get(session, gateway.url + "/v1/models/warm", **ANTHROPIC)
        _, new = await get(session, gateway.url + "/v1/models/new", **ANTHROPIC)

    assert warm["capabilities"]["thinking"]["types"]["enabled"] == {"supported": True}
    assert (warm["capabilities"]["image_input"], warm["max_tokens"]) == ({"supported": False}, 512)
    assert (new["capabilities"], new["max_tokens"]) == (None, None)


@pytest.mark.parametrize("name", ["after_id", "before_id"])
async def test_a_page_beside_a_model_that_is_not_listed_is_refused(
    session: aiohttp.ClientSession, name: str
) -> None:
    async with FakeNeuron(["warm"]) as a, Gateway(gateway_config(a), CATALOGUE) as gateway:
        await gateway.poller.first_round()
        status, said = await get(session, f"{gateway.url}/v1/models?{name}=gone", **ANTHROPIC)

    assert (status, said["error"]["param"]) == (400, name)
    assert said["error"]["message"] == f"{name}: there is no model 'gone' in the list"
