"""What is counted and logged about a request."""

import asyncio
import threading
from collections.abc import Iterable
from typing import Any

import aiohttp
import pytest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from cortex.gateway.app import Gateway
from cortex.gateway.catalogue import Catalogue, Profile
from cortex.gateway.config import Budget, Entitlements, Key
from cortex.gateway.metrics import Metrics
from cortex.gateway.usage import Meter, RequestRecord
from cortex.ipc.errors import Overloaded
from cortex.ipc.node_api import Activation
from cortex.ipc.openai_answers import PromptTokensDetails, Usage
from every_dialect import CHAT, EVERY_DIALECT
from fakes import FakeModel, FakeNeuron, gateway_config, until

BODY: dict[str, Any] = {"model": "qwen3-8b", "messages": [{"role": "user", "content": "x"}]}
STREAM = {**BODY, "stream": True}
HERE = {"model": "qwen3-8b", "node": "a"}
NOWHERE = {"model": "unknown", "node": ""}
SPENT = ("", "_prompt", "_completion")


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


class Watching(Collector):
    """Notes the thread that it is read by."""

    def __init__(self) -> None:
        self.threads: list[threading.Thread] = []

    def collect(self) -> Iterable[Metric]:
        self.threads.append(threading.current_thread())
        return ()


async def test_gauges_are_read_by_the_event_loop_and_the_rest_beside_it() -> None:
    gauges, rest = Watching(), Watching()
    metrics = Metrics(gauges)
    metrics.registry.register(rest)
    gauges.threads.clear()
    rest.threads.clear()

    text = (await metrics.exposition()).decode()

    assert gauges.threads == [threading.main_thread()]
    assert threading.main_thread() not in rest.threads
    assert len(rest.threads) == 1
    assert "cortex_event_loop_lag_seconds_bucket" in text


@pytest.mark.parametrize(("path", "body"), EVERY_DIALECT)
async def test_every_dialect_is_metered_alike(
    neuron: FakeNeuron, session: aiohttp.ClientSession, path: str, body: dict[str, Any]
) -> None:
    neuron.cached_tokens = 3
    embeds, streams = path == "/v1/embeddings", body.get("stream", False)

    async with Gateway(gateway_config(neuron)) as gateway:
        await ask(session, gateway, body, path)
        samples = await scrape(session, gateway)

    assert of(samples, "requests_total", **HERE) == 1
    assert of(samples, "prompt_tokens_total", **HERE) == 7
    assert of(samples, "completion_tokens_total", **HERE) == (0 if embeds else 2)
    assert of(samples, "cached_prompt_tokens_total", **HERE) == (0 if embeds else 3)
    assert of(samples, "request_duration_seconds_count", **HERE) == 1
    assert of(samples, "queue_seconds_count", **HERE) == 1
    assert of(samples, "time_to_first_token_seconds_count", **HERE) == (1 if streams else None)
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


@pytest.mark.parametrize(
    "delta",
    [
        b'{"content":"Hi"}',
        b'{"reasoning_content":"Hm"}',
        b'{"reasoning":"Hm"}',
        b'{"tool_calls":[{"index":0,"id":"c","type":"function","function":{"name":"f"}}]}',
    ],
)
def test_the_first_token_is_the_first_text_reasoning_or_call(delta: bytes) -> None:
    meter = Meter()

    meter.saw(b'data: {"choices":[{"delta":{"role":"assistant","content":""}}]}\n\n')
    assert meter.first_token_at is None
    meter.saw(b'data: {"choices":[{"delta":' + delta + b"}]}\n\n")

    assert meter.first_token_at is not None


@pytest.mark.parametrize("choices", [b"null", b"7", b"[null, 3]", b'{"a":1}'])
def test_choices_that_are_none_are_passed_over(choices: bytes) -> None:
    meter = Meter()

    meter.saw(b'data: {"choices":' + choices + b"}\n\ndata: [DONE]\n\n")
    meter.ended()

    assert (meter.first_token_at, meter.is_complete) == (None, True)


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
    turned_away = {key: n for key, n in samples.items() if "request_rejections_t" in key[0]}
    assert list(turned_away.values()) == [1]
    assert of(samples, "request_rejections_total", model="qwen3-8b", reason="overloaded") == 1


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


