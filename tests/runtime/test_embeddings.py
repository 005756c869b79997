"""``/v1/embeddings``: vectors in order, refusals that name the input, nothing left running."""

import asyncio
import base64
import math
from array import array
from typing import Any

import openai
import pytest
from structlog.testing import capture_logs

from cortex.ipc.errors import NodeFailed
from cortex.runtime.config import AdmissionConfig, CacheConfig, NeuronConfig
from cortex.runtime.embeddings import AT_ONCE
from cortex.runtime.routes import SERVICES
from cortex.runtime.served_model import Limits
from fake_node import FakeNode, FakeText, posting, serving, tiny_text
from fakes import until

PATH = "/v1/embeddings"


def node_of(pooling: str | None = "last") -> FakeNode:
    """Return a node with a model that makes vectors, [0.6, 0.8] unless told otherwise."""
    node = FakeNode("m")
    node.models["m"].text = FakeText(pooling=pooling)
    return node


async def asked(node: FakeNode, given: Any, **more: Any) -> tuple[int, Any]:
    """Return status and body of one request."""
    async with posting(node, PATH, {"model": "m", "input": given, **more}) as response:
        return response.status, await response.json()


async def test_one_text_is_one_vector() -> None:
    node = node_of()

    status, body = await asked(node, "hello")

    tokens = tiny_text().text_prompt("hello")
    assert status == 200
    assert body == {
        "object": "list",
        "model": "m",
        "data": [{"object": "embedding", "index": 0, "embedding": [*array("f", [0.6, 0.8])]}],
        "usage": {"prompt_tokens": len(tokens), "total_tokens": len(tokens)},
    }
    assert node.embedded == [("m", tokens, "last")]


@pytest.mark.parametrize("given", [["a", "b", "c"], [[1], [2, 2], [3]]])
async def test_vectors_come_in_the_order_of_the_inputs(given: list[Any]) -> None:
    node, side = node_of("mean"), tiny_text()
    firsts = [side.text_prompt(item)[0] if isinstance(item, str) else item[0] for item in given]
    node.vectors = {first: [float(at), 1.0] for at, first in enumerate(firsts)}

    _, body = await asked(node, given)

    assert [entry["embedding"][0] for entry in body["data"]] == [0.0, 1.0, 2.0]
    assert [entry["index"] for entry in body["data"]] == [0, 1, 2]
    assert {pooling for _, _, pooling in node.embedded} == {"mean"}


async def test_token_ids_are_one_input_and_go_as_they_are() -> None:
    node = node_of()

    _, body = await asked(node, [5, 6, 7])

    assert node.embedded == [("m", [5, 6, 7], "last")]
    assert body["usage"]["prompt_tokens"] == 3


async def test_a_vector_may_be_cut_and_is_then_of_length_one_again() -> None:
    node = node_of()
    node.vectors = {5: [0.1, 0.2, 0.3, 0.4]}

    _, body = await asked(node, [5], dimensions=2)

    cut = body["data"][0]["embedding"]
    assert math.hypot(*cut) == pytest.approx(1.0)
    assert cut[1] == pytest.approx(2 * cut[0])


async def test_a_part_that_is_nothing_stays_nothing() -> None:
    node = node_of()
    node.vectors = {5: [0.0, 1.0]}

    _, body = await asked(node, [5], dimensions=1)

    assert body["data"][0]["embedding"] == [0.0]


async def test_more_dimensions_than_there_are_are_refused() -> None:
    status, body = await asked(node_of(), "a", dimensions=3)

    assert (status, body["error"]["param"]) == (400, "dimensions")
    assert "2 dimensions" in body["error"]["message"]


async def test_base64_is_of_little_endian_floats() -> None:
    _, body = await asked(node_of(), "a", encoding_format="base64")

    raw = base64.b64decode(body["data"][0]["embedding"])
    assert raw == bytes.fromhex("9a99193f") + bytes.fromhex("cdcc4c3f")


async def test_the_sdk_reads_what_it_asks_for() -> None:
    async with (
        serving(node_of()) as server,
        openai.AsyncOpenAI(base_url=str(server.make_url("/v1")), api_key="none") as client,
    ):
        by_default = await client.embeddings.create(model="m", input=["a", "b"])
        as_floats = await client.embeddings.create(model="m", input="a", encoding_format="float")

    assert [entry.embedding for entry in by_default.data] == [pytest.approx([0.6, 0.8])] * 2
    assert as_floats.data[0].embedding == pytest.approx([0.6, 0.8])


