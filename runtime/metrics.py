"""Every metric of a neuron, in the names that dashboards for vLLM know.

Each app has a registry of its own. What is counted is counted here; what is a state (requests
running, devices) is read when Prometheus asks, so nothing of a model that is gone remains. A
``model_name`` is only ever the id of a model that is loaded, and empty for a request that names
none: clients cannot invent series.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from http import HTTPStatus

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from cortex.ipc.node_api import Health

MIB = 2**20
SECONDS_TO_FIRST = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
SECONDS_PER_TOKEN = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
SECONDS_IN_ALL = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
TOKENS = (
    *(1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000),
    *(100_000, 200_000),
)


class Metrics:
    """The registry of one app; *health* is asked for the states at every scrape."""

    def __init__(self, health: Callable[[], Health]) -> None:
        self.registry = CollectorRegistry()
        model = ["model_name"]
        self._first_token_seconds = Histogram(
            "vllm:time_to_first_token_seconds",
            "From the request's arrival to its first token.",
            model,
            registry=self.registry,
            buckets=SECONDS_TO_FIRST,
        )
        self._token_seconds = Histogram(
            "vllm:time_per_output_token_seconds",
            "Mean time between two tokens of one request.",
            model,
            registry=self.registry,
            buckets=SECONDS_PER_TOKEN,
        )
        self._seconds = Histogram(
            "vllm:e2e_request_latency_seconds",
            "From the request's arrival to its end.",
            model,
            registry=self.registry,
            buckets=SECONDS_IN_ALL,
        )
        self._prompt_tokens_of_one = Histogram(
            "vllm:request_prompt_tokens",
            "Prompt tokens of one request.",
            model,
            registry=self.registry,
            buckets=TOKENS,
        )
        self._generated_of_one = Histogram(
            "vllm:request_generation_tokens",
            "Generated tokens of one request.",
            model,
            registry=self.registry,
            buckets=TOKENS,
        )
        self._prompt_tokens = Counter(
            "vllm:prompt_tokens", "Prompt tokens processed.", model, registry=self.registry
        )
        self._prefix_queries = Counter(
            "vllm:prefix_cache_queries",
            "Prompt tokens that were looked for in the prefix cache.",
            model,
            registry=self.registry,
        )
        self._prefix_hits = Counter(
            "vllm:prefix_cache_hits",
            "Prompt tokens that were found there, and so not computed again.",
            model,
            registry=self.registry,
        )
        self._generated = Counter(
            "vllm:generation_tokens", "Tokens generated.", model, registry=self.registry
        )
        self._successes = Counter(
            "vllm:request_success",
            "Requests that were answered whole.",
            [*model, "finished_reason"],
            registry=self.registry,
        )
        self._requests = Counter(
            "neuron:requests",
            "Inference requests by status; 499 is a client that left.",
            [*model, "status"],
            registry=self.registry,
        )
        self.registry.register(_States(health))

    def render(self) -> bytes:
        """Return the text that Prometheus scrapes."""
        return generate_latest(self.registry)

    def count(
        self,
        model: str | None,
        *,
        status: int,
        prompt_tokens: int,
        cached_tokens: int,
        completion_tokens: int,
        first_token_seconds: float | None,
        duration_seconds: float,
        finish_reason: str | None,
    ) -> None:
        """Count one request that has ended, of a model that is loaded, or refused before that.

        Embeddings have no first token, but their prompts were processed.
        """
        self._requests.labels(model or "", str(status)).inc()
        if model is None:
            return
        if first_token_seconds is None:
            self._prompt_tokens.labels(model).inc(prompt_tokens if status == HTTPStatus.OK else 0)
            return
        self._first_token_seconds.labels(model).observe(first_token_seconds)
        self._prompt_tokens.labels(model).inc(prompt_tokens)
        self._prefix_queries.labels(model).inc(prompt_tokens)
        self._prefix_hits.labels(model).inc(cached_tokens)
        self._generated.labels(model).inc(completion_tokens)
        if completion_tokens > 1:
            between = (duration_seconds - first_token_seconds) / (completion_tokens - 1)
            self._token_seconds.labels(model).observe(between)
        if finish_reason is not None:
            self._seconds.labels(model).observe(duration_seconds)
            self._prompt_tokens_of_one.labels(model).observe(prompt_tokens)
            self._generated_of_one.labels(model).observe(completion_tokens)
            self._successes.labels(model, finish_reason).inc()


class _States:
    """What is true now, as gauges."""

    def __init__(self, health: Callable[[], Health]) -> None:
        self._health = health

    def describe(self) -> list[Metric]:
        """Nothing, so that registering does not collect."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Yield the gauges of models and devices."""
        health = self._health()
        models = {
            "vllm:num_requests_running": ("Requests that hold a seat.", "in_flight"),
            "vllm:num_requests_waiting": ("Requests that wait for a seat.", "queue_depth"),
            "neuron:sequences_running": ("Sequences that the device computes.", "running"),
            "neuron:sequences_waiting": ("Sequences that wait there for memory.", "waiting"),
            "neuron:max_in_flight": ("Seats.", "max_in_flight"),
            "neuron:prefill_tokens_per_second": ("Recent mean.", "tok_s_prefill"),
            "neuron:decode_tokens_per_second": ("Recent mean of one request.", "tok_s_decode"),
        }
        for name, (text, attribute) in models.items():
            gauge = GaugeMetricFamily(name, text, labels=["model_name"])
            for model in health.models:
                gauge.add_metric([model.id], getattr(model, attribute))
            yield gauge
        yield _cache_usage(health)
        yield from _counted_since_load(health)
        yield from _devices(health)


