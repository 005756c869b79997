"""What each loaded model has to do right now, and how fast it has been lately.

Rates        moving means of prefill and decode speed, per request
Traffic      one model's seats, rates, and what its device says of the KV cache
Traffics     that of every model; a model that was loaded anew begins anew
"""

from __future__ import annotations

from cortex.ipc.node_api import ModelLoad
from cortex.runtime.admission import Admission, CacheRoom, Seats
from cortex.runtime.config import AdmissionConfig
from cortex.runtime.node import ModelView

MIB = 2**20
WEIGHT_OF_NEW = 0.2


class Rates:
    """Tokens per second, as exponential moving means over requests; 0 before the first."""

    def __init__(self) -> None:
        self.prefill = 0.0
        self.decode = 0.0

    def prefilled(self, tokens: int, seconds: float) -> None:
        """Learn from a prompt that took *seconds* to its first token."""
        self.prefill = _mean(self.prefill, tokens, seconds)

    def decoded(self, tokens: int, seconds: float) -> None:
        """Learn from *tokens* that came after the first one in *seconds*."""
        self.decode = _mean(self.decode, tokens, seconds)


def _mean(before: float, tokens: int, seconds: float) -> float:
    if tokens < 1 or seconds <= 0:  # says nothing
        return before
    now = tokens / seconds
    return now if before == 0 else before + WEIGHT_OF_NEW * (now - before)


class Traffic:
    """One model's requests; *model* is one load of it.

    It has as many seats as its device computes sequences at a time, or fewer where *limits* say so.
    """

    def __init__(self, model: ModelView, limits: AdmissionConfig) -> None:
        self.model = model
        self.rates = Rates()
        seats = limits.max_in_flight
        if model.limits is not None:
            seats = min(seats, model.limits.max_sequences)
        self.admission = Admission(
            Seats(seats, limits.max_queue_depth, self.room), limits.max_wait_seconds
        )

    def room(self) -> CacheRoom | None:
        """Return what the KV cache has, as the device said last; None before the load."""
        limits, engine = self.model.limits, self.model.engine
        if limits is None:
            return None
        total = limits.kv_cache_tokens
        return CacheRoom(total if engine is None else engine.kv_free_tokens, total)

    def load(self) -> ModelLoad:
        """Return what ``/health`` says of the model."""
        seats, engine, room = self.admission.seats, self.model.engine, self.room()
        budget_mb, available_mb = self._kv_mb()
        return ModelLoad(
            id=self.model.id,
            in_flight=seats.in_flight,
            queue_depth=seats.queue_depth,
            max_in_flight=seats.max_in_flight,
            max_queue_depth=seats.max_queue_depth,
            kv_budget_mb=budget_mb,
            kv_available_mb=available_mb,
            kv_total_tokens=room.total_tokens if room else 0,
            kv_free_tokens=room.free_tokens if room else 0,
            running=engine.running if engine else 0,
            waiting=engine.waiting if engine else 0,
            preemptions=engine.preemptions if engine else 0,
            drafted_tokens=engine.drafted_tokens if engine else 0,
            accepted_tokens=engine.accepted_tokens if engine else 0,
            tok_s_prefill=round(self.rates.prefill, 1),
            tok_s_decode=round(self.rates.decode, 1),
        )

    def _kv_mb(self) -> tuple[int, int]:
        """Return the KV cache's megabytes, on all devices, and those that no sequence holds."""
        kv_bytes, room = sum(held.kv_bytes for held in self.model.footprints), self.room()
        if room is None or not room.total_tokens:
            return 0, 0
        return kv_bytes // MIB, kv_bytes * room.free_tokens // room.total_tokens // MIB


class Traffics:
    """The traffic of every model that is there."""

    def __init__(self, limits: AdmissionConfig) -> None:
        self._limits = limits
        self._all: dict[str, Traffic] = {}
        self._is_closed = False

    def of(self, model: ModelView) -> Traffic:
        """Return the traffic of this load of *model*."""
        known = self._all.get(model.id)
        if known is None or known.model is not model:
            known = self._all[model.id] = Traffic(model, self._limits)
            if self._is_closed:
                known.admission.close()
        return known

    def forget_all_but(self, model_ids: frozenset[str]) -> None:
        """Forget the models that are gone."""
        for gone in self._all.keys() - model_ids:
            del self._all[gone]

    def close(self) -> None:
        """Admit nobody any more; who waits is sent home."""
        self._is_closed = True
        for traffic in self._all.values():
            traffic.admission.close()
