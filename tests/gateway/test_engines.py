"""Engines through the gateway, over HTTP: servers that we do not manage, behind every dialect."""

import asyncio
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import orjson
import pytest
from structlog.typing import EventDict

from cortex.gateway.app import Gateway
from cortex.gateway.catalogue import Catalogue, Profile
from cortex.gateway.config import Budget, Engine, Entitlements, Key, Routing
from cortex.ipc.errors import Overloaded
from fake_engine import USAGE, FakeEngine, Kind, Refusal, chunk, engine_config, said
from fakes import QUICK, FakeNeuron, until

CHAT, MESSAGES, RESPONSES = "/v1/chat/completions", "/v1/messages", "/v1/responses"
COUNT = "/v1/messages/count_tokens"
TURNS = [{"role": "user", "content": "hi"}]
ASKS: dict[str, dict[str, Any]] = {
    CHAT: {"messages": TURNS},
    MESSAGES: {"messages": TURNS, "max_tokens": 9},
    RESPONSES: {"input": "hi"},
}
DIALECTS = pytest.mark.parametrize("path", ASKS)
SLOW = msgspec.structs.replace(QUICK, keep_alive_seconds=30.0)
RARELY = msgspec.structs.replace(QUICK, poll_seconds=3600)


async def ask(
    session: aiohttp.ClientSession, gateway: Gateway, path: str = CHAT, **fields: Any
) -> tuple[int, bytes, dict[str, str]]:
    headers = fields.pop("headers", None)
    body = {"model": "m", **ASKS.get(path, {}), **fields}
    async with session.post(gateway.url + path, json=body, headers=headers) as response:
        return response.status, await response.read(), dict(response.headers)


async def get(session: aiohttp.ClientSession, gateway: Gateway, path: str) -> Any:
    async with session.get(gateway.url + path) as response:
        return orjson.loads(await response.read())


def events(stream: bytes) -> list[dict[str, Any]]:
    lines = [line for line in stream.split(b"\n") if line.startswith(b"data: {")]
    return [orjson.loads(line.removeprefix(b"data: ")) for line in lines]


async def test_the_models_of_an_engine_are_listed_with_their_limits(
    session: aiohttp.ClientSession,
) -> None:
    async with FakeEngine() as ray, Gateway(engine_config(ray)) as gateway:
        ray.listing["data"] = [{"id": "glm-5", "max_model_len": 8192}, {"id": "b"}]
        await gateway.poller.refresh("ray")
        listed = (await get(session, gateway, "/v1/models"))["data"]

    [b, glm] = [entry for entry in listed if entry["loaded"]]
    assert glm["locations"] == [{"node": "ray", "status": "loaded"}]
    assert (glm["id"], glm["context_length"], glm["max_model_len"]) == ("glm-5", 8192, 8192)
    assert b["id"] == "b"
    assert "context_length" not in b


async def test_what_an_engine_does_not_list_is_not_offered_and_said_once(
    session: aiohttp.ClientSession, logged: list[EventDict]
) -> None:
    async with (
        FakeEngine("m", "other") as ray,
        Gateway(engine_config(ray, models=("m", "absent"))) as gateway,
    ):
        await gateway.poller.refresh("ray")
        await gateway.poller.refresh("ray")
        models = [model.id for model in gateway.fleet.node("ray").models]
        status, body, _ = await ask(session, gateway, model="other")

    assert models == ["m"]
    assert (status, orjson.loads(body)["error"]["code"]) == (404, "model_not_found")
    assert [line["models"] for line in logged if "not offered" in line["event"]] == [["absent"]]


async def test_an_engine_that_is_gone_is_down_and_comes_back() -> None:
    async with FakeEngine("m") as ray, Gateway(engine_config(ray)) as gateway:
        await gateway.poller.refresh("ray")
        ray.listing = "nonsense"
        await until(lambda: not gateway.fleet.node("ray").is_healthy)
        error = gateway.fleet.node("ray").error
        ray.listing = {"data": [{"id": "m"}]}
        await until(lambda: gateway.fleet.node("ray").is_healthy)

    assert error is not None
    assert error.startswith("GET /v1/models: ")


