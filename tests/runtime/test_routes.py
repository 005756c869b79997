"""Every route that is not a completion: what it answers, and in which shape it refuses."""

import asyncio
import dataclasses
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from blockbuster import blockbuster_ctx
from structlog.testing import capture_logs

from cortex.ipc.errors import Conflict, LoadedDifferently, Unloadable
from cortex.ipc.messages import Hello
from cortex.ipc.node_api import LoadRequest, ModelStatus
from cortex.runtime.chat import Chat, ChatOptions
from cortex.runtime.chat_template import ChatTemplate
from cortex.runtime.config import AdmissionConfig, CacheConfig, NeuronConfig
from fake_node import CHATML, FakeModel, FakeNode, says, serving, tiny_text
from tiny_text import TINY_LLAMA, metadata_of, trained, write_gguf

MODEL = "smollm2-135m-instruct"


@pytest.fixture(autouse=True)
def _nothing_blocks_the_loop() -> Iterator[None]:
    with blockbuster_ctx("cortex.runtime"):
        yield


async def got(node: FakeNode, path: str, **options: Any) -> tuple[int, Any]:
    """Return status and body of a GET."""
    async with serving(node, **options) as client, client.get(path) as response:
        return response.status, await response.json()


async def posted(node: FakeNode, path: str, body: Any, **options: Any) -> tuple[int, Any]:
    """Return status and body of a POST."""
    async with serving(node, **options) as client, client.post(path, json=body) as response:
        return response.status, await response.json()


async def test_models_is_a_bare_array() -> None:
    status, body = await got(FakeNode(MODEL), "/models")

    assert status == 200
    assert body == [
        {
            "id": MODEL,
            "harness": "torch",
            "status": "loaded",
            "devices": [{"index": 0, "weights_mb": 93, "kv_mb": 40, "workspace_mb": 5}],
            "servable": {"ok": True},
            "limit": {"context": 512},
            "capabilities": ["completion", "chat"],
        }
    ]


async def test_a_model_that_failed_is_shown_with_its_reason() -> None:
    node = FakeNode(MODEL)
    node.models[MODEL].status = "failed"
    node.models[MODEL].failure = "the disk is full"
    node.models[MODEL].footprints = []

    _, body = await got(node, "/models")

    assert body[0]["failure"] == "the disk is full"
    assert body[0]["devices"] == [{"index": 0, "weights_mb": 0, "kv_mb": 0, "workspace_mb": 0}]


async def test_v1_models_lists_what_is_loaded_by_id() -> None:
    node = FakeNode("b", "a", "c")
    node.models["c"].status = "loading"

    _, body = await got(node, "/v1/models")

    assert [(entry["id"], entry["object"]) for entry in body["data"]] == [
        ("a", "model"),
        ("b", "model"),
    ]
    assert body["data"][0]["context_length"] == 512


@pytest.mark.parametrize("path", ["org/name:q4", "org%2Fname%3Aq4"])
async def test_an_id_may_hold_slashes_and_colons_escaped_or_not(path: str) -> None:
    node = FakeNode("org/name:q4")

    for url in (f"/v1/models/{path}", f"/models/{path}/endpoint", f"/models/{path}/capabilities"):
        status, _ = await got(node, url)
        assert status == 200


async def test_the_endpoint_is_where_the_caller_reached_the_neuron() -> None:
    config = NeuronConfig(listen="10.0.0.7:13131")
    async with serving(FakeNode(MODEL), config=config) as client:
        headers = {"Host": "beast.lan:13131"}
        async with client.get(f"/models/{MODEL}/endpoint", headers=headers) as response:
            assert await response.json() == {"url": "http://beast.lan:13131"}


@pytest.mark.parametrize(
    "path", ["/v1/models/none", "/models/none/endpoint", "/models/file:/none/capabilities"]
)
async def test_a_model_nobody_knows_is_404(path: str) -> None:
    status, body = await got(FakeNode(), path)

    assert (status, body["error"]["code"]) == (404, "model_not_found")


async def test_a_model_that_is_not_loaded_yet_is_not_in_v1_models() -> None:
    node = FakeNode(MODEL)
    node.models[MODEL].status = "loading"

    status, _ = await got(node, f"/v1/models/{MODEL}")

    assert status == 404


async def test_a_loaded_model_says_what_it_can_do() -> None:
    _, body = await got(FakeNode(MODEL), f"/models/{MODEL}/capabilities")

    assert body == {
        "capabilities": ["completion", "chat"],
        "limit": {"context": 512},
        "tool_call": False,
        "reasoning": False,
        "size_bytes": 93 * 2**20,
        "source": "loaded",
    }