async def test_gauges_call_a_model_as_its_clients_do(
    neuron: FakeNeuron, session: aiohttp.ClientSession
) -> None:
    catalogue = Catalogue({"short": Profile("short", source="qwen3-8b")})
    neuron.may_finish.clear()

    async with Gateway(gateway_config(neuron), catalogue) as gateway:
        body = {**STREAM, "model": "short"}
        async with session.post(gateway.url + CHAT, json=body) as response:
            await response.content.readany()
            samples = await scrape(session, gateway)
            neuron.may_finish.set()
            await response.read()

    assert of(samples, "model_in_flight", model="short", node="a") == 0
    assert of(samples, "requests_in_flight", model="short", node="a") == 1


async def test_loads_in_progress_are_shown_while_they_last(
    neuron: FakeNeuron, session: aiohttp.ClientSession
) -> None:
    neuron.models["slow"] = FakeModel("slow", "loading")
    neuron.may_load.clear()
    neuron.activation = Activation("pre_warming", pending=["next"])

    async with Gateway(gateway_config(neuron)) as gateway:
        await gateway.poller.first_round()
        during = await scrape(session, gateway)
        neuron.activation = Activation()
        neuron.may_load.set()
        await until(lambda: not gateway.fleet.node("a").is_loading)
        after = await scrape(session, gateway)

    for model in ("slow", "next"):
        assert of(during, "model_loads_in_progress", model=model, node="a") == 1
        assert of(after, "model_loads_in_progress", model=model, node="a") is None


async def test_a_drained_node_and_an_open_breaker_are_shown(
    neuron: FakeNeuron, session: aiohttp.ClientSession
) -> None:
    async with Gateway(gateway_config(neuron)) as gateway:
        gateway.fleet.drained.add("a")
        samples = await scrape(session, gateway)

    assert of(samples, "node_drained", node="a") == 1
    assert of(samples, "node_breaker_state", node="a") == 0


async def test_what_a_key_spends_is_counted_and_its_budget_shown(
    neuron: FakeNeuron, session: aiohttp.ClientSession
) -> None:
    keys = (
        Key("sk-with-budget", "saver", budget=Budget(5000)),
        Key("sk-everything", "boss"),
    )
    neuron.may_finish.clear()

    async with Gateway(gateway_config(neuron, entitlements=Entitlements(keys=keys))) as gateway:
        headers = {"x-api-key": "sk-with-budget"}
        async with session.post(gateway.url + CHAT, json=STREAM, headers=headers) as response:
            await response.content.readany()
            during = await scrape(session, gateway)
            neuron.may_finish.set()
            await response.read()
        await ask(session, gateway, BODY)
        after = await scrape(session, gateway)

    assert (of(during, "budget_reserved_tokens", key="saver") or 0) > 4096
    assert of(during, "key_requests_in_flight", key="saver") == 1
    assert of(after, "budget_reserved_tokens", key="saver") == 0
    assert of(after, "budget_spent_tokens", key="saver") == 9
    assert of(after, "budget_tokens", key="saver") == 5000
    assert of(after, "budget_tokens", key="boss") is None
    assert of(after, "key_requests_in_flight", key="boss") == 0
    spent = [of(after, f"spend{of_what}_tokens_total", key="saver") for of_what in SPENT]
    assert spent == [9, 7, 2]
    assert sum("spend_tokens_total" in name for name, _ in after) == 1


async def test_the_lag_of_the_event_loop_is_measured(
    neuron: FakeNeuron, session: aiohttp.ClientSession
) -> None:
    async with Gateway(gateway_config(neuron)) as gateway:
        gateway.metrics.loop_lag.observe(0.02)
        samples = await scrape(session, gateway)

    assert (of(samples, "event_loop_lag_seconds_bucket", le="0.025") or 0) >= 1


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
    neuron.cached_tokens = 3
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
    assert line["duration_seconds"] >= line["first_token_seconds"] >= line["queue_seconds"] > 0
    assert (line["path"], line["cached_tokens"], line["retries"]) == (CHAT, 3, 0)
    assert line["reason"] == response.headers["x-cortex-reason"]
    assert (line["finish_reason"], line["key"], line["code"]) == ("stop", "boss", None)


async def test_the_line_tells_of_other_replicas_that_were_asked(
    session: aiohttp.ClientSession, logged: list[dict[str, Any]]
) -> None:
    async with (
        FakeNeuron(["qwen3-8b"], "a") as a,
        FakeNeuron(["qwen3-8b"], "b") as b,
        Gateway(gateway_config(a, b)) as gateway,
    ):
        a.refuses = Overloaded("full")
        await ask(session, gateway, BODY)
        samples = await scrape(session, gateway)

    (line,) = [entry for entry in logged if entry["event"] == "request finished"]
    assert (line["node"], line["reason"], line["retries"]) == ("b", "retried", 1)
    assert of(samples, "request_retries_total", **HERE, code="overloaded") == 1


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