async def test_the_fleet_shows_an_engine_with_our_requests_as_its_load(
    session: aiohttp.ClientSession,
) -> None:
    async with FakeEngine("m") as ray, Gateway(engine_config(ray)) as gateway:
        await gateway.poller.first_round()
        with gateway.fleet.holding("ray", "m"):
            [node] = (await get(session, gateway, "/fleet"))["nodes"]

    assert (node["is_engine"], node["healthy"], node["devices"]) == (True, True, [])
    assert [(m["id"], m["status"], m["in_flight"]) for m in node["models"]] == [("m", "loaded", 1)]


async def test_the_key_of_an_engine_goes_there_and_nothing_of_ours(
    session: aiohttp.ClientSession, tmp_path: Path
) -> None:
    file = tmp_path / "key"
    file.write_text("sk-of-the-engine\n")
    file.chmod(0o600)
    keys = Entitlements(keys=(Key("sk-of-the-client", "laptop", priority=3),))
    async with FakeEngine("m") as ray:
        ray.key = "sk-of-the-engine"
        config = engine_config(ray, entitlements=keys)
        written = (Engine("ray", ray.url, key_file=str(file)),)
        config = msgspec.structs.replace(config, engines=written)
        async with Gateway(config) as gateway:
            headers = {"x-api-key": "sk-of-the-client", "x-request-id": "r", "x-cortex-usage": "1"}
            status, _, _ = await ask(session, gateway, headers=headers)

    [received] = ray.received
    assert status == 200
    assert received.headers["authorization"] == "Bearer sk-of-the-engine"
    assert not [name for name in received.headers if name.startswith("x-")]
    assert "sk-of-the-client" not in str(received.headers)


async def test_an_engine_that_wants_another_key_is_down_in_words() -> None:
    async with FakeEngine("m") as ray:
        ray.key = "sk-of-the-engine"
        async with Gateway(engine_config(ray)) as gateway:
            await gateway.poller.first_round()
            error = gateway.fleet.node("ray").error

    assert error == "node ray wants another key: set key_file of this engine"


@DIALECTS
async def test_an_engine_answers_in_every_dialect(
    session: aiohttp.ClientSession, path: str
) -> None:
    async with FakeEngine("m") as ray, Gateway(engine_config(ray)) as gateway:
        status, whole, headers = await ask(session, gateway, path)
        _, stream, _ = await ask(session, gateway, path, stream=True)

    assert (status, headers["x-cortex-node"], headers["x-cortex-reason"]) == (
        *(200, "ray"),
        "only-replica",
    )
    assert b"Hello world" in whole
    assert b"Hello" in stream
    assert b" world" in stream


async def test_a_body_goes_to_an_engine_byte_for_byte(session: aiohttp.ClientSession) -> None:
    async with FakeEngine("m") as ray, Gateway(engine_config(ray)) as gateway:
        await ask(session, gateway, temperature=1.50, top_k=3, unheard_of={"a": None})

    assert ray.bodies() == [
        {"model": "m", "messages": TURNS, "temperature": 1.5, "top_k": 3, "unheard_of": {"a": None}}
    ]


@pytest.mark.parametrize("options", [{}, {"stream_options": None}, {"stream_options": {"x": 1}}])
async def test_usage_is_asked_for_metered_and_not_shown(
    session: aiohttp.ClientSession, logged: list[EventDict], options: dict[str, Any]
) -> None:
    async with FakeEngine("m") as ray, Gateway(engine_config(ray)) as gateway:
        _, stream, _ = await ask(session, gateway, stream=True, **options)

    asked = {**(options.get("stream_options") or {}), "include_usage": True}
    assert ray.bodies() == [{"model": "m", **ASKS[CHAT], "stream": True, "stream_options": asked}]
    assert [event for event in events(stream) if not event["choices"]] == []
    [line] = [line for line in logged if line["event"] == "request finished"]
    assert (line["prompt_tokens"], line["completion_tokens"]) == (7, 2)