async def test_what_a_model_can_do_is_what_its_text_side_says() -> None:
    node = FakeNode(MODEL, "loading")
    thinks = ChatTemplate(CHATML + "{# <think> </think> #}", {})
    chat = Chat(tiny_text().tokenizer, thinks, ChatOptions(tool_prompt="hermes"))
    node.models[MODEL].text = dataclasses.replace(tiny_text(), chat=chat, pooling="mean")
    node.models["loading"].text = None

    _, able = await got(node, f"/models/{MODEL}/capabilities")
    _, models = await got(node, "/models")

    assert (able["tool_call"], able["reasoning"]) == (True, True)
    assert able["capabilities"] == ["completion", "chat", "tools", "embeddings"]
    assert models[0].items() >= {"tool_call": True, "reasoning": True}.items()
    assert "capabilities" not in models[1]


async def test_a_model_on_the_disk_says_what_it_can_do(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "m.gguf", TINY_LLAMA | metadata_of(trained("smollm"), "smollm"))

    status, body = await got(FakeNode(), f"/models/file:{file}/capabilities")

    assert (status, body["source"], body["limit"]) == (200, "cache", {"context": 1024})
    assert body["capabilities"] == ["completion"]  # it has no chat template


async def test_files_that_are_no_model_are_no_evidence(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"nonsense")

    status, body = await got(FakeNode(), f"/models/file:{tmp_path / 'm.gguf'}/capabilities")

    assert status == 404
    assert "cannot be served" in body["error"]["message"]


async def test_an_id_without_a_source_is_no_evidence() -> None:
    status, body = await got(FakeNode(), "/models/ftp:x/capabilities")

    assert (status, body["error"]["code"]) == (404, "model_not_found")


async def test_a_load_is_accepted_once_it_is_queued() -> None:
    node = FakeNode()

    status, body = await posted(node, "/models/load", {"model_id": MODEL, "harness": "candle"})

    assert (status, body) == (202, {"status": "loading"})
    assert node.acts[0] == ("load", LoadRequest(MODEL, harness="candle"))


async def test_a_load_that_waits_answers_when_it_is_loaded() -> None:
    node = FakeNode()

    status, body = await posted(node, "/models/load", {"model_id": MODEL, "wait": True})

    assert (status, body) == (200, {"status": "loaded"})


async def test_loading_what_is_loaded_is_done_already() -> None:
    status, body = await posted(FakeNode(MODEL), "/models/load", {"model_id": MODEL})

    assert (status, body) == (200, {"status": "loaded"})


@pytest.mark.parametrize(
    ("refusal", "status", "code"),
    [
        (Unloadable("no such quant", kind="quant_not_found"), 422, "unloadable"),
        (LoadedDifferently("another quant"), 409, "loaded_differently"),
    ],
)
async def test_a_load_that_cannot_be_is_refused(refusal: Exception, status: int, code: str) -> None:
    node = FakeNode()
    node.refusal = refusal

    answer = await posted(node, "/models/load", {"model_id": MODEL})

    assert (answer[0], answer[1]["error"]["code"]) == (status, code)


async def test_the_kind_of_an_unloadable_model_is_for_machines() -> None:
    node = FakeNode()
    node.refusal = Unloadable("no such quant", kind="quant_not_found", nearest="Q4_1")

    _, body = await posted(node, "/models/load", {"model_id": MODEL})

    assert body["error"]["kind"] == "quant_not_found"
    assert body["error"]["nearest"] == "Q4_1"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"model_id": MODEL, "kv_cache_mb": 0}, "kv_cache_mb"),
        ({"model_id": MODEL, "gpu_layers": 3}, "gpu_layers"),
        ({"model_id": MODEL, "sampling": {"warmth": 1}}, "sampling.warmth"),
        ({"model_id": MODEL, "sampling": {"top_p": 7}}, "sampling.top_p"),
        ({}, "model_id"),
    ],
)
async def test_a_load_request_of_the_wrong_shape_names_the_place(
    body: dict[str, Any], param: str
) -> None:
    status, answer = await posted(FakeNode(), "/models/load", body)

    assert (status, answer["error"]["code"]) == (400, "invalid_request")
    assert answer["error"]["param"] == param


async def test_unloading_is_forced_only_where_asked() -> None:
    node = FakeNode("a", "b")

    assert await posted(node, "/models/unload", {"model_id": "a"}) == (200, {"status": "unloaded"})
    await posted(node, "/models/unload", {"model_id": "b", "force": True})

    assert node.acts == [("unload", ("a", False)), ("unload", ("b", True))]


async def test_unloading_what_is_not_there_is_404() -> None:
    status, _ = await posted(FakeNode(), "/models/unload", {"model_id": "a"})

    assert status == 404


