"""Every metric of the gateway, with its unit and its help; served on the metrics port.

Histograms have the names and buckets of the predecessor, so that its boards go on working. The
``model`` label is only ever a resolved id, ``unknown`` where nothing was resolved, so that a client
cannot make up series; ``key`` is the id that the operator gave it. Gauges are in ``gauges.py``.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from functools import cache
from typing import TypeVar

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.registry import Collector

UNKNOWN = "unknown"
DURATION = (0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1200)
FIRST_TOKEN = (0.05, 0.1, 0.25, 0.5, 1, 2, 5, 10, 20, 30, 60, 120)
RATE = (1, 2.5, 5, 10, 15, 20, 30, 40, 60, 80, 120, 200)

LAG = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)


M = TypeVar("M", Counter, Histogram)


def _series(metric: M, *labels: str) -> M:
    return metric.labels(*labels)


class Metrics:
    """The registry, and what the request path counts."""

    def __init__(self, *gauges: Collector) -> None:
        self.registry = CollectorRegistry()
        self._gauges = CollectorRegistry()
        self.counter: Callable[..., Counter] = cache(_series)
        """The series of a metric with some labels; found in a tenth of what ``labels`` takes."""
        self.histogram: Callable[..., Histogram] = cache(_series)
        where = ("model", "node")
        self.requests = self._counter("requests", "Inference requests that ended", where)
        self.errors = self._counter(
            "request_errors", "Inference requests that failed, by cause", (*where, "code")
        )
        self.rejections = self._counter(
            "request_rejections",
            "Inference requests turned away: no room, no budget, no model now",
            ("model", "reason"),
        )
        self.cold_starts = self._counter("cold_starts", "Loads started for a request", where)
        self.prompt_tokens = self._counter("prompt_tokens", "Tokens of prompts", where)
        self.completion_tokens = self._counter("completion_tokens", "Tokens generated", where)
        self.cached_prompt_tokens = self._counter(
            "cached_prompt_tokens", "Tokens of prompts found in a prefix cache", where
        )
        self.duration = self._histogram(
            "request_duration_seconds", "Arrival to last byte", where, DURATION
        )
        self.first_token = self._histogram(
            "time_to_first_token_seconds",
            "Arrival to the first chunk of a stream with text in it",
            where,
            FIRST_TOKEN,
        )
        self.rate = self._histogram(
            "tokens_per_second", "Tokens of a stream after its first, per second", where, RATE
        )
        self.queue = self._histogram(
            "queue_seconds", "Arrival to the moment the first node is asked", where, FIRST_TOKEN
        )
        self.load_seconds = self._histogram(
            "model_load_seconds", "Loads that ended well, from the order on", where, DURATION
        )
        self.failed_loads = self._counter(
            "model_load_errors", "Loads that failed, by cause", (*where, "code")
        )
        self.evictions = self._counter(
            "evictions", "Models unloaded: displaced, idle, asked or drained", (*where, "reason")
        )
        self.retries = self._counter(
            "request_retries", "Requests that went on to another replica", (*where, "code")
        )
        self.affinity = self._counter(
            "affinity", "Sessions that had a choice of replicas: home or away", ("model", "outcome")
        )
        self.spend = self._counter("spend_tokens", "Tokens that the key has used", ("key",))
        self.spend_prompt = self._counter(
            "spend_prompt_tokens", "Tokens of the key's prompts", ("key",)
        )
        self.spend_completion = self._counter(
            "spend_completion_tokens", "Tokens generated for the key", ("key",)
        )
        self.loop_lag = self._histogram(
            "event_loop_lag_seconds", "How much too late the event loop wakes a task", (), LAG
        )
        for collector in gauges:
            self._gauges.register(collector)

    async def exposition(self) -> bytes:
        """Return everything, in Prometheus's text format.

        Histograms are most of it, and locked: a thread writes them down, so that streams go on.
        """
        gauges = generate_latest(self._gauges)  # what they read is the event loop's
        return await asyncio.to_thread(generate_latest, self.registry) + gauges

    def _counter(self, name: str, text: str, labels: Iterable[str]) -> Counter:
        return Counter(f"cortex_{name}", text, tuple(labels), registry=self.registry)

    def _histogram(
        self, name: str, text: str, labels: Iterable[str], buckets: tuple[float, ...]
    ) -> Histogram:
        return Histogram(
            f"cortex_{name}", text, tuple(labels), buckets=buckets, registry=self.registry
        )
