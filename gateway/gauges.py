"""The fleet and the budgets as gauges, read at the moment of the scrape.

What has vanished, a node or a key, is not shown any more. Models have the names that clients say.
"""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from cortex.gateway.budgets import Budgets
from cortex.gateway.circuit_breaker import BreakerState
from cortex.gateway.fleet import Fleet, FleetSnapshot, Node
from cortex.gateway.written import Written

BREAKER_STATES: tuple[BreakerState, ...] = ("closed", "half_open", "open")
NODE_GAUGES = {
    "healthy": "1 while up",
    "drained": "1 while an operator has it drained",
    "breaker_state": "0 closed, 1 half-open, 2 open",
}
MODEL_GAUGES = {
    "in_flight": "Requests running, as the node says",
    "queue_depth": "Requests queued, as the node says",
    "max_in_flight": "Requests the node runs at once",
    "max_queue_depth": "Requests the node queues",
    "kv_budget_mb": "Memory of the KV cache, in MiB",
    "kv_available_mb": "The part of it that no running sequence holds, in MiB",
    "kv_total_tokens": "Tokens that the KV cache can hold",
    "kv_free_tokens": "The part of them that no running sequence holds",
    "running": "Sequences that the device computes",
    "waiting": "Sequences that wait there for memory",
    "tok_s_prefill": "Prompt tokens per second, as the node says",
    "tok_s_decode": "Generated tokens per second, as the node says",
}
MODEL_COUNTERS = {
    "preemptions": "Sequences that gave their memory back and were computed again",
    "drafted_tokens": "Tokens that speculation guessed",
    "accepted_tokens": "Those of them that were right",
}
DEVICE_GAUGES = {
    "vram_used_mb": "Memory in use, in MiB",
    "vram_free_mb": "Memory free, in MiB",
    "utilization_pct": "Utilisation, in percent",
    "temp_c": "Temperature, in degrees Celsius",
}
BUDGET_GAUGES = {
    "tokens": "Tokens that the key may spend, in its window or for good",
    "spent_tokens": "Tokens that count as spent now",
    "reserved_tokens": "Tokens kept for requests that run",
}


class FleetGauges(Collector):
    """Nodes, models, devices, and our requests there."""

    def __init__(self, fleet: Fleet, written: Written) -> None:
        self._fleet = fleet
        self._written = written

    def collect(self) -> Iterable[Metric]:
        """Yield one family a gauge."""
        snapshot = self._fleet.snapshot()
        up = [node for node in snapshot.nodes if node.is_healthy]
        yield from _of_nodes(snapshot)
        yield from self._of_models(up)
        yield self._loads(up)
        yield self._own(snapshot)
        yield from _of_devices(up)

    def _name(self, node_id: str) -> str:
        return self._written.catalogue.public_id(node_id)

    def _of_models(self, up: list[Node]) -> Iterable[Metric]:
        kinds = [(MODEL_GAUGES, GaugeMetricFamily), (MODEL_COUNTERS, CounterMetricFamily)]
        for fields, kind in kinds:
            for field, text in fields.items():
                family = kind(f"cortex_model_{field}", text, labels=["node", "model"])
                for node in up:
                    for load in node.health.models if node.health else []:
                        family.add_metric([node.name, self._name(load.id)], getattr(load, field))
                yield family

    def _loads(self, up: list[Node]) -> Metric:
        loading = GaugeMetricFamily(
            "cortex_model_loads_in_progress", "1 while it loads", labels=["node", "model"]
        )
        for node in up:
            activation = node.health.activation if node.health else None
            ids = {model.id for model in node.models if model.status == "loading"}
            if activation:
                ids |= {*activation.pending, *filter(None, [activation.in_progress])}
            for node_id in sorted(ids):
                loading.add_metric([node.name, self._name(node_id)], 1.0)
        return loading

    def _own(self, snapshot: FleetSnapshot) -> Metric:
        own = GaugeMetricFamily(
            "cortex_requests_in_flight", "Requests of ours that run", labels=["model", "node"]
        )
        for (node, node_id), count in snapshot.own.items():
            own.add_metric([self._name(node_id), node], count)
        return own


def _of_nodes(snapshot: FleetSnapshot) -> Iterable[Metric]:
    for field, text in NODE_GAUGES.items():
        family = GaugeMetricFamily(f"cortex_node_{field}", text, labels=["node"])
        for node in snapshot.nodes:
            value = {
                "healthy": node.is_healthy,
                "drained": node.is_drained,
                "breaker_state": BREAKER_STATES.index(node.breaker),
            }[field]
            family.add_metric([node.name], float(value))
        yield family


def _of_devices(up: list[Node]) -> Iterable[Metric]:
    for field, text in DEVICE_GAUGES.items():
        family = GaugeMetricFamily(f"cortex_device_{field}", text, labels=["node", "device"])
        for node in up:
            for device in node.health.devices if node.health else []:
                if (value := getattr(device, field)) is not None:
                    family.add_metric([node.name, device.name], value)
        yield family


class BudgetGauges(Collector):
    """The budgets of the keys that have one, and the requests of all keys."""

    def __init__(self, budgets: Budgets, written: Written) -> None:
        self._budgets = budgets
        self._written = written

    def collect(self) -> Iterable[Metric]:
        """Yield one family a gauge."""
        keys = self._written.config.entitlements.keys
        running = GaugeMetricFamily(
            "cortex_key_requests_in_flight", "Requests of the key that run", labels=["key"]
        )
        for key in keys:
            running.add_metric([key.id], self._budgets.in_flight(key.id))
        yield running
        told = {key.id: self._budgets.told(key.id, key.budget) for key in keys if key.budget}
        for field, text in BUDGET_GAUGES.items():
            family = GaugeMetricFamily(f"cortex_budget_{field}", text, labels=["key"])
            for key_id, values in told.items():
                family.add_metric([key_id], values[field])
            yield family
