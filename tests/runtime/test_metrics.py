"""Metrics in the names that dashboards for vLLM know, and never a label that a client chose."""

from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from cortex.ipc.node_api import DeviceHealth, Health, ModelLoad
from cortex.runtime.metrics import Metrics
from fake_node import FakeNode, serving


def samples(text: str) -> dict[tuple[str, str], float]:
    """Return the value of every sample by name and model (or device)."""
    return {
        (
            sample.name,
            sample.labels.get("model_name", sample.labels.get("device", "")),
        ): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def one_request(metrics: Metrics, **more: object) -> None:
    """Count an ordinary request."""
    fields: dict[str, object] = {
        "status": 200,
        "prompt_tokens": 10,
        "cached_tokens": 6,
        "completion_tokens": 5,
        "first_token_seconds": 0.2,
        "duration_seconds": 1.0,
        "finish_reason": "stop",
    }
    metrics.count("m", **(fields | more))  # type: ignore[arg-type]  # of the right types


def rendered(health: Health | None = None, **more: object) -> dict[tuple[str, str], float]:
    """Return what one request leaves behind."""
    metrics = Metrics(lambda: health or Health(0.0))
    one_request(metrics, **more)
    return samples(metrics.render().decode())


def test_a_request_is_counted_in_tokens_and_seconds() -> None:
    values = rendered()

    assert values["vllm:prompt_tokens_total", "m"] == 10
    assert values["vllm:prefix_cache_queries_total", "m"] == 10
    assert values["vllm:prefix_cache_hits_total", "m"] == 6
    assert values["vllm:generation_tokens_total", "m"] == 5
    assert values["vllm:time_to_first_token_seconds_sum", "m"] == 0.2
    assert values["vllm:e2e_request_latency_seconds_sum", "m"] == 1.0
    assert values["vllm:time_per_output_token_seconds_sum", "m"] == 0.2
    assert values["vllm:request_success_total", "m"] == 1


def test_a_request_without_a_token_has_no_time_to_one() -> None:
    values = rendered(first_token_seconds=None, status=503, finish_reason=None)

    assert ("vllm:time_to_first_token_seconds_count", "m") not in values
    assert values["neuron:requests_total", "m"] == 1


def test_a_request_that_broke_is_no_success_but_its_tokens_count() -> None:
    values = rendered(finish_reason=None, status=502, completion_tokens=1)

    assert ("vllm:request_success_total", "m") not in values
    assert values["vllm:generation_tokens_total", "m"] == 1


def test_states_are_read_when_asked() -> None:
    health = Health(
        0.0,
        devices=[
            DeviceHealth(
                0,
                "cpu:0",
                "ready",
                100,
                300,
                lifecycle_cycles=4,
                restarts_by_cause={"hung": 2},
                foreign_mb=7,
            )
        ],
        models=[
            ModelLoad(
                "m",
                in_flight=2,
                queue_depth=1,
                kv_total_tokens=1000,
                kv_free_tokens=250,
                running=3,
                waiting=4,
                preemptions=5,
                drafted_tokens=7,
                accepted_tokens=6,
            )
        ],
    )

    values = rendered(health)

    assert values["vllm:num_requests_running", "m"] == 2
    assert values["vllm:num_requests_waiting", "m"] == 1
    assert values["vllm:kv_cache_usage_perc", "m"] == 0.75
    assert values["vllm:num_preemptions_total", "m"] == 5
    assert values["vllm:spec_decode_num_draft_tokens_total", "m"] == 7
    assert values["vllm:spec_decode_num_accepted_tokens_total", "m"] == 6
    assert values["neuron:sequences_running", "m"] == 3
    assert values["neuron:sequences_waiting", "m"] == 4
    assert values["neuron:device_ready", "cpu:0"] == 1
    assert values["neuron:device_restarts_total", "cpu:0"] == 2
    assert values["neuron:device_memory_foreign_bytes", "cpu:0"] == 7 * 2**20
    assert values["neuron:device_lifecycle_cycles", "cpu:0"] == 4
    assert values["neuron:device_memory_used_bytes", "cpu:0"] == 100 * 2**20


async def test_two_apps_do_not_count_together() -> None:
    first, second = Metrics(lambda: Health(0.0)), Metrics(lambda: Health(0.0))

    one_request(first)

    assert ("vllm:prompt_tokens_total", "m") not in samples(second.render().decode())


@pytest.mark.parametrize(
    "more", [{"max_tokens": -1}, {"response_format": {"type": "xml"}}, {"model": 3}]
)
async def test_what_is_refused_before_its_model_is_known_is_counted(more: dict[str, Any]) -> None:
    body = {"model": "m", "messages": [{"role": "user", "content": "Hello"}], **more}
    async with serving(FakeNode("m")) as client:
        async with client.post("/v1/chat/completions", json=body) as response:
            assert response.status == 400
        async with client.get("/metrics") as response:
            text = await response.text()

    assert 'neuron:requests_total{model_name="",status="400"} 1.0' in text
    assert samples(text).keys() & {("vllm:prompt_tokens_total", "")} == set()


async def test_a_model_that_a_client_made_up_is_no_label() -> None:
    async with serving(FakeNode("m")) as client:
        for model in ("m", "made-up"):
            body = {"model": model, "prompt": "Hello"}
            async with client.post("/v1/completions", json=body) as response:
                await response.read()
        async with client.get("/metrics") as response:
            text = await response.text()
            assert response.content_type == "text/plain"

    assert samples(text)["vllm:request_success_total", "m"] == 1
    assert samples(text)["neuron:requests_total", ""] == 1
    assert "made-up" not in text