async def test_usage_is_shown_to_whoever_asked_for_it(session: aiohttp.ClientSession) -> None:
    options = {"include_usage": True, "continuous_usage_stats": False}
    async with FakeEngine("m") as ray, Gateway(engine_config(ray)) as gateway:
        _, stream, _ = await ask(session, gateway, stream=True, stream_options=options)

    assert ray.bodies()[0]["stream_options"] == options
    assert events(stream)[-1] == {"choices": [], "usage": USAGE}


async def test_options_of_a_stream_that_are_none_are_the_engines_to_refuse(
    session: aiohttp.ClientSession,
) -> None:
    async with FakeEngine("m") as ray, Gateway(engine_config(ray)) as gateway:
        ray.refuses = Refusal(422, {"detail": "stream_options: no object"})
        status, _, _ = await ask(session, gateway, stream=True, stream_options="usage")

    assert status == 422
    assert ray.bodies()[0]["stream_options"] == "usage"


async def test_what_tells_no_usage_costs_what_it_is_estimated_at(
    session: aiohttp.ClientSession, logged: list[EventDict]
) -> None:
    key = Key("sk-of-the-client", "laptop", budget=Budget(10_000))
    async with FakeEngine("m") as ray:
        ray.stream = said(chunk({"content": "a"}), chunk({"content": "b"}), chunk({}, "stop"))
        async with Gateway(engine_config(ray, entitlements=Entitlements(keys=(key,)))) as gateway:
            await ask(session, gateway, stream=True, headers={"x-api-key": "sk-of-the-client"})

    [line] = [line for line in logged if line["event"] == "request finished"]
    assert line["prompt_tokens"] > 0
    assert line["completion_tokens"] == 3


async def test_an_answer_passes_byte_for_byte_and_its_usage_is_metered(
    session: aiohttp.ClientSession, logged: list[EventDict]
) -> None:
    async with FakeEngine("m") as ray, Gateway(engine_config(ray)) as gateway:
        ray.answer["choices"][0]["message"]["reasoning"] = "Hm."
        _, body, _ = await ask(session, gateway)

    assert orjson.loads(body) == ray.answer
    [line] = [line for line in logged if line["event"] == "request finished"]
    assert (line["node"], line["prompt_tokens"], line["finish_reason"]) == ("ray", 7, "stop")


@DIALECTS
async def test_an_engine_knows_the_model_by_its_own_name(
    session: aiohttp.ClientSession, path: str
) -> None:
    catalogue = Catalogue({"mine": Profile("mine", source="file:/srv/m.gguf")}, {"short": "mine"})
    async with FakeEngine("file:/srv/m.gguf") as ray:
        ray.stream = said(chunk({"content": "Hello"}, model="file:/srv/m.gguf"), chunk({}, "stop"))
        async with Gateway(engine_config(ray), catalogue) as gateway:
            _, stream, _ = await ask(session, gateway, path, model="short", stream=True)

    assert ray.bodies()[-1]["model"] == "file:/srv/m.gguf"
    assert b"Hello" in stream
    assert b"/srv/" not in stream