async def test_a_cleared_prefix_cache_says_what_was_forgotten() -> None:
    node = FakeNode("a")
    node.cached_blocks = 12

    answers = [
        await posted(node, "/models/clear_prefix_cache", {"model_id": "a"}) for _ in range(2)
    ]

    assert answers == [
        (200, {"status": "cleared", "blocks": 12}),
        (200, {"status": "cleared", "blocks": 0}),
    ]


@pytest.mark.parametrize(
    ("state", "status"), [("loading", 503), ("recovering", 503), ("unloading", 404), (None, 404)]
)
async def test_only_what_is_loaded_has_a_prefix_cache(
    state: ModelStatus | None, status: int
) -> None:
    node = FakeNode("a") if state else FakeNode()
    if state:
        node.models["a"].status = state

    answer, _ = await posted(node, "/models/clear_prefix_cache", {"model_id": "a"})

    assert answer == status


async def test_a_full_model_refuses_with_the_numbers() -> None:
    node, gate = FakeNode(MODEL), asyncio.Event()
    node.script = [gate, *says("Paris.")]
    config = NeuronConfig(
        admission=AdmissionConfig(max_in_flight=1, max_queue_depth=0),
        cache=CacheConfig("/nonexistent"),
    )
    body = {"model": MODEL, "prompt": "Hello"}

    async with serving(node, config=config) as client, asyncio.TaskGroup() as tasks:
        first = tasks.create_task(client.post("/v1/completions", json=body))
        await node.started.wait()
        async with client.post("/v1/completions", json=body) as response:
            error = (await response.json())["error"]
        async with client.get("/models") as models:
            [shown] = await models.json()
        gate.set()
        (await first).release()

    assert (response.status, response.headers["Retry-After"]) == (503, "1")
    assert {name: error[name] for name in ("code", "seats_taken", "seats", "queue_depth")} == {
        "code": "overloaded",
        "seats_taken": 1,
        "seats": 1,
        "queue_depth": 0,
    }
    assert (error["kv_free_tokens"], error["kv_total_tokens"]) == (1024, 1024)
    assert shown["servable"]["reason"] == "overloaded"


async def test_the_more_urgent_of_those_who_wait_is_served_first() -> None:
    node, gate = FakeNode(MODEL), asyncio.Event()
    node.scripts = [[gate, *says("Paris.")]]
    config = NeuronConfig(
        admission=AdmissionConfig(max_in_flight=1), cache=CacheConfig("/nonexistent")
    )

    async def ask(client: Any, priority: int) -> None:
        headers = {"x-cortex-priority": str(priority)}
        body = {"model": MODEL, "prompt": "Hello"}
        async with client.post("/v1/completions", json=body, headers=headers) as response:
            assert response.status == 200

    async def waiting(client: Any) -> int:
        async with client.get("/health") as response:
            return int((await response.json())["models"][0]["queue_depth"])

    async with serving(node, config=config) as client, asyncio.TaskGroup() as tasks:
        tasks.create_task(ask(client, 0))
        await node.started.wait()
        for depth, priority in enumerate((-1, 0, 2), 1):
            tasks.create_task(ask(client, priority))
            while await waiting(client) < depth:
                pass
        gate.set()

    assert node.priorities == [0, 2, 0, -1]


async def test_a_device_is_restarted_with_or_without_a_body() -> None:
    node = FakeNode()

    async with serving(node) as client:
        async with client.post("/devices/0/restart") as response:
            assert response.status == 200
        async with client.post("/devices/0/restart", json={"force": True}) as response:
            assert response.status == 200

    assert node.acts == [("restart", (0, False)), ("restart", (0, True))]


async def test_a_busy_device_is_not_restarted() -> None:
    node = FakeNode()
    node.refusal = Conflict("2 requests run")

    status, body = await posted(node, "/devices/0/restart", {})

    assert (status, body["error"]["code"]) == (409, "conflict")


async def test_a_device_that_is_not_there_is_404() -> None:
    status, body = await posted(FakeNode(), "/devices/7/restart", {})

    assert (status, body["error"]["code"]) == (404, "not_found")


async def test_the_version_is_what_the_device_process_said() -> None:
    node = FakeNode()
    node.devices[0].hello = Hello(1, "cpu:0", 7, True, 1, "2.13.0+cpu", None)

    _, body = await got(node, "/version")

    assert body["torch_version"] == "2.13.0+cpu"
    assert body["package_version"]


async def test_text_and_conversations_are_tokenised_without_a_device() -> None:
    node = FakeNode(MODEL)

    _, plain = await posted(node, "/tokenize", {"model": MODEL, "prompt": "Hi"})
    messages = [{"role": "user", "content": "Hi"}]
    _, chat = await posted(node, "/tokenize", {"model": MODEL, "messages": messages})

    assert plain["count"] == len(plain["tokens"]) > 0
    assert chat["count"] > plain["count"]
    assert node.asked == []