def _cache_usage(health: Health) -> Metric:
    usage = GaugeMetricFamily(
        "vllm:kv_cache_usage_perc",
        "Part of the KV cache that sequences hold; 1 is all.",
        labels=["model_name"],
    )
    for model in health.models:
        if model.kv_total_tokens:
            usage.add_metric([model.id], 1 - model.kv_free_tokens / model.kv_total_tokens)
    return usage


def _counted_since_load(health: Health) -> Iterator[Metric]:
    counters = {
        "vllm:num_preemptions": (
            "Sequences that gave their memory back and were computed again.",
            "preemptions",
        ),
        "vllm:spec_decode_num_draft_tokens": ("Tokens that were guessed.", "drafted_tokens"),
        "vllm:spec_decode_num_accepted_tokens": ("Guesses that were right.", "accepted_tokens"),
    }
    for name, (text, attribute) in counters.items():
        counter = CounterMetricFamily(name, f"{text} Since the load.", labels=["model_name"])
        for model in health.models:
            counter.add_metric([model.id], getattr(model, attribute))
        yield counter


def _devices(health: Health) -> Iterator[Metric]:
    ready = GaugeMetricFamily("neuron:device_ready", "1 while it serves.", labels=["device"])
    cycles = GaugeMetricFamily(
        "neuron:device_lifecycle_cycles",
        "Models unloaded by its process so far.",
        labels=["device"],
    )
    restarts = CounterMetricFamily(
        "neuron:device_restarts",
        "Lives of its process that have ended since the start, by cause.",
        labels=["device", "cause"],
    )
    foreign = GaugeMetricFamily(
        "neuron:device_memory_foreign_bytes", "Held by other processes.", labels=["device"]
    )
    used = GaugeMetricFamily("neuron:device_memory_used_bytes", "In use.", labels=["device"])
    free = GaugeMetricFamily("neuron:device_memory_free_bytes", "Free.", labels=["device"])
    for device in health.devices:
        ready.add_metric([device.name], float(device.state == "ready"))
        cycles.add_metric([device.name], device.lifecycle_cycles)
        for cause, number in device.restarts_by_cause.items():
            restarts.add_metric([device.name, cause], number)
        if device.foreign_mb is not None:
            foreign.add_metric([device.name], device.foreign_mb * MIB)
        if device.vram_used_mb is not None:
            used.add_metric([device.name], device.vram_used_mb * MIB)
        if device.vram_free_mb is not None:
            free.add_metric([device.name], device.vram_free_mb * MIB)
    yield from (ready, cycles, restarts, foreign, used, free)