@pytest.mark.parametrize("path", [MESSAGES, RESPONSES])
@pytest.mark.parametrize("stream", [False, True])
async def test_reasoning_and_whole_calls_of_an_engine_are_translated(
    session: aiohttp.ClientSession, path: str, *, stream: bool
) -> None:
    call = {"type": "function", "function": {"name": "look", "arguments": {"at": "sky"}}}
    spoken = {"role": "assistant", "content": None, "reasoning": "Hm.", "tool_calls": [call]}
    tool = {"name": "look", "input_schema": {"type": "object"}}
    function = {"type": "function", "name": "look", "parameters": {"type": "object"}}
    async with FakeEngine("m") as ray:
        ray.answer["choices"] = [{"index": 0, "message": spoken, "finish_reason": "stop"}]
        del ray.answer["usage"]
        ray.stream = said(chunk(spoken), chunk({}, "stop"))
        async with Gateway(engine_config(ray)) as gateway:
            tools = [tool if path == MESSAGES else function]
            status, body, _ = await ask(session, gateway, path, stream=stream, tools=tools)

    assert status == 200
    assert b"Hm." in body
    assert b'{\\"at\\":\\"sky\\"}' in body or b'"input":{"at":"sky"}' in body
    if path == MESSAGES:
        assert b'"tool_use"' in body


async def test_a_silent_engine_does_not_let_a_stream_starve(
    session: aiohttp.ClientSession,
) -> None:
    async with FakeEngine("m") as ray, Gateway(engine_config(ray)) as gateway:
        ray.may_begin.clear()
        ray.may_finish.clear()
        url, body = gateway.url + CHAT, {"model": "m", **ASKS[CHAT], "stream": True}
        async with session.post(url, json=body) as response:
            first = await response.content.readuntil(b"\n\n")
            ray.may_begin.set()
            while b"keep-alive" not in (second := await response.content.readuntil(b"\n\n")):
                assert second
            ray.may_finish.set()
            rest = await response.content.read()

    assert (first, second) == (b": waiting for ray\n\n", b": keep-alive\n\n")
    assert rest.endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize(
    ("path", "sign"), [(MESSAGES, b"event: ping"), (RESPONSES, b"response.queued")]
)
async def test_a_silent_engine_is_told_in_the_dialect(
    session: aiohttp.ClientSession, path: str, sign: bytes
) -> None:
    async with FakeEngine("m") as ray, Gateway(engine_config(ray)) as gateway:
        ray.may_begin.clear()
        url, body = gateway.url + path, {"model": "m", **ASKS[path], "stream": True}
        async with session.post(url, json=body) as response:
            while sign not in (line := await response.content.readline()):
                assert line
            ray.may_begin.set()
            rest = await response.content.read()

    assert b" world" in rest


async def test_an_engine_that_refuses_after_a_silence_ends_the_stream_with_a_frame(
    session: aiohttp.ClientSession,
) -> None:
    async with FakeEngine("m") as ray, Gateway(engine_config(ray)) as gateway:
        ray.may_begin.clear()
        ray.refuses = Refusal(400, {"error": {"message": "no such thing", "code": 400}})
        url, body = gateway.url + CHAT, {"model": "m", **ASKS[CHAT], "stream": True}
        async with session.post(url, json=body) as response:
            await response.content.readuntil(b"\n\n")
            ray.may_begin.set()
            rest = await response.content.read()

    assert events(rest)[-1]["error"]["message"] == "no such thing"
    assert b"[DONE]" not in rest


async def test_another_replica_may_answer_after_the_silence_of_one(
    session: aiohttp.ClientSession,
) -> None:
    async with (
        FakeEngine("m", name="a") as a,
        FakeEngine("m", name="b") as b,
        Gateway(engine_config(a, b)) as gateway,
    ):
        await gateway.poller.first_round()
        a.may_begin.clear()
        a.refuses = Refusal(503, "busy", {"Retry-After": "3"}, "text/plain")
        url, body = gateway.url + CHAT, {"model": "m", **ASKS[CHAT], "stream": True}
        with gateway.fleet.holding("b", "other"):
            async with session.post(url, json=body) as response:
                await response.content.readuntil(b"\n\n")
                a.may_begin.set()
                rest = await response.content.read()

    assert len(a.bodies()) + len(b.bodies()) == 2
    assert rest.endswith(b"data: [DONE]\n\n")


