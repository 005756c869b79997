"""What is counted and logged about a request."""

import asyncio
from typing import Any

import aiohttp
import pytest
from prometheus_client.parser import text_string_to_metric_families

from cortex.gateway.app import Gateway
from cortex.gateway.catalogue import Catalogue
from cortex.gateway.config import Entitlements, Key
from cortex.gateway.usage import Meter
from cortex.ipc.errors import Overloaded
from fakes import FakeNeuron, gateway_config, until

CHAT = "/v1/chat/completions"
BODY: dict[str, Any] = {"model": "qwen3-8b", "messages": [{"role": "user", "content": "x"}]}
STREAM = {**BODY, "stream": True}
HERE = {"model": "qwen3-8b", "node": "a"}
NOWHERE = {"model": "unknown", "node": ""}


async def scrape(session: aiohttp.ClientSession, gateway: Gateway) -> dict[Any, float]:
    """Return every sample by name and labels."""
    async with session.get(f"{gateway.metrics_url}/metrics") as response:
        assert response.content_type == "text/plain"
        families = text_string_to_metric_families(await response.text())
        return {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in families
            for sample in family.samples
        }


def of(samples: dict[Any, float], name: str, **labels: str) -> float | None:
    return samples.get((f"cortex_{name}", frozenset(labels.items())))


async def ask(
    session: aiohttp.ClientSession, gateway: Gateway, body: dict[str, Any], path: str = CHAT
) -> None:
    async with session.post(gateway.url + path, json=body) as response:
        await response.read()


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, BODY),
        (CHAT, STREAM),
        ("/v1/completions", STREAM),
        ("/v1/messages", {**BODY, "max_tokens": 9}),
        ("/v1/messages", {**STREAM, "max_tokens": 9}),
    ],
)
async def test_tokens_of_every_dialect_are_counted(
    neuron: FakeNeuron, session: aiohttp.ClientSession, path: str, body: dict[str, Any]
) -> None:
    neuron.cached_tokens = 3

    async with Gateway(gateway_config(neuron)) as gateway:
        await ask(session, gateway, body, path)
        samples = await scrape(session, gateway)

    assert of(samples, "requests_total", **HERE) == 1
    assert of(samples, "prompt_tokens_total", **HERE) == 7
    assert of(samples, "completion_tokens_total", **HERE) == 2
    assert of(samples, "cached_prompt_tokens_total", **HERE) == 3
    assert of(samples, "request_duration_seconds_count", **HERE) == 1
    assert of(samples, "request_errors_total", **HERE) is None


async def test_the_duration_runs_to_the_last_byte_and_the_first_token_is_text(
    neuron: FakeNeuron, session: aiohttp.ClientSession
) -> None:
    neuron.may_finish.clear()

    async with Gateway(gateway_config(neuron)) as gateway:
        async with session.post(gateway.url + CHAT, json=STREAM) as response:
            await response.content.readany()
            await asyncio.sleep(0.15)  # what is measured is time itself
            neuron.may_finish.set()
            await response.read()
        samples = await scrape(session, gateway)

    duration = of(samples, "request_duration_seconds_sum", **HERE)
    first = of(samples, "time_to_first_token_seconds_sum", **HERE)
    assert duration is not None
    assert first is not None
    assert duration - first >= 0.15
    assert of(samples, "tokens_per_second_count", **HERE) == 1


async def test_embeddings_count_the_tokens_of_their_prompts(
    neuron: FakeNeuron, session: aiohttp.ClientSession
) -> None:
    async with Gateway(gateway_config(neuron)) as gateway:
        await ask(session, gateway, {"model": "qwen3-8b", "input": "x"}, "/v1/embeddings")
        samples = await scrape(session, gateway)

    assert of(samples, "prompt_tokens_total", **HERE) == 7
    assert of(samples, "completion_tokens_total", **HERE) == 0
    assert of(samples, "requests_total", **HERE) == 1