@pytest.mark.parametrize(
    ("given", "param"),
    [("", "input"), (["a", ""], "input[1]"), ([[1], []], "input[1]"), ([10**6], "input")],
)
async def test_an_input_that_is_none_is_named(given: Any, param: str) -> None:
    node = node_of()

    status, body = await asked(node, given)

    assert (status, body["error"]["code"], body["error"]["param"]) == (
        400,
        "invalid_request",
        param,
    )
    assert node.embedded == []


async def test_an_input_over_the_context_is_named_before_anything_is_computed() -> None:
    node = node_of()
    node.models["m"].limits = Limits(4, 8, 64)

    status, body = await asked(node, [[1] * 4, [1] * 5])

    assert (status, body["error"]["code"]) == (400, "context_length_exceeded")
    assert body["error"]["param"] == "input[1]"
    assert "maximum context length is 4 tokens" in body["error"]["message"]
    assert node.embedded == []


async def test_an_input_that_can_never_fit_the_memory_is_413_with_the_numbers() -> None:
    node = node_of()
    node.models["m"].limits = Limits(512, 8, 64)

    status, body = await asked(node, [[1] * 64, [1] * 65])

    assert (status, body["error"]["code"]) == (413, "prompt_too_long_for_memory")
    assert (body["error"]["prompt_tokens"], body["error"]["cache_tokens"]) == (65, 64)
    assert body["error"]["param"] == "input[1]"
    assert node.embedded == []


async def test_a_model_that_does_not_say_how_makes_no_vectors() -> None:
    status, body = await asked(node_of(None), "a")

    assert (status, body["error"]["code"]) == (400, "unsupported_parameter")
    assert "makes no embeddings" in body["error"]["message"]


async def test_a_model_that_is_not_loaded_is_404() -> None:
    status, body = await asked(FakeNode(), "a")

    assert (status, body["error"]["code"]) == (404, "model_not_found")


async def test_a_few_inputs_run_at_a_time_and_hold_one_seat() -> None:
    node, gate = node_of(), asyncio.Event()
    count = AT_ONCE + 3
    node.vectors = dict.fromkeys(range(1, count + 1), gate)
    body = {"model": "m", "input": [[first] for first in range(1, count + 1)]}

    async with serving(node) as client, asyncio.TaskGroup() as tasks:
        asking = tasks.create_task(client.post(PATH, json=body))
        await until(lambda: len(node.embedding) == AT_ONCE)
        async with client.get("/health") as health:
            [load] = (await health.json())["models"]
        gate.set()
        response = await asking
        answer = await response.json()

    assert load["in_flight"] == 1
    assert len(answer["data"]) == count


async def test_one_that_fails_fails_the_request_and_ends_the_others() -> None:
    node = node_of()
    node.vectors = {1: asyncio.Event(), 2: NodeFailed("the device died")}

    status, body = await asked(node, [[1], [2]])

    assert (status, body["error"]["code"]) == (502, "node_failed")
    assert node.embedding == []


async def test_a_client_that_leaves_ends_what_runs_and_gives_the_seat_back() -> None:
    node = node_of()
    node.vectors = {1: asyncio.Event()}
    one_seat = NeuronConfig(
        admission=AdmissionConfig(max_in_flight=1, max_queue_depth=0),
        cache=CacheConfig("/nonexistent"),
    )

    async with serving(node, config=one_seat) as client:
        async with asyncio.TaskGroup() as tasks:
            asking = tasks.create_task(client.post(PATH, json={"model": "m", "input": [1]}))
            await node.started.wait()
            async with client.post(PATH, json={"model": "m", "input": [2]}) as refused:
                assert refused.status == 503
            asking.cancel()
        await until(lambda: node.embedding == [])
        async with client.post(PATH, json={"model": "m", "input": [2]}) as response:
            assert response.status == 200


async def test_a_neuron_that_drains_makes_no_vectors() -> None:
    async with serving(node_of()) as client:
        client.server.app[SERVICES].door.close()  # type: ignore[attr-defined] # BaseTestServer hides it
        async with client.post(PATH, json={"model": "m", "input": "a"}) as response:
            assert (response.status, response.headers["Retry-After"]) == (503, "15")


async def test_it_leaves_one_line_and_its_tokens_are_counted() -> None:
    with capture_logs() as lines:
        async with serving(node_of()) as client:
            async with client.post(PATH, json={"model": "m", "input": [1, 2, 3]}) as response:
                await response.read()
            async with client.get("/metrics") as metrics:
                text = await metrics.text()

    [finished] = [line for line in lines if line["event"] == "request finished"]
    assert (finished["model"], finished["status"], finished["prompt_tokens"]) == ("m", 200, 3)
    assert 'vllm:prompt_tokens_total{model_name="m"} 3.0' in text