async def test_a_client_that_leaves_a_silent_engine_cancels_its_request(
    session: aiohttp.ClientSession,
) -> None:
    async with FakeEngine("m") as ray, Gateway(engine_config(ray, timeouts=SLOW)) as gateway:
        ray.may_begin.clear()
        async with asyncio.TaskGroup() as beside:
            asking = beside.create_task(ask(session, gateway, stream=True))
            await ray.asked.wait()
            asking.cancel()
            await ray.cancelled.wait()

        await until(lambda: gateway.fleet.own("ray") == {})


async def test_a_client_that_leaves_in_the_middle_cancels_the_request(
    session: aiohttp.ClientSession,
) -> None:
    async with FakeEngine("m") as ray, Gateway(engine_config(ray)) as gateway:
        ray.may_finish.clear()
        url, body = gateway.url + MESSAGES, {"model": "m", **ASKS[MESSAGES], "stream": True}
        async with session.post(url, json=body) as response:
            await response.content.readuntil(b"\n\n")
        await ray.cancelled.wait()

        await until(lambda: gateway.fleet.own("ray") == {})


async def test_an_engine_that_breaks_in_the_middle_ends_the_stream_with_a_frame(
    session: aiohttp.ClientSession,
) -> None:
    async with FakeEngine("m") as ray, Gateway(engine_config(ray)) as gateway:
        ray.breaks = True
        _, stream, _ = await ask(session, gateway, stream=True)

    assert events(stream)[-1]["error"]["code"] == "node_failed"
    assert b"[DONE]" not in stream


async def test_a_page_in_place_of_an_answer_is_never_passed_on(
    session: aiohttp.ClientSession,
) -> None:
    async with FakeEngine("m") as ray, Gateway(engine_config(ray)) as gateway:
        ray.answer = b"<html>Welcome</html>"
        status, body, headers = await ask(session, gateway)
        ray.stream = ray.answer
        streamed, stream, _ = await ask(session, gateway, stream=True)

    assert (status, streamed) == (502, 502)
    assert headers["Content-Type"].startswith("application/json")
    assert b"html" not in body + stream


async def test_an_error_in_an_answer_of_status_200_is_an_error(
    session: aiohttp.ClientSession,
) -> None:
    async with FakeEngine("m") as ray, Gateway(engine_config(ray)) as gateway:
        ray.answer = {"object": "error", "message": "no such thing", "code": 400}
        status, body, headers = await ask(session, gateway)

    assert (status, headers["x-cortex-source"]) == (400, "node")
    assert orjson.loads(body)["error"]["message"] == "no such thing"


async def test_a_prompt_that_is_too_long_for_an_engine_is_said_in_the_known_words(
    session: aiohttp.ClientSession,
) -> None:
    words = (
        "This model's maximum context length is 8192 tokens. However, you requested 9010 tokens "
        "(9000 in the messages, 10 in the completion)."
    )
    async with FakeEngine("m") as ray, Gateway(engine_config(ray)) as gateway:
        ray.refuses = Refusal(400, {"error": {"message": words, "code": 400}})
        status, body, _ = await ask(session, gateway, MESSAGES)

    error = orjson.loads(body)["error"]
    assert (status, error["type"]) == (400, "invalid_request_error")
    assert error["message"] == "prompt is too long: 9000 tokens > 8192 maximum"


async def test_what_an_engine_does_not_serve_is_said_not_to_be(
    session: aiohttp.ClientSession,
) -> None:
    async with FakeEngine("m", kind="ollama") as ray, Gateway(engine_config(ray)) as gateway:
        status, body, _ = await ask(session, gateway, "/v1/embeddings", input="hi")

    assert status == 404
    assert orjson.loads(body)["error"]["message"] == "node ray does not serve /v1/embeddings"