def gone(*chunks: bytes) -> RequestRecord:
    record = RequestRecord(CHAT, None)
    record.body_bytes = 400
    for chunk in chunks:
        record.meter.saw(chunk)
    record.client_gone()
    return record


TEXT = b'data: {"choices": [{"delta": {"content": "a"}}]}\n\n'


def test_a_client_that_leaves_after_the_usage_costs_what_the_node_said() -> None:
    cost = b': usage {"prompt_tokens": 5, "completion_tokens": 1, "total_tokens": 6}\n\n'

    assert gone(TEXT, cost).usage() == Usage(5, 1, 6)


def test_a_client_that_leaves_before_it_costs_its_prompt_about_and_what_came() -> None:
    assert gone(TEXT, TEXT, b": keep-alive\n\n", TEXT + TEXT).usage() == Usage(100, 4, 104)


@pytest.mark.parametrize("came", [(), (b'data: {"choices": [{"delta": {"role": "x"}}]}\n\n',)])
def test_a_client_that_leaves_before_the_first_text_costs_its_prompt_about(
    came: tuple[bytes, ...],
) -> None:
    assert gone(*came).usage() == Usage(100, 0, 100)


def test_a_client_that_leaves_before_any_node_is_asked_costs_nothing() -> None:
    record = RequestRecord(CHAT, None)
    record.client_gone()

    assert record.usage() is None


def test_a_client_that_leaves_after_its_node_has_failed_costs_nothing() -> None:
    record = RequestRecord(CHAT, None)
    record.body_bytes = 400
    record.node_failed()
    record.client_gone()

    assert record.usage() is None


def test_an_answer_without_usage_and_text_costs_nothing() -> None:
    record = RequestRecord(CHAT, None)
    record.body_bytes = 400

    assert record.usage() is None


def test_a_rate_needs_more_than_one_token() -> None:
    meter = Meter()
    meter.saw(b'data: {"choices": [{"delta": {"content": "a"}}]}\n\n: usage {"prompt_tokens": 1,')
    meter.saw(b' "completion_tokens": 1, "total_tokens": 2}\n\ndata: [DONE]\n\n')
    meter.ended()

    assert meter.usage is not None
    assert meter.tokens_per_second() is None


@pytest.mark.parametrize("prompt_tokens", ['"many"', "-5", str(2**62), str(2**70), "null"])
def test_usage_that_makes_no_sense_is_left_out(prompt_tokens: str) -> None:
    meter = Meter()
    meter.saw(f': usage {{"prompt_tokens": {prompt_tokens}}}\n\n'.encode())
    meter.ended()

    assert meter.usage is None


@pytest.mark.parametrize(
    ("said", "usage"),
    [
        ('{"prompt_tokens": 5, "completion_tokens": 2}', Usage(5, 2, 7)),
        ('{"prompt_tokens": 5, "total_tokens": 5}', Usage(5, 0, 5)),
        (
            '{"prompt_tokens": 5, "completion_tokens": 2, "prompt_tokens_details": null}',
            Usage(5, 2, 7),
        ),
        (
            '{"prompt_tokens": 5, "prompt_tokens_details": {"cached_tokens": 3}}',
            Usage(5, 0, 5, PromptTokensDetails(3)),
        ),
        (
            '{"prompt_tokens": 5, "prompt_tokens_details": {"audio_tokens": 0}}',
            Usage(5, 0, 5, PromptTokensDetails(0)),
        ),
        (
            '{"prompt_tokens": 5, "prompt_tokens_details": {"cached_tokens": null}}',
            Usage(5, 0, 5, PromptTokensDetails(0)),
        ),
    ],
)
def test_usage_counts_whatever_else_a_server_leaves_out(said: str, usage: Usage) -> None:
    meter = Meter()
    meter.saw(f": usage {said}\n\n".encode())
    meter.ended()

    assert meter.usage == usage


def test_a_long_stream_is_judged_by_its_tail() -> None:
    meter = Meter()
    for _ in range(1000):
        meter.saw(b'data: {"choices": [{"delta": {"content": "a long word"}}]}\n\n')
    meter.saw(b'data: {"choices": [{"delta": {}, "finish_reason": "length"}]}\n\ndata: [DONE]\n\n')
    meter.ended()

    assert (meter.is_complete, meter.finish_reason) == (True, "length")