@pytest.mark.parametrize(
    "delta",
    [
        b'{"content":"Hi"}',
        b'{"reasoning_content":"Hm"}',
        b'{"tool_calls":[{"index":0,"id":"c","type":"function","function":{"name":"f"}}]}',
    ],
)
def test_the_first_token_is_the_first_text_reasoning_or_call(delta: bytes) -> None:
    meter = Meter()

    meter.saw(b'data: {"choices":[{"delta":{"role":"assistant","content":""}}]}\n\n')
    assert meter.first_token_at is None
    meter.saw(b'data: {"choices":[{"delta":' + delta + b"}]}\n\n")

    assert meter.first_token_at is not None


def test_an_answer_that_is_no_object_has_nothing_to_measure() -> None:
    for body in (b"", b"[]", b"{", b"nothing"):
        meter = Meter()
        meter.saw_answer(body)
        assert (meter.usage, meter.error, meter.is_complete) == (None, None, True)


async def test_an_answer_that_comes_whole_has_no_first_token(
    neuron: FakeNeuron, session: aiohttp.ClientSession
) -> None:
    async with Gateway(gateway_config(neuron)) as gateway:
        await ask(session, gateway, BODY)
        samples = await scrape(session, gateway)

    assert of(samples, "time_to_first_token_seconds_count", **HERE) is None


async def test_errors_are_counted_by_their_cause(
    neuron: FakeNeuron, session: aiohttp.ClientSession
) -> None:
    async with Gateway(gateway_config(neuron)) as gateway:
        neuron.refuses = Overloaded("full")
        await ask(session, gateway, BODY)
        neuron.refuses = None
        neuron.fails_after_tokens = 1
        await ask(session, gateway, STREAM)
        samples = await scrape(session, gateway)

    assert of(samples, "request_errors_total", **HERE, code="overloaded") == 1
    assert of(samples, "request_errors_total", **HERE, code="node_failed") == 1


async def test_a_client_cannot_make_up_labels(
    neuron: FakeNeuron, session: aiohttp.ClientSession
) -> None:
    async with Gateway(gateway_config(neuron)) as gateway:
        for model in ("made-up", 3):
            await ask(session, gateway, {**BODY, "model": model})
        samples = await scrape(session, gateway)

    assert of(samples, "requests_total", **NOWHERE) == 2
    assert of(samples, "request_errors_total", **NOWHERE, code="model_not_found") == 1
    assert of(samples, "request_errors_total", **NOWHERE, code="missing_model_field") == 1


async def test_a_node_cannot_make_up_labels(
    neuron: FakeNeuron, session: aiohttp.ClientSession
) -> None:
    neuron.refuses = Overloaded("full")
    neuron.refuses.code = "mood-17"

    async with Gateway(gateway_config(neuron)) as gateway:
        await ask(session, gateway, BODY)
        samples = await scrape(session, gateway)

    assert of(samples, "request_errors_total", **HERE, code="unknown") == 1


async def test_an_alias_is_counted_as_its_model(
    neuron: FakeNeuron, session: aiohttp.ClientSession
) -> None:
    catalogue = Catalogue({}, {"nick": "qwen3-8b"})

    async with Gateway(gateway_config(neuron), catalogue) as gateway:
        await ask(session, gateway, {**BODY, "model": "nick"})
        samples = await scrape(session, gateway)

    assert of(samples, "requests_total", **HERE) == 1


async def test_cold_starts_are_counted(session: aiohttp.ClientSession) -> None:
    async with FakeNeuron() as a, Gateway(gateway_config(a)) as gateway:
        await ask(session, gateway, {**BODY, "model": "smollm2-135m-instruct"})
        samples = await scrape(session, gateway)

    assert of(samples, "cold_starts_total", model="smollm2-135m-instruct", node="a") == 1