async def test_embeddings_pass(session: aiohttp.ClientSession, logged: list[EventDict]) -> None:
    async with FakeEngine("m") as ray, Gateway(engine_config(ray)) as gateway:
        ray.answer = {"object": "list", "data": [{"embedding": [0.5]}], "usage": USAGE}
        _, body, _ = await ask(session, gateway, "/v1/embeddings", input="hi")

    assert orjson.loads(body) == ray.answer
    [line] = [line for line in logged if line["event"] == "request finished"]
    assert line["prompt_tokens"] == 7


@pytest.mark.parametrize("kind", ["vllm", "llama-server", "llama-cpp-python"])
async def test_a_prompt_is_counted_in_the_way_of_the_engine(
    session: aiohttp.ClientSession, kind: Kind
) -> None:
    tools = [{"name": "look", "input_schema": {"type": "object"}}]
    async with FakeEngine("m", kind=kind) as ray, Gateway(engine_config(ray)) as gateway:
        _, body, _ = await ask(session, gateway, COUNT, messages=TURNS, tools=tools)
        _, stream, _ = await ask(session, gateway, MESSAGES, stream=True)

    assert orjson.loads(body) == {"input_tokens": 42}
    assert events(stream)[0]["message"]["usage"]["input_tokens"] == 42


async def test_where_no_engine_can_count_that_is_said(session: aiohttp.ClientSession) -> None:
    async with FakeEngine("m", kind="ollama") as ray, Gateway(engine_config(ray)) as gateway:
        status, body, _ = await ask(session, gateway, COUNT, messages=TURNS)
        _, stream, _ = await ask(session, gateway, MESSAGES, stream=True)

    assert status == 404
    assert orjson.loads(body)["error"]["message"] == (
        "no node can count for 'm': none has it, or can tell"
    )
    assert events(stream)[-1]["type"] == "message_stop"


async def test_a_neuron_counts_what_an_engine_cannot(session: aiohttp.ClientSession) -> None:
    async with (
        FakeEngine("m", kind="ollama", name="a") as ray,
        FakeNeuron(["m"], "b") as neuron,
        Gateway(engine_config(ray, neurons=[neuron])) as gateway,
    ):
        _, body, _ = await ask(session, gateway, COUNT, messages=TURNS)

    assert orjson.loads(body) == {"input_tokens": 7}


async def test_an_engine_that_does_not_have_the_model_is_not_asked_to_count(
    session: aiohttp.ClientSession,
) -> None:
    async with (
        FakeEngine("other", kind="llama-server") as ray,
        Gateway(engine_config(ray)) as gateway,
    ):
        status, _, _ = await ask(session, gateway, COUNT, messages=TURNS)

    assert status != 200
    assert ray.received == []


async def test_an_engine_and_a_neuron_are_both_replicas(session: aiohttp.ClientSession) -> None:
    async with (
        FakeEngine("m", name="ray") as ray,
        FakeNeuron(["m"], "b") as neuron,
        Gateway(engine_config(ray, neurons=[neuron])) as gateway,
    ):
        await gateway.poller.first_round()
        neuron.refuses = Overloaded("full")
        first = [await ask(session, gateway) for _ in range(4)]
        neuron.refuses = None
        ray.refuses = Refusal(500, "Internal Server Error", content_type="text/plain")
        second = [await ask(session, gateway) for _ in range(4)]

    assert [headers["x-cortex-node"] for _, _, headers in first] == ["ray"] * 4
    assert [headers["x-cortex-node"] for _, _, headers in second] == ["b"] * 4


async def test_a_full_engine_gets_no_more(session: aiohttp.ClientSession) -> None:
    async with FakeEngine("m", "n") as ray, Gateway(engine_config(ray, max_in_flight=1)) as gateway:
        ray.may_finish.clear()
        async with asyncio.TaskGroup() as beside:
            asking = beside.create_task(ask(session, gateway))
            await ray.asked.wait()
            status, body, headers = await ask(session, gateway, model="n")
            listed = (await get(session, gateway, "/v1/models"))["data"]
            ray.may_finish.set()
            answered, _, _ = await asking
        again, _, _ = await ask(session, gateway)

    assert (status, headers["Retry-After"], answered, again) == (503, "1", 200, 200)
    assert orjson.loads(body)["error"]["code"] == "overloaded"
    assert "ray has all the requests that it may have" in orjson.loads(body)["error"]["message"]
    assert all(entry["loaded"] for entry in listed if entry["id"] in ("m", "n"))


