"""Every metric of the gateway, with its unit and its help; served on the metrics port.

Histograms have the names and buckets of the predecessor, so that its boards go on working. The
``model`` label is only ever a resolved id, ``unknown`` where nothing was resolved, so that a client
cannot make up series. Gauges are read from the fleet when somebody scrapes: what has vanished from
the fleet vanishes here.
"""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from cortex.gateway.fleet import Fleet

UNKNOWN = "unknown"
DURATION = (0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1200)
FIRST_TOKEN = (0.05, 0.1, 0.25, 0.5, 1, 2, 5, 10, 20, 30, 60, 120)
RATE = (1, 2.5, 5, 10, 15, 20, 30, 40, 60, 80, 120, 200)

MODEL_GAUGES = {
    "in_flight": "Requests running, as the node says",
    "queue_depth": "Requests queued, as the node says",
    "max_in_flight": "Requests the node runs at once",
    "max_queue_depth": "Requests the node queues",
    "tok_s_prefill": "Prompt tokens per second, as the node says",
    "tok_s_decode": "Generated tokens per second, as the node says",
}
DEVICE_GAUGES = {
    "vram_used_mb": "Memory in use, in MiB",
    "vram_free_mb": "Memory free, in MiB",
    "utilization_pct": "Utilisation, in percent",
    "temp_c": "Temperature, in degrees Celsius",
}


class Metrics:
    """The registry, and what the request path counts."""

    def __init__(self, fleet: Fleet) -> None:
        self.registry = CollectorRegistry()
        where = ("model", "node")
        self.requests = self._counter("requests", "Inference requests that ended", where)
        self.errors = self._counter(
            "request_errors", "Inference requests that failed, by cause", (*where, "code")
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
        self.registry.register(FleetGauges(fleet))

    def exposition(self) -> bytes:
        """Return everything, in Prometheus's text format."""
        return generate_latest(self.registry)

    def _counter(self, name: str, text: str, labels: Iterable[str]) -> Counter:
        return Counter(f"cortex_{name}", text, tuple(labels), registry=self.registry)

    def _histogram(
        self, name: str, text: str, labels: Iterable[str], buckets: tuple[float, ...]
    ) -> Histogram:
        return Histogram(
            f"cortex_{name}", text, tuple(labels), buckets=buckets, registry=self.registry
        )


class FleetGauges(Collector):
    """The fleet as gauges, read at the moment of the scrape."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    def collect(self) -> Iterable[GaugeMetricFamily]:
        """Yield one family a gauge."""
        nodes = self._fleet.snapshot().nodes
        healthy = GaugeMetricFamily("cortex_node_healthy", "1 while up", labels=["node"])
        for node in nodes:
            healthy.add_metric([node.name], float(node.is_healthy))
        yield healthy
        up = [(node.name, node.health) for node in nodes if node.is_healthy and node.health]
        for field, text in MODEL_GAUGES.items():
            family = GaugeMetricFamily(f"cortex_model_{field}", text, labels=["node", "model"])
            for name, health in up:
                for load in health.models:
                    family.add_metric([name, load.id], getattr(load, field))
            yield family
        for field, text in DEVICE_GAUGES.items():
            family = GaugeMetricFamily(f"cortex_device_{field}", text, labels=["node", "device"])
            for name, health in up:
                for device in health.devices:
                    value = getattr(device, field)
                    if value is not None:
                        family.add_metric([name, device.name], value)
            yield family