async def test_gauges_mirror_the_fleet_and_vanish_with_it(
    neuron: FakeNeuron, session: aiohttp.ClientSession
) -> None:
    neuron.models["qwen3-8b"].in_flight = 3

    async with Gateway(gateway_config(neuron)) as gateway:
        await gateway.poller.first_round()
        before = await scrape(session, gateway)
        neuron.is_out_of_order = True
        await until(lambda: not gateway.fleet.node("a").is_healthy)
        after = await scrape(session, gateway)

    assert of(before, "model_in_flight", **HERE) == 3
    assert of(before, "device_vram_free_mb", node="a", device="cpu:0") == 1000
    assert of(before, "device_temp_c", node="a", device="cpu:0") is None
    assert [of(samples, "node_healthy", node="a") for samples in (before, after)] == [1, 0]
    assert of(after, "model_in_flight", **HERE) is None


async def test_metrics_are_not_on_the_main_port(
    neuron: FakeNeuron, session: aiohttp.ClientSession
) -> None:
    async with (
        Gateway(gateway_config(neuron)) as gateway,
        session.get(f"{gateway.url}/metrics") as response,
    ):
        assert response.status == 404


async def test_every_request_ends_in_one_canonical_line(
    neuron: FakeNeuron, session: aiohttp.ClientSession, logged: list[dict[str, Any]]
) -> None:
    doors = Entitlements(keys=(Key("sk-everything", "boss"),))
    headers = {"x-request-id": "r1", "x-api-key": "sk-everything"}

    async with (
        Gateway(gateway_config(neuron, entitlements=doors)) as gateway,
        session.post(gateway.url + CHAT, json=STREAM, headers=headers) as response,
    ):
        await response.read()

    (line,) = [entry for entry in logged if entry["event"] == "request finished"]
    assert line["request_id"] == "r1"
    assert (line["model"], line["node"], line["status"]) == ("qwen3-8b", "a", 200)
    assert (line["prompt_tokens"], line["completion_tokens"]) == (7, 2)
    assert line["duration_seconds"] >= line["first_token_seconds"] > 0
    assert (line["finish_reason"], line["key"], line["code"]) == ("stop", "boss", None)


async def test_a_refused_request_has_its_line_too(
    neuron: FakeNeuron, session: aiohttp.ClientSession, logged: list[dict[str, Any]]
) -> None:
    neuron.refuses = Overloaded("full")

    async with Gateway(gateway_config(neuron)) as gateway:
        await ask(session, gateway, {**BODY, "max_tokens": 9}, "/v1/messages")

    (line,) = [entry for entry in logged if entry["event"] == "request finished"]
    assert (line["status"], line["code"]) == (529, "overloaded")


async def test_a_client_that_left_is_logged_as_gone(
    neuron: FakeNeuron, session: aiohttp.ClientSession, logged: list[dict[str, Any]]
) -> None:
    neuron.may_finish.clear()

    async with Gateway(gateway_config(neuron)) as gateway:
        response = await session.post(gateway.url + CHAT, json=STREAM)
        response.close()
        await until(lambda: any(entry["event"] == "request finished" for entry in logged))

    (line,) = [entry for entry in logged if entry["event"] == "request finished"]
    assert (line["status"], line["code"]) == (499, "client_gone")


def test_a_rate_needs_more_than_one_token() -> None:
    meter = Meter()
    meter.saw(b'data: {"choices": [{"delta": {"content": "a"}}]}\n\n: usage {"prompt_tokens": 1,')
    meter.saw(b' "completion_tokens": 1, "total_tokens": 2}\n\ndata: [DONE]\n\n')
    meter.ended()

    assert meter.usage is not None
    assert meter.tokens_per_second() is None


def test_usage_that_makes_no_sense_is_left_out() -> None:
    meter = Meter()
    meter.saw(b': usage {"prompt_tokens": "many"}\n\n')
    meter.ended()

    assert meter.usage is None


def test_a_long_stream_is_judged_by_its_tail() -> None:
    meter = Meter()
    for _ in range(1000):
        meter.saw(b'data: {"choices": [{"delta": {"content": "a long word"}}]}\n\n')
    meter.saw(b'data: {"choices": [{"delta": {}, "finish_reason": "length"}]}\n\ndata: [DONE]\n\n')
    meter.ended()

    assert (meter.is_complete, meter.finish_reason) == (True, "length")