async def test_another_replica_answers_in_place_of_a_full_engine(
    session: aiohttp.ClientSession,
) -> None:
    async with (
        FakeEngine("m", name="a") as ray,
        FakeNeuron(["m"], "b") as neuron,
        Gateway(engine_config(ray, neurons=[neuron], max_in_flight=1)) as gateway,
    ):
        await gateway.poller.first_round()
        with gateway.fleet.holding("a", "m"):
            nodes = [(await ask(session, gateway))[2]["x-cortex-node"] for _ in range(3)]

    assert nodes == ["b"] * 3


async def test_a_bound_that_changes_counts_at_once() -> None:
    async with FakeEngine("m") as ray, Gateway(engine_config(ray)) as gateway:
        await gateway.poller.refresh("ray")
        with gateway.fleet.holding("ray", "m"):
            before = gateway.fleet.snapshot().nodes[0]
            gateway.fleet.configure((), (Engine("ray", ray.url, max_in_flight=1),))
            after = gateway.fleet.snapshot().nodes[0]

    assert (before.is_full, after.is_full, after.is_healthy) == (False, True, True)


async def test_an_engine_is_left_alone_while_it_answers_one_request() -> None:
    async with (
        FakeEngine("m", name="a") as ray,
        FakeNeuron(["x"], "b") as neuron,
        Gateway(engine_config(ray, neurons=[neuron])) as gateway,
    ):
        await gateway.poller.first_round()
        with gateway.fleet.holding("a", "m"):
            polls, others = ray.polls, neuron.polls
            await until(lambda: neuron.polls > others + 10)
            left_alone = ray.polls <= polls + 1  # one may have been under way
            await gateway.poller.refresh("a")
            asked_for = ray.polls
        await until(lambda: ray.polls > asked_for)

    assert left_alone


async def test_an_engine_that_answers_several_requests_is_polled() -> None:
    async with FakeEngine("m") as ray, Gateway(engine_config(ray)) as gateway:
        await gateway.poller.first_round()
        with gateway.fleet.holding("ray", "m"), gateway.fleet.holding("ray", "m"):
            polls = ray.polls

            await until(lambda: ray.polls > polls + 3)


async def test_nothing_is_loaded_on_an_engine(session: aiohttp.ClientSession) -> None:
    catalogue = Catalogue({"cold": Profile("cold")})
    async with FakeEngine("m") as ray, Gateway(engine_config(ray), catalogue) as gateway:
        status, body, _ = await ask(session, gateway, model="cold")
        async with session.post(
            gateway.url + "/fleet/models/unload", json={"model": "m"}
        ) as response:
            unloaded = response.status

    assert 400 <= status < 600
    assert b"internal_error" not in body
    assert unloaded == 404
    assert ray.received == []


async def test_an_engine_that_breaks_everything_is_closed_to_requests(
    session: aiohttp.ClientSession,
) -> None:
    async with FakeEngine("m") as ray:
        config = engine_config(ray, routing=Routing(breaker_failures=1, breaker_open_seconds=60.0))
        async with Gateway(config) as gateway:
            ray.refuses = Refusal(500, {"error": "CUDA error"})
            first, body, _ = await ask(session, gateway)
            second, _, headers = await ask(session, gateway)

    assert (first, second) == (502, 503)
    assert orjson.loads(body)["error"]["message"] == "node ray failed: CUDA error"
    assert int(headers["Retry-After"]) > 1