async def test_a_model_on_the_disk_tokenises_too(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "m.gguf", TINY_LLAMA | metadata_of(trained("smollm"), "smollm"))

    status, body = await posted(FakeNode(), "/tokenize", {"model": f"file:{file}", "prompt": "Hi"})

    assert (status, body["count"] > 0) == (200, True)


async def test_files_without_a_tokeniser_do_not_tokenise(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"nonsense")
    body = {"model": f"file:{tmp_path / 'm.gguf'}", "prompt": "Hi"}

    status, answer = await posted(FakeNode(), "/tokenize", body)

    assert (status, answer["error"]["code"]) == (404, "model_not_found")


async def test_a_conversation_is_tokenised_as_a_chat_would_be() -> None:
    node = FakeNode(MODEL)
    chat = Chat(tiny_text().tokenizer, ChatTemplate(CHATML, {}), ChatOptions(tool_prompt="hermes"))
    node.models[MODEL].text = dataclasses.replace(tiny_text(), chat=chat)
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "Hi"}],
        "tools": [{"type": "function", "function": {"name": "look"}}],
        "tool_choice": "auto",
        "chat_template_kwargs": {"x": 1},
        "reasoning_effort": "low",
        "thinking": {"type": "disabled"},
    }

    _, counted = await posted(node, "/tokenize", body)
    await posted(node, "/v1/chat/completions", body)
    _, without_tools = await posted(node, "/tokenize", {**body, "tool_choice": "none"})

    assert counted["tokens"] == node.asked[0][1]
    assert counted["count"] > without_tools["count"]


async def test_a_conversation_may_be_tokenised_without_asking_for_an_answer() -> None:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}]}

    _, asking = await posted(FakeNode(MODEL), "/tokenize", body)
    _, silent = await posted(FakeNode(MODEL), "/tokenize", {**body, "add_generation_prompt": False})

    assert asking["tokens"][: silent["count"]] == silent["tokens"]
    assert asking["count"] > silent["count"]


async def test_token_ids_are_their_own_tokens() -> None:
    status, body = await posted(FakeNode(MODEL), "/tokenize", {"model": MODEL, "prompt": [5, 6]})

    assert (status, body) == (200, {"tokens": [5, 6], "count": 2})


@pytest.mark.parametrize("body", [{}, {"prompt": "a", "messages": []}])
async def test_tokenize_takes_one_of_messages_and_prompt(body: dict[str, Any]) -> None:
    status, _ = await posted(FakeNode(MODEL), "/tokenize", {"model": MODEL, **body})

    assert status == 400


async def test_a_path_that_is_not_there_is_404_in_the_envelope() -> None:
    status, body = await posted(FakeNode(), "/nowhere", {})

    assert (status, body["error"]["code"]) == (404, "not_found")


async def test_a_wrong_method_is_405_in_the_envelope() -> None:
    async with serving(FakeNode()) as client, client.get("/v1/chat/completions") as response:
        body = await response.json()

        assert (response.status, body["error"]["code"]) == (405, "method_not_allowed")
        assert response.headers["Allow"] == "POST"


async def test_a_body_over_32_mib_is_413_in_the_envelope() -> None:
    big = io.BytesIO(bytes(32 * 2**20 + 1))

    async with serving(FakeNode()) as client, client.post("/tokenize", data=big) as response:
        body = await response.json()

    assert (response.status, body["error"]["code"]) == (413, "body_too_large")


async def test_a_bug_does_not_leak_its_message() -> None:
    node = FakeNode()
    node.refusal = ZeroDivisionError("the secret")

    with capture_logs() as lines:
        status, body = await posted(node, "/models/unload", {"model_id": "a"})

    assert (status, body["error"]["message"]) == (500, "internal error")
    assert [line["event"] for line in lines if line["log_level"] == "error"] == ["request failed"]


async def test_a_request_id_is_echoed() -> None:
    given = {"x-request-id": "r-1"}

    async with serving(FakeNode()) as client, client.get("/nowhere", headers=given) as response:
        assert response.headers["x-request-id"] == "r-1"


@pytest.mark.parametrize("given", ["", "two words", "x" * 129, "ümlaut"])
async def test_an_unfit_request_id_is_replaced(given: str) -> None:
    headers = {"x-request-id": given}

    async with serving(FakeNode()) as client, client.get("/health", headers=headers) as response:
        assert len(response.headers["x-request-id"]) == 32


async def test_a_caller_that_stops_waiting_does_not_stop_the_load() -> None:
    node = FakeNode()
    node.load_may_end.clear()

    async with serving(node) as client:
        body = {"model_id": MODEL, "wait": True}
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await client.post("/models/load", json=body)

    assert isinstance(node.models[MODEL], FakeModel)
    assert [verb for verb, _ in node.acts] == ["load"]
